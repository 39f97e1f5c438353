//! The serving end of path slots: which connections of a session are fenced, and what became of
//! their requests.
//!
//! # Theory of operation
//!
//! A session holds several connections to a store, each in a *path slot* with its own *generation*;
//! (session, slot, generation) is an *opening*. A client that loses a connection does not know what
//! became of the requests on it. "Before moving a request from slot A to B the client sends
//! FENCE_PATH(session, slot A, generation) on B; the primary closes A, drops A's requests without
//! lsn, answers with the outcome of those that have one. Only then the rest is re-sent."
//! (docs/internals/replication.md, section 6.) So nothing of a fenced opening takes effect after the
//! answer, which would undo what the client has written since: a ghost write.
//!
//! This type keeps the books; its owner reads and answers. A fence
//! 1. closes the connections of its openings up to the generation: no request of theirs begins from
//!    then on, and no HELLO of such an opening is accepted again;
//! 2. waits until each request of those openings that has begun is over;
//! 3. is answered with the outcomes of those that got an lsn. The outcome of a request whose
//!    connection ended first is kept until then, because no reply has told the client.
//!
//! A fence whose own connection ends is forgotten, and the outcomes stay for the next one.
//!
//! Costs: three lookups per request. Books end with their owner, as slots end with the reign.
//!
//! *Limits.* A client that is gone for good never asks for its outcomes. When [`OUTCOMES_MAX`] of
//! them are kept, the session whose oldest outcome has waited longest is *forgotten*: its outcomes
//! go, and so that nobody takes their absence for "had no effect", the session is fenced as a whole:
//! its connections are closed and no HELLO of it is accepted any more. A client that lives fences
//! right after it has connected again, so its outcomes are young and are not the ones to go.

use crate::mutant::Mutant;
use proto::wire::{FenceOutcome, Header, PAYLOAD_BYTES_MAX};
use proto::{Lsn, Status};
use smallvec::SmallVec;
use std::collections::BTreeMap;
use std::mem;
use std::ops::RangeInclusive;

/// Fenced slots that are remembered; of more, the one fenced longest ago is forgotten. After that,
/// a HELLO of that slot which has been on its way ever since would be accepted.
pub const FENCED_MAX: usize = 65_536;

/// Outcomes that are kept for fences to come: of some hundred clients that died at full depth, and
/// never more than one answer has room for.
pub const OUTCOMES_MAX: usize = PAYLOAD_BYTES_MAX as usize / FENCE_OUTCOME_BYTES;

/// Bytes of one outcome in an answer (docs/reference/pfw.md).
const FENCE_OUTCOME_BYTES: usize = 32;

/// Forgotten sessions that are remembered; of more, the one forgotten longest ago goes. To be
/// accepted again it would need a ticket older than all clients that have died since.
pub const FORGOTTEN_MAX: usize = 65_536;

/// Session, slot and generation.
type OpeningKey = (u64, u8, u64);

#[derive(Debug)]
struct Opening<C> {
    /// Connections that are neither closed nor fenced: one, unless a client repeats a generation.
    conns: SmallVec<[C; 1]>,
    /// Requests that have begun and are not over.
    open: u32,
    /// Outcomes of requests that were over only after their connection had ended.
    outcomes: Vec<FenceOutcome>,
    /// Place of its first outcome in `Paths::outcomes_order`.
    since: u64,
}

impl<C> Opening<C> {
    fn new() -> Opening<C> {
        Opening { conns: SmallVec::new(), open: 0, outcomes: Vec::new(), since: 0 }
    }

    fn is_over(&self) -> bool {
        self.conns.is_empty() && self.open == 0 && self.outcomes.is_empty()
    }
}

#[derive(Debug)]
struct Begun<C> {
    conn: C,
    key: OpeningKey,
    command_id: u64,
}

#[derive(Debug)]
struct Fence<C> {
    conn: C,
    header: Header,
    /// The newest opening that is fenced.
    upto: OpeningKey,
}

/// Up to which opening a slot is fenced.
#[derive(Clone, Copy, Debug)]
struct Fenced {
    generation: u64,
    /// Fences are numbered as they come.
    number: u64,
}

/// The connections of all sessions of one store. `C` names a connection.
#[derive(Debug)]
pub struct Paths<C: Copy + Ord> {
    mutant: Mutant,
    /// Connections that may begin requests.
    conns: BTreeMap<C, OpeningKey>,
    openings: BTreeMap<OpeningKey, Opening<C>>,
    begun: BTreeMap<u64, Begun<C>>,
    /// Not answered yet, in order.
    fences: Vec<Fence<C>>,
    fenced: BTreeMap<(u64, u8), Fenced>,
    /// The slots of `fenced` by number.
    fenced_order: BTreeMap<u64, (u64, u8)>,
    next_number: u64,
    /// Openings with outcomes, in the order of their first one.
    outcomes_order: BTreeMap<u64, OpeningKey>,
    /// Outcomes of all of them.
    outcomes_kept: usize,
    /// Sessions whose outcomes were given up, with their place in the order.
    forgotten: BTreeMap<u64, u64>,
    forgotten_order: BTreeMap<u64, u64>,
    /// Their connections, which the owner has to close.
    orphaned: Vec<C>,
}

impl<C: Copy + Ord> Default for Paths<C> {
    fn default() -> Paths<C> {
        Paths::new()
    }
}

impl<C: Copy + Ord> Paths<C> {
    /// No connections, nothing fenced.
    #[must_use]
    pub fn new() -> Paths<C> {
        Paths::with_mutant(Mutant::None)
    }

    /// The same with a seeded bug.
    #[must_use]
    pub fn with_mutant(mutant: Mutant) -> Paths<C> {
        Paths {
            mutant,
            conns: BTreeMap::new(),
            openings: BTreeMap::new(),
            begun: BTreeMap::new(),
            fences: Vec::new(),
            fenced: BTreeMap::new(),
            fenced_order: BTreeMap::new(),
            next_number: 0,
            outcomes_order: BTreeMap::new(),
            outcomes_kept: 0,
            forgotten: BTreeMap::new(),
            forgotten_order: BTreeMap::new(),
            orphaned: Vec::new(),
        }
    }

    /// A connection has said HELLO, in this slot of this session.
    ///
    /// Errors: `Status::Fenced` when that opening is fenced, or its session is forgotten; the
    /// connection is to be closed.
    pub fn hello(
        &mut self,
        conn: C,
        session: u64,
        slot: u8,
        generation: u64,
    ) -> Result<(), Status> {
        let fenced = self.fenced.get(&(session, slot));
        let is_fenced = fenced.is_some_and(|fenced| generation <= fenced.generation);
        if is_fenced || self.forgotten.contains_key(&session) {
            return Err(Status::Fenced);
        }
        let key = (session, slot, generation);
        let before = self.conns.insert(conn, key);
        assert!(before.is_none(), "a connection says HELLO once");
        self.openings.entry(key).or_insert_with(Opening::new).conns.push(conn);
        Ok(())
    }

    /// A request of a connection begins; `token` comes back with its end.
    ///
    /// False when the connection has not said HELLO, has ended or is fenced: then the request must
    /// not be carried out, and has no end.
    pub fn begin(&mut self, conn: C, header: &Header, token: u64) -> bool {
        let Some(&key) = self.conns.get(&conn) else { return false };
        let begun = Begun { conn, key, command_id: header.command_id };
        let before = self.begun.insert(token, begun);
        assert!(before.is_none(), "tokens are used once");
        self.openings.get_mut(&key).expect("a connection keeps its opening").open += 1;
        true
    }

    /// A request is over, with this result; `lsn` if it got one. Then ask `ready_fences` and
    /// `orphaned`.
    pub fn finish(&mut self, token: u64, lsn: Option<Lsn>, status: Status) {
        let Begun { conn, key, command_id } =
            self.begun.remove(&token).expect("a request that has begun ends once");
        let has_ended = self.conns.get(&conn) != Some(&key);
        let opening = self.openings.get_mut(&key).expect("a request keeps its opening");
        opening.open -= 1;
        // While the connection lives the reply tells the outcome. Whether the reply arrives is not
        // known here.
        if let Some(lsn) = lsn
            && has_ended
            && !self.forgotten.contains_key(&key.0)
        {
            if opening.outcomes.is_empty() {
                opening.since = self.next_number;
                self.next_number += 1;
                self.outcomes_order.insert(opening.since, key);
            }
            opening.outcomes.push(FenceOutcome { command_id, lsn, status, detail: 0 });
            self.outcomes_kept += 1;
        }
        self.forget_if_over(key);
        if self.outcomes_kept > OUTCOMES_MAX {
            let (_, oldest) = self.outcomes_order.first_key_value().expect("some are kept");
            self.forget_session(oldest.0);
        }
    }

    /// Connections of sessions that were forgotten; each is returned once.
    #[must_use = "the connections must be closed"]
    pub fn orphaned(&mut self) -> Vec<C> {
        mem::take(&mut self.orphaned)
    }

    /// Give up all outcomes of a session, and the session with them.
    fn forget_session(&mut self, session: u64) {
        self.forgotten.insert(session, self.next_number);
        self.forgotten_order.insert(self.next_number, session);
        self.next_number += 1;
        if self.forgotten.len() > FORGOTTEN_MAX {
            let (_, oldest) = self.forgotten_order.pop_first().expect("one place per session");
            self.forgotten.remove(&oldest);
        }
        self.fences.retain(|fence| fence.upto.0 != session);
        let mut keys = Vec::new();
        for (&key, opening) in
            self.openings.range_mut((session, 0, 0)..=(session, u8::MAX, u64::MAX))
        {
            for conn in mem::take(&mut opening.conns) {
                self.conns.remove(&conn);
                self.orphaned.push(conn);
            }
            keys.push(key);
        }
        for key in keys {
            drop(self.take_outcomes(key));
            self.forget_if_over(key);
        }
    }

    fn take_outcomes(&mut self, key: OpeningKey) -> Vec<FenceOutcome> {
        let Some(opening) = self.openings.get_mut(&key) else { return Vec::new() };
        let outcomes = mem::take(&mut opening.outcomes);
        if !outcomes.is_empty() {
            self.outcomes_order.remove(&opening.since);
            self.outcomes_kept -= outcomes.len();
        }
        outcomes
    }

    /// FENCE_PATH has come in on `conn`: connections to close. It is answered when `ready_fences`
    /// says so.
    #[must_use = "the connections must be closed"]
    pub fn fence(&mut self, conn: C, header: Header, slot: u8, generation: u64) -> Vec<C> {
        // The session is what the connection's own HELLO has proved: nobody fences another's.
        let Some(&(session, ..)) = self.conns.get(&conn) else { return Vec::new() };
        let upto = (session, slot, generation);
        self.fences.push(Fence { conn, header, upto });
        if self.mutant.is(Mutant::NoPathFencing) {
            return Vec::new();
        }
        self.remember((session, slot), generation);
        let mut closed = Vec::new();
        let mut keys = Vec::new();
        for (&key, opening) in self.openings.range_mut(openings(upto)) {
            closed.extend(mem::take(&mut opening.conns));
            keys.push(key);
        }
        keys.into_iter().for_each(|key| self.forget_if_over(key));
        for conn in &closed {
            self.conns.remove(conn);
        }
        closed
    }

    /// Fences none of whose requests is open any more, in the order in which they came: on which
    /// connection to answer which request with what. Each is returned once.
    #[must_use = "each fence is answered"]
    pub fn ready_fences(&mut self) -> Vec<(C, Header, Vec<FenceOutcome>)> {
        let mut ready = Vec::new();
        for fence in mem::take(&mut self.fences) {
            let mut range = self.openings.range(openings(fence.upto));
            let is_ready = range.all(|(_, opening)| opening.open == 0);
            if !is_ready && !self.mutant.is(Mutant::NoPathFencing) {
                self.fences.push(fence);
                continue;
            }
            let mut outcomes = Vec::new();
            let range = self.openings.range(openings(fence.upto));
            let keys: Vec<OpeningKey> = range.map(|(&key, _)| key).collect();
            for key in keys {
                outcomes.append(&mut self.take_outcomes(key));
                self.forget_if_over(key);
            }
            ready.push((fence.conn, fence.header, outcomes));
        }
        ready
    }

    /// A connection has ended. Harmless for one that never said HELLO or was fenced.
    pub fn closed(&mut self, conn: C) {
        self.fences.retain(|fence| fence.conn != conn);
        let Some(key) = self.conns.remove(&conn) else { return };
        let opening = self.openings.get_mut(&key).expect("a connection keeps its opening");
        opening.conns.retain(|known| *known != conn);
        self.forget_if_over(key);
    }

    fn remember(&mut self, slot: (u64, u8), generation: u64) {
        let before = self.fenced.get(&slot).copied();
        if let Some(before) = before {
            self.fenced_order.remove(&before.number);
        }
        let number = self.next_number;
        self.next_number += 1;
        let generation = before.map_or(generation, |before| before.generation.max(generation));
        self.fenced.insert(slot, Fenced { generation, number });
        self.fenced_order.insert(number, slot);
        if self.fenced.len() > FENCED_MAX {
            let (_, oldest) = self.fenced_order.pop_first().expect("one number per slot");
            self.fenced.remove(&oldest);
        }
    }

    /// Nothing is left to wait for or to tell.
    fn forget_if_over(&mut self, key: OpeningKey) {
        if self.openings.get(&key).is_some_and(|opening| opening.is_over()) {
            self.openings.remove(&key);
        }
    }
}

/// Every opening of a slot up to this one.
fn openings(upto: OpeningKey) -> RangeInclusive<OpeningKey> {
    (upto.0, upto.1, 0)..=upto
}

#[cfg(test)]
pub(crate) mod tests;
