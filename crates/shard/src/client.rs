//! What a client may ask of a shard, and how a request becomes lane operations over whole blocks.
//!
//! Ranges of 512-byte sectors become steps: whole blocks are read, written or discarded, a partial
//! block is read, verified, merged and written, which is the one place where the client's CRC ends.
//! Pure planning: what a step needs (a lock, an lsn, a lease, replicas) is the serving machine's.

use lane::{Problem, lane::REQUEST_BLOCKS_MAX};
use proto::disk::BufList;
use proto::{BLOCK_BYTES, Buf, Epoch, Pool, Seq, Status, checksum};
use smallvec::SmallVec;
use std::collections::VecDeque;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// What a client asks; offsets are bytes of the shard, multiples of 512, lengths not zero.
#[derive(Clone, Debug)]
pub enum ClientOp {
    /// Read a range.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Write a range whose data have passed their CRCs.
    Write {
        /// First byte.
        offset: u64,
        /// Plain CRC32C of every started block's piece.
        crcs: SmallVec<[u32; 4]>,
        /// The data.
        data: BufList,
    },
    /// Make a range read as zeros (DISCARD and WRITE_ZEROES).
    Zero {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// A barrier over completed writes: every write that was acknowledged is on stable media, so
    /// there is nothing to wait for.
    Flush,
}

/// A request with what rides in its header.
#[derive(Clone, Debug)]
pub struct ClientRequest {
    /// Comes back with the reply.
    pub token: u64,
    /// As the client knows it.
    pub epoch: Epoch,
    /// As the client knows it.
    pub attach_epoch: u64,
    /// What to do.
    pub op: ClientOp,
}

/// What a successful request brought.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Durable, with the seq of its last operation (0: it needed none).
    Done(Seq),
    /// The data of a read.
    Read {
        /// Plain CRC32C of every started block's piece.
        crcs: SmallVec<[u32; 4]>,
        /// The bytes asked for.
        data: BufList,
    },
}

/// One step of a request over whole blocks, in order.
#[derive(Debug)]
pub(crate) enum Step {
    Read {
        first: u32,
        count: u32,
    },
    Write {
        first: u32,
        crcs: SmallVec<[u32; 4]>,
        data: BufList,
    },
    Discard {
        first: u32,
        count: u32,
    },
    /// Read the block, replace bytes from `at`, write it.
    Merge {
        block: u32,
        at: usize,
        bytes: Vec<u8>,
    },
}

/// A request on its way through its steps.
#[derive(Debug)]
pub(crate) struct Task {
    /// The client's; `None` for what the machine does by itself.
    pub(crate) token: Option<u64>,
    /// Highest seq of its operations so far.
    pub(crate) last_seq: Seq,
    /// Of a read: first byte in its first block, and length.
    slice: Option<(usize, usize)>,
    /// Of a read: what its steps have brought.
    found: (BufList, SmallVec<[u32; 4]>),
    steps: VecDeque<Step>,
    /// The merge that waits for its block.
    merging: Option<(u32, usize, Vec<u8>)>,
    /// Of `heal`: the block.
    block: Option<u32>,
}

/// What became of a step that read.
#[derive(Debug)]
pub(crate) enum Found {
    /// There are more steps.
    More,
    /// A merged block is to be written.
    Write { first: u32, crcs: SmallVec<[u32; 4]>, data: BufList },
    /// The read is complete.
    Complete(Answer),
}

impl ClientOp {
    /// First byte and length; a flush has none.
    pub(crate) fn range(&self) -> Option<(u64, u64)> {
        match self {
            ClientOp::Read { offset, length } | ClientOp::Zero { offset, length } => {
                Some((*offset, u64::from(*length)))
            }
            ClientOp::Write { offset, data, .. } => {
                Some((*offset, data.iter().map(|buf| buf.len() as u64).sum()))
            }
            ClientOp::Flush => None,
        }
    }

    /// Whether it lies inside a shard of so many blocks.
    pub(crate) fn fits(&self, blocks: u32) -> bool {
        self.range().is_none_or(|(offset, length)| {
            let end = offset.checked_add(length);
            length > 0 && end.is_some_and(|end| end <= u64::from(blocks) * BLOCK)
        })
    }

    /// Whether it changes content.
    pub(crate) fn is_change(&self) -> bool {
        matches!(self, ClientOp::Write { .. } | ClientOp::Zero { .. })
    }
}

impl Task {
    /// Turn a checked request into steps, with the blocks to lock and whether exclusively; `None`
    /// needs no step.
    #[allow(clippy::type_complexity, reason = "what a table of tasks and a lock take, once")]
    pub(crate) fn plan(
        request: ClientRequest,
        pool: &Pool,
    ) -> Option<(Task, std::ops::Range<u32>, bool)> {
        let mut steps = VecDeque::new();
        let mut slice = None;
        let (blocks, exclusive) = match request.op {
            ClientOp::Flush => return None,
            ClientOp::Read { offset, length } => {
                let blocks = covering(offset, u64::from(length));
                slice = Some(((offset % BLOCK) as usize, length as usize));
                // A fragment at each end can make one block more than a lane reads at once.
                let (mut first, end) = (blocks.start, blocks.end);
                while first < end {
                    let count = (end - first).min(REQUEST_BLOCKS_MAX);
                    steps.push_back(Step::Read { first, count });
                    first += count;
                }
                (blocks, false)
            }
            ClientOp::Write { offset, crcs, data } => {
                let length: u64 = data.iter().map(|buf| buf.len() as u64).sum();
                let blocks = covering(offset, length);
                if offset.is_multiple_of(BLOCK) && length.is_multiple_of(BLOCK) {
                    steps.push_back(Step::Write { first: blocks.start, crcs, data });
                } else {
                    plan_fragments(offset, &data, pool, &mut steps);
                }
                (blocks, true)
            }
            ClientOp::Zero { offset, length } => {
                let blocks = covering(offset, u64::from(length));
                plan_zero(offset, u64::from(length), &mut steps);
                (blocks, true)
            }
        };
        let task = Task {
            token: Some(request.token),
            last_seq: Seq(0),
            slice,
            found: Default::default(),
            steps,
            merging: None,
            block: None,
        };
        Some((task, blocks, exclusive))
    }

    /// Read a block and write it again: its copy here is damaged, and a read gets it from elsewhere.
    pub(crate) fn heal(block: u32) -> Task {
        Task {
            token: None,
            last_seq: Seq(0),
            slice: None,
            found: Default::default(),
            steps: VecDeque::from([Step::Merge { block, at: 0, bytes: Vec::new() }]),
            merging: None,
            block: Some(block),
        }
    }

    /// The block that a task of `heal` is for.
    pub(crate) fn healed(&self) -> u32 {
        self.block.expect("made by `heal`")
    }

    /// Whether the read under way is the first half of a merge.
    pub(crate) fn is_merging(&self) -> bool {
        self.merging.is_some()
    }

    /// The next step; a merge comes as the read that it begins with.
    pub(crate) fn next(&mut self) -> Option<Step> {
        Some(match self.steps.pop_front()? {
            Step::Merge { block, at, bytes } => {
                self.merging = Some((block, at, bytes));
                Step::Read { first: block, count: 1 }
            }
            step @ (Step::Read { .. } | Step::Write { .. } | Step::Discard { .. }) => step,
        })
    }

    /// A step has read these blocks.
    pub(crate) fn read_done(
        &mut self,
        data: BufList,
        crcs: SmallVec<[u32; 4]>,
        pool: &Pool,
    ) -> Found {
        if let Some((first, at, bytes)) = self.merging.take() {
            let mut merged = pool.copy_of(&data[0][..BLOCK_BYTES]);
            merged[at..at + bytes.len()].copy_from_slice(&bytes);
            let merged = merged.freeze();
            let crcs = SmallVec::from_slice(&[checksum::crc32c(&merged)]);
            return Found::Write { first, crcs, data: proto::block::single(merged) };
        }
        self.found.0.extend(data);
        self.found.1.extend(crcs);
        if !self.steps.is_empty() {
            return Found::More;
        }
        let (data, crcs) = std::mem::take(&mut self.found);
        Found::Complete(cut(data, crcs, self.slice.expect("a read")))
    }
}

/// A write with partial blocks: merge the ends, write what lies between from a fresh buffer,
/// because the whole blocks do not lie aligned in the one received.
fn plan_fragments(offset: u64, data: &BufList, pool: &Pool, steps: &mut VecDeque<Step>) {
    let bytes: Vec<u8> = data.iter().flat_map(|buf| buf.iter().copied()).collect();
    let mut at = 0;
    while at < bytes.len() {
        let place = offset + at as u64;
        let (block, in_block) = ((place / BLOCK) as u32, (place % BLOCK) as usize);
        let here = (BLOCK_BYTES - in_block).min(bytes.len() - at);
        if here < BLOCK_BYTES {
            let bytes = bytes[at..at + here].to_vec();
            steps.push_back(Step::Merge { block, at: in_block, bytes });
            at += here;
        } else {
            let whole = (bytes.len() - at) / BLOCK_BYTES * BLOCK_BYTES;
            let copy = pool.copy_of(&bytes[at..at + whole]).freeze();
            let mut list = Vec::new();
            checksum::crc32c_blocks(&copy, &mut list);
            let (crcs, data) = (SmallVec::from_vec(list), proto::block::single(copy));
            steps.push_back(Step::Write { first: block, crcs, data });
            at += whole;
        }
    }
}

/// The status that a client sees for a lane's problem.
#[must_use]
pub fn status_of(problem: &Problem) -> Status {
    match problem {
        Problem::NoSpace { .. } => Status::NoSpace,
        Problem::OutOfRange { .. } => Status::OutOfRange,
        Problem::NotFound { .. } => Status::NotFound,
        Problem::AlreadyExists { .. } => Status::AlreadyExists,
        Problem::Limit { .. } => Status::Limit,
        Problem::Media { .. } | Problem::Poisoned { .. } => Status::MediaError,
        Problem::BadChecksum { .. } => Status::BadChecksum,
        Problem::Stopped { .. } => Status::DiskFailed,
    }
}

fn covering(offset: u64, length: u64) -> std::ops::Range<u32> {
    (offset / BLOCK) as u32..(offset + length).div_ceil(BLOCK) as u32
}

/// Zeros over a range: whole blocks are discarded, partial ones merged.
fn plan_zero(offset: u64, length: u64, steps: &mut VecDeque<Step>) {
    let end = offset + length;
    let (whole_start, whole_end) = (offset.next_multiple_of(BLOCK), end / BLOCK * BLOCK);
    let merge = |from: u64, to: u64| Step::Merge {
        block: (from / BLOCK) as u32,
        at: (from % BLOCK) as usize,
        bytes: vec![0; (to - from) as usize],
    };
    if whole_start > whole_end {
        steps.push_back(merge(offset, end));
        return;
    }
    if offset < whole_start {
        steps.push_back(merge(offset, whole_start));
    }
    if whole_start < whole_end {
        let (first, count) = (whole_start / BLOCK, (whole_end - whole_start) / BLOCK);
        steps.push_back(Step::Discard { first: first as u32, count: count as u32 });
    }
    if whole_end < end {
        steps.push_back(merge(whole_end, end));
    }
}

/// The bytes that a read asked for, of the whole blocks that were read and verified.
fn cut(data: BufList, crcs: SmallVec<[u32; 4]>, (skip, length): (usize, usize)) -> Answer {
    if skip == 0 && length.is_multiple_of(BLOCK_BYTES) {
        return Answer::Read { crcs, data };
    }
    let mut pieces = BufList::new();
    let (mut skip_left, mut left) = (skip, length);
    for buf in data {
        let from = skip_left.min(buf.len());
        skip_left -= from;
        let to = (from + left).min(buf.len());
        if from < to {
            left -= to - from;
            pieces.push(buf.slice(from..to));
        }
    }
    Answer::Read { crcs: piece_crcs(skip, &pieces), data: pieces }
}

/// CRC32C of every started block's piece, for data that begin `skip` bytes into a block.
fn piece_crcs(skip: usize, data: &[Buf]) -> SmallVec<[u32; 4]> {
    let mut crcs: SmallVec<[u32; 4]> = SmallVec::new();
    let mut in_block = skip;
    let mut is_new = true;
    for buf in data {
        let mut rest: &[u8] = buf;
        while !rest.is_empty() {
            let (here, after) = rest.split_at(rest.len().min(BLOCK_BYTES - in_block));
            match crcs.last_mut().filter(|_| !is_new) {
                Some(crc) => *crc = checksum::crc32c_append(*crc, here),
                None => crcs.push(checksum::crc32c(here)),
            }
            in_block = (in_block + here.len()) % BLOCK_BYTES;
            is_new = in_block == 0;
            rest = after;
        }
    }
    crcs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const BLOCKS: u32 = 16;

    /// Carry out every step of a request at once on blocks in memory, checking every CRC.
    fn run(blocks: &mut BTreeMap<u32, Vec<u8>>, pool: &Pool, op: ClientOp) -> Answer {
        let request = ClientRequest { token: 9, epoch: Epoch(1), attach_epoch: 1, op };
        let Some((mut task, _, _)) = Task::plan(request, pool) else { return Answer::Done(Seq(0)) };
        let write =
            |blocks: &mut BTreeMap<u32, Vec<u8>>, first: u32, crcs: &[u32], data: BufList| {
                let bytes: Vec<u8> = data.iter().flat_map(|buf| buf.to_vec()).collect();
                for (index, chunk) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
                    assert_eq!(checksum::crc32c(chunk), crcs[index]);
                    blocks.insert(first + index as u32, chunk.to_vec());
                }
            };
        while let Some(step) = task.next() {
            match step {
                Step::Read { first, count } => {
                    let zero = vec![0; BLOCK_BYTES];
                    let content = |block: u32| blocks.get(&block).unwrap_or(&zero).clone();
                    let bytes: Vec<u8> = (first..first + count).flat_map(content).collect();
                    let mut crcs = Vec::new();
                    checksum::crc32c_blocks(&bytes, &mut crcs);
                    let data = proto::block::single(pool.copy_of(&bytes).freeze());
                    match task.read_done(data, SmallVec::from_vec(crcs), pool) {
                        Found::More => {}
                        Found::Write { first, crcs, data } => write(blocks, first, &crcs, data),
                        Found::Complete(answer) => return answer,
                    }
                }
                Step::Write { first, crcs, data } => write(blocks, first, &crcs, data),
                Step::Discard { first, count } => {
                    (first..first + count).for_each(|block| drop(blocks.remove(&block)));
                }
                Step::Merge { .. } => panic!("comes as the read that it begins with"),
            }
        }
        Answer::Done(Seq(0))
    }

    proptest! {
        #[test]
        fn sectors_agree_with_a_plain_array(
            ops in prop::collection::vec((0u8..3, 0u64..128, 1u64..40, any::<u8>()), 1..30)
        ) {
            let (mut blocks, pool) = (BTreeMap::new(), Pool::new(1 << 20));
            let mut oracle = vec![0u8; BLOCKS as usize * BLOCK_BYTES];
            for (kind, sector, sectors, fill) in ops {
                let (offset, length) = (sector * 512, sectors.min(128 - sector) * 512);
                let range = offset as usize..(offset + length) as usize;
                match kind {
                    0 => {
                        let buf = pool.copy_of(&vec![fill; length as usize]).freeze();
                        let crcs = piece_crcs((offset % BLOCK) as usize, std::slice::from_ref(&buf));
                        let data = proto::block::single(buf);
                        run(&mut blocks, &pool, ClientOp::Write { offset, crcs, data });
                        oracle[range].fill(fill);
                    }
                    1 => {
                        let op = ClientOp::Zero { offset, length: length as u32 };
                        run(&mut blocks, &pool, op);
                        oracle[range].fill(0);
                    }
                    _ => {
                        let op = ClientOp::Read { offset, length: length as u32 };
                        let Answer::Read { crcs, data } = run(&mut blocks, &pool, op)
                        else { panic!("a read brings data") };
                        let bytes: Vec<u8> = data.iter().flat_map(|buf| buf.to_vec()).collect();
                        prop_assert_eq!(&bytes[..], &oracle[range]);
                        prop_assert_eq!(crcs, piece_crcs((offset % BLOCK) as usize, &data));
                    }
                }
            }
        }
    }

    #[test]
    fn what_lies_outside_the_shard_does_not_fit() {
        let read = |offset, length| ClientOp::Read { offset, length };
        assert!(read(0, 512).fits(BLOCKS));
        assert!(read(15 * BLOCK, 4096).fits(BLOCKS));
        assert!(!read(0, 0).fits(BLOCKS));
        assert!(!read(u64::MAX - 511, 512).fits(BLOCKS));
        assert!(!read(16 * BLOCK - 512, 1024).fits(BLOCKS));
        assert!(ClientOp::Flush.fits(BLOCKS));
    }
}
