//! Ghost writes (docs/internals/replication.md, section 6), rule by rule, then random histories
//! against books kept the slow way.

use super::*;
use crate::seeded::{Rule, demand};
use proptest::prelude::*;
use proto::wire::{HEADER_BYTES, Request, RequestOp};
use proto::{Epoch, Seq, ShardId, VolumeId};
use std::collections::BTreeSet;

const SESSION: u64 = 77;

fn header(command_id: u64) -> Header {
    let shard = ShardId { volume: VolumeId(3), index: 0 };
    let op = RequestOp::Flush;
    let request =
        Request { command_id, shard, epoch: Epoch(4), attach_epoch: 1, is_fua: false, op };
    Header::parse(&request.encode().head[..HEADER_BYTES]).expect("our own header")
}

fn lsn(seq: u64) -> Option<Lsn> {
    Some(Lsn { epoch: Epoch(4), seq: Seq(seq) })
}

fn outcome(command_id: u64, seq: u64, status: Status) -> FenceOutcome {
    FenceOutcome { command_id, lsn: lsn(seq).expect("one"), status, detail: 0 }
}

/// Connection 1 in slot 0 and connection 2 in slot 1 of one session.
fn two_paths() -> Paths<u32> {
    let mut paths = Paths::new();
    paths.hello(1, SESSION, 0, 1).expect("nothing is fenced");
    paths.hello(2, SESSION, 1, 2).expect("nothing is fenced");
    paths
}

fn is_empty(paths: &Paths<u32>) -> bool {
    let Paths { conns, openings, begun, fences, outcomes_order, outcomes_kept, .. } = paths;
    let is_told = outcomes_order.is_empty() && *outcomes_kept == 0;
    conns.is_empty() && openings.is_empty() && begun.is_empty() && fences.is_empty() && is_told
}

#[test]
fn a_fence_closes_its_openings_and_waits_for_their_requests() {
    let mut paths = two_paths();
    assert!(paths.begin(1, &header(10), 100));
    assert!(paths.begin(1, &header(11), 101));
    assert!(paths.begin(2, &header(12), 102));
    assert_eq!(paths.fence(2, header(13), 0, 1), [1]);
    assert_eq!(paths.ready_fences(), [], "two requests are open");
    paths.finish(101, lsn(5), Status::Ok);
    assert_eq!(paths.ready_fences(), [], "one request is open");
    paths.finish(100, None, Status::NotPrimary);
    let told = vec![outcome(11, 5, Status::Ok)];
    assert_eq!(paths.ready_fences(), [(2, header(13), told)], "the other had no effect");
    assert_eq!(paths.ready_fences(), [], "once");
    paths.finish(102, lsn(6), Status::Ok);
    paths.closed(1);
    paths.closed(2);
    assert!(is_empty(&paths));
}

#[test]
fn a_fence_without_open_requests_is_ready_at_once() {
    let mut paths = two_paths();
    assert_eq!(paths.fence(2, header(13), 0, 1), [1]);
    assert_eq!(paths.ready_fences(), [(2, header(13), vec![])]);
}

#[test]
fn nothing_begins_on_a_fenced_connection() {
    let mut paths = two_paths();
    assert_eq!(paths.fence(2, header(13), 0, 1), [1]);
    assert!(!paths.begin(1, &header(14), 100), "it had been read before the end was");
    assert_eq!(paths.fence(1, header(15), 1, 2), [], "nor does it fence others");
    assert_eq!(paths.ready_fences().len(), 1);
    assert!(paths.begin(2, &header(16), 101));
}

#[test]
fn nothing_begins_before_hello() {
    let mut paths: Paths<u32> = Paths::new();
    assert!(!paths.begin(1, &header(10), 100));
    assert_eq!(paths.fence(1, header(11), 0, 9), []);
    assert_eq!(paths.ready_fences(), [], "nobody to answer");
    paths.closed(1);
    assert!(is_empty(&paths));
}

#[test]
fn a_fenced_opening_is_never_accepted_again() {
    let mut paths = two_paths();
    assert_eq!(paths.fence(2, header(13), 0, 5), [1]);
    assert_eq!(paths.hello(3, SESSION, 0, 5), Err(Status::Fenced), "it was under way");
    assert_eq!(paths.hello(3, SESSION, 0, 6), Ok(()));
    assert_eq!(paths.hello(4, SESSION, 1, 5), Ok(()), "another slot");
    assert_eq!(paths.hello(5, SESSION + 1, 0, 1), Ok(()), "another session");
    // A fence that comes late takes nothing back.
    assert_eq!(paths.fence(2, header(14), 0, 2), []);
    assert_eq!(paths.hello(6, SESSION, 0, 5), Err(Status::Fenced));
}

#[test]
fn a_fence_reaches_older_generations_and_no_newer_ones() {
    let mut paths = two_paths();
    paths.hello(3, SESSION, 0, 3).expect("not fenced");
    paths.hello(4, SESSION, 0, 4).expect("not fenced");
    paths.hello(5, SESSION + 1, 0, 1).expect("not fenced");
    assert!(paths.begin(4, &header(10), 100));
    assert_eq!(paths.fence(2, header(13), 0, 3), [1, 3]);
    assert_eq!(paths.ready_fences().len(), 1, "the newer opening's request is none of its");
}

#[test]
fn every_connection_of_a_repeated_generation_is_closed() {
    let mut paths = two_paths();
    paths.hello(3, SESSION, 0, 1).expect("not fenced");
    paths.closed(3);
    assert!(paths.begin(1, &header(10), 100), "the other lives on");
    paths.hello(4, SESSION, 0, 1).expect("not fenced");
    assert_eq!(paths.fence(2, header(13), 0, 1), [1, 4]);
}

#[test]
fn the_outcome_of_a_request_is_kept_when_its_connection_has_ended() {
    let mut paths = two_paths();
    assert!(paths.begin(1, &header(10), 100));
    assert!(paths.begin(1, &header(11), 101));
    assert!(paths.begin(1, &header(12), 102));
    paths.finish(100, lsn(5), Status::Ok);
    paths.closed(1);
    paths.finish(101, lsn(6), Status::MediaError);
    paths.finish(102, None, Status::Ok);
    assert_eq!(paths.fence(2, header(13), 0, 1), [], "it is closed already");
    let told = vec![outcome(11, 6, Status::MediaError)];
    assert_eq!(paths.ready_fences(), [(2, header(13), told)], "10 was answered, 12 had no lsn");
}

#[test]
fn nothing_is_kept_of_an_opening_that_has_nothing_to_tell() {
    let mut paths = two_paths();
    assert!(paths.begin(1, &header(10), 100));
    assert!(paths.begin(1, &header(11), 101));
    paths.closed(1);
    paths.closed(2);
    paths.finish(100, None, Status::Ok);
    paths.finish(101, None, Status::NotPrimary);
    assert!(is_empty(&paths), "a read and a refusal have no outcome: {paths:?}");
}

#[test]
fn a_fence_whose_connection_ends_leaves_the_outcomes_to_the_next() {
    let mut paths = two_paths();
    assert!(paths.begin(1, &header(10), 100));
    assert_eq!(paths.fence(2, header(13), 0, 1), [1]);
    paths.closed(2);
    paths.finish(100, lsn(5), Status::Ok);
    assert_eq!(paths.ready_fences(), [], "nobody to answer");
    paths.hello(3, SESSION, 2, 3).expect("not fenced");
    assert_eq!(paths.fence(3, header(14), 0, 1), []);
    let told = vec![outcome(10, 5, Status::Ok)];
    assert_eq!(paths.ready_fences(), [(3, header(14), told)]);
}

#[test]
fn fences_are_answered_in_order_as_they_become_ready() {
    let mut paths = two_paths();
    paths.hello(3, SESSION, 2, 3).expect("not fenced");
    assert!(paths.begin(1, &header(10), 100));
    assert_eq!(paths.fence(3, header(13), 0, 1), [1]);
    assert_eq!(paths.fence(3, header(14), 1, 2), [2]);
    assert_eq!(paths.fence(3, header(15), 0, 1), []);
    assert_eq!(paths.ready_fences(), [(3, header(14), vec![])], "its slot has nothing open");
    paths.finish(100, lsn(5), Status::Ok);
    let told = vec![outcome(10, 5, Status::Ok)];
    let ready = paths.ready_fences();
    assert_eq!(ready, [(3, header(13), told), (3, header(15), vec![])]);
}

#[test]
fn a_path_may_fence_itself() {
    let mut paths = two_paths();
    assert_eq!(paths.fence(1, header(10), 0, 1), [1]);
    assert_eq!(paths.ready_fences(), [(1, header(10), vec![])]);
}

#[test]
fn the_slot_that_was_fenced_longest_ago_is_forgotten_first() {
    let mut paths: Paths<u32> = Paths::new();
    paths.hello(0, SESSION, 0, 1).expect("not fenced");
    let again = 3;
    // The smallest session comes last: it must not be the one to go.
    for session in (0..=FENCED_MAX as u64).rev().chain([again]) {
        let conn = 1 + session as u32;
        paths.closed(conn);
        paths.hello(conn, 1_000 + session, 1, 9).expect("slot 1 is not fenced");
        assert_eq!(paths.fence(conn, header(1), 0, 5), []);
        assert_eq!(paths.ready_fences().len(), 1);
    }
    let newest_first = 1_000 + FENCED_MAX as u64;
    assert_eq!(paths.hello(900_000, newest_first, 0, 5), Ok(()), "forgotten");
    assert_eq!(paths.hello(900_001, newest_first - 1, 0, 5), Err(Status::Fenced));
    assert_eq!(paths.hello(900_001, 1_000, 0, 5), Err(Status::Fenced), "the last one");
    assert_eq!(paths.hello(900_001, 1_000 + again, 0, 5), Err(Status::Fenced));
    assert_eq!(paths.fenced.len(), paths.fenced_order.len());
}

/// A client that connects, writes, dies and never comes back.
fn die_with_writes(paths: &mut Paths<u32>, session: u64, conn: u32, writes: u64) {
    paths.hello(conn, session, 0, 1).expect("not fenced");
    let tokens = session * 1_000_000..session * 1_000_000 + writes;
    tokens.clone().for_each(|token| assert!(paths.begin(conn, &header(token), token)));
    paths.closed(conn);
    tokens.for_each(|token| paths.finish(token, lsn(token), Status::Ok));
}

#[test]
fn outcomes_that_nobody_asks_for_are_bounded_and_their_session_is_out() {
    let mut paths = Paths::new();
    let each = OUTCOMES_MAX as u64 / 2;
    // Session 1 has lost a connection with outcomes and holds another one, with a request open.
    die_with_writes(&mut paths, 1, 10, each);
    paths.hello(11, 1, 1, 1).expect("not fenced");
    assert!(paths.begin(11, &header(7), 7));
    die_with_writes(&mut paths, 2, 20, each);
    assert_eq!((paths.outcomes_kept, paths.orphaned()), (OUTCOMES_MAX, vec![]), "as many as fit");

    die_with_writes(&mut paths, 3, 30, 1);
    assert_eq!(paths.outcomes_kept, each as usize + 1, "the oldest session's are given up");
    assert_eq!(paths.orphaned(), [11], "it cannot be told what became of them, so it is out");
    assert_eq!(paths.orphaned(), [], "once");
    assert!(!paths.begin(11, &header(8), 8));
    assert_eq!(paths.hello(12, 1, 2, 9), Err(Status::Fenced), "also with another slot");
    paths.finish(7, lsn(7), Status::Ok);
    assert_eq!(paths.outcomes_kept, each as usize + 1, "nothing is kept for it any more");

    // The others are as they were.
    paths.hello(21, 2, 1, 1).expect("not forgotten");
    assert_eq!(paths.fence(21, header(9), 0, 1), []);
    let (_, _, told) = paths.ready_fences().pop().expect("nothing is open");
    assert_eq!(told.len(), each as usize);
    assert_eq!(paths.outcomes_kept, 1);
}

#[test]
fn a_fence_of_a_forgotten_session_is_never_answered() {
    let mut paths = Paths::new();
    die_with_writes(&mut paths, 1, 10, OUTCOMES_MAX as u64);
    paths.hello(11, 1, 1, 1).expect("not fenced");
    paths.hello(12, 1, 0, 2).expect("not fenced");
    assert!(paths.begin(12, &header(7), 7));
    // It waits for the open request of generation 2; before that ends, the session is forgotten.
    assert_eq!(paths.fence(11, header(9), 0, 2), [12]);
    assert_eq!(paths.ready_fences(), []);
    die_with_writes(&mut paths, 2, 20, 1);
    assert_eq!(paths.orphaned(), [11]);
    paths.finish(7, lsn(7), Status::Ok);
    assert_eq!(paths.ready_fences(), [], "an answer without its outcomes would be a lie");
}

#[test]
#[should_panic(expected = "ends once")]
fn a_request_ends_once() {
    let mut paths = two_paths();
    assert!(paths.begin(1, &header(10), 100));
    paths.finish(100, None, Status::Ok);
    paths.finish(100, None, Status::Ok);
}

/// The rules of this file that a seeded bug breaks.
pub(crate) const RULES: [Rule; 1] = [Rule::new(
    Mutant::NoPathFencing,
    "paths: nothing of a fenced slot begins or is forgotten",
    a_fence_holds,
)];

/// "The primary closes A, drops A's requests without lsn, answers with the outcome of those that have
/// one. Only then the rest is re-sent" (section 6).
fn a_fence_holds(mutant: Mutant) -> Result<(), String> {
    let mut paths = Paths::with_mutant(mutant);
    paths.hello(1, SESSION, 0, 1).expect("nothing is fenced");
    paths.hello(2, SESSION, 1, 2).expect("nothing is fenced");
    demand(paths.begin(1, &header(10), 100), "an open path took no request")?;
    demand(paths.fence(2, header(13), 0, 1) == [1], "the fenced path stayed open")?;
    demand(paths.ready_fences().is_empty(), "answered while a request was open")?;
    demand(!paths.begin(1, &header(11), 101), "a request of a fenced path began")?;
    demand(paths.hello(3, SESSION, 0, 1).is_err(), "a fenced path was opened again")?;
    paths.finish(100, lsn(5), Status::Ok);
    let told = vec![outcome(10, 5, Status::Ok)];
    demand(paths.ready_fences() == [(2, header(13), told)], "the outcome was not told")
}

// --------------------------------------------------------------------------- random histories --

#[derive(Clone, Debug)]
enum Fate {
    Hello { session: u64, slot: u8, generation: u64 },
    Begin { which: usize },
    Finish { which: usize, has_lsn: bool },
    Fence { which: usize, slot: u8, generation: u64 },
    Closed { which: usize },
}

fn fate() -> impl Strategy<Value = Fate> {
    let place = (0..2_u64, 0..3_u8, 1..6_u64);
    prop_oneof![
        4 => place.prop_map(|(session, slot, generation)| Fate::Hello { session, slot, generation }),
        6 => any::<usize>().prop_map(|which| Fate::Begin { which }),
        5 => (any::<usize>(), any::<bool>())
            .prop_map(|(which, has_lsn)| Fate::Finish { which, has_lsn }),
        2 => (any::<usize>(), 0..3_u8, 1..6_u64)
            .prop_map(|(which, slot, generation)| Fate::Fence { which, slot, generation }),
        2 => any::<usize>().prop_map(|which| Fate::Closed { which }),
    ]
}

/// Everything that ever happened; each question is answered by looking through all of it.
#[derive(Default)]
struct History {
    /// Connection, its opening, whether it may still begin requests.
    conns: Vec<(u32, OpeningKey, bool)>,
    /// Token, connection, whether it is over.
    requests: Vec<(u64, u32, bool)>,
    /// Outcomes that nobody has been told, by opening.
    untold: Vec<(OpeningKey, FenceOutcome)>,
    /// Command id, connection, upto.
    fences: Vec<(u64, u32, OpeningKey)>,
    answered: BTreeSet<u64>,
    every_fence: Vec<OpeningKey>,
}

fn reaches(upto: OpeningKey, key: OpeningKey) -> bool {
    (upto.0, upto.1) == (key.0, key.1) && key.2 <= upto.2
}

impl History {
    fn conn(&self, conn: u32) -> (OpeningKey, bool) {
        let found = self.conns.iter().find(|(known, ..)| *known == conn).expect("known");
        (found.1, found.2)
    }

    fn pick<T: std::marker::Copy>(list: &[T], which: usize) -> Option<T> {
        (!list.is_empty()).then(|| list[which % list.len()])
    }

    fn live(&self) -> Vec<u32> {
        self.conns.iter().filter(|(.., is_live)| *is_live).map(|(conn, ..)| *conn).collect()
    }

    fn expect_ready(&mut self) -> Vec<(u32, u64, Vec<FenceOutcome>)> {
        let mut ready = Vec::new();
        for (command_id, conn, upto) in mem::take(&mut self.fences) {
            let is_open = self
                .requests
                .iter()
                .any(|(_, conn, is_over)| !is_over && reaches(upto, self.conn(*conn).0));
            if is_open {
                self.fences.push((command_id, conn, upto));
                continue;
            }
            let (mut told, rest): (Vec<_>, Vec<_>) =
                mem::take(&mut self.untold).into_iter().partition(|(key, _)| reaches(upto, *key));
            self.untold = rest;
            told.sort_by_key(|(key, _)| *key);
            assert!(self.answered.insert(command_id), "a fence is answered once");
            ready.push((conn, command_id, told.into_iter().map(|(_, outcome)| outcome).collect()));
        }
        ready
    }

    fn happen(&mut self, paths: &mut Paths<u32>, number: u64, fate: Fate) {
        match fate {
            Fate::Hello { session, slot, generation } => {
                let key = (session, slot, generation);
                let is_fenced = self.every_fence.iter().any(|upto| reaches(*upto, key));
                let expected = if is_fenced { Err(Status::Fenced) } else { Ok(()) };
                let conn = number as u32;
                assert_eq!(paths.hello(conn, session, slot, generation), expected);
                if !is_fenced {
                    self.conns.push((conn, key, true));
                }
            }
            Fate::Begin { which } => {
                let Some((conn, _, is_live)) = History::pick(&self.conns, which) else { return };
                assert_eq!(paths.begin(conn, &header(number), number), is_live);
                if is_live {
                    self.requests.push((number, conn, false));
                }
            }
            Fate::Finish { which, has_lsn } => {
                let open: Vec<(u64, u32)> = self
                    .requests
                    .iter()
                    .filter(|(.., is_over)| !is_over)
                    .map(|(token, conn, _)| (*token, *conn))
                    .collect();
                let Some((token, conn)) = History::pick(&open, which) else { return };
                let lsn = lsn(number).filter(|_| has_lsn);
                paths.finish(token, lsn, Status::Ok);
                let (key, is_live) = self.conn(conn);
                if has_lsn && !is_live {
                    self.untold.push((key, outcome(token, number, Status::Ok)));
                }
                for request in self.requests.iter_mut().filter(|request| request.0 == token) {
                    request.2 = true;
                }
            }
            Fate::Fence { which, slot, generation } => {
                let Some(conn) = History::pick(&self.live(), which) else { return };
                let upto = (self.conn(conn).0.0, slot, generation);
                let mut expected = Vec::new();
                for (conn, key, is_live) in &mut self.conns {
                    if *is_live && reaches(upto, *key) {
                        *is_live = false;
                        expected.push(*conn);
                    }
                }
                self.every_fence.push(upto);
                self.fences.push((number, conn, upto));
                let mut closed = paths.fence(conn, header(number), slot, generation);
                closed.sort_unstable();
                assert_eq!(closed, expected);
            }
            Fate::Closed { which } => {
                let Some((conn, ..)) = History::pick(&self.conns, which) else { return };
                paths.closed(conn);
                self.fences.retain(|fence| fence.1 != conn);
                for known in self.conns.iter_mut().filter(|known| known.0 == conn) {
                    known.2 = false;
                }
            }
        }
    }

    fn compare(&mut self, paths: &mut Paths<u32>) {
        let ready = paths.ready_fences();
        let ready = ready.into_iter().map(|(conn, header, told)| (conn, header.command_id, told));
        assert_eq!(ready.collect::<Vec<_>>(), self.expect_ready());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn any_history_ends_as_its_books_say(fates in prop::collection::vec(fate(), 1..120)) {
        let (mut paths, mut history) = (Paths::new(), History::default());
        for (number, fate) in (1_u64..).zip(fates) {
            history.happen(&mut paths, number, fate);
            history.compare(&mut paths);
        }
        // Everything ends and is fenced: nothing is kept but what is fenced.
        for (number, which) in (1_000_u64..).zip(0..history.requests.len()) {
            history.happen(&mut paths, number, Fate::Finish { which, has_lsn: true });
            history.compare(&mut paths);
        }
        for session in 0..2 {
            paths.hello(9_000, session, 3, 1).expect("slot 3 is never fenced");
            for slot in 0..3 {
                let closed = paths.fence(9_000, header(1), slot, 9);
                prop_assert!(closed.iter().all(|conn| history.conn(*conn).1));
            }
            prop_assert_eq!(paths.ready_fences().len(), 3);
            paths.closed(9_000);
        }
        prop_assert!(is_empty(&paths));
    }
}
