//! Each rule of section 4 of docs/internals/replication.md by itself, then a world of two stores
//! that lose, repeat and delay, with clocks that disagree.

use super::*;
use crate::seeded::{Rule, demand};
use proptest::prelude::*;
use proto::VolumeId;

const A: StoreId = 1;
const B: StoreId = 2;
const C: StoreId = 3;
const L: u64 = 1_500;
const G: u64 = 2_250;

fn ms(at: u64) -> Tick {
    Tick(0).after_millis(at)
}

fn shard(index: u32) -> ShardId {
    ShardId { volume: VolumeId(7), index }
}

fn machine(store: StoreId, incarnation: Incarnation) -> Heartbeats {
    Heartbeats::new(store, incarnation, ms(0), Timing::default(), Mutant::None)
}

fn step(machine: &mut Heartbeats, at: u64, event: Event) -> Vec<Effect> {
    let mut out = Vec::new();
    machine.step(ms(at), event, &mut out);
    out
}

fn claim_at(index: u32, reign: u64, epoch: u64, stores: &[(StoreId, Incarnation)]) -> Event {
    let (reign, epoch) = (Epoch(reign), Epoch(epoch));
    Event::Claim { shard: shard(index), reign, epoch, stores: stores.to_vec() }
}

/// Claim a shard at B's first life.
fn claim(index: u32, epoch: u64) -> Event {
    claim_at(index, epoch, epoch, &[(B, 1)])
}

/// The one heartbeat that is sent at this time.
fn sent(machine: &mut Heartbeats, at: u64) -> Ping {
    let mut pings = all_sent(machine, at);
    assert_eq!(pings.len(), 1, "one heartbeat at {at} ms");
    pings.remove(0).1
}

fn all_sent(machine: &mut Heartbeats, at: u64) -> Vec<(StoreId, Ping)> {
    let out = step(machine, at, Event::Tick);
    let ping = |effect| match effect {
        Effect::Send { to, ping } => Some((to, ping)),
        Effect::Answer { .. } | Effect::Newer { .. } | Effect::Wake(_) => None,
    };
    out.into_iter().filter_map(ping).collect()
}

fn answer(machine: &mut Heartbeats, at: u64, ping: &Ping) -> Ping {
    let event = Event::Ping { from: ping.store, token: 9, ping: ping.clone() };
    let out = step(machine, at, event);
    let [Effect::Answer { token: 9, ping }] = &out[..] else { panic!("one answer: {out:?}") };
    ping.clone()
}

fn pong(machine: &mut Heartbeats, at: u64, ping: &Ping) -> Vec<Effect> {
    step(machine, at, Event::Pong { from: ping.store, ping: ping.clone() })
}

fn lease(machine: &Heartbeats, index: u32) -> Tick {
    machine.lease_until(shard(index), B, 1)
}

fn promise(machine: &Heartbeats, index: u32) -> Tick {
    machine.promised_until(shard(index))
}

/// Both machines after one heartbeat of A that B has got at 20 ms and whose answer A has at 30 ms.
fn leased(shards: u32) -> (Heartbeats, Heartbeats) {
    let (mut a, mut b) = (machine(A, 1), machine(B, 1));
    for index in 0..shards {
        step(&mut a, 10, claim(index, 5));
    }
    let ping = sent(&mut a, 10);
    let reply = answer(&mut b, 20, &ping);
    pong(&mut a, 30, &reply);
    (a, b)
}

#[test]
fn a_lease_counts_from_sending_and_a_promise_from_receipt() {
    let (a, b) = leased(2);
    assert_eq!((lease(&a, 0), lease(&a, 1)), (ms(10 + L), ms(10 + L)));
    assert_eq!((promise(&b, 0), promise(&b, 1)), (ms(20 + G), ms(20 + G)));
    assert_eq!(lease(&a, 2), Tick(0), "never claimed");
    assert_eq!(promise(&b, 2), Tick(0), "never listed");
    assert_eq!(b.heard_at(shard(0), A), Some(ms(20)));
    assert_eq!(b.heard_at(shard(2), A), None);
    assert_eq!(a.lease_until(shard(0), B, 2), Tick(0), "of another life of B");
    assert_eq!(a.lease_until(shard(0), C, 1), Tick(0), "of another store");
}

#[test]
fn nothing_is_leased_before_the_acknowledgement() {
    let mut a = machine(A, 1);
    step(&mut a, 10, claim(0, 5));
    sent(&mut a, 10);
    assert_eq!(lease(&a, 0), Tick(0));
}

#[test]
fn a_pair_that_claims_is_heard_every_200_ms_and_otherwise_never() {
    let mut a = machine(A, 1);
    assert_eq!(step(&mut a, 5, Event::Tick), []);
    let out = step(&mut a, 10, claim(0, 5));
    assert_eq!(out, [Effect::Wake(ms(10))], "news go at once");
    let out = step(&mut a, 10, Event::Tick);
    assert!(matches!(&out[..], [Effect::Send { to: B, .. }, Effect::Wake(at)] if *at == ms(210)));
    assert_eq!(step(&mut a, 209, Event::Tick), [], "too early, and already asked for");
    assert_eq!(sent(&mut a, 210).sequence, 2);
    step(&mut a, 300, Event::Unclaim { shard: shard(0) });
    assert_eq!(step(&mut a, 410, Event::Tick), [], "nothing listed, nothing said, no wake");
}

#[test]
fn news_wait_for_an_eighth_of_the_interval() {
    let mut a = machine(A, 1);
    step(&mut a, 10, claim(0, 5));
    sent(&mut a, 10);
    assert_eq!(step(&mut a, 12, claim(1, 5)), [Effect::Wake(ms(35))]);
    assert_eq!(step(&mut a, 34, Event::Tick), []);
    assert_eq!(sent(&mut a, 35).entries.len(), 2);
    assert_eq!(step(&mut a, 40, claim(1, 5)), [], "no news");
}

#[test]
fn a_pair_that_was_silent_is_not_late() {
    let (mut a, _) = leased(1);
    step(&mut a, 40, claim_at(1, 5, 5, &[(C, 1)]));
    step(&mut a, 40, Event::Unclaim { shard: shard(1) });
    for at in [210, 410, 610, 810, 1010] {
        sent(&mut a, at);
    }
    step(&mut a, 1_100, claim_at(1, 6, 6, &[(C, 1)]));
    all_sent(&mut a, 1_100);
    assert_eq!(lease(&a, 0), ms(10 + L), "B's lease was not dropped as if A had slept");
}

#[test]
fn the_store_itself_is_passed_over() {
    let mut a = machine(A, 1);
    step(&mut a, 10, claim_at(0, 5, 5, &[(A, 1), (B, 1), (C, 4)]));
    let sent = all_sent(&mut a, 10);
    let to: Vec<_> = sent.iter().map(|(to, ping)| (*to, ping.peer_incarnation)).collect();
    assert_eq!(to, [(B, 1), (C, 4)]);
}

#[test]
fn after_an_acknowledgement_only_differences_are_sent_and_all_shards_renewed() {
    let (mut a, mut b) = leased(3);
    step(&mut a, 40, Event::Unclaim { shard: shard(1) });
    step(&mut a, 40, claim_at(2, 5, 6, &[(B, 1)]));
    let ping = sent(&mut a, 210);
    assert_eq!((ping.sequence, ping.base_sequence), (2, 1));
    let record = |index, epoch, kind| HeartbeatEntry { shard: shard(index), epoch, kind };
    let expected =
        [record(1, Epoch(5), HeartbeatKind::Drop), record(2, Epoch(6), HeartbeatKind::Lease)];
    assert_eq!(ping.entries, expected);
    let reply = answer(&mut b, 220, &ping);
    assert_eq!(promise(&b, 0), ms(220 + G), "renewed without being named");
    assert_eq!(promise(&b, 1), ms(20 + G), "a promise survives the drop, until its time");
    pong(&mut a, 230, &reply);
    assert_eq!((lease(&a, 0), lease(&a, 2)), (ms(210 + L), ms(210 + L)), "the reign goes on");
    assert_eq!(lease(&a, 1), Tick(0));
    assert_eq!(sent(&mut a, 410).entries, [], "the drop has arrived");
}

#[test]
fn a_drop_outlives_the_acknowledgement_of_what_it_takes_back() {
    let (mut a, mut b) = leased(2);
    let reply = answer(&mut b, 220, &sent(&mut a, 210));
    step(&mut a, 225, Event::Unclaim { shard: shard(1) });
    pong(&mut a, 230, &reply);
    let kind = HeartbeatKind::Drop;
    let ping = sent(&mut a, 410);
    assert_eq!(ping.entries, [HeartbeatEntry { shard: shard(1), epoch: Epoch(5), kind }]);
    answer(&mut b, 420, &ping);
    assert_eq!((promise(&b, 0), promise(&b, 1)), (ms(420 + G), ms(220 + G)));
}

#[test]
fn a_loss_is_repaired_by_the_next_heartbeat() {
    let (mut a, mut b) = leased(1);
    step(&mut a, 40, claim(1, 5));
    let lost = sent(&mut a, 40);
    assert_eq!(lost.entries.len(), 1);
    step(&mut a, 50, Event::Unclaim { shard: shard(0) });
    let ping = sent(&mut a, 240);
    assert_eq!((ping.base_sequence, ping.entries.len()), (1, 2), "both since the acknowledged one");
    pong(&mut a, 250, &answer(&mut b, 245, &ping));
    assert_eq!(promise(&b, 1), ms(245 + G));
    assert_eq!(lease(&a, 1), ms(240 + L));
    // The lost one turns up: it neither revives what was dropped nor renews anything.
    let reply = answer(&mut b, 400, &lost);
    assert_eq!((promise(&b, 0), promise(&b, 1)), (ms(20 + G), ms(245 + G)));
    assert_eq!(b.heard_at(shard(1), A), Some(ms(245)));
    assert_eq!((reply.sequence, reply.base_sequence), (2, 3), "what B holds is the newer one");
    pong(&mut a, 410, &reply);
    assert_eq!(lease(&a, 1), ms(240 + L));
}

#[test]
fn a_repeated_heartbeat_renews_nothing() {
    let (mut a, mut b) = leased(1);
    let ping = sent(&mut a, 210);
    answer(&mut b, 220, &ping);
    answer(&mut b, 900, &ping);
    assert_eq!(promise(&b, 0), ms(220 + G));
}

#[test]
fn a_late_acknowledgement_shortens_no_lease() {
    let (mut a, mut b) = leased(1);
    let early = sent(&mut a, 210);
    let early = answer(&mut b, 220, &early);
    let late = sent(&mut a, 410);
    pong(&mut a, 430, &answer(&mut b, 420, &late));
    pong(&mut a, 440, &early);
    assert_eq!(lease(&a, 0), ms(410 + L));
    assert_eq!(sent(&mut a, 610).base_sequence, 3, "nor is the base taken back");
}

#[test]
fn an_older_base_than_what_the_receiver_holds_is_enough() {
    let (mut a, mut b) = leased(1);
    step(&mut a, 40, claim(1, 5));
    answer(&mut b, 50, &sent(&mut a, 40));
    step(&mut a, 60, Event::Unclaim { shard: shard(1) });
    // The answer was lost: the base is still the first one, and B holds the second.
    let ping = sent(&mut a, 240);
    assert_eq!(ping.base_sequence, 1);
    pong(&mut a, 260, &answer(&mut b, 250, &ping));
    assert_eq!(promise(&b, 1), ms(50 + G), "dropped");
    assert_eq!((promise(&b, 0), lease(&a, 0)), (ms(250 + G), ms(240 + L)));
}

#[test]
fn a_receiver_without_the_base_gets_the_complete_list() {
    let (mut a, _) = leased(2);
    let mut forgetful = machine(B, 1);
    step(&mut a, 40, Event::Unclaim { shard: shard(1) });
    let reply = answer(&mut forgetful, 220, &sent(&mut a, 210));
    assert_eq!(reply.base_sequence, 0);
    assert_eq!(promise(&forgetful, 0), Tick(0), "a difference to nothing promises nothing");
    pong(&mut a, 230, &reply);
    assert_eq!(lease(&a, 0), ms(10 + L), "and acknowledges nothing");
    let ping = sent(&mut a, 410);
    assert_eq!((ping.base_sequence, ping.entries.len()), (0, 1));
    pong(&mut a, 430, &answer(&mut forgetful, 420, &ping));
    assert_eq!((promise(&forgetful, 0), lease(&a, 0)), (ms(420 + G), ms(410 + L)));
}

#[test]
fn a_complete_list_replaces_what_was_listed() {
    let (mut a, mut b) = leased(2);
    let mut ping = sent(&mut a, 210);
    let entry = HeartbeatEntry { shard: shard(1), epoch: Epoch(5), kind: HeartbeatKind::Lease };
    (ping.base_sequence, ping.entries) = (0, vec![entry]);
    answer(&mut b, 220, &ping);
    assert_eq!((promise(&b, 0), promise(&b, 1)), (ms(20 + G), ms(220 + G)));
}

#[test]
fn a_new_reign_begins_without_lease() {
    let (mut a, mut b) = leased(1);
    // Sent while the first reign lasted, answered in the second.
    let old = sent(&mut a, 210);
    let old = answer(&mut b, 220, &old);
    step(&mut a, 225, claim(0, 8));
    assert_eq!(lease(&a, 0), Tick(0));
    pong(&mut a, 230, &old);
    assert_eq!(lease(&a, 0), Tick(0), "it listed the shard in another reign");
    let new = sent(&mut a, 235);
    pong(&mut a, 236, &old);
    assert_eq!(lease(&a, 0), Tick(0), "also once the new reign has been listed");
    pong(&mut a, 250, &answer(&mut b, 240, &new));
    assert_eq!(lease(&a, 0), ms(235 + L));
}

#[test]
fn a_claim_taken_up_again_begins_without_lease() {
    let (mut a, mut b) = leased(1);
    let old = sent(&mut a, 210);
    let old = answer(&mut b, 220, &old);
    step(&mut a, 225, Event::Unclaim { shard: shard(0) });
    assert_eq!(lease(&a, 0), Tick(0));
    step(&mut a, 226, claim(0, 5));
    pong(&mut a, 230, &old);
    assert_eq!(lease(&a, 0), Tick(0));
}

#[test]
fn a_store_that_a_claim_no_longer_names_is_dropped() {
    let (mut a, mut b) = leased(1);
    step(&mut a, 40, claim_at(0, 5, 6, &[(C, 1)]));
    assert_eq!(lease(&a, 0), Tick(0));
    step(&mut a, 40, claim(1, 5));
    let to_b = all_sent(&mut a, 40).into_iter().find(|(to, _)| *to == B).expect("shard 1 is B's");
    answer(&mut b, 50, &to_b.1);
    assert_eq!((promise(&b, 0), promise(&b, 1)), (ms(20 + G), ms(50 + G)));
}

#[test]
fn a_deposed_primary_is_refused_and_told() {
    let (mut a, mut b) = leased(2);
    step(&mut b, 100, Event::Promise { shard: shard(0), epoch: Epoch(6) });
    step(&mut b, 100, Event::Promise { shard: shard(0), epoch: Epoch(3) });
    let reply = answer(&mut b, 220, &sent(&mut a, 210));
    let kind = HeartbeatKind::Refused;
    assert_eq!(reply.entries, [HeartbeatEntry { shard: shard(0), epoch: Epoch(6), kind }]);
    assert_eq!(promise(&b, 0), ms(20 + G), "not renewed");
    assert_eq!(b.heard_at(shard(0), A), Some(ms(20)), "nor heard");
    assert_eq!(promise(&b, 1), ms(220 + G), "its other shards are");
    let out = pong(&mut a, 230, &reply);
    assert_eq!(out, [Effect::Newer { shard: shard(0), epoch: Epoch(6) }]);
    assert_eq!((lease(&a, 0), lease(&a, 1)), (ms(10 + L), ms(210 + L)));
    // The configuration of that epoch names A again: the same reign goes on.
    step(&mut a, 240, claim_at(0, 5, 6, &[(B, 1)]));
    assert_eq!(pong(&mut a, 241, &reply), [], "no longer newer");
    let reply = answer(&mut b, 250, &sent(&mut a, 245));
    assert_eq!(reply.entries, []);
    pong(&mut a, 260, &reply);
    assert_eq!((promise(&b, 0), lease(&a, 0)), (ms(250 + G), ms(245 + L)));
}

#[test]
fn a_refused_listing_creates_no_promise() {
    let (mut a, mut b) = (machine(A, 1), machine(B, 1));
    step(&mut b, 5, Event::Promise { shard: shard(0), epoch: Epoch(6) });
    step(&mut a, 10, claim(0, 5));
    let reply = answer(&mut b, 20, &sent(&mut a, 10));
    assert_eq!((promise(&b, 0), b.heard_at(shard(0), A)), (Tick(0), None));
    pong(&mut a, 30, &reply);
    assert_eq!(lease(&a, 0), Tick(0));
}

#[test]
fn the_answer_to_an_old_heartbeat_refuses_what_the_newest_listed() {
    let (mut a, mut b) = leased(1);
    let old = sent(&mut a, 210);
    step(&mut a, 300, claim(1, 5));
    step(&mut b, 300, Event::Promise { shard: shard(1), epoch: Epoch(9) });
    answer(&mut b, 310, &sent(&mut a, 300));
    // The answer to the newest is lost; this one acknowledges it too, and must refuse as it did.
    let out = pong(&mut a, 330, &answer(&mut b, 320, &old));
    assert_eq!(out, [Effect::Newer { shard: shard(1), epoch: Epoch(9) }]);
    assert_eq!((lease(&a, 0), lease(&a, 1)), (ms(300 + L), Tick(0)));
}

#[test]
fn a_heartbeat_to_another_life_promises_nothing() {
    let (mut a, mut reborn) = (machine(A, 1), machine(B, 2));
    step(&mut a, 10, claim(0, 5));
    let reply = answer(&mut reborn, 20, &sent(&mut a, 10));
    assert_eq!((promise(&reborn, 0), reborn.heard_at(shard(0), A)), (Tick(0), None));
    assert_eq!((reply.incarnation, reply.base_sequence), (2, 0));
}

#[test]
fn another_life_of_the_receiver_promises_and_leases_nothing() {
    let (mut a, _) = leased(1);
    let mut reborn = machine(B, 2);
    let reply = answer(&mut reborn, 220, &sent(&mut a, 210));
    assert_eq!((promise(&reborn, 0), reborn.heard_at(shard(0), A)), (Tick(0), None));
    assert_eq!((reply.incarnation, reply.base_sequence), (2, 0));
    let forged = Ping { base_sequence: 2, ..reply };
    pong(&mut a, 230, &forged);
    assert_eq!(lease(&a, 0), ms(10 + L), "an answer of a life that was not claimed");
    assert_eq!(a.lease_until(shard(0), B, 2), Tick(0));
    // Claimed in its new life, it is given a complete list and starts from nothing.
    step(&mut a, 300, claim_at(0, 5, 6, &[(B, 2)]));
    assert_eq!((lease(&a, 0), a.lease_until(shard(0), B, 2)), (Tick(0), Tick(0)));
    let ping = sent(&mut a, 300);
    assert_eq!((ping.base_sequence, ping.peer_incarnation, ping.entries.len()), (0, 2, 1));
    pong(&mut a, 320, &answer(&mut reborn, 310, &ping));
    assert_eq!(a.lease_until(shard(0), B, 2), ms(300 + L));
    // A claim that still names the old life is not listed and takes nothing back.
    step(&mut a, 330, claim_at(1, 5, 5, &[(B, 1)]));
    assert_eq!(sent(&mut a, 500).entries, []);
    assert_eq!((lease(&a, 1), a.lease_until(shard(0), B, 2)), (Tick(0), ms(300 + L)));
    step(&mut a, 510, claim_at(0, 5, 6, &[(B, 1)]));
    assert_eq!(a.lease_until(shard(0), B, 2), Tick(0), "this one gives up the new life's");
}

#[test]
fn an_answer_to_an_earlier_life_of_the_sender_does_not_count() {
    let (mut old, mut b) = (machine(A, 1), machine(B, 1));
    step(&mut old, 10, claim(0, 5));
    let reply = answer(&mut b, 20, &sent(&mut old, 10));
    let mut a = machine(A, 2);
    step(&mut a, 30, claim(0, 5));
    sent(&mut a, 30);
    pong(&mut a, 40, &reply);
    assert_eq!(lease(&a, 0), Tick(0));
}

#[test]
fn a_new_life_of_the_sender_replaces_the_list_but_not_the_promises() {
    let (mut old, mut b) = leased(2);
    let late = sent(&mut old, 210);
    let mut a = machine(A, 2);
    step(&mut a, 300, claim(1, 8));
    let ping = sent(&mut a, 300);
    pong(&mut a, 320, &answer(&mut b, 310, &ping));
    assert_eq!((promise(&b, 0), promise(&b, 1)), (ms(20 + G), ms(310 + G)));
    // What the old life has sent comes late.
    let reply = answer(&mut b, 400, &late);
    assert_eq!(reply.base_sequence, 0);
    assert_eq!((promise(&b, 0), promise(&b, 1)), (ms(20 + G), ms(310 + G)));
    // The new life's heartbeats go on as if nothing had come between.
    let ping = sent(&mut a, 500);
    pong(&mut a, 520, &answer(&mut b, 510, &ping));
    assert_eq!((promise(&b, 1), lease(&a, 1)), (ms(510 + G), ms(500 + L)));
}

#[test]
fn promises_to_a_life_that_is_over_are_void() {
    let (mut a, mut b) = leased(1);
    let mut c = machine(C, 1);
    step(&mut c, 30, claim_at(1, 5, 5, &[(B, 1)]));
    answer(&mut b, 40, &sent(&mut c, 30));
    step(&mut b, 50, Event::Dead { store: A, incarnation: 1 });
    assert_eq!((promise(&b, 0), promise(&b, 1)), (Tick(0), ms(40 + G)), "only those to A");
    let reply = answer(&mut b, 220, &sent(&mut a, 210));
    assert_eq!(promise(&b, 0), Tick(0), "and what it sent before its end promises nothing");
    assert_eq!(reply.base_sequence, 0);
    step(&mut b, 230, Event::Dead { store: A, incarnation: 0 });
    let mut reborn = machine(A, 2);
    step(&mut reborn, 240, claim(0, 6));
    answer(&mut b, 250, &sent(&mut reborn, 240));
    assert_eq!(promise(&b, 0), ms(250 + G));
    step(&mut b, 260, Event::Dead { store: A, incarnation: 1 });
    assert_eq!(promise(&b, 0), ms(250 + G), "the newer life is not meant");
}

#[test]
fn promises_of_one_shard_to_several_stores_do_not_disturb_one_another() {
    let (mut a, mut b) = leased(1);
    let mut c = machine(C, 1);
    step(&mut c, 100, claim(0, 5));
    answer(&mut b, 110, &sent(&mut c, 100));
    assert_eq!(promise(&b, 0), ms(110 + G));
    step(&mut b, 120, Event::Dead { store: C, incarnation: 1 });
    assert_eq!(promise(&b, 0), ms(20 + G), "what was promised to A");
    let mut reborn = machine(A, 2);
    step(&mut reborn, 130, claim(0, 5));
    answer(&mut b, 140, &sent(&mut reborn, 130));
    step(&mut b, 150, Event::Dead { store: A, incarnation: 1 });
    assert_eq!(promise(&b, 0), ms(140 + G), "what was promised to its next life");
    answer(&mut b, 220, &sent(&mut a, 210));
    assert_eq!(promise(&b, 0), ms(140 + G));
}

#[test]
fn release_gives_back_the_promises_of_the_heartbeats_before_it() {
    let release = |mut ping: Ping, epoch| {
        let kind = HeartbeatKind::Release;
        ping.entries = vec![HeartbeatEntry { shard: shard(0), epoch: Epoch(epoch), kind }];
        ping
    };
    let (mut a, mut b) = leased(2);
    let ping = release(sent(&mut a, 210), 5);
    answer(&mut b, 220, &ping);
    assert_eq!((promise(&b, 0), promise(&b, 1)), (Tick(0), ms(220 + G)));
    answer(&mut b, 420, &sent(&mut a, 410));
    assert_eq!(promise(&b, 0), Tick(0), "listed no longer");

    let (mut a, mut b) = leased(1);
    let old = release(sent(&mut a, 210), 5);
    answer(&mut b, 420, &sent(&mut a, 410));
    answer(&mut b, 430, &old);
    assert_eq!(promise(&b, 0), ms(420 + G), "promised to a heartbeat after the release");

    let (mut a, mut b) = leased(2);
    step(&mut a, 30, Event::Release { shard: shard(0) });
    assert_eq!((lease(&a, 0), lease(&a, 1)), (Tick(0), ms(10 + L)), "its own lease ends at once");
    let (lost, said) = (sent(&mut a, 40), sent(&mut a, 240));
    assert_eq!((&lost.entries, lost.entries[0].kind), (&said.entries, HeartbeatKind::Release));
    answer(&mut b, 250, &said);
    assert_eq!((promise(&b, 0), promise(&b, 1)), (Tick(0), ms(250 + G)), "said until it is heard");

    let (mut a, mut b) = leased(1);
    step(&mut a, 30, Event::Release { shard: shard(0) });
    answer(&mut b, 50, &sent(&mut a, 40));
    step(&mut a, 60, claim(0, 5));
    assert_eq!(lease(&a, 0), Tick(0), "claimed again, it begins anew");

    let (mut a, _) = leased(1);
    step(&mut a, 30, Event::Release { shard: shard(0) });
    step(&mut a, 40 + G, Event::Tick);
    assert!(
        step(&mut a, 41 + G, Event::Tick).is_empty(),
        "nobody has heard, and the promise is over"
    );

    let (mut a, mut b) = leased(1);
    answer(&mut b, 220, &release(sent(&mut a, 210), 4));
    assert_eq!(promise(&b, 0), ms(20 + G), "the release of an earlier epoch");
}

#[test]
fn only_a_remembered_send_time_counts() {
    let mut a = machine(A, 1);
    step(&mut a, 0, claim(0, 5));
    let first = sent(&mut a, 0);
    let ack = |sequence| Ping {
        sequence,
        base_sequence: sequence,
        store: B,
        incarnation: 1,
        peer_incarnation: 1,
        ..Ping::default()
    };
    for count in 1..=SENT_MAX as u64 {
        sent(&mut a, 200 * count);
    }
    pong(&mut a, 12_801, &ack(first.sequence));
    assert_eq!(lease(&a, 0), Tick(0), "forgotten");
    pong(&mut a, 12_801, &ack(1_000));
    assert_eq!(lease(&a, 0), Tick(0), "never sent");
    pong(&mut a, 12_801, &ack(2));
    assert_eq!(lease(&a, 0), ms(200 + L), "the oldest one that is remembered");
}

#[test]
fn a_machine_that_was_not_running_begins_without_lease() {
    let (mut a, mut b) = leased(1);
    let ping = sent(&mut a, 210);
    let reply = answer(&mut b, 220, &ping);
    // The Tick of 410 comes more than L / 4 late.
    let ping = sent(&mut a, 410 + L / 4 + 1);
    assert_eq!(lease(&a, 0), Tick(0));
    pong(&mut a, 800, &reply);
    assert_eq!(lease(&a, 0), Tick(0), "sent before the gap");
    pong(&mut a, 820, &answer(&mut b, 810, &ping));
    assert_eq!(lease(&a, 0), ms(410 + L / 4 + 1 + L));
}

#[test]
fn a_machine_that_was_a_little_late_keeps_its_leases() {
    let (mut a, _) = leased(1);
    sent(&mut a, 210 + L / 4);
    assert_eq!(lease(&a, 0), ms(10 + L));
}

#[test]
fn a_list_longer_than_a_heartbeat_is_leased_as_it_is_listed() {
    let (mut a, mut b) = (machine(A, 1), machine(B, 1));
    let count = ENTRIES_MAX as u32 + 2;
    for index in 0..count {
        step(&mut a, 10, claim(index, 5));
    }
    let first = sent(&mut a, 10);
    assert_eq!(first.entries.len(), ENTRIES_MAX);
    // A shard of the first part changes, while neither part is acknowledged.
    step(&mut a, 20, claim_at(0, 5, 6, &[(B, 1)]));
    let second = sent(&mut a, 210);
    assert_eq!((second.base_sequence, second.entries.len()), (0, ENTRIES_MAX));
    assert_eq!(second.entries[0].epoch, Epoch(6), "what was said before is said as it is now");
    pong(&mut a, 230, &answer(&mut b, 220, &second));
    assert_eq!((lease(&a, count - 3), lease(&a, count - 2)), (ms(210 + L), Tick(0)));
    assert_eq!(promise(&b, count - 2), Tick(0));
    let third = sent(&mut a, 410);
    assert_eq!((third.base_sequence, third.entries.len()), (2, 2));
    pong(&mut a, 430, &answer(&mut b, 420, &third));
    assert_eq!((lease(&a, 0), lease(&a, count - 1)), (ms(410 + L), ms(410 + L)));
    assert_eq!(promise(&b, count - 1), ms(420 + G));
}

#[test]
fn a_complete_list_that_does_not_fit_leases_only_what_it_names() {
    let (mut a, mut b) = leased(ENTRIES_MAX as u32);
    step(&mut a, 40, claim(ENTRIES_MAX as u32, 5));
    let ping = sent(&mut a, 40);
    pong(&mut a, 60, &answer(&mut b, 50, &ping));
    let last = ENTRIES_MAX as u32;
    assert_eq!(lease(&a, last), ms(40 + L));
    let mut forgetful = machine(B, 1);
    let reply = answer(&mut forgetful, 250, &sent(&mut a, 240));
    pong(&mut a, 260, &reply);
    let ping = sent(&mut a, 440);
    pong(&mut a, 460, &answer(&mut forgetful, 450, &ping));
    assert_eq!((lease(&a, last - 1), lease(&a, last)), (ms(440 + L), ms(40 + L)));
    assert_eq!(promise(&forgetful, last), Tick(0));
}

#[test]
#[should_panic(expected = "never goes back")]
fn time_never_goes_back() {
    let mut a = machine(A, 1);
    step(&mut a, 10, Event::Tick);
    step(&mut a, 9, Event::Tick);
}

/// The rules of this file that a seeded bug breaks.
pub(crate) const RULES: [Rule; 1] = [Rule::new(
    Mutant::HeartbeatAnyEpoch,
    "heartbeat: a deposed primary renews nothing",
    a_deposed_primary_renews_nothing,
)];

/// "Having promised a newer epoch it refuses and answers with that epoch" (section 4).
fn a_deposed_primary_renews_nothing(mutant: Mutant) -> Result<(), String> {
    let mut a = machine(A, 1);
    let mut b = Heartbeats::new(B, 1, ms(0), Timing::default(), mutant);
    step(&mut a, 10, claim(0, 5));
    let reply = answer(&mut b, 20, &sent(&mut a, 10));
    pong(&mut a, 30, &reply);
    step(&mut b, 100, Event::Promise { shard: shard(0), epoch: Epoch(6) });
    let reply = answer(&mut b, 220, &sent(&mut a, 210));
    pong(&mut a, 230, &reply);
    demand(promise(&b, 0) == ms(20 + G), "a promise to a deposed primary was renewed")?;
    demand(lease(&a, 0) == ms(10 + L), "a deposed primary's lease was renewed")?;
    let refused: Vec<Epoch> = reply.entries.iter().map(|entry| entry.epoch).collect();
    demand(refused == [Epoch(6)], "it was not told the epoch that deposed it")
}

// ------------------------------------------------------------------------------ two stores' world --

const SHARDS: u32 = 3;

/// One thing that happens, after so many true milliseconds.
#[derive(Clone, Debug)]
enum Fate {
    /// Time passes: both machines tick when they asked for it.
    Wait,
    /// Deliver a message under way (chosen by number), and keep it under way when it is repeated.
    Deliver {
        which: usize,
        is_repeated: bool,
    },
    /// Lose a message under way.
    Lose {
        which: usize,
    },
    /// A claims a shard, in a new reign or a new epoch of it.
    Claim {
        index: u32,
        is_new_reign: bool,
    },
    Unclaim {
        index: u32,
    },
    /// A gives back what was promised for a shard.
    Release {
        index: u32,
    },
    /// B promises the epoch after A's present one.
    Promise {
        index: u32,
    },
    RestartA,
    RestartB,
    /// B learns that A's earlier lives are over.
    Dead,
    /// A does not run for a while.
    Pause {
        millis: u64,
    },
}

fn fate() -> impl Strategy<Value = (u64, Fate)> {
    let index = 0..SHARDS;
    let fate = prop_oneof![
        6 => Just(Fate::Wait),
        12 => (any::<usize>(), prop::bool::weighted(0.2))
            .prop_map(|(which, is_repeated)| Fate::Deliver { which, is_repeated }),
        2 => any::<usize>().prop_map(|which| Fate::Lose { which }),
        3 => (index.clone(), prop::bool::weighted(0.5))
            .prop_map(|(index, is_new_reign)| Fate::Claim { index, is_new_reign }),
        1 => index.clone().prop_map(|index| Fate::Unclaim { index }),
        2 => index.clone().prop_map(|index| Fate::Release { index }),
        1 => index.prop_map(|index| Fate::Promise { index }),
        1 => Just(Fate::RestartA),
        1 => Just(Fate::RestartB),
        1 => Just(Fate::Dead),
        1 => (100_u64..3_000).prop_map(|millis| Fate::Pause { millis }),
    ];
    (prop_oneof![3 => Just(0_u64), 5 => 1_u64..60, 1 => 60_u64..700], fate)
}

/// A message under way, tagged with the store it goes to.
type Message = (StoreId, bool, Ping);

struct World {
    now_micros: u64,
    /// Thousandths by which each clock runs fast or slow, and how far it has run since the start.
    rates: [u64; 2],
    a: Heartbeats,
    b: Heartbeats,
    lives: [Incarnation; 2],
    b_booted: Tick,
    wakes: [Option<Tick>; 2],
    under_way: Vec<Message>,
    epoch: u64,
    a_sleeps_until_micros: u64,
    /// Times at which some lease held.
    leases_seen: u64,
}

impl World {
    fn new(rates: [u64; 2]) -> World {
        World {
            now_micros: 0,
            rates,
            a: machine(A, 1),
            b: machine(B, 1),
            lives: [1, 1],
            b_booted: ms(0),
            wakes: [None, None],
            under_way: Vec::new(),
            epoch: 5,
            a_sleeps_until_micros: 0,
            leases_seen: 0,
        }
    }

    fn clock(&self, side: usize) -> Tick {
        Tick(self.now_micros * self.rates[side])
    }

    fn is_asleep(&self) -> bool {
        self.now_micros < self.a_sleeps_until_micros
    }

    fn step(&mut self, side: usize, event: Event) {
        let mut out = Vec::new();
        let (now, own, other) = (self.clock(side), [A, B][side], [B, A][side]);
        let machine = if side == 0 { &mut self.a } else { &mut self.b };
        machine.step(now, event, &mut out);
        for effect in out {
            match effect {
                Effect::Send { to, ping } => {
                    assert_eq!((to, ping.store), (other, own));
                    self.under_way.push((to, true, ping));
                }
                Effect::Answer { token, ping } => self.under_way.push((token, false, ping)),
                Effect::Newer { .. } => {}
                Effect::Wake(at) => {
                    let wake = &mut self.wakes[side];
                    *wake = Some(wake.map_or(at, |wake| wake.min(at)));
                }
            }
        }
    }

    fn deliver(&mut self, (to, is_request, ping): Message) {
        let (side, from) = if to == A { (0, B) } else { (1, A) };
        if side == 0 && self.is_asleep() {
            self.under_way.push((to, is_request, ping));
            return;
        }
        let event = if is_request {
            Event::Ping { from, token: from, ping }
        } else {
            Event::Pong { from, ping }
        };
        self.step(side, event);
    }

    fn run_until(&mut self, micros: u64) {
        while self.now_micros < micros {
            self.now_micros = micros.min(self.now_micros + 5_000);
            for side in 0..2 {
                let is_due = self.wakes[side].is_some_and(|wake| wake <= self.clock(side));
                if is_due && (side == 1 || !self.is_asleep()) {
                    self.wakes[side] = None;
                    self.step(side, Event::Tick);
                }
            }
            self.check();
        }
    }

    fn claim(&mut self, index: u32, is_new_reign: bool) {
        self.epoch += 1;
        let entry = self.a.asked.get(&B).and_then(|asked| asked.entries.get(&shard(index)));
        let reign = match entry.map(|entry| entry.saying) {
            Some(Saying::Lease { reign, .. }) if !is_new_reign => reign.0,
            Some(Saying::Lease { .. } | Saying::Release { .. } | Saying::Drop) | None => self.epoch,
        };
        self.step(0, claim_at(index, reign, self.epoch, &[(B, self.lives[1])]));
    }

    fn happen(&mut self, fate: Fate) {
        match fate {
            Fate::Wait => {}
            Fate::Deliver { which, is_repeated } if !self.under_way.is_empty() => {
                let which = which % self.under_way.len();
                let message = self.under_way[which].clone();
                if !is_repeated {
                    self.under_way.swap_remove(which);
                }
                self.deliver(message);
            }
            Fate::Lose { which } if !self.under_way.is_empty() => {
                let which = which % self.under_way.len();
                self.under_way.swap_remove(which);
            }
            Fate::Deliver { .. } | Fate::Lose { .. } => {}
            Fate::Claim { index, is_new_reign } => self.claim(index, is_new_reign),
            Fate::Unclaim { index } => self.step(0, Event::Unclaim { shard: shard(index) }),
            Fate::Release { index } => self.step(0, Event::Release { shard: shard(index) }),
            Fate::Promise { index } => {
                self.epoch += 1;
                self.step(1, Event::Promise { shard: shard(index), epoch: Epoch(self.epoch) });
            }
            Fate::RestartA => {
                self.lives[0] += 1;
                let (now, timing) = (self.clock(0), Timing::default());
                self.a = Heartbeats::new(A, self.lives[0], now, timing, Mutant::None);
                self.wakes[0] = None;
                self.a_sleeps_until_micros = 0;
            }
            Fate::RestartB => {
                self.lives[1] += 1;
                let (now, timing) = (self.clock(1), Timing::default());
                self.b = Heartbeats::new(B, self.lives[1], now, timing, Mutant::None);
                self.b_booted = now;
                self.wakes[1] = None;
            }
            Fate::Dead => {
                self.step(1, Event::Dead { store: A, incarnation: self.lives[0] - 1 });
            }
            Fate::Pause { millis } => {
                self.a_sleeps_until_micros = self.now_micros + millis * 1_000;
            }
        }
    }

    /// A paused store looks at its leases too: the pause may have begun just before.
    fn check(&mut self) {
        let (a_now, b_now) = (self.clock(0), self.clock(1));
        for index in 0..SHARDS {
            for life in 1..=self.lives[1] {
                let lease = self.a.lease_until(shard(index), B, life);
                if lease <= a_now {
                    continue;
                }
                self.leases_seen += 1;
                let given = self.b.promises.get(&shard(index));
                let given = given.and_then(|given| given.get(&(A, self.lives[0])));
                let is_promised = given.is_some_and(|promised| promised.until > b_now);
                // A later life of B waits for G after its start instead.
                let grace = Timing::default().grace_nanos;
                let is_waiting = life < self.lives[1] && self.b_booted.after_nanos(grace) > b_now;
                assert!(
                    is_promised || is_waiting,
                    "shard {index}: leased until {lease:?} at {a_now:?}, but B at {b_now:?} has \
                     {given:?}"
                );
            }
        }
    }

    fn run(&mut self, fates: Vec<(u64, Fate)>) {
        for (millis, fate) in fates {
            self.run_until(self.now_micros + millis * 1_000);
            self.happen(fate);
            self.check();
        }
        // Even when nothing more arrives.
        self.run_until(self.now_micros + 2_500_000);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// The one property that matters: a lease never outlives the promise behind it.
    #[test]
    fn whenever_a_lease_holds_so_does_the_promise(
        rates in [900_u64..=1_100, 900_u64..=1_100],
        fates in prop::collection::vec(fate(), 1..150),
    ) {
        World::new(rates).run(fates);
    }

    /// After any history, a network that works brings leases within a second.
    #[test]
    fn leases_come_back_when_messages_arrive(
        rates in [900_u64..=1_100, 900_u64..=1_100],
        fates in prop::collection::vec(fate(), 1..150),
    ) {
        let mut world = World::new(rates);
        world.run(fates);
        world.a_sleeps_until_micros = 0;
        world.under_way.clear();
        world.claim(0, true);
        for _ in 0..200 {
            world.run_until(world.now_micros + 5_000);
            for message in std::mem::take(&mut world.under_way) {
                world.deliver(message);
            }
            world.check();
        }
        let lease = world.a.lease_until(shard(0), B, world.lives[1]);
        prop_assert!(lease > world.clock(0).after_millis(1_000), "{lease:?}");
        prop_assert!(world.leases_seen > 0);
    }
}
