//! A disk that can crash: it knows which writes are durable, which are only completed, and which are
//! under way, and leaves after a crash what a power failure could leave.
//!
//! The world decides when an operation completes and whether it fails; the disk decides what is
//! read and what a crash leaves. Pages are handles into the buffers that were written, so nothing is
//! copied; a page that was never written costs nothing.

use crate::random::Random;
use proto::disk::{DiskDone, DiskError, DiskOp, DiskRequest, IoId};
use proto::{BLOCK_BYTES, Buf, Pool};
use std::collections::BTreeMap;

const SECTOR_BYTES: usize = 512;
const BLOCK: u64 = BLOCK_BYTES as u64;
/// The errno of a failed medium.
const EIO: i32 = 5;

#[derive(Clone)]
struct Write {
    ticket: u64,
    first_page: usize,
    pages: Vec<Buf>,
    is_complete: bool,
    /// The flush that makes it durable, once one was begun after its completion.
    covered_by: Option<u64>,
}

/// What becomes of an operation that completes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It is carried out.
    Good,
    /// The device answers with EIO; of a write nothing is on the disk.
    Failed,
    /// One bit of what is read is wrong, this time.
    Flipped,
}

/// What a crash does to writes that are not durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Crash {
    /// The power fails: writes that were completed and not flushed may be lost.
    pub loses_unflushed: bool,
    /// Writes may be torn at sectors.
    pub tears: bool,
}

/// The double.
#[derive(Clone)]
pub struct Disk {
    durable: Vec<Option<Buf>>,
    /// Not durable, in order of submission.
    writes: Vec<Write>,
    waiting: BTreeMap<u64, DiskRequest>,
    next_ticket: u64,
    is_volatile: bool,
    zero: Buf,
    pool: Pool,
}

impl Disk {
    /// An empty disk of `bytes`. `is_volatile`: a completed write is durable only after a flush.
    #[must_use]
    pub fn new(bytes: u64, is_volatile: bool, pool: Pool) -> Disk {
        let pages = usize::try_from(bytes / BLOCK).expect("simulated disks are small");
        Disk {
            durable: vec![None; pages],
            writes: Vec::new(),
            waiting: BTreeMap::new(),
            next_ticket: 0,
            is_volatile,
            zero: pool.zeroed(BLOCK_BYTES).freeze(),
            pool,
        }
    }

    /// Put bytes on the disk for good.
    pub fn poke(&mut self, offset: u64, bytes: &[u8]) {
        for (index, chunk) in bytes.chunks(BLOCK_BYTES).enumerate() {
            let mut page = self.pool.zeroed(BLOCK_BYTES);
            page[..chunk.len()].copy_from_slice(chunk);
            self.durable[page_of(offset) + index] = Some(page.freeze());
        }
    }

    /// Damage a page for good: one bit is wrong from now on. False: it is being written.
    pub fn rot(&mut self, offset: u64, random: &mut Random) -> bool {
        let page = page_of(offset);
        let covers = |write: &Write| {
            (write.first_page..write.first_page + write.pages.len()).contains(&page)
        };
        if self.writes.iter().any(covers) {
            return false;
        }
        let good = self.page(page).clone();
        self.durable[page] = Some(self.flip(&good, random));
        true
    }

    /// Take a request; it completes when `complete` names its ticket.
    pub fn submit(&mut self, request: DiskRequest) -> u64 {
        self.next_ticket += 1;
        let ticket = self.next_ticket;
        match &request.op {
            DiskOp::Write { offset, data } => {
                let blocks = data.iter().flat_map(|buf| {
                    assert!(buf.len().is_multiple_of(BLOCK_BYTES), "whole blocks only");
                    (0..buf.len() / BLOCK_BYTES).map(|index| buf.block(index))
                });
                self.writes.push(Write {
                    ticket,
                    first_page: page_of(*offset),
                    pages: blocks.collect(),
                    is_complete: false,
                    covered_by: None,
                });
            }
            DiskOp::Flush => {
                for write in &mut self.writes {
                    if write.is_complete && write.covered_by.is_none() {
                        write.covered_by = Some(ticket);
                    }
                }
            }
            DiskOp::Read { .. } => {}
        }
        self.waiting.insert(ticket, request);
        ticket
    }

    /// Operations that have not completed.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.waiting.len()
    }

    /// Their tickets, in order of submission.
    pub fn tickets(&self) -> impl Iterator<Item = u64> + '_ {
        self.waiting.keys().copied()
    }

    /// Whether this operation is a write, if it is outstanding.
    #[must_use]
    pub fn is_write(&self, ticket: u64) -> Option<bool> {
        let request = self.waiting.get(&ticket)?;
        Some(matches!(request.op, DiskOp::Write { .. }))
    }

    /// What the lane calls this operation, if it is outstanding.
    #[must_use]
    pub fn id(&self, ticket: u64) -> Option<IoId> {
        self.waiting.get(&ticket).map(|request| request.id)
    }

    /// Whether this operation is a read, if it is outstanding.
    #[must_use]
    pub fn is_read(&self, ticket: u64) -> Option<bool> {
        let request = self.waiting.get(&ticket)?;
        Some(matches!(request.op, DiskOp::Read { .. }))
    }

    /// Complete an operation; `None` if a crash has ended it.
    pub fn complete(&mut self, ticket: u64, fate: Fate, random: &mut Random) -> Option<DiskDone> {
        let DiskRequest { id, op } = self.waiting.remove(&ticket)?;
        let failed = Err(DiskError::Errno(EIO));
        let result = match op {
            DiskOp::Read { .. } if fate == Fate::Failed => failed,
            DiskOp::Read { offset, len } => {
                let bytes = self.read(offset, len);
                Ok(Some(if fate == Fate::Flipped { self.flip(&bytes, random) } else { bytes }))
            }
            DiskOp::Write { .. } => {
                self.finish_write(ticket, fate == Fate::Failed);
                if fate == Fate::Failed { failed } else { Ok(None) }
            }
            DiskOp::Flush => {
                self.land(|write| write.covered_by.is_some_and(|flush| flush <= ticket));
                Ok(None)
            }
        };
        Some(DiskDone { id, result })
    }

    fn flip(&self, bytes: &Buf, random: &mut Random) -> Buf {
        let mut flipped = self.pool.copy_of(bytes);
        let at = random.below(flipped.len() as u64) as usize;
        flipped[at] ^= 1 << random.below(8);
        flipped.freeze()
    }

    fn finish_write(&mut self, ticket: u64, failed: bool) {
        let write = self.writes.iter_mut().find(|write| write.ticket == ticket);
        let write = write.expect("an outstanding write");
        write.is_complete = true;
        if failed {
            write.pages.clear();
        }
        if !self.is_volatile {
            self.land(|write| write.is_complete);
        }
    }

    fn land(&mut self, is_chosen: impl Fn(&Write) -> bool) {
        let durable = &mut self.durable;
        self.writes.retain(|write| {
            let lands = is_chosen(write);
            if lands {
                for (index, page) in write.pages.iter().enumerate() {
                    durable[write.first_page + index] = Some(page.clone());
                }
            }
            !lands
        });
    }

    /// What a read returns now: durable and completed writes.
    #[must_use]
    pub fn read(&self, offset: u64, len: u32) -> Buf {
        let (first, count) = (page_of(offset), len as usize / BLOCK_BYTES);
        if count == 1 {
            return self.page(first).clone();
        }
        let mut buf = self.pool.alloc(len as usize);
        for (index, chunk) in buf.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            chunk.copy_from_slice(self.page(first + index));
        }
        buf.freeze()
    }

    fn page(&self, page: usize) -> &Buf {
        let cached = self.writes.iter().rev().filter(|write| write.is_complete).find_map(|write| {
            page.checked_sub(write.first_page).and_then(|index| write.pages.get(index))
        });
        cached.or(self.durable[page].as_ref()).unwrap_or(&self.zero)
    }

    /// The process, and perhaps the machine, fails. Every page of every write that is not durable
    /// meets its own fate; nothing is outstanding afterwards.
    pub fn crash(&mut self, crash: Crash, random: &mut Random) -> CrashReport {
        let mut report = CrashReport::default();
        self.waiting.clear();
        for write in std::mem::take(&mut self.writes) {
            let survives = write.is_complete && !crash.loses_unflushed;
            // Half of the writes are lost or there as a whole: more like a queue that was cut.
            let as_one = random.below(2) == 0;
            let choice = random.number();
            for (index, page) in write.pages.iter().enumerate() {
                let bits = if as_one { choice } else { random.number() };
                let place = write.first_page + index;
                if survives || bits & 3 == 0 {
                    self.durable[place] = Some(page.clone());
                } else if bits & 3 == 1 && crash.tears {
                    self.tear(place, page, random.number());
                    report.torn += 1;
                } else if bits & 3 == 1 {
                    self.durable[place] = Some(page.clone());
                } else {
                    report.lost += u64::from(write.is_complete);
                }
            }
        }
        report
    }

    fn tear(&mut self, place: usize, page: &Buf, bits: u64) {
        let mut torn = self.pool.copy_of(self.durable[place].as_ref().unwrap_or(&self.zero));
        for sector in 0..BLOCK_BYTES / SECTOR_BYTES {
            if bits >> sector & 1 == 1 {
                let range = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
                torn[range.clone()].copy_from_slice(&page[range]);
            }
        }
        self.durable[place] = Some(torn.freeze());
    }
}

/// What a crash has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CrashReport {
    /// Pages of completed writes that are gone.
    pub lost: u64,
    /// Pages that are a mixture.
    pub torn: u64,
}

fn page_of(offset: u64) -> usize {
    assert!(offset.is_multiple_of(BLOCK), "whole blocks only");
    usize::try_from(offset / BLOCK).expect("simulated disks are small")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::disk::IoId;

    fn disk(is_volatile: bool) -> (Disk, Random, Pool) {
        let pool = Pool::new(1 << 20);
        (Disk::new(64 * BLOCK, is_volatile, pool.clone()), Random::new(3), pool)
    }

    fn write(disk: &mut Disk, pool: &Pool, page: u64, value: u8) -> u64 {
        let mut buf = pool.alloc(BLOCK_BYTES);
        buf.fill(value);
        let data = proto::block::single(buf.freeze());
        disk.submit(DiskRequest { id: IoId(9), op: DiskOp::Write { offset: page * BLOCK, data } })
    }

    const KILLED: Crash = Crash { loses_unflushed: false, tears: false };
    const POWER: Crash = Crash { loses_unflushed: true, tears: false };

    #[test]
    fn a_flush_covers_what_completed_before_it_and_nothing_else() {
        let mut survived = [0; 2];
        for seed in 0..64 {
            let (mut disk, _, pool) = disk(true);
            let mut random = Random::new(seed);
            let first = write(&mut disk, &pool, 1, 1);
            disk.complete(first, Fate::Good, &mut random).expect("it is outstanding");
            let second = write(&mut disk, &pool, 2, 2);
            let flush = disk.submit(DiskRequest { id: IoId(1), op: DiskOp::Flush });
            disk.complete(second, Fate::Good, &mut random).expect("it is outstanding");
            disk.complete(flush, Fate::Good, &mut random).expect("it is outstanding");
            assert_eq!(disk.read(2 * BLOCK, 4096)[0], 2, "completed writes are read");
            disk.crash(POWER, &mut random);
            for page in [1, 2] {
                survived[page - 1] += u32::from(disk.read(page as u64 * BLOCK, 4096)[0] != 0);
            }
        }
        assert_eq!(survived[0], 64, "flushed");
        assert!((1..64).contains(&survived[1]), "not flushed: {} of 64 survived", survived[1]);
    }

    #[test]
    fn a_killed_process_loses_nothing_that_was_completed() {
        let (mut disk, mut random, pool) = disk(true);
        let ticket = write(&mut disk, &pool, 5, 7);
        disk.complete(ticket, Fate::Good, &mut random).expect("it is outstanding");
        assert_eq!(disk.crash(KILLED, &mut random), CrashReport::default());
        assert_eq!(disk.read(5 * BLOCK, 4096)[17], 7);
    }

    #[test]
    fn torn_pages_mix_sectors_of_both_contents() {
        let mut torn = 0;
        for seed in 0..64 {
            let (mut disk, _, pool) = disk(false);
            let mut random = Random::new(seed);
            let old = write(&mut disk, &pool, 3, 1);
            disk.complete(old, Fate::Good, &mut random).expect("it is outstanding");
            write(&mut disk, &pool, 3, 2);
            torn += disk.crash(Crash { loses_unflushed: true, tears: true }, &mut random).torn;
            let page = disk.read(3 * BLOCK, 4096);
            for sector in page.chunks(SECTOR_BYTES) {
                assert!(sector.iter().all(|&byte| byte == sector[0]), "sectors are atomic");
            }
        }
        assert!(torn > 5, "{torn} of 64 were torn");
    }

    #[test]
    fn rot_stays_until_the_page_is_written() {
        let (mut disk, mut random, pool) = disk(false);
        let ticket = write(&mut disk, &pool, 4, 0);
        assert!(!disk.rot(4 * BLOCK, &mut random), "it is being written");
        disk.complete(ticket, Fate::Good, &mut random).expect("it is outstanding");
        assert!(disk.rot(4 * BLOCK, &mut random));
        let bits = |disk: &Disk| -> u32 {
            disk.read(4 * BLOCK, 4096).iter().map(|byte| byte.count_ones()).sum()
        };
        assert_eq!((bits(&disk), bits(&disk)), (1, 1), "each time");
        let ticket = write(&mut disk, &pool, 4, 0);
        disk.complete(ticket, Fate::Good, &mut random).expect("it is outstanding");
        assert_eq!(bits(&disk), 0);
    }

    #[test]
    fn failures_are_answered_and_leave_no_trace() {
        let (mut disk, mut random, pool) = disk(false);
        let ticket = write(&mut disk, &pool, 4, 9);
        let done = disk.complete(ticket, Fate::Failed, &mut random).expect("it is outstanding");
        assert_eq!(done.result.expect_err("EIO"), DiskError::Errno(EIO));
        assert_eq!(disk.read(4 * BLOCK, 4096)[0], 0);
        let op = DiskOp::Read { offset: 4 * BLOCK, len: 8192 };
        let ticket = disk.submit(DiskRequest { id: IoId(2), op });
        let done = disk.complete(ticket, Fate::Flipped, &mut random).expect("it is outstanding");
        let bytes = done.result.expect("a read").expect("with data");
        assert_eq!(bytes.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1, "one bit");
        assert!(disk.complete(ticket, Fate::Good, &mut random).is_none(), "once");
    }
}
