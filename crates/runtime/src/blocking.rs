//! Disk operations one at a time, by the thread that asks: for formatting, inspecting and recovery,
//! which happen before a lane's reactor exists. Never on the I/O path.

use crate::disk_file::DiskFile;
use crate::engine::{retried, transfer};
use proto::disk::{BufList, DiskError, DiskOp};
use proto::{Buf, Pool};
use rustix::io::{pread, pwrite};

/// Do one operation; a read brings its data.
pub fn execute(disk: &DiskFile, pool: &Pool, op: &DiskOp) -> Result<Option<Buf>, DiskError> {
    match op {
        DiskOp::Read { offset, len } => read(disk, pool, *offset, *len as usize).map(Some),
        DiskOp::Write { offset, data } => write(disk, *offset, data).map(|()| None),
        DiskOp::Flush => retried(|| rustix::fs::fdatasync(disk.fd())).map(|()| None),
    }
}

fn read(disk: &DiskFile, pool: &Pool, offset: u64, len: usize) -> Result<Buf, DiskError> {
    let mut buf = pool.alloc(len);
    transfer(len, |done| pread(disk.fd(), &mut buf[done..], offset + done as u64))?;
    Ok(buf.freeze())
}

fn write(disk: &DiskFile, mut offset: u64, data: &BufList) -> Result<(), DiskError> {
    for buf in data {
        transfer(buf.len(), |done| pwrite(disk.fd(), &buf[done..], offset + done as u64))?;
        offset += buf.len() as u64;
    }
    Ok(())
}
