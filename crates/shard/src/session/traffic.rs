//! Connections: made, greeted, used, lost; and what becomes of the requests that were on them.

use super::path::{Backoff, Host, PATHS_PER_STORE, PathId, PathState, Use};
use super::request::Place;
use super::slab::Key;
use super::{Effect, HANDSHAKE_MS, Session, Timer};
use proto::disk::BufList;
use proto::frame::Frame;
use proto::wire::{
    FenceOutcome, Header, Hello, HelloReply, Limits, Opcode, PAYLOAD_BYTES_MAX, PathSlot, Reply,
    ReplyOp, Request, RequestOp, VERSION, VersionRange, Who, WireError,
};
use proto::{BLOCK_BYTES, Epoch, ShardId, Status, Tick};

/// Pieces that were on a connection when it ended, and may have reached the primary.
pub(super) struct Orphans {
    slot: u8,
    generation: u64,
    host: Host,
    /// Of the ticket that the connection was opened with.
    attach_epoch: u64,
    pieces: Vec<Key>,
    /// FENCE_PATH was sent and not answered.
    is_fencing: bool,
    pub retry_at: Option<Tick>,
    backoff: Backoff,
}

impl Session {
    /// Begin a connection.
    pub(super) fn connect(&mut self, now: Tick, index: u32, place: usize, out: &mut Vec<Effect>) {
        self.generation += 1;
        self.counters.connects += 1;
        let generation = self.generation;
        let store = self.store_mut(index);
        let path = &mut store.paths[place];
        assert_eq!(path.state, PathState::Waiting, "one connection per path at a time");
        (path.state, path.generation) = (PathState::Connecting, generation);
        let address = store.target.address;
        self.set_path_timer(index, place, Some(now.after_millis(HANDSHAKE_MS)));
        out.push(Effect::Connect { path: self.path_id(index, place), address });
    }

    fn path_id(&self, index: u32, place: usize) -> PathId {
        let store = self.stores[index as usize].as_ref().expect("it has this path");
        PathId { store: index, place: place as u8, generation: store.paths[place].generation }
    }

    /// Where a connection is in the tables, unless it has been given up.
    fn find(&self, path: PathId) -> Option<(u32, usize)> {
        let store = self.stores.get(path.store as usize)?.as_ref()?;
        let found = &store.paths[usize::from(path.place)];
        let is_it = found.generation == path.generation && found.state != PathState::Waiting;
        is_it.then_some((path.store, path.place.into()))
    }

    pub(super) fn path_timer(
        &mut self,
        now: Tick,
        index: u32,
        place: usize,
        out: &mut Vec<Effect>,
    ) {
        let path = &mut self.store_mut(index).paths[place];
        path.timer = None;
        match path.state {
            PathState::Waiting => self.connect(now, index, place, out),
            PathState::Connecting | PathState::Greeting { .. } => {
                self.drop_path(now, index, place, out);
            }
            PathState::Open { .. } => unreachable!("an open path has no timer"),
        }
    }

    /// The connection is there: say who we are.
    pub(super) fn connected(&mut self, path: PathId, out: &mut Vec<Effect>) {
        let Some((index, place)) = self.find(path) else { return };
        let command = self.next_command();
        let lane = self.store_mut(index).target.lane;
        let slot = &mut self.store_mut(index).paths[place];
        assert_eq!(slot.state, PathState::Connecting, "connected once");
        slot.state = PathState::Greeting { command };
        let hello = Hello {
            versions: VersionRange::OWN,
            features: 0,
            lane,
            path: PathSlot { slot: slot.slot, generation: path.generation },
            limits: Limits::DEFAULT,
            cluster_id: self.options.cluster_id,
            who: Who::Client(self.conf.ticket),
        };
        let request = self.request(0, Epoch(0), command, RequestOp::Hello(Box::new(hello)));
        out.push(Effect::Send { path, request });
    }

    pub(super) fn closed(&mut self, now: Tick, path: PathId, out: &mut Vec<Effect>) {
        if let Some((index, place)) = self.find(path) {
            self.lose(now, index, place, out);
        }
    }

    /// End a connection and try again later.
    fn drop_path(&mut self, now: Tick, index: u32, place: usize, out: &mut Vec<Effect>) {
        out.push(Effect::Disconnect(self.path_id(index, place)));
        self.lose(now, index, place, out);
    }

    /// End a connection, if there is one, and do not try again.
    pub(super) fn stop_path(&mut self, now: Tick, index: u32, place: usize, out: &mut Vec<Effect>) {
        let path = self.path_id(index, place);
        if self.find(path).is_some() {
            out.push(Effect::Disconnect(path));
            self.orphan(now, index, place, None, out);
            self.store_mut(index).paths[place].state = PathState::Waiting;
        }
    }

    /// End a connection, and begin a new one at once.
    pub(super) fn restart_path(
        &mut self,
        now: Tick,
        index: u32,
        place: usize,
        out: &mut Vec<Effect>,
    ) {
        self.stop_path(now, index, place, out);
        self.set_path_timer(index, place, None);
        self.connect(now, index, place, out);
    }

    /// A connection has ended by itself.
    fn lose(&mut self, now: Tick, index: u32, place: usize, out: &mut Vec<Effect>) {
        self.orphan(now, index, place, None, out);
        let path = &mut self.store_mut(index).paths[place];
        let was_open = path.host().is_some();
        path.state = PathState::Waiting;
        let at = path.backoff.next(now);
        self.set_path_timer(index, place, Some(at));
        self.counters.lost += u64::from(was_open);
        self.is_orphans_due = true;
        self.due_stores.push(index);
        let store = self.stores[index as usize].as_ref().expect("it has this path");
        if store.open_path().is_none() {
            self.ask_for_conf(index, out);
        }
    }

    /// Nothing reaches this store: perhaps its shards are served elsewhere by now.
    fn ask_for_conf(&self, index: u32, out: &mut Vec<Effect>) {
        let store = self.stores[index as usize].as_ref().expect("it was just lost");
        let orphans = self.orphans.values().flat_map(|orphans| &orphans.pieces);
        let waiting = store.queue.iter().chain(orphans).filter_map(|key| self.pieces.get(*key));
        let mut shards: Vec<u32> = waiting.map(|piece| piece.shard).collect();
        shards.sort_unstable();
        shards.dedup();
        shards.retain(|shard| self.shards.get(shard).is_some_and(|s| s.store == Some(index)));
        out.extend(shards.into_iter().map(|shard| Effect::NeedConf { shard }));
    }

    /// Take what is in flight away from a path: all, or that of one shard. Reads go back to their
    /// queue; the rest may have reached the primary and waits to be settled.
    pub(super) fn orphan(
        &mut self,
        now: Tick,
        index: u32,
        place: usize,
        only: Option<u32>,
        out: &mut Vec<Effect>,
    ) {
        let pieces = &self.pieces;
        let is_meant = |key: Key| {
            let piece = pieces.get(key).expect("pieces in flight exist");
            only.is_none_or(|shard| piece.shard == shard)
        };
        let store = self.stores[index as usize].as_mut().expect("it has this path");
        let path = &mut store.paths[place];
        let Some(host) = path.host() else { return };
        let (slot, generation) = (path.slot, path.generation);
        let mut taken = Vec::new();
        if only.is_some() {
            // The connection stays, so the replies will come: their tags are not free before.
            for flight in path.tags.iter_mut().flatten() {
                if let Use::Piece(key) = flight.used_for
                    && is_meant(key)
                {
                    flight.used_for = Use::Abandoned;
                    taken.push((key, flight.command));
                }
            }
        } else {
            for flight in path.take_all() {
                match flight.used_for {
                    Use::Piece(key) => taken.push((key, flight.command)),
                    Use::Fence(id) => {
                        if let Some(orphans) = self.orphans.get_mut(&id) {
                            orphans.is_fencing = false;
                        }
                    }
                    Use::Abandoned => {}
                }
            }
        }
        let (mut reads, mut others) = (Vec::new(), Vec::new());
        for (key, command) in taken {
            let piece = self.pieces.get_mut(key).expect("pieces in flight exist");
            piece.place = Place::Orphan { command };
            if piece.is_read() { reads.push(key) } else { others.push(key) }
        }
        if !others.is_empty() {
            self.orphans_count += 1;
            let orphans = Orphans {
                slot,
                generation,
                host,
                attach_epoch: self.conf.attach_epoch,
                pieces: others,
                is_fencing: false,
                retry_at: None,
                backoff: Backoff::default(),
            };
            self.orphans.insert(self.orphans_count, orphans);
            self.is_orphans_due = true;
        }
        for key in reads {
            self.enqueue(now, key, out);
        }
    }

    /// Let orphans go on, or begin to find out what became of them.
    pub(super) fn settle_orphans(&mut self, now: Tick, out: &mut Vec<Effect>) {
        let ids: Vec<u64> = self.orphans.keys().copied().collect();
        for id in ids {
            let Some(mut orphans) = self.orphans.remove(&id) else { continue };
            let is_of_old_attach = orphans.attach_epoch < self.conf.attach_epoch;
            #[cfg(test)]
            let is_of_old_attach = is_of_old_attach || self.is_fencing_off;
            let (mut free, mut held, mut fence_on) = (Vec::new(), Vec::new(), None);
            for key in orphans.pieces.drain(..) {
                let Some(piece) = self.pieces.get(key) else { continue };
                let store = self.shards.get(&piece.shard).and_then(|shard| shard.store);
                let open = store.and_then(|index| {
                    let store = self.stores[index as usize].as_ref().expect("it is routed to");
                    store.open_path().map(|place| (index, place, store.paths[place].host()))
                });
                match open {
                    // A newer attach drained the requests of the attaches before it.
                    _ if is_of_old_attach => free.push(key),
                    // The reign of that process is over.
                    Some((_, _, host)) if host != Some(orphans.host) => free.push(key),
                    Some((index, place, _)) => {
                        fence_on = Some((index, place, piece.shard));
                        held.push(key);
                    }
                    None => held.push(key),
                }
            }
            orphans.pieces = held;
            if fence_on.is_some()
                && let Some((index, place)) = self.open_with_generation(orphans.generation)
            {
                // The orphans' shard left that connection and came back. The connection must end:
                // once the slot is fenced, the primary refuses every request on it.
                self.drop_path(now, index, place, out);
                fence_on = None;
            }
            if let Some((index, place, shard)) = fence_on
                && !orphans.is_fencing
                && orphans.retry_at.is_none()
            {
                orphans.is_fencing = self.send_fence((index, place), shard, id, &orphans, out);
            }
            if !orphans.pieces.is_empty() {
                self.orphans.insert(id, orphans);
            } else if let Some(at) = orphans.retry_at {
                self.timers.remove(&(at, Timer::Fence(id)));
            }
            for key in free {
                self.enqueue(now, key, out);
            }
        }
    }

    fn open_with_generation(&self, generation: u64) -> Option<(u32, usize)> {
        let is_it = |&(index, place): &(u32, usize)| {
            let store = self.stores[index as usize].as_ref().expect("listed because it exists");
            let path = &store.paths[place];
            path.generation == generation && path.host().is_some()
        };
        self.path_places().into_iter().find(is_it)
    }

    /// "Before moving a request from slot A to B the client sends FENCE_PATH(session, slot A,
    /// generation) on B". False if there is no room now; the next reply makes some.
    fn send_fence(
        &mut self,
        (index, place): (u32, usize),
        shard: u32,
        id: u64,
        orphans: &Orphans,
        out: &mut Vec<Effect>,
    ) -> bool {
        let path = self.path_id(index, place);
        let count = self.commands;
        let slot = &mut self.store_mut(index).paths[place];
        if !slot.has_room(0) {
            return false;
        }
        let command = slot.admit(count, 0, Use::Fence(id));
        self.commands += 1;
        self.counters.fences += 1;
        let op = RequestOp::FencePath { slot: orphans.slot, generation: orphans.generation };
        let epoch = self.shards.get(&shard).map_or(Epoch(0), |shard| shard.epoch);
        let request = self.request(shard, epoch, command, op);
        out.push(Effect::Send { path, request });
        true
    }

    /// The answer to FENCE_PATH: "drops A's requests without lsn, answers with the outcome of those
    /// that have one. Only then the rest is re-sent."
    fn fenced(
        &mut self,
        now: Tick,
        id: u64,
        result: Result<Vec<FenceOutcome>, Status>,
        out: &mut Vec<Effect>,
    ) {
        let Some(orphans) = self.orphans.get_mut(&id) else { return };
        orphans.is_fencing = false;
        let outcomes = match result {
            Ok(outcomes) => outcomes,
            Err(_) => {
                // Nothing may move before the slot is known to be closed.
                let at = orphans.backoff.next(now);
                orphans.retry_at = Some(at);
                self.timers.insert((at, Timer::Fence(id)));
                return;
            }
        };
        let orphans = self.orphans.remove(&id).expect("just found");
        assert!(orphans.retry_at.is_none(), "nothing is sent during a pause");
        for key in orphans.pieces {
            let Some(piece) = self.pieces.get(key) else { continue };
            let Place::Orphan { command } = piece.place else {
                unreachable!("orphans stay where they are until they are settled")
            };
            match outcomes.iter().find(|outcome| outcome.command_id == command) {
                Some(outcome) if outcome.status == Status::Ok => {
                    self.succeed(now, key, BufList::new(), out);
                }
                Some(outcome) => self.fail(now, key, outcome.status, None, out),
                None => self.enqueue(now, key, out),
            }
        }
    }

    /// A frame has come. What breaks the protocol ends the connection.
    pub(super) fn frame(&mut self, now: Tick, path: PathId, frame: Frame, out: &mut Vec<Effect>) {
        let Some((index, place)) = self.find(path) else { return };
        let state = self.store_mut(index).paths[place].state;
        let result = match state {
            PathState::Greeting { command } => {
                self.greeted(now, (index, place), command, frame, out)
            }
            PathState::Open { .. } => self.answered(now, (index, place), frame, out),
            PathState::Waiting | PathState::Connecting => Err(()),
        };
        if result.is_err() {
            self.counters.violations += 1;
            self.drop_path(now, index, place, out);
        }
    }

    fn greeted(
        &mut self,
        now: Tick,
        (index, place): (u32, usize),
        command: u64,
        frame: Frame,
        out: &mut Vec<Effect>,
    ) -> Result<(), ()> {
        let header = Header::parse(&frame.header).map_err(|_| ())?;
        let reply = Reply::parse(&header, frame).map_err(|_| ())?;
        if reply.command_id != command {
            return Err(());
        }
        let hello = match reply.result {
            Ok(ReplyOp::Hello(hello)) => hello,
            Ok(_) => return Err(()),
            // Not ready, an expired ticket, another cluster: all may be mended by whoever
            // configures us, so it is tried again.
            Err(_) => {
                self.drop_path(now, index, place, out);
                return Ok(());
            }
        };
        let HelloReply { version, limits, peer, .. } = *hello;
        // Every build of this version carries 1 MiB; pieces are cut for that.
        if version != VERSION || limits.payload_bytes_max < PAYLOAD_BYTES_MAX {
            return Err(());
        }
        let host = Host { store: peer.store, incarnation: peer.incarnation };
        let limits = Limits::DEFAULT.agree(limits);
        self.store_mut(index).paths[place].state = PathState::Open { host, limits };
        self.set_path_timer(index, place, None);
        self.counters.greeted += 1;
        for other in 0..PATHS_PER_STORE {
            let theirs = self.store_mut(index).paths[other].host();
            if theirs.is_some_and(|theirs| theirs != host) {
                // The process behind that connection is gone; do not wait until TCP notices.
                self.drop_path(now, index, other, out);
            }
        }
        self.is_orphans_due = true;
        self.due_stores.push(index);
        Ok(())
    }

    fn answered(
        &mut self,
        now: Tick,
        (index, place): (u32, usize),
        frame: Frame,
        out: &mut Vec<Effect>,
    ) -> Result<(), ()> {
        let header = Header::parse(&frame.header).map_err(|_| ())?;
        let path = &self.store_mut(index).paths[place];
        let tag = (header.command_id % path.tags.len() as u64) as usize;
        let flight = path.tags[tag].filter(|flight| flight.command == header.command_id);
        let used_for = flight.ok_or(())?.used_for;
        let is_meant = match used_for {
            Use::Piece(key) => {
                let piece = self.pieces.get(key).expect("pieces in flight exist");
                let shard = ShardId { volume: self.conf.volume, index: piece.shard };
                (header.opcode, header.shard) == (piece.op.opcode(), shard)
            }
            Use::Fence(_) => header.opcode == Opcode::FencePath,
            Use::Abandoned => true,
        };
        if !is_meant {
            return Err(());
        }
        let result = match Reply::parse(&header, frame) {
            Ok(reply) => reply.result.map_err(|failure| failure.status),
            Err(WireError::DataChecksum { .. }) => Err(Status::BadChecksum),
            Err(_) => return Err(()),
        };
        if let (Use::Piece(key), Ok(ReplyOp::Read(data))) = (used_for, &result) {
            let piece = self.pieces.get(key).expect("pieces in flight exist");
            let RequestOp::Read { range, .. } = &piece.op else {
                unreachable!("the opcodes are equal")
            };
            let start = (range.offset() % BLOCK_BYTES as u64) as u32;
            if (data.start_in_block(), data.length()) != (start, range.length()) {
                return Err(());
            }
        }
        let path = &mut self.store_mut(index).paths[place];
        let finished = path.finish(header.command_id);
        assert!(finished.is_some(), "just found");
        path.backoff.reset();
        self.due_stores.push(index);
        if self.orphans.values().any(|orphans| !orphans.is_fencing) {
            self.is_orphans_due = true;
        }
        match (used_for, result) {
            (Use::Abandoned, _) => {}
            (Use::Fence(id), Ok(ReplyOp::FencePath(outcomes))) => {
                self.fenced(now, id, Ok(outcomes), out);
            }
            (Use::Fence(id), Err(status)) => self.fenced(now, id, Err(status), out),
            (Use::Fence(_), Ok(_)) => unreachable!("the opcodes are equal"),
            (Use::Piece(key), Ok(ReplyOp::Read(data))) => {
                self.succeed(now, key, data.into_parts().1, out);
            }
            (Use::Piece(key), Ok(_)) => self.succeed(now, key, BufList::new(), out),
            (Use::Piece(key), Err(status)) => self.fail(now, key, status, Some(place as u8), out),
        }
        Ok(())
    }

    /// The reply to this command means nothing any more.
    pub(super) fn abandon_command(&mut self, path: PathId, command: u64) {
        let Some((index, place)) = self.find(path) else { return };
        let tags = &mut self.store_mut(index).paths[place].tags;
        let tag = (command % tags.len() as u64) as usize;
        if let Some(flight) = tags[tag].as_mut().filter(|flight| flight.command == command) {
            flight.used_for = Use::Abandoned;
        }
    }

    /// Send what waits for a store, as much as its paths take.
    pub(super) fn pump(&mut self, index: u32, out: &mut Vec<Effect>) {
        loop {
            let Some(store) = self.stores[index as usize].as_mut() else { return };
            let Some(&key) = store.queue.front() else { return };
            let Some(piece) = self.pieces.get_mut(key) else {
                let _ = store.queue.pop_front();
                continue;
            };
            let Some(place) = store.choose(piece.bytes, piece.avoid) else { return };
            let _ = store.queue.pop_front();
            let slot = &mut store.paths[place];
            let command = slot.admit(self.commands, piece.bytes, Use::Piece(key));
            self.commands += 1;
            let generation = slot.generation;
            let path = PathId { store: index, place: place as u8, generation };
            piece.place = Place::InFlight { path, command };
            self.counters.sent += 1;
            self.counters.resent += u64::from(std::mem::replace(&mut piece.is_resend, true));
            let (shard, op) = (piece.shard, piece.op.clone());
            let epoch = self.shards.get(&shard).expect("it is routed").epoch;
            let request = self.request(shard, epoch, command, op);
            out.push(Effect::Send { path, request });
        }
    }

    /// A number for a command that takes no tag.
    fn next_command(&mut self) -> u64 {
        self.commands += 1;
        (self.commands - 1) * super::path::TAGS as u64
    }

    fn request(&self, index: u32, epoch: Epoch, command_id: u64, op: RequestOp) -> Request {
        let shard = ShardId { volume: self.conf.volume, index };
        let attach_epoch = self.conf.attach_epoch;
        Request { command_id, shard, epoch, attach_epoch, is_fua: false, op }
    }
}
