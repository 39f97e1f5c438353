//! Rules that a seeded bug breaks. Each is a function of the bug: it holds without it, and says what
//! went wrong with it (`crate::seeded` asserts both).

use super::bench::{B, Bench, C, FOREVER, ME, conf, context, life, lsn, prepare};
use super::damage::{at_a_member, every_block, other_blocks};
use crate::conf::transition::Transition;
use crate::mutant::Mutant;
use crate::replica::follower::blocks_of;
use crate::replica::{Event, Role};
use crate::seeded::{Rule, demand};
use lane::{Op, REGION_BLOCKS};
use proto::wire::{Opcode, Request, RequestOp};
use proto::{Epoch, Status, Tick};

/// Every rule of this file with the seeded bug that breaks it.
pub(crate) const RULES: [Rule; 16] = [
    Rule::new(Mutant::NackedGoesOn, "replica: a NACK ends the epoch", nack),
    Rule::new(Mutant::NoQuiesceAtPromise, "replica: a promise waits for operations", quiesce),
    Rule::new(Mutant::LeaseIgnored, "replica: a read needs the lease twice", lease),
    Rule::new(Mutant::LeaseByIsr, "replica: reads need the learner's lease", pending_lease),
    Rule::new(Mutant::NoPromiseWait, "replica: an own promise is kept", promise_wait),
    Rule::new(Mutant::NoBootWait, "replica: an earlier life's promise is kept", boot_wait),
    Rule::new(Mutant::RefusalIsOutcome, "replica: silence is no outcome", refusal),
    Rule::new(Mutant::NoIncarnationCheck, "replica: lives are told apart", incarnations),
    Rule::new(Mutant::RejoinByRegionOnly, "replica: a learner's doubt counts", doubt),
    Rule::new(Mutant::NoRegionLock, "replica: a region is read as of one lsn", region_lock),
    Rule::new(Mutant::LateCopied, "replica: a late COPIED cleans nothing", late_copied),
    Rule::new(Mutant::CreditIgnored, "replica: a full disk is an answer, no failure", full),
    Rule::new(Mutant::ReleasedGoesOn, "replica: who has given back serves nothing", transfer),
    Rule::new(Mutant::WholeRangeAsk, "replica: each block of a read is asked for", other_blocks),
    Rule::new(Mutant::HealFirstOnly, "replica: all damage of a read is mended", every_block),
    Rule::new(Mutant::MemberDamageForgotten, "replica: a member's damage is mended", at_a_member),
];

const SECOND: u64 = 1_000;

/// "NACK -> SUSPENDED: no lsn, no ack, no read, nothing dropped" until a newer configuration names
/// this life: then uncommitted PREPAREs go again, same lsn, new epoch (sections 1 and 3).
fn nack(mutant: Mutant) -> Result<(), String> {
    let mut bench = Bench::primary(mutant, conf(5, 0, &[0, 1, 2], &[]));
    bench.write(1, 0);
    bench.read(2, 9);
    let to_b = bench.operation_to(B, 1);
    let to_c = bench.operation_to(C, 1);
    bench.run_lane(|op| matches!(op, Op::Range { .. }));
    bench.acknowledge(C, &to_c);
    bench.nack(B, &to_b, 6);
    // Said before the promise, and overtaken by the refusal.
    bench.acknowledge(B, &to_b);
    demand(!bench.is_done(1), "a write was committed in an epoch that was refused")?;
    bench.run_lane(|_| true);
    demand(!bench.is_done(2), "a read was answered in an epoch that was refused")?;
    demand(bench.replica.role() == Role::Suspended, "a refused primary was not suspended")?;
    bench.write(3, 20);
    demand(bench.lane.is_empty(), "a refused primary gave an lsn")?;
    bench.learn(conf(7, 0, &[0, 1, 2], &[]));
    demand(bench.replica.role() == Role::Active, "it did not go on when it was named again")?;
    demand(bench.is_done(1) && bench.is_done(2), "what had waited was not answered")?;
    demand(
        bench.refusal(3) == Some(Status::StaleEpoch),
        "a request of the old epoch was carried out",
    )
}

/// T5: "drained; RELEASE given". Until then nothing has happened; from then on nothing is served,
/// until another configuration, or the lack of one, lets the reign begin to claim anew.
fn transfer(mutant: Mutant) -> Result<(), String> {
    let mut bench = Bench::primary(mutant, conf(5, 0, &[0, 1, 2], &[]));
    bench.write(1, 0);
    bench.step(Event::Transfer { to: 1 });
    bench.read(2, 9);
    demand(bench.proposals.is_empty(), "it was given away while a write was under way")?;
    bench.run_lane(|_| true);
    [B, C].into_iter().for_each(|store| bench.obey(store));
    demand(bench.is_done(1), "a write under way was not finished")?;
    let transfer = Transition::Transfer { copy: 1 };
    demand(bench.proposals == [transfer.clone()], "what is drained is proposed once")?;
    demand(bench.claimed.is_none(), "it proposes without a RELEASE")?;
    bench.read(3, 9);
    bench.write(4, 20);
    bench.run_lane(|_| true);
    let is_served = (2..=4).any(|token| bench.is_done(token)) || !bench.sent.is_empty();
    demand(!is_served, "it served after its RELEASE")?;
    demand(bench.replica.role() == Role::Leaving, "nobody sees why it does not serve")?;
    bench.pass(SECOND / 2);
    demand(bench.proposals == [transfer.clone(), transfer], "a lost proposal is said again")?;
    bench.pass(SECOND / 2);
    demand(bench.claimed.is_some(), "a reign that goes on needs its leases anew")?;
    demand(bench.replica.role() == Role::Active, "without an answer it waits for ever")?;
    bench.run_lane(|_| true);
    demand(bench.is_done(2) && bench.is_done(3), "what had waited is not carried out")
}

/// "(2) waits until every accepted op is durable or failed, (3) persists the promise, (4) only then
/// answers; acks that become ready after (1) are dropped" (section 3).
fn quiesce(mutant: Mutant) -> Result<(), String> {
    let is_conf = |op: &Op| matches!(op, Op::Conf { .. });
    let mut bench = Bench::follower(mutant, conf(5, 1, &[0, 1, 2], &[]));
    bench.asks(B, 1, 5, prepare(context(lsn(5, 1), 0), 4));
    bench.step(Event::Conf(conf(6, 2, &[0, 2], &[])));
    bench.asks(C, 2, 6, RequestOp::Tails(context(lsn(6, 0), 0)));
    bench.run_lane(is_conf);
    let early = bench.tails(2).map(|tails| tails.records.len());
    demand(early.is_none(), "TAILS was answered while an accepted operation was in flight")?;
    bench.run_lane(|op| !is_conf(op));
    demand(
        bench.refused(1) == Some(Status::StaleEpoch),
        "an operation was acknowledged after the promise",
    )?;
    demand(bench.tails(2).is_none(), "TAILS was answered before the promise was stored")?;
    bench.run_lane(is_conf);
    let tails = bench.tails(2).ok_or("TAILS was not answered in the end")?;
    let blocks: Vec<u64> = tails.records.iter().map(|record| record.range.offset()).collect();
    demand(blocks == [4 * 4096], "the tail did not hold the operation")
}

/// "Lease -> local read -> verified -> unlock": held when the read begins, and still when its data
/// have come, because the process may have been paused in between (section 4).
fn lease(mutant: Mutant) -> Result<(), String> {
    let mut bench = Bench::primary(mutant, conf(5, 0, &[0, 1], &[]));
    bench.read(1, 0);
    demand(bench.is_asked(|op| matches!(op, Op::Read { .. })), "it did not read with the lease")?;
    bench.leases.leases.insert((B, life(B)), bench.now);
    bench.run_lane(|_| true);
    demand(!bench.is_done(1), "a read was answered whose lease had ended meanwhile")?;
    bench.read(2, 9);
    demand(bench.lane.is_empty(), "a read began without lease")?;
    bench.leases.leases.insert((B, life(B)), FOREVER);
    bench.pass(100);
    bench.run_lane(|_| true);
    demand(bench.is_done(1) && bench.is_done(2), "they were not answered with the lease")
}

/// A primary of {A, B} whose learner C has everything: its admission is proposed.
fn pending(mutant: Mutant) -> Bench {
    let mut bench = Bench::primary(mutant, conf(5, 0, &[0, 1], &[2]));
    bench.pass(100);
    bench.learner_tails(C, 0, &[]);
    let admit = Transition::Admit { copy: 2, incarnation: life(C) };
    assert_eq!(bench.proposals, [admit], "nothing was missing");
    bench
}

/// "pending_admit = R: R joins `required` for acks *and* lease" (section 2, T4).
fn pending_lease(mutant: Mutant) -> Result<(), String> {
    let mut bench = pending(mutant);
    demand(bench.claimed == Some(vec![B, C]), "the learner's lease was not asked for")?;
    bench.leases.leases.insert((C, life(C)), Tick(0));
    bench.read(1, 0);
    bench.run_lane(|_| true);
    demand(!bench.is_done(1), "a read was answered without the lease of the learner")?;
    bench.leases.leases.insert((C, life(C)), bench.now.after_millis(SECOND));
    bench.pass(100);
    bench.run_lane(|_| true);
    demand(bench.is_done(1), "it was not answered with the lease")
}

/// "The receiver promises for G after *receipt* not to serve as primary of those shards" (section 4).
fn promise_wait(mutant: Mutant) -> Result<(), String> {
    let mut bench = Bench::follower(mutant, conf(5, 1, &[0, 1, 2], &[]));
    bench.leases.promised = bench.now.after_millis(SECOND);
    bench.learn(conf(6, 0, &[0, 2], &[]));
    bench.obey(C);
    demand(bench.replica.role() == Role::Settling, "it served while its promise stood")?;
    bench.pass(SECOND - 1);
    demand(bench.replica.role() == Role::Settling, "it served just before its promise ended")?;
    bench.pass(1);
    demand(bench.replica.role() == Role::Active, "it did not serve when its promise had ended")
}

/// "After process start a store serves as primary in place of another only G after its start, unless
/// that primary ... is provably dead" (section 4).
fn boot_wait(mutant: Mutant) -> Result<(), String> {
    let restarted = || {
        let mut bench = Bench::follower(mutant, conf(5, 1, &[0, 1], &[]));
        bench.restart(21);
        let mut reopened = conf(6, 0, &[0], &[]);
        reopened.members[0].incarnation = 21;
        bench.learn(reopened);
        bench
    };
    let mut bench = restarted();
    demand(bench.replica.role() == Role::Settling, "it served at once after its start")?;
    bench.pass(2_249);
    demand(bench.replica.role() == Role::Settling, "it served just before G was over")?;
    bench.pass(1);
    demand(bench.replica.role() == Role::Active, "it did not serve when G was over")?;
    let mut bench = restarted();
    bench.step(Event::Dead { store: B, incarnation: life(B) - 1 });
    demand(bench.replica.role() == Role::Settling, "an earlier life's end counted")?;
    bench.step(Event::Dead { store: B, incarnation: life(B) });
    demand(bench.replica.role() == Role::Active, "it waited although nobody could be serving")
}

/// "The outcome is known only when a conf with a greater epoch has been *read*: a refusal, error or
/// timeout is never an outcome" (section 2, T4).
fn refusal(mutant: Mutant) -> Result<(), String> {
    let mut bench = pending(mutant);
    // No configuration comes. Short of the time after which a silent learner is given up.
    for _ in 0..5 {
        bench.pass(100);
    }
    bench.write(1, 0);
    bench.run_lane(|_| true);
    bench.obey(B);
    demand(
        !bench.is_done(1),
        "a write was committed without the learner, who may be a member now",
    )?;
    let to_c = bench.operation_to(C, 1);
    bench.acknowledge(C, &to_c);
    demand(bench.is_done(1), "it was not committed with the learner")
}

/// "Carrying incarnations": what is meant for, or said by, another life does not count (sections 3
/// and 4).
fn incarnations(mutant: Mutant) -> Result<(), String> {
    let mut bench = Bench::follower(mutant, conf(5, 1, &[0, 1, 2], &[]));
    let mut peer = context(lsn(5, 1), 0);
    peer.incarnation = life(ME) - 1;
    bench.asks(B, 1, 5, prepare(peer, 4));
    demand(bench.lane.is_empty(), "a PREPARE for another life was accepted")?;
    demand(bench.refused(1) == Some(Status::Fenced), "it was not refused")?;

    let mut bench = Bench::primary(mutant, conf(5, 0, &[0, 1], &[]));
    bench.write(1, 0);
    bench.run_lane(|_| true);
    let to_b = bench.operation_to(B, 1);
    bench.acknowledge_as(B, life(B) - 1, &to_b);
    demand(!bench.is_done(1), "an acknowledgement of an earlier life counted")?;
    // What one life has acknowledged, the next one of the same store need not have.
    bench.acknowledge_as(B, life(B) + 1, &to_b);
    demand(!bench.is_done(1), "an acknowledgement of a later life counted")?;
    bench.acknowledge(B, &to_b);
    demand(bench.is_done(1), "one of the life that is meant did not count")
}

/// "Copy every region with max(primary.region_lsn, R.region_lsn) > R.complete_lsn, and all SUSPECT
/// regions" (section 5): the learner's own unfinished writes are nowhere in the primary's map.
fn doubt(mutant: Mutant) -> Result<(), String> {
    let mut bench = Bench::primary(mutant, conf(5, 0, &[0, 1], &[2]));
    bench.pass(100);
    bench.learner_tails(C, 0, &[REGION_BLOCKS]);
    demand(bench.proposals.is_empty(), "a learner with doubtful content was proposed")?;
    bench.run_lane(|_| true);
    let firsts = copies(&bench.sent_to(C));
    demand(firsts == [REGION_BLOCKS], "not its doubtful region, or not only that, was copied")
}

/// First blocks of the COPYs among some requests.
fn copies(sent: &[Request]) -> Vec<u32> {
    let first = |request: &Request| {
        let RequestOp::Copy(copy) = &request.op else { return None };
        Some(blocks_of(copy.content.range()).0)
    };
    sent.iter().filter_map(first).collect()
}

/// "Region read under a region lock (stops new lsns only)" (section 5): a write that came between the
/// read and its lsn would be neither in the COPY nor above it.
fn region_lock(mutant: Mutant) -> Result<(), String> {
    let is_change = |op: &Op| matches!(op, Op::Range { .. });
    let mut bench = Bench::primary(mutant, conf(5, 0, &[0, 1], &[2]));
    bench.write(1, 5);
    bench.pass(100);
    bench.learner_tails(C, 0, &[0]);
    let is_read = bench.is_asked(|op| matches!(op, Op::Read { .. }));
    demand(!is_read, "a region was read in which an operation is not durable at both ends")?;
    bench.run_lane(is_change);
    bench.obey(B);
    demand(bench.is_done(1), "a learner was waited for")?;
    demand(bench.is_asked(|op| matches!(op, Op::Read { .. })), "the region was not read")?;
    bench.write(2, 3);
    demand(!bench.is_asked(is_change), "an lsn was given in a region that is being read")?;
    bench.write(3, REGION_BLOCKS);
    demand(bench.is_asked(is_change), "the lock reached further than its region")?;
    bench.run_lane(|_| true);
    demand(copies(&bench.sent_to(C)) == [0], "the region was not copied")?;
    bench.obey(B);
    demand(bench.is_done(2) && bench.is_done(3), "the lock was not taken off")
}

/// "A write that commits *without* R's ack re-dirties its region first; a late COPIED
/// acknowledgement of an earlier pass is ignored" (section 5).
fn late_copied(mutant: Mutant) -> Result<(), String> {
    let mut bench = Bench::primary(mutant, conf(5, 0, &[0, 1], &[2]));
    bench.pass(100);
    bench.learner_tails(C, 0, &[0]);
    bench.run_lane(|_| true);
    let sent = bench.sent_to(C);
    demand(copies(&sent) == [0], "the region was not copied")?;
    // Committed without the learner, while the COPY is on its way.
    bench.write(1, 3);
    bench.run_lane(|_| true);
    bench.obey(B);
    demand(bench.is_done(1), "a learner was waited for")?;
    bench.sent_to(C);
    // The learner's acknowledgement is waited for, and does not come.
    bench.pass(SECOND);
    let copy = sent.iter().find(|request| request.op.opcode() == Opcode::Copy).expect("seen above");
    bench.acknowledge(C, copy);
    bench.run_lane(|_| true);
    let sent = bench.sent_to(C);
    demand(copies(&sent) == [0], "a region that was written meanwhile was not copied again")?;
    // Nothing comes back: the pass is given up, and the next one is under way when it does.
    bench.pass(2 * SECOND);
    bench.run_lane(|_| true);
    demand(copies(&bench.sent_to(C)) == [0], "a pass without answer was not repeated")?;
    let copy = sent.iter().find(|request| request.op.opcode() == Opcode::Copy).expect("seen above");
    bench.acknowledge(C, copy);
    bench.run_lane(|_| true);
    let asked = bench.sent_to(C);
    let is_digest = asked.iter().any(|request| request.op.opcode() == Opcode::Digest);
    demand(!is_digest, "an acknowledgement of the earlier pass counted for this one")?;
    demand(
        bench.replica.conf().is_some_and(|conf| conf.epoch == Epoch(5)),
        "something else happened",
    )
}

/// "Space credit from every ISR member (else NO_SPACE *before* an lsn exists)"; overwrites go on, and
/// room that comes back is found (section 3).
fn full(mutant: Mutant) -> Result<(), String> {
    let mut bench = Bench::primary(mutant, conf(5, 0, &[0, 1], &[]));
    let full = Some(Status::NoSpace);
    bench.credit = 0;
    bench.fill(1, 0);
    bench.run_lane(|_| true);
    bench.obey(B);
    demand(bench.is_done(1), "there was room for it")?;
    bench.fill(2, 100);
    demand(bench.refusal(2) == full && bench.lane.is_empty(), "a member has no room for it")?;
    bench.fill(3, 1);
    bench.run_lane(|_| true);
    bench.obey(B);
    demand(bench.is_done(3), "a write that needs no room was refused")?;
    // Asked again what it has.
    bench.credit = 1;
    bench.pass(SECOND);
    bench.fill(4, 100);
    demand(bench.refusal(4).is_none(), "refused by what was said long ago")?;
    demand(bench.lane.is_empty(), "it is not known yet whether there is room")?;
    bench.obey(B);
    bench.credit = 0;
    bench.run_lane(|_| true);
    bench.obey(B);
    demand(bench.is_done(4), "the first write was refused although there is room again")?;
    bench.fill(5, 300);
    demand(bench.refusal(5) == full, "it has no room, as it has just said")?;
    bench.pass(SECOND);
    bench.fill(7, 300);
    bench.obey(B);
    demand(bench.refusal(7) == full, "it was asked, and still has none")?;
    bench.free_slots = 0;
    bench.pass(SECOND);
    bench.fill(8, 300);
    demand(bench.refusal(8) == full, "whatever it says, the own lane has no room")?;
    bench.credit = 1_000;
    bench.obey(B);
    bench.fill(6, 200);
    demand(bench.refusal(6) == full, "the own lane has no room for it")
}
