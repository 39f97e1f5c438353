//! From a caller's request to its pieces and back to one reply.
//!
//! ```text
//! piece: QUEUED -sent-> IN_FLIGHT -reply-> done
//!          ^  \            |  \
//!          |   route gone  |   connection lost: ORPHAN -fenced or free-> QUEUED, or done
//!          |      v        |
//!          +--- PARKED <---+  (stale, not primary, busy, ...)
//! ```

use super::path::PathId;
use super::slab::Key;
use super::split::{first_piece, slice};
use super::standing::Standing;
use super::{Effect, REQUEST_BYTES_MAX, Session, Timer};
use proto::block::{BlockData, BlockOp, BlockRequest};
use proto::disk::BufList;
use proto::wire::{
    ByteRange, Opcode, PAYLOAD_BYTES_MAX, RANGE_BYTES_MAX, RangeData, RequestOp, SECTOR_BYTES,
};
use proto::{Status, Tick};
use smallvec::SmallVec;

/// Pieces of one request at a time. A READ or WRITE has at most 33, and one more per shard edge;
/// a discard of a whole volume is cut as it goes.
const PIECES_MAX: usize = 64;
/// Times that data are asked for before a wrong CRC is believed.
const CHECKSUM_TRIES: u8 = 3;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Read,
    Write,
    Discard,
    WriteZeroes { is_kept_allocated: bool },
}

impl Kind {
    fn message_bytes_max(self) -> u32 {
        match self {
            Kind::Read | Kind::Write => PAYLOAD_BYTES_MAX,
            Kind::Discard | Kind::WriteZeroes { .. } => RANGE_BYTES_MAX,
        }
    }

    fn has_data(self) -> bool {
        matches!(self, Kind::Read | Kind::Write)
    }
}

/// A caller's request.
pub(super) struct Whole {
    id: u64,
    kind: Kind,
    start: u64,
    /// First byte that is not cut into pieces yet.
    next: u64,
    end: u64,
    /// Of a write.
    data: BufList,
    /// Pieces that are not done.
    open: SmallVec<[Key; 2]>,
    /// Results of a read's pieces, in order.
    parts: SmallVec<[BufList; 2]>,
    failed: Option<Status>,
}

/// Where a piece is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// In a store's queue.
    Queued,
    /// With its shard.
    Parked,
    /// Sent.
    InFlight { path: PathId, command: u64 },
    /// Its connection was lost after it was sent with this command id.
    Orphan { command: u64 },
}

/// What goes into one message.
pub(super) struct Piece {
    whole: Key,
    ordinal: usize,
    pub shard: u32,
    pub op: RequestOp,
    /// Data bytes, in either direction.
    pub bytes: u32,
    pub place: Place,
    pub is_resend: bool,
    bad_checksums: u8,
    /// The path that brought bad data: another one is preferred.
    pub avoid: Option<u8>,
}

impl Piece {
    pub fn is_read(&self) -> bool {
        self.op.opcode() == Opcode::Read
    }
}

/// What to do after a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    /// Tell the caller.
    Final,
    /// Park; a newer configuration would help.
    Reroute,
    /// Park; it passes by itself.
    Pause,
    /// Again over another path, a few times.
    Checksum,
}

fn verdict(status: Status) -> Verdict {
    match status {
        Status::Busy | Status::Cancelled | Status::TimedOut => Verdict::Pause,
        // FENCED ends with an attach that gives this session a newer ticket, or with that of somebody
        // else, which `standing` finds out. DISK_FAILED,
        // UNAVAILABLE, NO_QUORUM and NOT_FOUND end when the shard is served elsewhere or again.
        Status::StaleEpoch
        | Status::NotPrimary
        | Status::Fenced
        | Status::NotFound
        | Status::DiskFailed
        | Status::Unavailable
        | Status::NoQuorum => Verdict::Reroute,
        Status::BadChecksum => Verdict::Checksum,
        Status::Ok => unreachable!("the codec makes no failure of OK"),
        Status::Invalid
        | Status::OutOfRange
        | Status::Misaligned
        | Status::AlreadyExists
        | Status::InUse
        | Status::ReadOnly
        | Status::Limit
        | Status::Unsafe
        | Status::NoSpace
        | Status::MediaError
        | Status::WrongCluster
        | Status::Unauthenticated
        | Status::Denied
        | Status::Unsupported
        | Status::Internal => Verdict::Final,
    }
}

impl Session {
    pub(super) fn submit(&mut self, now: Tick, request: BlockRequest, out: &mut Vec<Effect>) {
        self.counters.requests += 1;
        let whole = match self.judge(request) {
            Ok(whole) => whole,
            Err((id, result)) => return self.reply(id, result, out),
        };
        if whole.kind.has_data() {
            self.open_bytes += whole.end - whole.start;
        }
        let key = self.wholes.insert(whole);
        if let Some(nanos) = self.options.io_timeout_nanos {
            self.deadlines.push_back((now.after_nanos(nanos), key));
        }
        self.cut(now, key, out);
    }

    /// A request that asks something of the stores, or its reply.
    fn judge(&self, request: BlockRequest) -> Result<Whole, (u64, Result<BlockData, Status>)> {
        let id = request.id;
        let refuse = |status| Err((id, Err(status)));
        if self.is_closed {
            return refuse(Status::Cancelled);
        }
        if self.standing == Standing::TakenOver {
            return refuse(Status::Fenced);
        }
        let (kind, start, length, data) = match request.op {
            // See the module's head: nothing is left to be made durable.
            BlockOp::Flush => return Err((id, Ok(BlockData::new()))),
            BlockOp::Read { offset, len } => (Kind::Read, offset, u64::from(len), BufList::new()),
            BlockOp::Write { offset, data } => {
                let length = data.iter().map(|buf| buf.len() as u64).sum();
                (Kind::Write, offset, length, data)
            }
            BlockOp::Discard { offset, len } => (Kind::Discard, offset, len, BufList::new()),
            BlockOp::WriteZeroes { offset, len, keep_allocated } => {
                let kind = Kind::WriteZeroes { is_kept_allocated: keep_allocated };
                (kind, offset, len, BufList::new())
            }
        };
        let is_sectors = |bytes: u64| bytes.is_multiple_of(SECTOR_BYTES.into());
        if !is_sectors(start) || !is_sectors(length) {
            return refuse(Status::Misaligned);
        }
        let Some(end) = start.checked_add(length).filter(|end| *end <= self.conf.size_bytes) else {
            return refuse(Status::OutOfRange);
        };
        if kind.has_data() && length > REQUEST_BYTES_MAX {
            return refuse(Status::Limit);
        }
        if kind != Kind::Read && !self.conf.ticket.ticket.rights.may_write() {
            return refuse(Status::ReadOnly);
        }
        if length == 0 {
            return Err((id, Ok(BlockData::new())));
        }
        Ok(Whole {
            id,
            kind,
            start,
            next: start,
            end,
            data,
            open: SmallVec::new(),
            parts: SmallVec::new(),
            failed: None,
        })
    }

    /// Make pieces, as many as may be open at a time.
    fn cut(&mut self, now: Tick, key: Key, out: &mut Vec<Effect>) {
        loop {
            let whole = self.wholes.get_mut(key).expect("cut while it is open");
            let is_over = whole.next == whole.end || whole.failed.is_some();
            if is_over || whole.open.len() >= PIECES_MAX {
                return;
            }
            let limit = whole.kind.message_bytes_max();
            let cut = first_piece(whole.next, whole.end, self.conf.shard_size_bytes, limit);
            let range = ByteRange::new(cut.offset, cut.length).expect("sectors inside a volume");
            let op = match whole.kind {
                Kind::Read => RequestOp::Read { range, snap_seq: None },
                Kind::Write => {
                    let data = slice(&whole.data, whole.next - whole.start, cut.length);
                    let data = RangeData::compute(cut.offset, data);
                    RequestOp::Write(data.expect("sectors inside a volume"))
                }
                Kind::Discard => RequestOp::Discard(range),
                Kind::WriteZeroes { is_kept_allocated } => {
                    RequestOp::WriteZeroes { range, is_kept_allocated }
                }
            };
            whole.next += u64::from(cut.length);
            let ordinal = whole.parts.len();
            if whole.kind == Kind::Read {
                whole.parts.push(BufList::new());
            }
            let piece = self.pieces.insert(Piece {
                whole: key,
                ordinal,
                shard: cut.shard,
                op,
                bytes: if whole.kind.has_data() { cut.length } else { 0 },
                place: Place::Parked,
                is_resend: false,
                bad_checksums: 0,
                avoid: None,
            });
            whole.open.push(piece);
            self.enqueue(now, piece, out);
        }
    }

    /// Bring a piece on its way: to its store's queue, or to its shard if that must wait.
    pub(super) fn enqueue(&mut self, now: Tick, key: Key, out: &mut Vec<Effect>) {
        let Some(piece) = self.pieces.get_mut(key) else { return };
        let whole = self.wholes.get(piece.whole).expect("a piece has a request");
        if whole.failed.is_some() {
            return self.drop_piece(key, out);
        }
        let shard = self.shards.entry(piece.shard).or_default();
        let Some(store) = shard.store.filter(|_| shard.retry_at.is_none()) else {
            return self.park(now, key, true, out);
        };
        piece.place = Place::Queued;
        let alive = self.pieces.len();
        let queue = &mut self.stores[store as usize].as_mut().expect("it is routed to").queue;
        queue.push_back(key);
        if queue.len() > 2 * alive + PIECES_MAX {
            // Timed-out requests leave dead keys behind while their store is away.
            let pieces = &self.pieces;
            queue.retain(|key| pieces.get(*key).is_some());
        }
        self.due_stores.push(store);
    }

    /// Let a piece wait for its shard.
    fn park(&mut self, now: Tick, key: Key, needs_conf: bool, out: &mut Vec<Effect>) {
        let piece = self.pieces.get_mut(key).expect("parked while it is open");
        piece.place = Place::Parked;
        self.counters.parked += 1;
        let index = piece.shard;
        let shard = self.shards.entry(index).or_default();
        shard.parked.push(key);
        if shard.retry_at.is_none() {
            let at = shard.backoff.next(now);
            shard.retry_at = Some(at);
            self.timers.insert((at, Timer::Shard(index)));
            if needs_conf {
                out.push(Effect::NeedConf { shard: index });
            }
        }
    }

    /// Let the pieces of a shard go on.
    pub(super) fn unpark(&mut self, now: Tick, index: u32, out: &mut Vec<Effect>) {
        let shard = self.shard_mut(index);
        let parked = std::mem::take(&mut shard.parked);
        if let Some(before) = shard.retry_at.take() {
            self.timers.remove(&(before, Timer::Shard(index)));
        }
        for key in parked {
            self.enqueue(now, key, out);
        }
    }

    /// A piece was carried out.
    pub(super) fn succeed(&mut self, now: Tick, key: Key, data: BufList, out: &mut Vec<Effect>) {
        let Some(piece) = self.pieces.remove(key) else { return };
        self.shard_mut(piece.shard).backoff.reset();
        let whole = self.wholes.get_mut(piece.whole).expect("a piece has a request");
        whole.open.retain(|open| *open != key);
        if whole.kind == Kind::Read {
            whole.parts[piece.ordinal] = data;
        }
        self.cut(now, piece.whole, out);
        self.finish_if_done(piece.whole, out);
    }

    /// A piece came back with a failure; `place` is the path that brought it, if one did.
    pub(super) fn fail(
        &mut self,
        now: Tick,
        key: Key,
        status: Status,
        place: Option<u8>,
        out: &mut Vec<Effect>,
    ) {
        if self.pieces.get(key).is_none() {
            return;
        }
        if status == Status::Fenced {
            self.hear_fenced(now);
        }
        let piece = self.pieces.get_mut(key).expect("just found");
        if self.wholes.get(piece.whole).expect("a piece has a request").failed.is_some() {
            return self.drop_piece(key, out);
        }
        match verdict(status) {
            Verdict::Final => self.give_up(key, status, out),
            Verdict::Reroute => self.park(now, key, true, out),
            Verdict::Pause => self.park(now, key, false, out),
            Verdict::Checksum => {
                self.counters.bad_checksums += 1;
                piece.bad_checksums += 1;
                piece.avoid = place;
                if piece.bad_checksums < CHECKSUM_TRIES {
                    self.enqueue(now, key, out);
                } else {
                    self.give_up(key, status, out);
                }
            }
        }
    }

    /// A piece has failed for good, and with it the request. Pieces that were not sent are dropped;
    /// those that were are waited for, so that nothing of a failed request happens after its reply.
    fn give_up(&mut self, key: Key, status: Status, out: &mut Vec<Effect>) {
        let whole_key = self.pieces.get(key).expect("fails while it is open").whole;
        let whole = self.wholes.get_mut(whole_key).expect("a piece has a request");
        whole.failed.get_or_insert(status);
        for other in whole.open.clone() {
            let piece = self.pieces.get(other).expect("open pieces exist");
            let is_unsent = matches!(piece.place, Place::Queued | Place::Parked);
            if other == key || is_unsent {
                let _ = self.pieces.remove(other);
                let whole = self.wholes.get_mut(whole_key).expect("still open");
                whole.open.retain(|open| *open != other);
            }
        }
        self.finish_if_done(whole_key, out);
    }

    /// A piece of a request that has failed is not sent again.
    fn drop_piece(&mut self, key: Key, out: &mut Vec<Effect>) {
        let piece = self.pieces.remove(key).expect("dropped while it is open");
        let whole = self.wholes.get_mut(piece.whole).expect("a piece has a request");
        whole.open.retain(|open| *open != key);
        self.finish_if_done(piece.whole, out);
    }

    fn finish_if_done(&mut self, key: Key, out: &mut Vec<Effect>) {
        let Some(whole) = self.wholes.get(key) else { return };
        let is_cut = whole.next == whole.end || whole.failed.is_some();
        if !whole.open.is_empty() || !is_cut {
            return;
        }
        let whole = self.remove_whole(key);
        match (whole.failed, whole.kind) {
            (Some(status), _) => return self.reply(whole.id, Err(status), out),
            (None, Kind::Read) => self.counters.read_bytes += whole.end - whole.start,
            (None, Kind::Write) => self.counters.written_bytes += whole.end - whole.start,
            (None, Kind::Discard | Kind::WriteZeroes { .. }) => {}
        }
        self.reply(whole.id, Ok(whole.parts.into_iter().flatten().collect()), out);
    }

    fn remove_whole(&mut self, key: Key) -> Whole {
        let whole = self.wholes.remove(key).expect("it is answered once");
        if whole.kind.has_data() {
            self.open_bytes -= whole.end - whole.start;
        }
        // The keys of answered requests are dead: at the front at once, elsewhere when they are many.
        let wholes = &self.wholes;
        while self.deadlines.front().is_some_and(|(_, key)| wholes.get(*key).is_none()) {
            let _ = self.deadlines.pop_front();
        }
        if self.deadlines.len() > 2 * wholes.len() + PIECES_MAX {
            self.deadlines.retain(|(_, key)| wholes.get(*key).is_some());
        }
        whole
    }

    /// Its time is over. "No answer came in time; the outcome is not known".
    pub(super) fn time_out(&mut self, key: Key, out: &mut Vec<Effect>) {
        if self.wholes.get(key).is_some() {
            self.counters.timed_out += 1;
            self.abandon(key, Status::TimedOut, out);
        }
    }

    /// Answer a request whatever its pieces are doing.
    pub(super) fn abandon(&mut self, key: Key, status: Status, out: &mut Vec<Effect>) {
        let whole = self.remove_whole(key);
        for key in whole.open {
            let piece = self.pieces.remove(key).expect("open pieces exist");
            if let Place::InFlight { path, command } = piece.place {
                self.abandon_command(path, command);
            }
        }
        self.reply(whole.id, Err(status), out);
    }

    fn reply(&mut self, id: u64, result: Result<BlockData, Status>, out: &mut Vec<Effect>) {
        self.counters.replies += 1;
        self.counters.errors += u64::from(result.is_err());
        out.push(Effect::Reply { id, result });
    }
}
