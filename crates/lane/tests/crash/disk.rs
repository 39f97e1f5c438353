//! A disk that can crash: it knows which writes are durable, which are only completed, and which
//! are in flight, and makes the states that a power failure could leave.

use crate::random::Random;
use proto::disk::{DiskDone, DiskOp, DiskRequest, IoId};
use proto::{BLOCK_BYTES, Buf, Pool};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

const SLOT_BYTES: u64 = lane::format::SLOT_BYTES;
const SECTOR_BYTES: usize = 512;
type Page = Rc<[u8; BLOCK_BYTES]>;

#[derive(Clone)]
struct Write {
    offset: u64,
    pages: Vec<Page>,
    completed: bool,
    /// Number of the flush request that would make it durable, once issued.
    covered_by: Option<u64>,
}

/// What a crash does to one write that is not durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// Nothing of it is on the disk.
    Lost,
    /// All of it.
    Landed,
    /// Some sectors (or whole blocks, on a device with atomic blocks), chosen by this number.
    Torn(u64),
}

/// The double.
#[derive(Clone)]
pub struct Disk {
    durable: BTreeMap<u64, Page>,
    /// Not durable, in order of submission.
    writes: Vec<(IoId, Write)>,
    waiting: Vec<DiskRequest>,
    volatile: bool,
    atomic_blocks: bool,
    pool: Pool,
    zero: Page,
    flushes: u64,
    /// Fail the operation with this countdown (0 = the next write).
    pub fail_write_in: Option<u32>,
    /// The same, counting only writes to slots.
    pub fail_slot_write_in: Option<u32>,
    /// Slots that take no write, by number.
    pub bad: BTreeSet<u64>,
    /// Byte where the slots begin.
    pub slots_from: u64,
    /// A write was failed since the last crash.
    pub has_failed: bool,
}

impl Disk {
    pub fn new(volatile: bool, atomic_blocks: bool, pool: Pool) -> Disk {
        Disk {
            durable: BTreeMap::new(),
            writes: Vec::new(),
            waiting: Vec::new(),
            volatile,
            atomic_blocks,
            pool,
            zero: Rc::new([0; BLOCK_BYTES]),
            flushes: 0,
            fail_write_in: None,
            fail_slot_write_in: None,
            bad: BTreeSet::new(),
            slots_from: 0,
            has_failed: false,
        }
    }

    /// Put bytes on the disk for good.
    pub fn poke(&mut self, offset: u64, bytes: &[u8]) {
        for (index, chunk) in bytes.chunks(BLOCK_BYTES).enumerate() {
            let mut page = [0; BLOCK_BYTES];
            page[..chunk.len()].copy_from_slice(chunk);
            self.durable.insert(offset + (index * BLOCK_BYTES) as u64, Rc::new(page));
        }
    }

    /// Offsets of the pages that were ever written.
    pub fn used_pages(&self) -> Vec<u64> {
        self.durable.keys().copied().collect()
    }

    /// Flip one bit for good.
    pub fn rot(&mut self, offset: u64) {
        let at = offset / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
        let mut page = **self.durable.get(&at).unwrap_or(&self.zero);
        page[(offset - at) as usize] ^= 0x10;
        self.durable.insert(at, Rc::new(page));
    }

    /// Take a request; it completes when `complete` chooses it.
    pub fn submit(&mut self, request: DiskRequest) {
        match &request.op {
            DiskOp::Write { offset, data } => {
                let pages = data
                    .iter()
                    .flat_map(|buf| buf.chunks_exact(BLOCK_BYTES).map(to_page).collect::<Vec<_>>())
                    .collect();
                let write = Write { offset: *offset, pages, completed: false, covered_by: None };
                self.writes.push((request.id, write));
            }
            DiskOp::Flush => {
                self.flushes += 1;
                let flush = self.flushes;
                for (_, write) in &mut self.writes {
                    if write.completed && write.covered_by.is_none() {
                        write.covered_by = Some(flush);
                    }
                }
                let id = IoId(request.id.0 | flush << 32);
                self.waiting.push(DiskRequest { id, op: DiskOp::Flush });
                return;
            }
            DiskOp::Read { .. } => {}
        }
        self.waiting.push(request);
    }

    pub fn outstanding(&self) -> usize {
        self.waiting.len()
    }

    /// Complete outstanding request number `index`.
    pub fn complete(&mut self, index: usize) -> DiskDone {
        let request = self.waiting.remove(index);
        let result = match request.op {
            DiskOp::Read { offset, len } => Ok(Some(self.read(offset, len))),
            DiskOp::Write { .. } => {
                let fails = self.fails(request.id);
                self.has_failed |= fails;
                self.write_completed(request.id, fails);
                if fails { Err(proto::disk::DiskError::Errno(5)) } else { Ok(None) }
            }
            DiskOp::Flush => {
                let flush = request.id.0 >> 32;
                let id = IoId(request.id.0 & 0xffff_ffff);
                self.land(|_, write| write.covered_by.is_some_and(|by| by <= flush));
                return DiskDone { id, result: Ok(None) };
            }
        };
        DiskDone { id: request.id, result }
    }

    /// Whether an outstanding write fails, now that it is its turn.
    fn fails(&mut self, id: IoId) -> bool {
        let is_it = |(other, write): &&(IoId, Write)| *other == id && !write.completed;
        let (_, write) = self.writes.iter().find(is_it).expect("an outstanding write");
        let mut pages = (0..write.pages.len() as u64).map(|page| page * BLOCK_BYTES as u64);
        let is_bad =
            |at: u64| self.slot_of(write.offset + at).is_some_and(|s| self.bad.contains(&s));
        let mut fails = self.fail_write_in == Some(0) || pages.any(is_bad);
        if self.slot_of(write.offset).is_some() {
            fails |= self.fail_slot_write_in == Some(0);
            self.fail_slot_write_in = self.fail_slot_write_in.and_then(|left| left.checked_sub(1));
        }
        self.fail_write_in = self.fail_write_in.and_then(|left| left.checked_sub(1));
        fails
    }

    fn slot_of(&self, offset: u64) -> Option<u64> {
        Some(offset.checked_sub(self.slots_from)? / SLOT_BYTES)
    }

    fn write_completed(&mut self, id: IoId, failed: bool) {
        // An id may be reused while an older, completed write of that id awaits its flush.
        let entry = self
            .writes
            .iter_mut()
            .find(|(other, write)| *other == id && !write.completed)
            .expect("an outstanding write");
        entry.1.completed = true;
        if failed {
            entry.1.pages.clear();
        }
        if !self.volatile {
            self.land(|_, write| write.completed);
        }
    }

    fn land(&mut self, choose: impl Fn(&IoId, &Write) -> bool) {
        let (landed, kept): (Vec<_>, Vec<_>) =
            self.writes.drain(..).partition(|(id, write)| choose(id, write));
        self.writes = kept;
        for (_, write) in landed {
            for (index, page) in write.pages.into_iter().enumerate() {
                self.durable.insert(write.offset + (index * BLOCK_BYTES) as u64, page);
            }
        }
    }

    /// What a read returns now: durable and completed writes.
    pub fn read(&self, offset: u64, len: u32) -> Buf {
        let mut buf = self.pool.zeroed(len as usize);
        for (index, chunk) in buf.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            let at = offset + (index * BLOCK_BYTES) as u64;
            let cached = self.writes.iter().rev().find_map(|(_, write)| {
                let page = at.checked_sub(write.offset)? as usize / BLOCK_BYTES;
                write.pages.get(page).filter(|_| write.completed)
            });
            let page = cached.or_else(|| self.durable.get(&at)).unwrap_or(&self.zero);
            chunk.copy_from_slice(&page[..]);
        }
        buf.freeze()
    }

    /// Number of writes whose fate a crash decides.
    pub fn undecided(&self) -> usize {
        self.writes.len()
    }

    /// The disk after a crash with these fates; nothing is outstanding any more.
    pub fn crashed(&self, fates: &[Fate]) -> Disk {
        let mut disk = self.clone();
        disk.waiting.clear();
        (disk.fail_write_in, disk.fail_slot_write_in, disk.has_failed) = (None, None, false);
        for ((_, write), fate) in std::mem::take(&mut disk.writes).into_iter().zip(fates) {
            for (index, page) in write.pages.iter().enumerate() {
                let at = write.offset + (index * BLOCK_BYTES) as u64;
                match fate {
                    Fate::Lost => {}
                    Fate::Landed => {
                        disk.durable.insert(at, Rc::clone(page));
                    }
                    Fate::Torn(choice) => disk.tear(at, page, *choice ^ index as u64),
                }
            }
        }
        disk
    }

    fn tear(&mut self, at: u64, page: &Page, choice: u64) {
        let bits = Random::new(choice).next();
        if self.atomic_blocks {
            if bits & 1 == 1 {
                self.durable.insert(at, Rc::clone(page));
            }
            return;
        }
        let mut torn = **self.durable.get(&at).unwrap_or(&self.zero);
        for sector in 0..BLOCK_BYTES / SECTOR_BYTES {
            if bits >> sector & 1 == 1 {
                let range = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
                torn[range.clone()].copy_from_slice(&page[range]);
            }
        }
        self.durable.insert(at, Rc::new(torn));
    }
}

fn to_page(bytes: &[u8]) -> Page {
    Rc::new(bytes.try_into().expect("a whole block"))
}
