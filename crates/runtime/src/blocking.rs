//! Disk operations one at a time, by the thread that asks: for formatting, inspecting and recovery,
//! which happen before a lane's reactor exists. Never on the I/O path.

use crate::disk_file::DiskFile;
use proto::disk::{BufList, DiskError, DiskOp};
use proto::{Buf, Pool};
use rustix::io::{Errno, pread, pwrite};

/// Do one operation; a read brings its data.
pub fn execute(disk: &DiskFile, pool: &Pool, op: &DiskOp) -> Result<Option<Buf>, DiskError> {
    match op {
        DiskOp::Read { offset, len } => read(disk, pool, *offset, *len as usize).map(Some),
        DiskOp::Write { offset, data } => write(disk, *offset, data).map(|()| None),
        DiskOp::Flush => rustix::fs::fdatasync(disk.fd()).map_err(error).map(|()| None),
    }
}

fn error(errno: Errno) -> DiskError {
    DiskError::Errno(errno.raw_os_error())
}

fn read(disk: &DiskFile, pool: &Pool, offset: u64, len: usize) -> Result<Buf, DiskError> {
    let mut buf = pool.alloc(len);
    let mut done = 0;
    while done < len {
        match pread(disk.fd(), &mut buf[done..], offset + done as u64) {
            Ok(0) => return Err(DiskError::Short),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(error(errno)),
        }
    }
    Ok(buf.freeze())
}

fn write(disk: &DiskFile, mut offset: u64, data: &BufList) -> Result<(), DiskError> {
    for buf in data {
        let mut done = 0;
        while done < buf.len() {
            match pwrite(disk.fd(), &buf[done..], offset + done as u64) {
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(error(errno)),
            }
        }
        offset += buf.len() as u64;
    }
    Ok(())
}
