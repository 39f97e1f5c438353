//! The serving end of a shard: from a client's request to lane operations and back.
//!
//! The machine of one shard on its primary. It checks bounds and epochs, takes the range lock (one
//! uncommitted write per block, first come first served), gives each write its lsn, and turns ranges
//! of 512-byte sectors into whole blocks: a partial block is read, verified, merged and written, which
//! is the one place where the client's CRC ends. This landing serves shards with one replica: a write
//! is committed when its lane says that it is durable (docs/internals/replication.md marks the rest).

use lane::locks::{OpIx, RangeLocks};
use lane::{Op, Outcome, Problem};
use proto::disk::BufList;
use proto::{BLOCK_BYTES, Buf, Epoch, Lsn, Pool, Seq, Status, checksum};
use smallvec::SmallVec;
use std::collections::{BTreeSet, VecDeque};

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

/// What the machine wants.
#[derive(Debug)]
pub enum Effect {
    /// Ask the shard's lane; the answer comes to `lane_done` with this number.
    Lane {
        /// The operation's number.
        op: OpIx,
        /// What to do.
        request: Op,
    },
    /// Answer a client.
    Reply {
        /// The request's.
        token: u64,
        /// What became of it.
        result: Result<Answer, Status>,
    },
}

/// One lane operation of a request, in order.
#[derive(Debug)]
enum Step {
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

#[derive(Debug)]
struct Running {
    token: u64,
    /// Of a read: first byte in its first block, and length.
    slice: Option<(usize, usize)>,
    /// Of a read: what its steps have brought.
    found: (BufList, SmallVec<[u32; 4]>),
    steps: VecDeque<Step>,
    /// The open write of the current step.
    seq: Option<Seq>,
    last_seq: Seq,
    /// The merge that waits for its block.
    merging: Option<(u32, usize, Vec<u8>)>,
}

/// The machine of one shard.
pub struct Primary {
    shard_ix: u32,
    blocks: u32,
    epoch: Epoch,
    attach_epoch: u64,
    next_seq: u64,
    open: BTreeSet<Seq>,
    locks: RangeLocks,
    ops: Vec<Option<Running>>,
    free: Vec<OpIx>,
    pool: Pool,
}

impl Primary {
    /// Serve the replica `shard_ix` of a lane that holds operations up to `applied`.
    #[must_use]
    pub fn new(
        shard_ix: u32,
        blocks: u32,
        (epoch, attach_epoch): (Epoch, u64),
        applied: Lsn,
        pool: Pool,
    ) -> Primary {
        Primary {
            shard_ix,
            blocks,
            epoch,
            attach_epoch,
            next_seq: applied.seq.0 + 1,
            open: BTreeSet::new(),
            locks: RangeLocks::default(),
            ops: Vec::new(),
            free: Vec::new(),
            pool,
        }
    }

    /// The epoch it serves in.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Follow a newer configuration; older ones are ignored.
    pub fn follow(&mut self, epoch: Epoch, attach_epoch: u64) {
        self.epoch = self.epoch.max(epoch);
        self.attach_epoch = self.attach_epoch.max(attach_epoch);
    }

    /// The replica has grown.
    pub fn grow(&mut self, blocks: u32) {
        self.blocks = self.blocks.max(blocks);
    }

    /// Handle one request of a client.
    pub fn request(&mut self, request: ClientRequest, out: &mut Vec<Effect>) {
        let token = request.token;
        match self.check(&request).map(|()| self.plan(request)) {
            Err(status) => out.push(Effect::Reply { token, result: Err(status) }),
            Ok(None) => out.push(Effect::Reply { token, result: Ok(Answer::Done(Seq(0))) }),
            Ok(Some((running, blocks, exclusive))) => {
                let op = self.insert(running);
                if self.locks.acquire(op, blocks, exclusive) {
                    self.advance(op, out);
                }
            }
        }
    }

    fn check(&self, request: &ClientRequest) -> Result<(), Status> {
        if request.epoch != self.epoch {
            return Err(Status::StaleEpoch);
        }
        if request.attach_epoch < self.attach_epoch {
            return Err(Status::Fenced);
        }
        let (offset, length) = match &request.op {
            ClientOp::Read { offset, length } | ClientOp::Zero { offset, length } => {
                (*offset, u64::from(*length))
            }
            ClientOp::Write { offset, data, .. } => {
                (*offset, data.iter().map(|buf| buf.len() as u64).sum())
            }
            ClientOp::Flush => return Ok(()),
        };
        let end = offset.checked_add(length);
        if length == 0 || end.is_none_or(|end| end > u64::from(self.blocks) * BLOCK) {
            return Err(Status::OutOfRange);
        }
        Ok(())
    }

    /// Turn a checked request into steps over whole blocks; `None` needs no step.
    #[allow(clippy::type_complexity, reason = "what `insert` and `acquire` take, once")]
    fn plan(&self, request: ClientRequest) -> Option<(Running, std::ops::Range<u32>, bool)> {
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
                    let count = (end - first).min(lane::lane::REQUEST_BLOCKS_MAX);
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
                    self.plan_fragments(offset, &data, &mut steps);
                }
                (blocks, true)
            }
            ClientOp::Zero { offset, length } => {
                let blocks = covering(offset, u64::from(length));
                plan_zero(offset, u64::from(length), &mut steps);
                (blocks, true)
            }
        };
        let running = Running {
            token: request.token,
            slice,
            found: Default::default(),
            steps,
            seq: None,
            last_seq: Seq(0),
            merging: None,
        };
        Some((running, blocks, exclusive))
    }

    /// A write with partial blocks: merge the ends, write what lies between from a fresh buffer,
    /// because the whole blocks do not lie aligned in the one received.
    fn plan_fragments(&self, offset: u64, data: &BufList, steps: &mut VecDeque<Step>) {
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
                let copy = self.pool.copy_of(&bytes[at..at + whole]).freeze();
                let mut list = Vec::new();
                checksum::crc32c_blocks(&copy, &mut list);
                let (crcs, data) = (SmallVec::from_vec(list), proto::block::single(copy));
                steps.push_back(Step::Write { first: block, crcs, data });
                at += whole;
            }
        }
    }

    fn insert(&mut self, running: Running) -> OpIx {
        match self.free.pop() {
            Some(op) => {
                self.ops[op as usize] = Some(running);
                op
            }
            None => {
                self.ops.push(Some(running));
                self.ops.len() as OpIx - 1
            }
        }
    }

    fn running(&mut self, op: OpIx) -> &mut Running {
        self.ops[op as usize].as_mut().expect("the operation runs")
    }

    /// Start the next step of an operation that holds its lock.
    fn advance(&mut self, op: OpIx, out: &mut Vec<Effect>) {
        let shard_ix = self.shard_ix;
        let Some(step) = self.running(op).steps.pop_front() else {
            let seq = self.running(op).last_seq;
            self.finish(op, Ok(Answer::Done(seq)), out);
            return;
        };
        let request = match step {
            Step::Read { first, count } => Op::Read { shard_ix, first, count },
            Step::Write { first, crcs, data } => self.write(op, first, crcs, data),
            Step::Discard { first, count } => {
                let (lsn, commit) = self.next_lsn(op);
                Op::Discard { shard_ix, lsn, commit, first, count, flags: 0 }
            }
            Step::Merge { block, at, bytes } => {
                self.running(op).merging = Some((block, at, bytes));
                Op::Read { shard_ix, first: block, count: 1 }
            }
        };
        out.push(Effect::Lane { op, request });
    }

    fn next_lsn(&mut self, op: OpIx) -> (Lsn, Seq) {
        let seq = Seq(self.next_seq);
        self.next_seq += 1;
        self.open.insert(seq);
        let lowest_open = self.open.first().expect("just inserted").0;
        let running = self.running(op);
        (running.seq, running.last_seq) = (Some(seq), seq);
        // With one replica a write is committed when it is durable here.
        (Lsn { epoch: self.epoch, seq }, Seq(lowest_open - 1))
    }

    fn write(&mut self, op: OpIx, first: u32, crcs: SmallVec<[u32; 4]>, data: BufList) -> Op {
        let (lsn, commit) = self.next_lsn(op);
        let shard_ix = self.shard_ix;
        Op::Write { shard_ix, lsn, commit, first, crcs, data, flags: 0, solo: true }
    }

    /// The lane has answered the operation's current step.
    pub fn lane_done(&mut self, op: OpIx, result: Result<Outcome, Problem>, out: &mut Vec<Effect>) {
        if let Some(seq) = self.running(op).seq.take() {
            self.open.remove(&seq);
        }
        match result {
            Err(problem) => self.finish(op, Err(status_of(&problem)), out),
            Ok(Outcome::Read { data, crcs }) => match self.running(op).merging.take() {
                Some((block, at, bytes)) => {
                    let mut merged = self.pool.copy_of(&data[0][..BLOCK_BYTES]);
                    merged[at..at + bytes.len()].copy_from_slice(&bytes);
                    let merged = merged.freeze();
                    let crcs = SmallVec::from_slice(&[checksum::crc32c(&merged)]);
                    let request = self.write(op, block, crcs, proto::block::single(merged));
                    out.push(Effect::Lane { op, request });
                }
                None => {
                    let running = self.running(op);
                    running.found.0.extend(data);
                    running.found.1.extend(crcs);
                    if running.steps.is_empty() {
                        let (data, crcs) = std::mem::take(&mut running.found);
                        let slice = running.slice.expect("a read");
                        self.finish(op, Ok(cut(data, crcs, slice)), out);
                    } else {
                        self.advance(op, out);
                    }
                }
            },
            Ok(Outcome::Done | Outcome::Created { .. }) => self.advance(op, out),
        }
    }

    fn finish(&mut self, op: OpIx, result: Result<Answer, Status>, out: &mut Vec<Effect>) {
        let running = self.ops[op as usize].take().expect("the operation runs");
        self.free.push(op);
        out.push(Effect::Reply { token: running.token, result });
        let mut ready = Vec::new();
        self.locks.release(op, &mut ready);
        ready.into_iter().for_each(|op| self.advance(op, out));
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
    use std::collections::HashMap;

    const BLOCKS: u32 = 16;

    /// A lane that does at once what it is asked, and checks every CRC.
    #[derive(Default)]
    struct Instant {
        blocks: HashMap<u32, Vec<u8>>,
        last_seq: u64,
    }

    impl Instant {
        fn answer(&mut self, pool: &Pool, op: Op) -> Outcome {
            match op {
                Op::Read { first, count, .. } => {
                    let mut bytes = Vec::new();
                    for block in first..first + count {
                        let zero = vec![0; BLOCK_BYTES];
                        bytes.extend_from_slice(self.blocks.get(&block).unwrap_or(&zero));
                    }
                    let mut crcs = Vec::new();
                    checksum::crc32c_blocks(&bytes, &mut crcs);
                    let data = proto::block::single(pool.copy_of(&bytes).freeze());
                    Outcome::Read { data, crcs: SmallVec::from_vec(crcs) }
                }
                Op::Write { first, crcs, data, lsn, .. } => {
                    assert_eq!(lsn.seq.0, self.last_seq + 1, "dense");
                    self.last_seq += 1;
                    let bytes: Vec<u8> = data.iter().flat_map(|buf| buf.to_vec()).collect();
                    for (index, chunk) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
                        assert_eq!(checksum::crc32c(chunk), crcs[index]);
                        self.blocks.insert(first + index as u32, chunk.to_vec());
                    }
                    Outcome::Done
                }
                Op::Discard { first, count, lsn, .. } => {
                    assert_eq!(lsn.seq.0, self.last_seq + 1, "dense");
                    self.last_seq += 1;
                    (first..first + count).for_each(|block| drop(self.blocks.remove(&block)));
                    Outcome::Done
                }
                Op::Create { .. }
                | Op::Delete { .. }
                | Op::Resize { .. }
                | Op::Conf { .. }
                | Op::Commit { .. }
                | Op::Region { .. }
                | Op::Checkpoint
                | Op::Close => panic!("a primary with one replica does not ask for this"),
            }
        }
    }

    fn run(primary: &mut Primary, lane: &mut Instant, op: ClientOp) -> Result<Answer, Status> {
        let mut effects = Vec::new();
        let request = ClientRequest { token: 9, epoch: Epoch(1), attach_epoch: 1, op };
        primary.request(request, &mut effects);
        let pool = primary.pool.clone();
        loop {
            match effects.remove(0) {
                Effect::Lane { op, request } => {
                    let outcome = lane.answer(&pool, request);
                    primary.lane_done(op, Ok(outcome), &mut effects);
                }
                Effect::Reply { token, result } => {
                    assert_eq!(token, 9);
                    assert!(effects.is_empty(), "one reply, and nothing after it");
                    return result;
                }
            }
        }
    }

    fn fresh() -> Primary {
        let confs = (Epoch(1), 1);
        Primary::new(0, BLOCKS, confs, Lsn::default(), Pool::new(1 << 20))
    }

    proptest! {
        #[test]
        fn sectors_agree_with_a_plain_array(
            ops in prop::collection::vec((0u8..3, 0u64..128, 1u64..40, any::<u8>()), 1..30)
        ) {
            let (mut primary, mut lane) = (fresh(), Instant::default());
            let mut oracle = vec![0u8; BLOCKS as usize * BLOCK_BYTES];
            for (kind, sector, sectors, fill) in ops {
                let (offset, length) = (sector * 512, sectors.min(128 - sector) * 512);
                let range = offset as usize..(offset + length) as usize;
                match kind {
                    0 => {
                        let bytes = vec![fill; length as usize];
                        let buf = primary.pool.copy_of(&bytes).freeze();
                        let crcs = piece_crcs((offset % BLOCK) as usize, std::slice::from_ref(&buf));
                        let data = proto::block::single(buf);
                        let op = ClientOp::Write { offset, crcs, data };
                        prop_assert!(run(&mut primary, &mut lane, op).is_ok());
                        oracle[range].fill(fill);
                    }
                    1 => {
                        let op = ClientOp::Zero { offset, length: length as u32 };
                        prop_assert!(run(&mut primary, &mut lane, op).is_ok());
                        oracle[range].fill(0);
                    }
                    _ => {
                        let op = ClientOp::Read { offset, length: length as u32 };
                        let Ok(Answer::Read { crcs, data }) = run(&mut primary, &mut lane, op)
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
    fn wrong_epochs_and_ranges_are_definite_refusals() {
        let mut primary = fresh();
        let ask = |primary: &mut Primary, epoch, attach_epoch, op| {
            let mut effects = Vec::new();
            let request = ClientRequest { token: 1, epoch: Epoch(epoch), attach_epoch, op };
            primary.request(request, &mut effects);
            match effects.pop() {
                Some(Effect::Reply { result: Err(status), .. }) => status,
                other => panic!("a refusal, not {other:?}"),
            }
        };
        let read = |offset, length| ClientOp::Read { offset, length };
        assert_eq!(ask(&mut primary, 2, 1, read(0, 512)), Status::StaleEpoch);
        assert_eq!(ask(&mut primary, 1, 0, read(0, 512)), Status::Fenced);
        assert_eq!(ask(&mut primary, 1, 1, read(u64::MAX - 511, 512)), Status::OutOfRange);
        assert_eq!(ask(&mut primary, 1, 1, read(16 * BLOCK - 512, 1024)), Status::OutOfRange);
    }

    #[test]
    fn overlapping_writes_reach_the_lane_one_after_the_other() {
        let mut primary = fresh();
        let mut effects = Vec::new();
        for token in [1, 2] {
            let op = ClientOp::Zero { offset: 0, length: 4096 };
            let request = ClientRequest { token, epoch: Epoch(1), attach_epoch: 1, op };
            primary.request(request, &mut effects);
        }
        let Some(Effect::Lane { op, .. }) = effects.pop() else { panic!("the first is asked") };
        assert!(effects.is_empty(), "the second waits");
        primary.lane_done(op, Ok(Outcome::Done), &mut effects);
        assert!(matches!(effects[0], Effect::Reply { token: 1, .. }));
        assert!(matches!(effects[1], Effect::Lane { .. }), "now the second goes");
    }
}
