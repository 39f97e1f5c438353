//! The machine of a shard with one replica: what a store runs until it follows configurations.
//!
//! It checks bounds and epochs, takes the range lock (one uncommitted write per block, first come
//! first served) and gives each write its lsn; a write is committed when its lane says that it is
//! durable. `replica` is the machine that does all of this for several replicas and any role.

use crate::client::{Answer, ClientRequest, Found, Step, Task, status_of};
use lane::locks::{OpIx, RangeLocks};
use lane::{Op, Outcome, Problem};
use proto::disk::BufList;
use proto::{Epoch, Lsn, Pool, Seq, Status};
use smallvec::SmallVec;
use std::collections::BTreeSet;

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

#[derive(Debug)]
struct Running {
    task: Task,
    /// The open write of the current step.
    seq: Option<Seq>,
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
        match self.check(&request).map(|()| Task::plan(request, &self.pool)) {
            Err(status) => out.push(Effect::Reply { token, result: Err(status) }),
            Ok(None) => out.push(Effect::Reply { token, result: Ok(Answer::Done(Seq(0))) }),
            Ok(Some((task, blocks, exclusive))) => {
                let op = self.insert(Running { task, seq: None });
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
        if !request.op.fits(self.blocks) {
            return Err(Status::OutOfRange);
        }
        Ok(())
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
        let Some(step) = self.running(op).task.next() else {
            let seq = self.running(op).task.last_seq;
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
            Step::Merge { .. } => unreachable!("comes as the read that it begins with"),
        };
        out.push(Effect::Lane { op, request });
    }

    fn next_lsn(&mut self, op: OpIx) -> (Lsn, Seq) {
        let seq = Seq(self.next_seq);
        self.next_seq += 1;
        self.open.insert(seq);
        let lowest_open = self.open.first().expect("just inserted").0;
        let running = self.running(op);
        (running.seq, running.task.last_seq) = (Some(seq), seq);
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
            Ok(Outcome::Read { data, crcs }) => {
                let pool = self.pool.clone();
                match self.running(op).task.read_done(data, crcs, &pool) {
                    Found::More => self.advance(op, out),
                    Found::Write { first, crcs, data } => {
                        let request = self.write(op, first, crcs, data);
                        out.push(Effect::Lane { op, request });
                    }
                    Found::Complete(answer) => self.finish(op, Ok(answer), out),
                }
            }
            Ok(Outcome::Done | Outcome::Created { .. }) => self.advance(op, out),
        }
    }

    fn finish(&mut self, op: OpIx, result: Result<Answer, Status>, out: &mut Vec<Effect>) {
        let running = self.ops[op as usize].take().expect("the operation runs");
        self.free.push(op);
        let token = running.task.token.expect("only clients ask this machine");
        out.push(Effect::Reply { token, result });
        let mut ready = Vec::new();
        self.locks.release(op, &mut ready);
        ready.into_iter().for_each(|op| self.advance(op, out));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{ClientOp, piece_crcs};
    use proptest::prelude::*;
    use proto::{BLOCK_BYTES, checksum};
    use std::collections::HashMap;

    const BLOCKS: u32 = 16;
    const BLOCK: u64 = BLOCK_BYTES as u64;

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
