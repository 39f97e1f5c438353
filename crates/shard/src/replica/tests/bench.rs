//! A real replica whose lane, leases and peers are the test itself.
//!
//! The lane's tables are real and change by real records when the test lets an operation be done.
//! All changes here are discards: order, promises and commitment do not look at content.

use super::super::*;
use crate::client::ClientOp;
use lane::EXTENT_BLOCKS;
use lane::record::{Body, DataPart, RangeKind, Record, ShardChange};
use proto::wire::{Content, Digest, Prepare, PrepareOp, TailRecord, Tails};
use proto::{ReplicaId, VolumeId, checksum};
use smallvec::SmallVec;

/// The store of the replica under test; it holds copy 0.
pub(crate) const ME: StoreId = 1;
/// The store of copy 1.
pub(crate) const B: StoreId = 2;
/// The store of copy 2.
pub(crate) const C: StoreId = 3;
/// Blocks of the shard: two regions, of which the last one is not whole.
pub(crate) const BLOCKS: u32 = 2 * lane::REGION_BLOCKS - 6;
/// A lease that no test outlives.
pub(crate) const FOREVER: Tick = Tick(u64::MAX / 4);
/// The history that configurations name.
pub(crate) const HISTORY: u64 = 7;

/// The life in which configurations mean a store.
pub(crate) fn life(store: StoreId) -> Incarnation {
    10 + store
}

pub(crate) fn shard() -> ShardId {
    ShardId { volume: VolumeId(9), index: 0 }
}

pub(crate) fn lsn(epoch: u64, seq: u64) -> Lsn {
    Lsn { epoch: Epoch(epoch), seq: Seq(seq) }
}

/// A configuration of three replicas, copy n on store n + 1.
pub(crate) fn conf(epoch: u64, primary: u8, isr: &[u8], learners: &[u8]) -> ShardConf {
    let member = |copy: u8| {
        let store = StoreId::from(copy) + 1;
        let (disk, format_uuid) = ([copy; 16], [copy; 16]);
        Member { copy, store, incarnation: life(store), disk, format_uuid }
    };
    ShardConf {
        shard: shard(),
        epoch: Epoch(epoch),
        rf: 3,
        min_write: 2,
        primary,
        isr: isr.to_vec(),
        learners: learners.to_vec(),
        members: (0..3).map(member).collect(),
        history_id: HISTORY,
        attach_epoch: 0,
    }
}

/// What the store's leases say, as the test has set it.
#[derive(Default)]
pub(crate) struct Promises {
    pub(crate) leases: BTreeMap<(StoreId, Incarnation), Tick>,
    pub(crate) promised: Tick,
    pub(crate) heard: BTreeMap<StoreId, Tick>,
}

impl Leases for Promises {
    fn lease_until(&self, _: ShardId, store: StoreId, incarnation: Incarnation) -> Tick {
        self.leases.get(&(store, incarnation)).copied().unwrap_or_default()
    }

    fn promised_until(&self, _: ShardId) -> Tick {
        self.promised
    }

    fn heard_at(&self, _: ShardId, store: StoreId) -> Option<Tick> {
        self.heard.get(&store).copied()
    }
}

/// The replica and everything that it has asked for.
pub(crate) struct Bench {
    pub(crate) replica: Replica,
    pub(crate) tables: Tables,
    /// Slots for new data, here and at every other store.
    pub(crate) free_slots: u32,
    pub(crate) credit: u64,
    pub(crate) leases: Promises,
    pub(crate) pace: Pace,
    pub(crate) now: Tick,
    /// The earliest Tick that was asked for and has not come.
    pub(crate) wake: Option<Tick>,
    options: Options,
    /// Lane operations that are not answered.
    pub(crate) lane: BTreeMap<u32, Op>,
    /// Requests to other stores that the test has not looked at.
    pub(crate) sent: Vec<(StoreId, Request)>,
    /// Answers to other stores by token.
    pub(crate) answers: BTreeMap<u64, Reply>,
    /// Replies to clients by token.
    pub(crate) replies: BTreeMap<u64, Result<Answer, Status>>,
    pub(crate) proposals: Vec<Transition>,
    /// Stores of the newest claim; `None`: nothing is claimed.
    pub(crate) claimed: Option<Vec<StoreId>>,
    pub(crate) notes: Vec<Note>,
    /// What verifications have found.
    pub(crate) verified: Vec<Result<VerifyReport, Status>>,
}

impl Bench {
    /// A replica that is new to its lane, started long ago, with every lease.
    pub(crate) fn new(mutant: Mutant) -> Bench {
        let mut tables = Tables::new(1024, 1);
        let replica = ReplicaId { shard: shard(), copy: 0 };
        let family = shard().volume;
        let change = ShardChange::Create { replica, blocks: BLOCKS, layer: 0, family };
        let create = Record::of_lane(Body::Shard(change));
        tables.apply(&create).expect("empty tables take a replica");
        let options = Options {
            shard_ix: 0,
            store: ME,
            incarnation: life(ME),
            booted: Tick(0),
            timing: Timing::default(),
            pool: Pool::new(0),
            mutant,
        };
        let mut leases = Promises::default();
        leases.leases.extend([B, C].map(|store| ((store, life(store)), FOREVER)));
        let view =
            View { tables: &tables, free_slots: 1_000, leases: &leases, pace: &Pace::default() };
        let replica = Replica::open(options.clone(), &view).expect("nothing is stored");
        let now = Tick(0).after_millis(60_000);
        Bench {
            replica,
            tables,
            free_slots: 1_000,
            credit: 1_000,
            leases,
            pace: Pace::default(),
            now,
            wake: None,
            options,
            lane: BTreeMap::new(),
            sent: Vec::new(),
            answers: BTreeMap::new(),
            replies: BTreeMap::new(),
            proposals: Vec::new(),
            claimed: None,
            notes: Vec::new(),
            verified: Vec::new(),
        }
    }

    /// A primary that serves in this configuration; its members had nothing in their tails.
    pub(crate) fn primary(mutant: Mutant, conf: ShardConf) -> Bench {
        let mut bench = Bench::new(mutant);
        bench.learn(conf);
        [B, C].into_iter().for_each(|store| bench.obey(store));
        assert_eq!(bench.replica.role(), Role::Active, "nothing stands against it");
        bench
    }

    /// A replica that follows this configuration.
    pub(crate) fn follower(mutant: Mutant, conf: ShardConf) -> Bench {
        let mut bench = Bench::new(mutant);
        bench.learn(conf);
        bench
    }

    /// The store's process ends and starts again, now, in this life: what is not in the lane is gone.
    pub(crate) fn restart(&mut self, incarnation: Incarnation) {
        (self.options.incarnation, self.options.booted) = (incarnation, self.now);
        self.leases = Promises::default();
        let view = View {
            tables: &self.tables,
            free_slots: self.free_slots,
            leases: &self.leases,
            pace: &self.pace,
        };
        self.replica = Replica::open(self.options.clone(), &view).expect("our own record");
        self.lane.clear();
        self.sent.clear();
        self.claimed = None;
    }

    pub(crate) fn step(&mut self, event: Event) {
        let mut out = Vec::new();
        let view = View {
            tables: &self.tables,
            free_slots: self.free_slots,
            leases: &self.leases,
            pace: &self.pace,
        };
        self.replica.step(self.now, event, &view, &mut out);
        for effect in out {
            match effect {
                Effect::Lane { op, request } => {
                    assert!(self.lane.insert(op, request).is_none(), "numbers are unique");
                }
                Effect::Reply { token, result } => {
                    let before = self.replies.insert(token, result);
                    assert!(before.is_none(), "a client is answered once");
                }
                Effect::Send { to, request } => self.sent.push((to, request)),
                Effect::Answer { token, reply } => {
                    let before = self.answers.insert(token, reply);
                    assert!(before.is_none(), "a store is answered once");
                }
                Effect::Propose { transition, .. } => self.proposals.push(transition),
                Effect::Claim { stores, .. } => {
                    self.claimed = Some(stores.into_iter().map(|(store, _)| store).collect());
                }
                Effect::Unclaim | Effect::Release => self.claimed = None,
                Effect::Note(note) => self.notes.push(note),
                Effect::Wake(at) => self.wake = Some(self.wake.map_or(at, |wake| wake.min(at))),
                Effect::Verified { result, .. } => self.verified.push(result),
                Effect::FetchConf { .. } | Effect::Promise { .. } => {}
            }
        }
    }

    /// Let time pass, then tick.
    pub(crate) fn pass(&mut self, millis: u64) {
        self.now = self.now.after_millis(millis);
        self.step(Event::Tick);
    }

    /// Let time pass up to the next Tick that was asked for, at most so long.
    pub(crate) fn wait(&mut self, nanos: u64) {
        let until = self.now.after_nanos(nanos);
        self.now = self.wake.map_or(until, |wake| wake.clamp(self.now, until));
        if self.wake.is_some_and(|wake| wake <= self.now) {
            self.wake = None;
            self.step(Event::Tick);
        }
    }

    fn blocks(&self) -> u32 {
        self.tables.shard(0).expect("the replica is there").blocks
    }

    /// The shard grows to so many regions.
    pub(crate) fn grow(&mut self, regions: u32) {
        let change = ShardChange::Resize { blocks: regions * lane::REGION_BLOCKS };
        self.record(Record { shard_ix: 0, ..Record::of_lane(Body::Shard(change)) });
        self.step(Event::Grown);
    }

    /// A configuration comes, and the lane does whatever is asked of it.
    pub(crate) fn learn(&mut self, conf: ShardConf) {
        self.step(Event::Conf(conf));
        self.run_lane(|_| true);
    }

    // ------------------------------------------------------------------------------- the lane --

    /// Let the lane do the operations that are wanted, until none of them is left.
    pub(crate) fn run_lane(&mut self, is_wanted: impl Fn(&Op) -> bool) {
        while let Some((&op, _)) = self.lane.iter().find(|(_, request)| is_wanted(request)) {
            let request = self.lane.remove(&op).expect("just found");
            let outcome = self.perform(request);
            self.step(Event::Lane { op, result: Ok(outcome) });
        }
    }

    /// The lane cannot do an operation that is wanted and under way.
    pub(crate) fn fail_lane(&mut self, problem: &Problem, is_wanted: impl Fn(&Op) -> bool) {
        let found = self.lane.iter().find(|(_, request)| is_wanted(request));
        let op = *found.expect("such an operation is under way").0;
        self.lane.remove(&op);
        self.step(Event::Lane { op, result: Err(problem.clone()) });
    }

    /// Whether the lane has been asked for such an operation and not answered.
    pub(crate) fn is_asked(&self, is_wanted: impl Fn(&Op) -> bool) -> bool {
        self.lane.values().any(is_wanted)
    }

    pub(crate) fn perform(&mut self, op: Op) -> Outcome {
        let shard_ix = 0;
        let (flags, lsn, commit, body) = match op {
            Op::Read { count, .. } => return nothing(count, &self.options.pool),
            Op::Range { lsn, commit, first, count, kind, flags, .. } => {
                (flags, lsn, commit, Body::Range { layer: 0, kind, first, count })
            }
            Op::Conf { blob, .. } => (0, Lsn::default(), Seq(0), Body::Conf(blob)),
            Op::Commit { commit, .. } => (0, Lsn::default(), commit, Body::Commit),
            Op::Region { region, value, .. } => {
                (0, Lsn::default(), Seq(0), Body::Region { region, value })
            }
            Op::Write { lsn, commit, first, crcs, flags, .. } => {
                assert_eq!(crcs.len(), 1, "no test writes more than a block with content");
                (flags, lsn, commit, stored(first))
            }
            Op::Create { .. }
            | Op::Delete { .. }
            | Op::Resize { .. }
            | Op::Checkpoint
            | Op::Close => unreachable!("no test of a replica leads to {op:?}"),
        };
        self.record(Record { flags, shard_ix, lsn, commit, body });
        Outcome::Done
    }

    fn record(&mut self, record: Record) {
        self.tables.apply(&record).expect("fits the tables");
    }

    /// The lane holds an operation from before; everything up to `commit` is known to be committed.
    pub(crate) fn has(&mut self, lsn: Lsn, block: u32, commit: u64) {
        let kind = RangeKind::Inherit;
        let body = Body::Range { layer: 0, kind, first: block, count: 1 };
        self.record(Record { flags: 0, shard_ix: 0, lsn, commit: Seq(commit), body });
    }

    /// The same, with content of its own.
    pub(crate) fn holds(&mut self, lsn: Lsn, block: u32) {
        let body = stored(block);
        self.record(Record { flags: 0, shard_ix: 0, lsn, commit: Seq(0), body });
    }

    /// The lane is in doubt about a region.
    pub(crate) fn suspects(&mut self, region: u32) {
        let body = Body::Region { region, value: 1 };
        self.record(Record { flags: 0, shard_ix: 0, lsn: Lsn::default(), commit: Seq(0), body });
    }

    // ----------------------------------------------------------------------------- the clients --

    fn client(&mut self, token: u64, op: ClientOp) {
        let epoch = self.replica.conf().expect("a configuration is known").epoch;
        self.step(Event::Client(ClientRequest { token, epoch, attach_epoch: 0, op }));
    }

    pub(crate) fn write(&mut self, token: u64, block: u32) {
        let (offset, length) = place(block);
        self.client(token, ClientOp::Zero { offset, length });
    }

    /// A write that has content, where `write` makes zeros.
    pub(crate) fn fill(&mut self, token: u64, block: u32) {
        let (offset, data) = (place(block).0, self.options.pool.alloc(BLOCK_BYTES).freeze());
        let crcs = SmallVec::from_slice(&[checksum::crc32c(&data)]);
        let data = proto::block::single(data);
        self.client(token, ClientOp::Write { offset, crcs, data });
    }

    pub(crate) fn read(&mut self, token: u64, block: u32) {
        self.read_run(token, block, 1);
    }

    pub(crate) fn read_run(&mut self, token: u64, first: u32, count: u32) {
        let (offset, length) = place(first);
        self.client(token, ClientOp::Read { offset, length: length * count });
    }

    /// The lane holds a block that is known to be lost.
    pub(crate) fn poisons(&mut self, lsn: Lsn, block: u32) {
        let body = Body::Range { layer: 0, kind: RangeKind::Poison, first: block, count: 1 };
        self.record(Record { flags: 0, shard_ix: 0, lsn, commit: Seq(0), body });
    }

    /// Whether a client has been told of success.
    pub(crate) fn is_done(&self, token: u64) -> bool {
        matches!(self.replies.get(&token), Some(Ok(_)))
    }

    /// What a client was told instead of success.
    pub(crate) fn refusal(&self, token: u64) -> Option<Status> {
        self.replies.get(&token)?.as_ref().err().copied()
    }

    // ------------------------------------------------------------------------ the other stores --

    /// What was sent to a store since the test looked last.
    pub(crate) fn sent_to(&mut self, store: StoreId) -> Vec<Request> {
        let (to_it, others) =
            std::mem::take(&mut self.sent).into_iter().partition(|(to, _)| *to == store);
        self.sent = others;
        to_it.into_iter().map(|(_, request): (StoreId, Request)| request).collect()
    }

    /// The last PREPARE or SETTLE of this number that was sent to a store.
    pub(crate) fn operation_to(&mut self, store: StoreId, seq: u64) -> Request {
        let mut sent = self.sent_to(store);
        let found = sent.iter().rposition(|request| {
            let is_operation = matches!(request.op, RequestOp::Prepare(_) | RequestOp::Settle(_));
            is_operation && context_of(&request.op).is_some_and(|peer| peer.lsn.seq == Seq(seq))
        });
        sent.swap_remove(found.expect("it was sent"))
    }

    /// A store does what it was asked for.
    pub(crate) fn obey(&mut self, store: StoreId) {
        for request in self.sent_to(store) {
            if context_of(&request.op).is_some() {
                self.acknowledge(store, &request);
            }
        }
    }

    /// A store has done this.
    pub(crate) fn acknowledge(&mut self, store: StoreId, request: &Request) {
        self.acknowledge_as(store, life(store), request);
    }

    /// This life of a store says that it has done this.
    pub(crate) fn acknowledge_as(&mut self, from: StoreId, life: Incarnation, request: &Request) {
        let reply = done(request, life, (self.credit, self.blocks()), &self.options.pool);
        self.step(Event::PeerReply { from, reply });
    }

    /// A store refuses because it has promised a newer epoch.
    pub(crate) fn nack(&mut self, from: StoreId, request: &Request, epoch: u64) {
        let (opcode, status) = (request.op.opcode(), Status::StaleEpoch);
        let result = Err(Failure { opcode, status, detail: 0 });
        let Request { command_id, shard, .. } = *request;
        let reply = Reply { command_id, shard, epoch: Epoch(epoch), seq: Seq(0), result };
        self.step(Event::PeerReply { from, reply });
    }

    /// A learner answers TAILS: it is complete up to here, and in doubt about these blocks.
    pub(crate) fn learner_tails(&mut self, from: StoreId, complete: u64, doubtful: &[u32]) {
        let asked = self.sent_to(from);
        let asked = asked.iter().find(|request| request.op.opcode() == Opcode::Tails);
        let mut reply = done(
            asked.expect("it was asked"),
            life(from),
            (self.credit, self.blocks()),
            &self.options.pool,
        );
        let record = |&block: &u32| {
            let (op, state) = (proto::wire::TailOp::Write, proto::wire::BlockState::Data);
            TailRecord { lsn: Lsn::default(), range: range(block), snap_seq: 0, op, state }
        };
        if let Ok(ReplyOp::Tails(tails)) = &mut reply.result {
            tails.complete_lsn = lsn(0, complete);
            tails.records = doubtful.iter().map(record).collect();
        }
        self.step(Event::PeerReply { from, reply });
    }

    /// The primary of an epoch asks this replica for something.
    pub(crate) fn asks(&mut self, from: StoreId, token: u64, epoch: u64, op: RequestOp) {
        let request = Request {
            command_id: token,
            shard: shard(),
            epoch: Epoch(epoch),
            attach_epoch: 0,
            is_fua: false,
            op,
        };
        self.step(Event::Peer { from, token, request });
    }

    /// Status that another store was refused with.
    pub(crate) fn refused(&self, token: u64) -> Option<Status> {
        self.answers.get(&token)?.result.as_ref().err().map(|failure| failure.status)
    }

    /// Records of the answer to a TAILS.
    pub(crate) fn tails(&self, token: u64) -> Option<&Tails> {
        match &self.answers.get(&token)?.result {
            Ok(ReplyOp::Tails(tails)) => Some(tails),
            other => panic!("not the answer to TAILS: {other:?}"),
        }
    }
}

/// A block's content in the slot that is its own by number.
fn stored(block: u32) -> Body {
    let (extent, first) = (block / EXTENT_BLOCKS, block % EXTENT_BLOCKS);
    let (slots, tags) = (vec![first / lane::SLOT_BLOCKS], vec![0]);
    Body::Intent(DataPart { layer: 0, extent, first, slots: slots.into(), tags: tags.into() })
}

fn place(block: u32) -> (u64, u32) {
    (u64::from(block) * BLOCK_BYTES as u64, BLOCK_BYTES as u32)
}

pub(crate) fn range(block: u32) -> ByteRange {
    let (offset, length) = place(block);
    ByteRange::new(offset, length).expect("one block")
}

/// Zeros, as the lane reads them.
pub(crate) fn nothing(count: u32, pool: &Pool) -> Outcome {
    let data = proto::block::single(pool.zeroed(count as usize * BLOCK_BYTES).freeze());
    let crc = proto::checksum::crc32c(&[0; BLOCK_BYTES]);
    Outcome::Read { data, crcs: smallvec::SmallVec::from_elem(crc, count as usize) }
}

/// What a message to this replica in its life says of itself.
pub(crate) fn context(lsn: Lsn, commit: u64) -> PeerContext {
    let commit_lsn = Lsn { epoch: lsn.epoch, seq: Seq(commit) };
    PeerContext { lsn, commit_lsn, snap_seq: 0, incarnation: life(ME), history_id: HISTORY }
}

/// PREPARE of a change of one block.
pub(crate) fn prepare(peer: PeerContext, block: u32) -> RequestOp {
    RequestOp::Prepare(Box::new(Prepare { peer, op: PrepareOp::Discard(range(block)) }))
}

/// COPY of one block.
pub(crate) fn copy(peer: PeerContext, resync_id: u64, block: u32) -> RequestOp {
    let content = Content::Inherit(range(block));
    let (layer_snap_seq, is_last) = (0, true);
    RequestOp::Copy(Box::new(proto::wire::Copy {
        peer,
        resync_id,
        layer_snap_seq,
        is_last,
        content,
    }))
}

/// The answer of a store in this life that has done what it was asked for, with nothing in its tail.
/// Its replica has so many blocks.
pub(crate) fn done(
    request: &Request,
    incarnation: Incarnation,
    (credit, blocks): (u64, u32),
    pool: &Pool,
) -> Reply {
    let peer = context_of(&request.op).expect("replicas ask with a context");
    let (history_id, lsn_epoch) = (peer.history_id, peer.lsn.epoch);
    let ack = |resync_id| Ack { incarnation, history_id, lsn_epoch, resync_id, credit };
    let op = match &request.op {
        RequestOp::Prepare(_) => ReplyOp::Prepare(ack(0)),
        RequestOp::Settle(_) => ReplyOp::Settle(ack(0)),
        RequestOp::Copy(copy) => ReplyOp::Copy(ack(copy.resync_id)),
        RequestOp::Digest(Digest { resync_id, first_region, .. }) => {
            let left = blocks - first_region * lane::REGION_BLOCKS;
            let content = nothing(left.min(lane::REGION_BLOCKS), pool);
            let digest = super::super::follower::digest_of(&content);
            ReplyOp::Digest(ack(*resync_id), vec![digest])
        }
        RequestOp::Tails(_) => ReplyOp::Tails(Box::new(Tails {
            ack: ack(0),
            complete_lsn: Lsn::default(),
            snap_seq: 0,
            records: Vec::new(),
            results: Vec::new(),
        })),
        RequestOp::Hello(_)
        | RequestOp::FencePath { .. }
        | RequestOp::Ping(_)
        | RequestOp::Read { .. }
        | RequestOp::Write(_)
        | RequestOp::Flush
        | RequestOp::Discard(_)
        | RequestOp::WriteZeroes { .. }
        | RequestOp::CompareAndWrite { .. }
        | RequestOp::Snap(_)
        | RequestOp::Attach(..)
        | RequestOp::NeedConf(_) => unreachable!("has no context of a replica"),
    };
    let Request { command_id, shard, epoch, .. } = *request;
    Reply { command_id, shard, epoch, seq: peer.lsn.seq, result: Ok(op) }
}
