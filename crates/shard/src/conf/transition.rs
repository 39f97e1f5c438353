//! T1 to T9: the only functions that make a configuration from another.
//!
//! `apply` is the whole of it: a configuration, the epoch that the proposal names, the proposal and
//! what the conductor knows go in; the next configuration or the first guard that is not met comes
//! out. It is pure. The guards are the table of docs/internals/replication.md section 2, and each
//! refusal is one of its words. Four readings of the table are decided here:
//!
//! * *A member that re-registers is removed before it may do anything*: a replica is heard only in
//!   the life that its configuration names and the registry has.
//! * *The last ISR member is never removed automatically*: the conductor removes a re-registered
//!   member only while another ISR member is there in its registered life. Otherwise the re-opening
//!   (T6) is due, whose guard is exactly the opposite; a removal could leave an ISR of dead stores
//!   although a store with every acknowledged write is back.
//! * T6 takes *all* good members of the ISR that are there; a proposal that leaves one out is refused,
//!   as that one could be the one with the highest complete_lsn.
//! * T7 is for a shard that nothing else can bring back. The copy is outside the ISR (one that is in
//!   it is opened by T2 or T6, without loss), no member of the ISR is there with a good journal, and
//!   of each it is certain that the life which the configuration names is over: a newer one has
//!   registered, or the life was reported to have ended or was revoked. Otherwise two histories
//!   could be served at once.
//!
//! A refusal is never an outcome: a proposal that was sent twice may have been applied the first
//! time. Who proposed learns the outcome by reading a configuration with a greater epoch.

use super::codec::ConfError;
use super::{CopyId, HISTORY_SHIFT, Incarnation, Member, ShardConf, StoreId};
use proto::{Epoch, Lsn, ShardId};
use std::collections::BTreeMap;
use std::fmt;

/// What is asked to change. Each is applied to one epoch of one shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Transition {
    /// T1: leave this member out of the ISR.
    Remove {
        /// Which.
        copy: CopyId,
    },
    /// T2: make this member primary, and leave the old primary out of the ISR.
    Promote {
        /// Which.
        copy: CopyId,
    },
    /// T3: begin to make this replica equal. Replaces the member with its number, if there is one.
    AddLearner {
        /// Which, in which life.
        member: Member,
    },
    /// T4: take a learner into the ISR; its digests were equal.
    Admit {
        /// Which.
        copy: CopyId,
        /// The life that was made equal.
        incarnation: Incarnation,
    },
    /// T5: make this member primary; the old one is drained and stays in the ISR.
    Transfer {
        /// Which.
        copy: CopyId,
    },
    /// T6: open the shard again after every member of its ISR was lost at once.
    Reopen {
        /// The new primary.
        primary: CopyId,
        /// The good members that are there, with their new lives; `primary` is one of them.
        present: Vec<Member>,
    },
    /// T7: a human decides on a history.
    ForceAccept {
        /// Whose content counts.
        member: Member,
        /// The new history.
        history_id: u64,
    },
    /// T8: stop making this replica equal.
    Cancel {
        /// Which.
        copy: CopyId,
    },
    /// T9: refuse writers attached earlier.
    Attach {
        /// The new one.
        attach_epoch: u64,
    },
    /// T9: change what the shard is to have.
    Properties {
        /// Replicas wanted.
        rf: u8,
        /// Replicas without which no write is committed.
        min_write: u8,
    },
}

impl Transition {
    /// Its name in docs/internals/replication.md.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Transition::Remove { .. } => "T1",
            Transition::Promote { .. } => "T2",
            Transition::AddLearner { .. } => "T3",
            Transition::Admit { .. } => "T4",
            Transition::Transfer { .. } => "T5",
            Transition::Reopen { .. } => "T6",
            Transition::ForceAccept { .. } => "T7",
            Transition::Cancel { .. } => "T8",
            Transition::Attach { .. } | Transition::Properties { .. } => "T9",
        }
    }
}

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Proposer {
    /// The leading conductor: its detector, planner or reconciler.
    Conductor,
    /// A replica of the shard.
    Replica {
        /// Its number.
        copy: CopyId,
        /// The life in which it asks.
        incarnation: Incarnation,
    },
    /// A person, whose decision is audited.
    Human,
}

impl fmt::Display for Proposer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Proposer::Conductor => write!(f, "the conductor"),
            Proposer::Replica { copy, incarnation } => {
                write!(f, "copy {copy} in incarnation {incarnation}")
            }
            Proposer::Human => write!(f, "a person"),
        }
    }
}

/// The newest life of a store that registered, as the conductor sees it now.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Registration {
    /// That life.
    pub incarnation: Incarnation,
    /// It answers the conductor at this time.
    pub is_reachable: bool,
    /// The journal behind the replica, on the disk and formatting that the configuration names, was
    /// read back whole.
    pub has_good_journal: bool,
}

/// What the conductor knows when it decides about a proposal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// Who asks.
    pub proposer: Proposer,
    /// The newest registration of each store.
    pub registered: BTreeMap<StoreId, Registration>,
    /// complete_lsn that the present candidates reported to the gather of T6; else not looked at.
    pub complete: BTreeMap<CopyId, Lsn>,
    /// Of each store the newest life that is over for certain: its supervisor saw it end, or it was
    /// revoked, and none up to it may register again. Only T7 looks at it.
    pub ended: BTreeMap<StoreId, Incarnation>,
}

/// Why a proposal is not applied. Never an outcome: it says nothing about earlier proposals.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// Of another configuration than the stored one.
    #[error("proposed for epoch {}, the shard is at epoch {}", proposed.0, stored.0)]
    WrongEpoch {
        /// That the proposal names.
        proposed: Epoch,
        /// That is stored.
        stored: Epoch,
    },
    /// Somebody else has to propose this.
    #[error("{transition} may not be proposed by {proposer}")]
    NotEntitled {
        /// T1 to T9.
        transition: &'static str,
        /// Who did.
        proposer: Proposer,
    },
    /// No such replica.
    #[error("copy {0} is not a member")]
    NotAMember(CopyId),
    /// It lacks acknowledged writes, or nothing is to be done.
    #[error("copy {0} is not in the ISR")]
    NotInIsr(CopyId),
    /// It has every write already.
    #[error("copy {0} is in the ISR")]
    InIsr(CopyId),
    /// That would leave no primary, or nothing is to be done.
    #[error("copy {0} is the primary")]
    IsPrimary(CopyId),
    /// Nobody makes it equal.
    #[error("copy {0} is not a learner")]
    NotALearner(CopyId),
    /// It is being made equal, in this very life.
    #[error("copy {0} is a learner in this incarnation already")]
    AlreadyLearner(CopyId),
    /// A store that never registered.
    #[error("store {0} is not registered")]
    NotRegistered(StoreId),
    /// Another life than the one that counts.
    #[error("copy {copy} is meant in incarnation {meant}, {known} counts")]
    OtherLife {
        /// Which.
        copy: CopyId,
        /// That was named.
        meant: Incarnation,
        /// Of the registry, or of the configuration.
        known: Incarnation,
    },
    /// Its life goes on, and too few others are there: only the primary may remove it.
    #[error("copy {0} has not registered anew, and too few others are there to do without it")]
    NotToSpare(CopyId),
    /// T1 of the last that could serve.
    #[error("no other ISR member is there in its registered incarnation: T6 is due")]
    NobodyElse,
    /// The conductor cannot talk to it now.
    #[error("store {0} is not reachable")]
    NotReachable(StoreId),
    /// It may lack acknowledged writes.
    #[error("store {0} has no good journal")]
    BadJournal(StoreId),
    /// T6 although somebody can go on.
    #[error("copy {0} of the ISR is there in its registered incarnation: T1 or T2 is due")]
    StillThere(CopyId),
    /// T6 with a primary that is not among those that are there.
    #[error("copy {0} is to be primary and not among the present")]
    PrimaryNotPresent(CopyId),
    /// T6 with somebody twice.
    #[error("copy {0} is present twice")]
    PresentTwice(CopyId),
    /// T6 without one that is there.
    #[error("copy {0} of the ISR is there with a good journal and was left out")]
    LeftOut(CopyId),
    /// Not the store, disk or formatting that the configuration names.
    #[error("copy {0} is not where the configuration has it")]
    OtherPlace(CopyId),
    /// T6 without asking everybody.
    #[error("the complete_lsn of copy {0} is not known")]
    UnknownComplete(CopyId),
    /// T6 of one that may lack acknowledged writes.
    #[error("copy {copy} is complete up to {complete}, copy {better} up to {best}")]
    Behind {
        /// Whom the proposal names.
        copy: CopyId,
        /// Its complete_lsn.
        complete: Lsn,
        /// Who has more.
        better: CopyId,
        /// Its complete_lsn.
        best: Lsn,
    },
    /// T7 although the life of a member may go on serving clients that reach it.
    #[error("copy {0} of the ISR may still serve: nobody has seen the end of its process")]
    MayServe(CopyId),
    /// T7 although everything that was acknowledged is there.
    #[error("copy {0} of the ISR is back with a good journal: T6 is due")]
    StillGood(CopyId),
    /// A history that may have been used before.
    #[error("history {proposed} does not follow {stored}")]
    HistoryNotNew {
        /// That the proposal names.
        proposed: u64,
        /// That is stored.
        stored: u64,
    },
    /// It would let an older writer in again.
    #[error("attach epoch {proposed} is not above {stored}")]
    AttachNotNewer {
        /// That the proposal names.
        proposed: u64,
        /// That is stored.
        stored: u64,
    },
    /// Nothing is to be done.
    #[error("the configuration has these properties already")]
    Unchanged,
    /// The result would be no configuration.
    #[error(transparent)]
    Unsound(#[from] ConfError),
}

impl ShardConf {
    /// The first configuration of a new shard: every member in the ISR, epoch 1.
    pub fn first(
        shard: ShardId,
        (rf, min_write): (u8, u8),
        primary: CopyId,
        mut members: Vec<Member>,
        (history_id, attach_epoch): (u64, u64),
    ) -> Result<ShardConf, ConfError> {
        members.sort_by_key(|member| member.copy);
        let isr = members.iter().map(|member| member.copy).collect();
        let learners = Vec::new();
        let epoch = Epoch(1);
        let conf = ShardConf {
            shard,
            epoch,
            rf,
            min_write,
            primary,
            isr,
            learners,
            members,
            history_id,
            attach_epoch,
        };
        conf.check()?;
        Ok(conf)
    }
}

/// Make the configuration that follows `conf`, or say which guard forbids it.
///
/// `epoch` is the one that the proposal names. The result has epoch + 1 and is sound; storing it by
/// compare-and-swap is the caller's work, before anybody is told.
pub fn apply(
    conf: &ShardConf,
    epoch: Epoch,
    transition: &Transition,
    facts: &Facts,
) -> Result<ShardConf, Refusal> {
    conf.check().expect("what is stored was made here or decoded");
    if epoch != conf.epoch {
        return Err(Refusal::WrongEpoch { proposed: epoch, stored: conf.epoch });
    }
    check_proposer(conf, transition, facts)?;
    let mut next = conf.clone();
    next.epoch = Epoch(conf.epoch.0 + 1); // Below 2^53 before, so it cannot overflow.
    match transition {
        Transition::Remove { copy } => remove(&mut next, *copy, facts)?,
        Transition::Promote { copy } => promote(&mut next, *copy, facts)?,
        Transition::AddLearner { member } => add_learner(&mut next, member, facts)?,
        Transition::Admit { copy, incarnation } => admit(&mut next, *copy, *incarnation, facts)?,
        Transition::Transfer { copy } => transfer(&mut next, *copy, facts)?,
        Transition::Reopen { primary, present } => reopen(&mut next, *primary, present, facts)?,
        Transition::ForceAccept { member, history_id } => {
            force_accept(&mut next, member, *history_id, facts)?;
        }
        Transition::Cancel { copy } => {
            check_learner(conf, *copy)?;
            next.learners.retain(|learner| learner != copy);
        }
        Transition::Attach { attach_epoch } => attach(&mut next, *attach_epoch)?,
        Transition::Properties { rf, min_write } => properties(&mut next, *rf, *min_write)?,
    }
    next.check()?;
    Ok(next)
}

/// The transition that leads from `old` to `new`, if there is one (invariant I7).
///
/// It looks at the two configurations only: which store was registered or reachable, and who asked,
/// is not in them.
#[must_use]
pub fn is_legal_step(old: &ShardConf, new: &ShardConf) -> Option<&'static str> {
    let is_next = old.shard == new.shard && new.epoch.0 == old.epoch.0 + 1;
    if !is_next || old.check().is_err() || new.check().is_err() {
        return None;
    }
    let shapes: [(&'static str, Shape); 9] = [
        ("T1", shape::remove),
        ("T2", shape::promote),
        ("T3", shape::add_learner),
        ("T4", shape::admit),
        ("T5", shape::transfer),
        ("T6", shape::reopen),
        ("T7", shape::force_accept),
        ("T8", shape::cancel),
        ("T9", shape::property),
    ];
    let fits = |make: Shape| {
        make(old, new).is_some_and(|made| ShardConf { epoch: new.epoch, ..made } == *new)
    };
    shapes.into_iter().find(|(_, make)| fits(*make)).map(|(name, _)| name)
}

type Shape = fn(&ShardConf, &ShardConf) -> Option<ShardConf>;

/// What each transition could have made of `old`, its argument being read off `new`.
mod shape {
    use super::{CopyId, Member, ShardConf, is_next_history};

    /// The one number of `more` that `less` lacks.
    fn one_more(more: &[CopyId], less: &[CopyId]) -> Option<CopyId> {
        let mut extra = more.iter().filter(|copy| !less.contains(copy));
        let found = extra.next().copied();
        if extra.next().is_some() { None } else { found }
    }

    fn without(copies: &[CopyId], copy: CopyId) -> Vec<CopyId> {
        copies.iter().copied().filter(|other| *other != copy).collect()
    }

    fn with(copies: &[CopyId], copy: CopyId) -> Vec<CopyId> {
        let mut all = copies.to_vec();
        all.push(copy);
        all.sort_unstable();
        all
    }

    fn replaced(members: &[Member], member: Member) -> Vec<Member> {
        let mut all: Vec<_> =
            members.iter().copied().filter(|other| other.copy != member.copy).collect();
        all.push(member);
        all.sort_by_key(|member| member.copy);
        all
    }

    pub(super) fn remove(old: &ShardConf, new: &ShardConf) -> Option<ShardConf> {
        let copy = one_more(&old.isr, &new.isr)?;
        (copy != old.primary).then(|| ShardConf { isr: without(&old.isr, copy), ..old.clone() })
    }

    pub(super) fn promote(old: &ShardConf, new: &ShardConf) -> Option<ShardConf> {
        let is_other = new.primary != old.primary && old.isr.contains(&new.primary);
        let isr = without(&old.isr, old.primary);
        is_other.then(|| ShardConf { primary: new.primary, isr, ..old.clone() })
    }

    pub(super) fn add_learner(old: &ShardConf, new: &ShardConf) -> Option<ShardConf> {
        // A learner that began anew is in both lists: then its member is what changed.
        let changed = || new.members.iter().find(|member| !old.members.contains(member));
        let copy = one_more(&new.learners, &old.learners)
            .or_else(|| changed().map(|member| member.copy))?;
        let member = *new.member(copy)?;
        let is_learner = new.learners.contains(&copy) && !old.isr.contains(&copy);
        is_learner.then(|| ShardConf {
            learners: with(&without(&old.learners, copy), copy),
            members: replaced(&old.members, member),
            ..old.clone()
        })
    }

    pub(super) fn admit(old: &ShardConf, new: &ShardConf) -> Option<ShardConf> {
        let copy = one_more(&new.isr, &old.isr)?;
        old.learners.contains(&copy).then(|| ShardConf {
            isr: with(&old.isr, copy),
            learners: without(&old.learners, copy),
            ..old.clone()
        })
    }

    pub(super) fn transfer(old: &ShardConf, new: &ShardConf) -> Option<ShardConf> {
        let is_other = new.primary != old.primary && old.isr.contains(&new.primary);
        is_other.then(|| ShardConf { primary: new.primary, ..old.clone() })
    }

    pub(super) fn reopen(old: &ShardConf, new: &ShardConf) -> Option<ShardConf> {
        let is_new_life = |copy: &CopyId| {
            let lives = (old.member(*copy), new.member(*copy));
            matches!(lives, (Some(old), Some(new)) if old.incarnation != new.incarnation)
        };
        let is_reopened = new.isr.iter().all(|copy| old.isr.contains(copy) && is_new_life(copy));
        let mut members = old.members.clone();
        for member in &mut members {
            member.incarnation = new.member(member.copy)?.incarnation;
        }
        let (primary, isr, learners) = (new.primary, new.isr.clone(), Vec::new());
        is_reopened.then(|| ShardConf { primary, isr, learners, members, ..old.clone() })
    }

    pub(super) fn force_accept(old: &ShardConf, new: &ShardConf) -> Option<ShardConf> {
        old.member(new.primary)?;
        let is_new =
            is_next_history(old.history_id, new.history_id) && !old.isr.contains(&new.primary);
        let member = *new.primary_member();
        is_new.then(|| ShardConf {
            primary: member.copy,
            isr: vec![member.copy],
            learners: Vec::new(),
            members: replaced(&old.members, member),
            history_id: new.history_id,
            attach_epoch: old.attach_epoch + 1,
            ..old.clone()
        })
    }

    pub(super) fn cancel(old: &ShardConf, new: &ShardConf) -> Option<ShardConf> {
        let copy = one_more(&old.learners, &new.learners)?;
        Some(ShardConf { learners: without(&old.learners, copy), ..old.clone() })
    }

    pub(super) fn property(old: &ShardConf, new: &ShardConf) -> Option<ShardConf> {
        let is_attach = new.attach_epoch > old.attach_epoch;
        let has_changed = (new.rf, new.min_write) != (old.rf, old.min_write);
        if is_attach && !has_changed {
            Some(ShardConf { attach_epoch: new.attach_epoch, ..old.clone() })
        } else if has_changed {
            Some(ShardConf { rf: new.rf, min_write: new.min_write, ..old.clone() })
        } else {
            None
        }
    }
}

/// The column "Proposer" of the table; a replica also has to be heard in the life that counts.
fn check_proposer(conf: &ShardConf, transition: &Transition, facts: &Facts) -> Result<(), Refusal> {
    let (by_conductor, by_primary, by_copy) = match transition {
        Transition::Remove { .. } | Transition::Cancel { .. } => (true, true, None),
        Transition::Promote { copy } => (true, true, Some(*copy)),
        Transition::AddLearner { .. }
        | Transition::Reopen { .. }
        | Transition::Attach { .. }
        | Transition::Properties { .. } => (true, false, None),
        Transition::Admit { .. } | Transition::Transfer { .. } => (false, true, None),
        Transition::ForceAccept { .. } => (false, false, None),
    };
    let (is_entitled, replica) = match facts.proposer {
        Proposer::Conductor => (by_conductor, None),
        Proposer::Human => (matches!(transition, Transition::ForceAccept { .. }), None),
        Proposer::Replica { copy, incarnation } => {
            let is_entitled = (by_primary && copy == conf.primary) || by_copy == Some(copy);
            (is_entitled, Some((copy, incarnation)))
        }
    };
    if !is_entitled {
        let (transition, proposer) = (transition.name(), facts.proposer);
        return Err(Refusal::NotEntitled { transition, proposer });
    }
    let Some((copy, meant)) = replica else { return Ok(()) };
    let member = conf.member(copy).ok_or(Refusal::NotAMember(copy))?;
    if member.incarnation != meant {
        return Err(Refusal::OtherLife { copy, meant, known: member.incarnation });
    }
    check_registered(member, facts).map(|_| ())
}

/// The registration of exactly the life that `member` names.
fn check_registered<'a>(member: &Member, facts: &'a Facts) -> Result<&'a Registration, Refusal> {
    let found = facts.registered.get(&member.store);
    let registration = found.ok_or(Refusal::NotRegistered(member.store))?;
    if registration.incarnation == member.incarnation {
        Ok(registration)
    } else {
        let (meant, known) = (member.incarnation, registration.incarnation);
        Err(Refusal::OtherLife { copy: member.copy, meant, known })
    }
}

/// Registered, reachable now, and with a good journal.
fn check_good(member: &Member, facts: &Facts) -> Result<(), Refusal> {
    let registration = check_registered(member, facts)?;
    if !registration.is_reachable {
        return Err(Refusal::NotReachable(member.store));
    }
    if !registration.has_good_journal {
        return Err(Refusal::BadJournal(member.store));
    }
    Ok(())
}

/// Whether the member is there in the life that the configuration names.
fn is_there(member: &Member, facts: &Facts) -> bool {
    check_registered(member, facts).is_ok_and(|registration| registration.is_reachable)
}

fn check_other_isr_member(conf: &ShardConf, copy: CopyId) -> Result<&Member, Refusal> {
    if !conf.isr.contains(&copy) {
        return Err(Refusal::NotInIsr(copy));
    }
    if copy == conf.primary {
        return Err(Refusal::IsPrimary(copy));
    }
    conf.member(copy).ok_or(Refusal::NotAMember(copy))
}

fn check_learner(conf: &ShardConf, copy: CopyId) -> Result<&Member, Refusal> {
    if !conf.learners.contains(&copy) {
        return Err(Refusal::NotALearner(copy));
    }
    conf.member(copy).ok_or(Refusal::NotAMember(copy))
}

/// Not the same replica any more when its store, disk or formatting is another.
fn is_same_place(one: &Member, other: &Member) -> bool {
    (one.store, one.disk, one.format_uuid) == (other.store, other.disk, other.format_uuid)
}

/// Put a member into its place, instead of the one with its number if there is one.
fn put_member(conf: &mut ShardConf, member: Member) {
    conf.members.retain(|other| other.copy != member.copy);
    conf.members.push(member);
    conf.members.sort_by_key(|member| member.copy);
}

/// Other ISR members that must be there before the conductor may leave one out whose life goes on:
/// a slow copy is better than a single one.
const SPARED_BY_MIN: usize = 2;

fn remove(next: &mut ShardConf, copy: CopyId, facts: &Facts) -> Result<(), Refusal> {
    let member = check_other_isr_member(next, copy)?;
    if facts.proposer == Proposer::Conductor {
        let found = facts.registered.get(&member.store);
        let registration = found.ok_or(Refusal::NotRegistered(member.store))?;
        let others = next.isr_members().filter(|other| other.copy != copy);
        let there = others.filter(|other| is_there(other, facts)).count();
        let is_spare = there >= SPARED_BY_MIN.max(usize::from(next.min_write));
        if registration.incarnation == member.incarnation && !is_spare {
            return Err(Refusal::NotToSpare(copy));
        }
        if there == 0 {
            return Err(Refusal::NobodyElse);
        }
    }
    next.isr.retain(|other| *other != copy);
    Ok(())
}

/// Learners keep their place: the new primary begins their resync anew.
fn promote(next: &mut ShardConf, copy: CopyId, facts: &Facts) -> Result<(), Refusal> {
    check_good(check_other_isr_member(next, copy)?, facts)?;
    let old_primary = std::mem::replace(&mut next.primary, copy);
    next.isr.retain(|other| *other != old_primary);
    Ok(())
}

fn add_learner(next: &mut ShardConf, member: &Member, facts: &Facts) -> Result<(), Refusal> {
    if next.isr.contains(&member.copy) {
        return Err(Refusal::InIsr(member.copy));
    }
    // A learner that restarted begins anew in its new life; the same one twice is a mistake.
    if next.learners.contains(&member.copy) && next.member(member.copy) == Some(member) {
        return Err(Refusal::AlreadyLearner(member.copy));
    }
    check_registered(member, facts)?;
    put_member(next, *member);
    if !next.learners.contains(&member.copy) {
        next.learners.push(member.copy);
        next.learners.sort_unstable();
    }
    Ok(())
}

fn admit(
    next: &mut ShardConf,
    copy: CopyId,
    incarnation: Incarnation,
    facts: &Facts,
) -> Result<(), Refusal> {
    let member = check_learner(next, copy)?;
    if incarnation != member.incarnation {
        return Err(Refusal::OtherLife { copy, meant: incarnation, known: member.incarnation });
    }
    check_registered(member, facts)?;
    next.learners.retain(|other| *other != copy);
    next.isr.push(copy);
    next.isr.sort_unstable();
    Ok(())
}

/// That the old primary is drained and has given RELEASE is why only itself may propose this.
fn transfer(next: &mut ShardConf, copy: CopyId, facts: &Facts) -> Result<(), Refusal> {
    check_registered(check_other_isr_member(next, copy)?, facts)?;
    next.primary = copy;
    Ok(())
}

fn reopen(
    next: &mut ShardConf,
    primary: CopyId,
    present: &[Member],
    facts: &Facts,
) -> Result<(), Refusal> {
    if let Some(member) = next.isr_members().find(|member| is_there(member, facts)) {
        return Err(Refusal::StillThere(member.copy));
    }
    if !next.isr.contains(&primary) {
        return Err(Refusal::NotInIsr(primary));
    }
    if !present.iter().any(|member| member.copy == primary) {
        return Err(Refusal::PrimaryNotPresent(primary));
    }
    for (place, member) in present.iter().enumerate() {
        if present[..place].iter().any(|other| other.copy == member.copy) {
            return Err(Refusal::PresentTwice(member.copy));
        }
        let before = next.member(member.copy).ok_or(Refusal::NotAMember(member.copy))?;
        if !is_same_place(before, member) {
            return Err(Refusal::OtherPlace(member.copy));
        }
        check_good(member, facts)?;
    }
    for member in next.isr_members() {
        let registration = facts.registered.get(&member.store);
        let is_good =
            registration.is_some_and(|found| found.is_reachable && found.has_good_journal);
        if is_good && !present.iter().any(|other| other.copy == member.copy) {
            return Err(Refusal::LeftOut(member.copy));
        }
    }
    let isr: Vec<CopyId> = next
        .isr
        .iter()
        .copied()
        .filter(|copy| present.iter().any(|member| member.copy == *copy))
        .collect();
    check_most_complete(primary, &isr, facts)?;
    for member in present {
        put_member(next, *member);
    }
    (next.primary, next.isr) = (primary, isr);
    next.learners.clear();
    Ok(())
}

/// Nobody among the candidates has seen a higher commit_lsn as ISR member than `primary` has.
fn check_most_complete(
    primary: CopyId,
    candidates: &[CopyId],
    facts: &Facts,
) -> Result<(), Refusal> {
    let known =
        |copy: CopyId| facts.complete.get(&copy).copied().ok_or(Refusal::UnknownComplete(copy));
    let complete = known(primary)?;
    for copy in candidates {
        let best = known(*copy)?;
        if best > complete {
            return Err(Refusal::Behind { copy: primary, complete, better: *copy, best });
        }
    }
    Ok(())
}

/// The place may be another one (a salvaged disk is formatted anew), the number may not: a person
/// chooses among the replicas that exist.
fn force_accept(
    next: &mut ShardConf,
    member: &Member,
    history_id: u64,
    facts: &Facts,
) -> Result<(), Refusal> {
    next.member(member.copy).ok_or(Refusal::NotAMember(member.copy))?;
    if next.isr.contains(&member.copy) {
        return Err(Refusal::InIsr(member.copy));
    }
    check_good(member, facts)?;
    for lost in next.isr_members() {
        check_lost(lost, facts)?;
    }
    if !is_next_history(next.history_id, history_id) {
        return Err(Refusal::HistoryNotNew { proposed: history_id, stored: next.history_id });
    }
    put_member(next, *member);
    (next.primary, next.isr) = (member.copy, vec![member.copy]);
    next.learners.clear();
    next.history_id = history_id;
    next.attach_epoch += 1;
    Ok(())
}

/// A member of the ISR that cannot serve in the life that the configuration names, nor be opened in
/// a newer one.
fn check_lost(member: &Member, facts: &Facts) -> Result<(), Refusal> {
    let registration = facts.registered.get(&member.store);
    let is_reborn = registration.is_some_and(|found| found.incarnation != member.incarnation);
    let is_ended = facts.ended.get(&member.store).is_some_and(|&last| last >= member.incarnation);
    if !is_reborn && !is_ended {
        return Err(Refusal::MayServe(member.copy));
    }
    if registration.is_some_and(|found| found.is_reachable && found.has_good_journal) {
        return Err(Refusal::StillGood(member.copy));
    }
    Ok(())
}

/// Whether a person has forced it after the other; what is below `HISTORY_SHIFT` says nothing.
fn is_next_history(old: u64, new: u64) -> bool {
    new >> HISTORY_SHIFT > old >> HISTORY_SHIFT
}

fn attach(next: &mut ShardConf, attach_epoch: u64) -> Result<(), Refusal> {
    if attach_epoch <= next.attach_epoch {
        let stored = next.attach_epoch;
        return Err(Refusal::AttachNotNewer { proposed: attach_epoch, stored });
    }
    next.attach_epoch = attach_epoch;
    Ok(())
}

fn properties(next: &mut ShardConf, rf: u8, min_write: u8) -> Result<(), Refusal> {
    if (rf, min_write) == (next.rf, next.min_write) {
        return Err(Refusal::Unchanged);
    }
    (next.rf, next.min_write) = (rf, min_write);
    Ok(())
}
