//! The `mem` engine: a disk that is a byte array of this process.
//!
//! For benchmarks of everything above the disk and for tests. Operations are done inside `submit`,
//! so completions are ready at once and nobody is ever woken. The array is a [`MemDisk`] that
//! outlives its engines: dropping an engine and making another one over the same array is a restart
//! of the process on the same disk. Space is taken in chunks when first written; the rest reads as
//! zeros. Cost: one uncontended lock and one copy per chunk touched.

use super::{DiskEngine, EngineCounters, Kind, assert_request, failed};
use crate::wake::Wake;
use proto::buffer::{BufMut, Pool};
use proto::disk::{BufList, DiskDone, DiskError, DiskOp, DiskRequest};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

/// Bytes taken from the heap at a time.
const CHUNK_BYTES: usize = 256 << 10;

type Chunk = Mutex<Option<Box<[u8]>>>;

/// The bytes of a memory disk. Clones share them; so may lanes on several threads.
#[derive(Clone)]
pub struct MemDisk {
    chunks: Arc<[Chunk]>,
    size_bytes: u64,
}

impl MemDisk {
    /// Make a disk of `size_bytes` zeros.
    #[must_use]
    pub fn new(size_bytes: u64) -> MemDisk {
        let count = size_bytes.div_ceil(CHUNK_BYTES as u64);
        MemDisk { chunks: (0..count).map(|_| Mutex::new(None)).collect(), size_bytes }
    }

    /// Size of the disk.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Read into `out`; false if the disk ends before.
    fn read(&self, offset: u64, out: &mut [u8]) -> bool {
        if !self.holds(offset, out.len()) {
            return false;
        }
        let mut done = 0;
        while done < out.len() {
            let (index, start, len) = place(offset + done as u64, out.len() - done);
            let piece = &mut out[done..done + len];
            match &*self.chunks[index].lock().expect("no panic happens under this lock") {
                Some(chunk) => piece.copy_from_slice(&chunk[start..start + len]),
                None => piece.fill(0),
            }
            done += len;
        }
        true
    }

    /// Write `data`; false, and nothing written, if the disk ends before.
    fn write(&self, offset: u64, data: &[u8]) -> bool {
        if !self.holds(offset, data.len()) {
            return false;
        }
        let mut done = 0;
        while done < data.len() {
            let (index, start, len) = place(offset + done as u64, data.len() - done);
            let mut chunk = self.chunks[index].lock().expect("no panic happens under this lock");
            let bytes = chunk.get_or_insert_with(|| vec![0; CHUNK_BYTES].into_boxed_slice());
            bytes[start..start + len].copy_from_slice(&data[done..done + len]);
            done += len;
        }
        true
    }

    fn holds(&self, offset: u64, len: usize) -> bool {
        offset.checked_add(len as u64).is_some_and(|end| end <= self.size_bytes)
    }
}

/// Chunk, position in it, and how many of `left` bytes it holds.
fn place(offset: u64, left: usize) -> (usize, usize, usize) {
    let start = (offset % CHUNK_BYTES as u64) as usize;
    ((offset / CHUNK_BYTES as u64) as usize, start, left.min(CHUNK_BYTES - start))
}

/// One lane's queue on a [`MemDisk`].
pub struct Mem {
    disk: MemDisk,
    pool: Pool,
    queued: Vec<DiskRequest>,
    done: Vec<DiskDone>,
    wake: Wake,
    counters: EngineCounters,
}

impl Mem {
    /// Make an engine over `disk` whose reads take buffers from `pool`.
    pub fn new(disk: MemDisk, pool: Pool) -> io::Result<Mem> {
        Ok(Mem {
            disk,
            pool,
            queued: Vec::new(),
            done: Vec::new(),
            wake: Wake::new()?,
            counters: EngineCounters::default(),
        })
    }

    fn read(&self, offset: u64, len: u32) -> Result<BufMut, DiskError> {
        let mut buf = self.pool.alloc(len as usize);
        if self.disk.read(offset, &mut buf) { Ok(buf) } else { Err(DiskError::Short) }
    }

    fn write(&self, offset: u64, data: &BufList) -> Result<(), DiskError> {
        let mut at = offset;
        for buf in data {
            if !self.disk.write(at, buf) {
                return Err(DiskError::Short);
            }
            at += buf.len() as u64;
        }
        Ok(())
    }
}

impl DiskEngine for Mem {
    fn queue(&mut self, request: DiskRequest) {
        assert_request(&request);
        self.queued.push(request);
    }

    fn submit(&mut self) {
        // Moved out for the loop and put back after it, so that its memory is kept.
        let mut queued = std::mem::take(&mut self.queued);
        for DiskRequest { id, op } in queued.drain(..) {
            let (kind, result) = match op {
                DiskOp::Read { offset, len } => {
                    (Kind::Read, self.read(offset, len).map(|buf| Some(buf.freeze())))
                }
                DiskOp::Write { offset, data } => {
                    let bytes = data.iter().map(|buf| buf.len() as u64).sum();
                    (Kind::Write { bytes }, self.write(offset, &data).map(|()| None))
                }
                DiskOp::Flush => (Kind::Flush, Ok(None)),
            };
            let done = match result {
                Ok(data) => DiskDone { id, result: Ok(data) },
                Err(error) => failed(id, error),
            };
            self.counters.count(kind, &done);
            self.done.push(done);
        }
        self.queued = queued;
    }

    fn reap(&mut self, out: &mut Vec<DiskDone>) {
        out.append(&mut self.done);
    }

    fn arm(&mut self) -> bool {
        self.done.is_empty()
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn in_flight(&self) -> usize {
        self.queued.len() + self.done.len()
    }

    fn counters(&self) -> EngineCounters {
        self.counters
    }

    fn name(&self) -> &'static str {
        "mem"
    }
}
