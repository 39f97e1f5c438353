//! The connections to one store: two path slots, what is in flight on each, and what waits.
//!
//! ```text
//! WAITING --timer--> CONNECTING --connected--> GREETING --HELLO reply--> OPEN
//!    ^                   |                        |                        |
//!    +--- closed, refused, 5 s over, or it breaks the protocol ------------+
//! ```

use super::conf::Target;
use super::slab::Key;
use proto::Tick;
use proto::wire::Limits;
use std::collections::VecDeque;

/// Connections to each store. Two, so that one stuck or broken connection stops nothing.
pub(super) const PATHS_PER_STORE: usize = 2;
/// Requests in flight on one connection (architecture, section 8).
pub(super) const TAGS: usize = 128;
/// First pause after a failure.
pub(super) const BACKOFF_MIN_MS: u64 = 10;
/// Longest pause between two tries.
pub(super) const BACKOFF_MAX_MS: u64 = 1_000;

/// Growing pauses between tries: 10 ms, doubled up to 1 s.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Backoff {
    pause_ms: u64,
}

impl Backoff {
    /// When to try again after one more failure.
    pub fn next(&mut self, now: Tick) -> Tick {
        self.pause_ms = (self.pause_ms * 2).clamp(BACKOFF_MIN_MS, BACKOFF_MAX_MS);
        now.after_millis(self.pause_ms)
    }

    /// It works again.
    pub fn reset(&mut self) {
        self.pause_ms = 0;
    }
}

/// One connection of a session, in the session's words. Never used again for another one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PathId {
    /// Index of the store in the session's table.
    pub(super) store: u32,
    /// Which of its paths.
    pub(super) place: u8,
    /// The generation that HELLO tells: grows with each connection of the session.
    pub(super) generation: u64,
}

/// The process that serves: a store and its incarnation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Host {
    pub store: u64,
    pub incarnation: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PathState {
    /// Tries again at `timer`.
    Waiting,
    /// Ends at `timer`.
    Connecting,
    /// HELLO was sent with this command id; ends at `timer`.
    Greeting { command: u64 },
    /// Requests flow.
    Open { host: Host, limits: Limits },
}

/// What a tag of a path is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Use {
    /// A piece.
    Piece(Key),
    /// FENCE_PATH for these orphans.
    Fence(u64),
    /// A piece that was given up or moved: its reply is awaited and means nothing.
    Abandoned,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    pub command: u64,
    pub bytes: u32,
    pub used_for: Use,
}

pub(super) struct Path {
    /// Of the present or last connection.
    pub generation: u64,
    /// On the wire: the same for all connections of this path, different from all others'.
    pub slot: u8,
    pub state: PathState,
    pub timer: Option<Tick>,
    pub backoff: Backoff,
    /// Tag `command % TAGS` holds the request with this command id.
    pub tags: Vec<Option<InFlight>>,
    pub free: Vec<u8>,
    pub bytes: u64,
}

impl Path {
    pub fn new(slot: u8) -> Path {
        Path {
            generation: 0,
            slot,
            state: PathState::Waiting,
            timer: None,
            backoff: Backoff::default(),
            tags: vec![None; TAGS],
            free: (0..TAGS as u8).rev().collect(),
            bytes: 0,
        }
    }

    pub fn host(&self) -> Option<Host> {
        match self.state {
            PathState::Open { host, .. } => Some(host),
            PathState::Waiting | PathState::Connecting | PathState::Greeting { .. } => None,
        }
    }

    pub fn in_flight(&self) -> usize {
        TAGS - self.free.len()
    }

    /// Whether one more request with `bytes` of data may be sent.
    pub fn has_room(&self, bytes: u32) -> bool {
        let PathState::Open { limits, .. } = self.state else { return false };
        let is_below = self.in_flight() < limits.requests_max as usize;
        let fits = self.bytes + u64::from(bytes) <= u64::from(limits.inflight_bytes_max);
        // A request that is alone on its path may exceed the bytes that a small peer wants to hold.
        !self.free.is_empty() && is_below && (fits || self.bytes == 0)
    }

    /// Take a tag for command number `count`; its command id comes back.
    pub fn admit(&mut self, count: u64, bytes: u32, used_for: Use) -> u64 {
        let tag = self.free.pop().expect("has_room was asked");
        let command = count * TAGS as u64 + u64::from(tag);
        let before = self.tags[usize::from(tag)].replace(InFlight { command, bytes, used_for });
        assert!(before.is_none(), "a free tag is empty");
        self.bytes += u64::from(bytes);
        command
    }

    /// What `command` was for, if it is in flight here; its tag is free again.
    pub fn finish(&mut self, command: u64) -> Option<InFlight> {
        let tag = (command % TAGS as u64) as usize;
        let found = self.tags[tag].take_if(|flight| flight.command == command)?;
        self.free.push(tag as u8);
        self.bytes -= u64::from(found.bytes);
        Some(found)
    }

    /// All that is in flight; nothing is afterwards.
    pub fn take_all(&mut self) -> Vec<InFlight> {
        let all = self.tags.iter_mut().filter_map(Option::take).collect();
        self.free = (0..TAGS as u8).rev().collect();
        self.bytes = 0;
        all
    }
}

pub(super) struct Store {
    pub target: Target,
    pub paths: [Path; PATHS_PER_STORE],
    /// Pieces that can be sent as soon as a path has room, in order.
    pub queue: VecDeque<Key>,
}

impl Store {
    /// `index` is the store's place in the session's table.
    pub fn new(index: u32, target: Target) -> Store {
        // Two targets may be one process (two of its addresses, two of its lanes), which tells
        // paths apart by slot. 128 targets have slots of their own; beyond that the generation,
        // unique in the session, still tells them apart.
        let first = (index as usize * PATHS_PER_STORE % 256) as u8;
        Store { target, paths: [Path::new(first), Path::new(first + 1)], queue: VecDeque::new() }
    }

    /// An open path, if possible with room, for what the store as a whole is to be told.
    pub fn open_path(&self) -> Option<usize> {
        let is_open = |&place: &usize| self.paths[place].host().is_some();
        let open = (0..PATHS_PER_STORE).filter(is_open);
        open.max_by_key(|&place| self.paths[place].has_room(0))
    }

    /// The path for `bytes` more: with room, not `avoid` if another is open, least loaded.
    pub fn choose(&self, bytes: u32, avoid: Option<u8>) -> Option<usize> {
        let is_open = |place: usize| self.paths[place].host().is_some();
        let has_other = avoid.is_some_and(|avoid| {
            (0..PATHS_PER_STORE).any(|place| place != usize::from(avoid) && is_open(place))
        });
        let is_allowed = |place: usize| !has_other || avoid != Some(place as u8);
        let usable =
            (0..PATHS_PER_STORE).filter(|&p| is_allowed(p) && self.paths[p].has_room(bytes));
        usable.min_by_key(|&place| (self.paths[place].bytes, self.paths[place].in_flight()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_second() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u64> = (0..9).map(|_| backoff.next(Tick(0)).0 / 1_000_000).collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.next(Tick(5)), Tick(5).after_millis(10));
    }
}
