//! What other stores have asked and are not answered yet: who, and how much per connection.
//!
//! Pure books: time and tokens come from the caller, tokens grow. A connection may have
//! [`REQUESTS_MAX`] requests and [`BYTES_MAX`] bytes of theirs under way. A replica may let a
//! request go without an answer (it follows a newer configuration now, which tells the asking
//! replica as much); such a request stays counted until room is needed, then every request older
//! than [`PATIENCE_MS`] goes. So a limit that is reached by mistake does not last.

use proto::Tick;
use std::collections::BTreeMap;

/// Requests of one connection under way: as many as the other side remembers.
pub(super) const REQUESTS_MAX: u32 = 16_384;
/// Bytes of data in them.
pub(super) const BYTES_MAX: u64 = 256 << 20;
/// After this time nobody waits for an answer: requests are said again after 500 ms, and a lane
/// that needs so long is no longer vouched for.
pub(super) const PATIENCE_MS: u64 = 5_000;

/// A request that is not answered yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Asked<C> {
    pub(super) conn: C,
    /// Its number on the connection.
    pub(super) command_id: u64,
    bytes: u64,
    pub(super) since: Tick,
}

#[derive(Default)]
struct Load {
    requests: u32,
    bytes: u64,
}

/// See the head of this module. `C` names a connection.
pub(super) struct Asks<C: Copy + Ord> {
    asked: BTreeMap<u64, Asked<C>>,
    loads: BTreeMap<C, Load>,
}

impl<C: Copy + Ord> Asks<C> {
    pub(super) fn new() -> Asks<C> {
        Asks { asked: BTreeMap::new(), loads: BTreeMap::new() }
    }

    /// A connection asks. False: it has too much under way, and the request is to be refused.
    pub(super) fn begin(
        &mut self,
        token: u64,
        conn: C,
        command_id: u64,
        bytes: u64,
        now: Tick,
    ) -> bool {
        if !self.has_room(conn, bytes) {
            self.forget_old(conn, now);
            if !self.has_room(conn, bytes) {
                return false;
            }
        }
        let before = self.asked.insert(token, Asked { conn, command_id, bytes, since: now });
        assert!(before.is_none(), "tokens are used once");
        let load = self.loads.entry(conn).or_default();
        load.requests += 1;
        load.bytes += bytes;
        true
    }

    /// A request is answered, unless that is over.
    pub(super) fn finish(&mut self, token: u64) -> Option<Asked<C>> {
        let asked = self.asked.remove(&token)?;
        let Asked { conn, bytes, .. } = asked;
        let load = self.loads.get_mut(&conn).expect("a connection with requests has a load");
        load.requests -= 1;
        load.bytes -= bytes;
        if load.requests == 0 {
            self.loads.remove(&conn);
        }
        Some(asked)
    }

    /// A connection has ended: nobody waits for its answers.
    pub(super) fn closed(&mut self, conn: C) {
        self.loads.remove(&conn);
        self.asked.retain(|_, asked| asked.conn != conn);
    }

    fn has_room(&self, conn: C, bytes: u64) -> bool {
        self.loads.get(&conn).is_none_or(|load| {
            load.requests < REQUESTS_MAX && load.bytes.saturating_add(bytes) <= BYTES_MAX
        })
    }

    fn forget_old(&mut self, conn: C, now: Tick) {
        let is_old =
            |asked: &Asked<C>| asked.conn == conn && asked.since.after_millis(PATIENCE_MS) <= now;
        let old = self.asked.iter().filter(|(_, asked)| is_old(asked));
        let tokens: Vec<u64> = old.map(|(&token, _)| token).collect();
        for token in tokens {
            self.finish(token).expect("just found");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Tick = Tick(1_000);

    fn finished(asks: &mut Asks<char>, token: u64) -> Option<(char, u64)> {
        asks.finish(token).map(|asked| (asked.conn, asked.command_id))
    }

    #[test]
    fn an_answer_finds_its_connection_and_its_number() {
        let mut asks = Asks::new();
        assert!(asks.begin(1, 'a', 70, 4096, NOW));
        assert!(asks.begin(2, 'b', 70, 0, NOW));
        assert_eq!(finished(&mut asks, 2), Some(('b', 70)));
        assert_eq!(asks.finish(2), None, "once");
        asks.closed('a');
        assert_eq!(asks.finish(1), None, "nobody is there");
        assert!(asks.asked.is_empty() && asks.loads.is_empty());
    }

    #[test]
    fn one_connection_is_bounded_and_the_others_are_not_touched() {
        let mut asks = Asks::new();
        let max = u64::from(REQUESTS_MAX);
        assert!((0..max).all(|token| asks.begin(token, 'a', token, 0, NOW)));
        assert!(!asks.begin(max, 'a', max, 0, NOW), "one too many");
        assert!(asks.begin(max, 'b', 1, 0, NOW));
        assert_eq!(finished(&mut asks, 5), Some(('a', 5)));
        assert!(asks.begin(max + 1, 'a', max, 0, NOW), "an answer makes room");
    }

    #[test]
    fn bytes_are_bounded_as_well() {
        let mut asks = Asks::new();
        assert!(asks.begin(1, 'a', 1, BYTES_MAX - 4096, NOW));
        assert!(!asks.begin(2, 'a', 2, 8192, NOW));
        assert!(asks.begin(3, 'a', 3, 4096, NOW), "what fits may go");
        assert_eq!(finished(&mut asks, 1), Some(('a', 1)));
        assert!(asks.begin(4, 'a', 4, 8192, NOW));
    }

    #[test]
    fn what_was_never_answered_makes_room_after_a_while_and_not_before() {
        let mut asks = Asks::new();
        assert!(asks.begin(1, 'a', 1, BYTES_MAX, NOW));
        let almost = Tick(NOW.after_millis(PATIENCE_MS).0 - 1);
        assert!(!asks.begin(2, 'a', 2, 4096, almost));
        assert!(asks.begin(3, 'a', 3, 4096, NOW.after_millis(PATIENCE_MS)));
        assert_eq!(asks.finish(1), None, "its answer goes nowhere");
        assert_eq!(finished(&mut asks, 3), Some(('a', 3)));
        assert!(asks.loads.is_empty());
    }
}
