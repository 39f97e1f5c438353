//! Reads of blocks that are damaged here, and the mending of damaged blocks.
//!
//! **A read goes on** when the lane could not do it: it is cut into *pieces*. A piece that fails
//! here is halved until the damaged blocks are known one by one; what is good here is read here.
//! Each damaged block is asked of one in-sync member after the other (committed content is the same
//! on all of them, and no write of these blocks is under way: the read holds its lock). So a
//! request fails only if one of its blocks is good nowhere, wherever the others are good.
//!
//! **What was met is mended.** A block that could not be read here, or by a member that was asked
//! for it, is written again once a good copy has been found: with an lsn of its own, at every
//! member, so one writing mends all copies. A block that nobody has is *lost*: an error, told until
//! it is overwritten. Only where it stands against a new copy it is poisoned on all members, so
//! that it is the same everywhere.
//!
//! **Mending does not wait for clients.** A client's write may wait for a new copy (`min_write`),
//! and that copy for the mending of a block here: so mending must not queue behind requests. It
//! takes no range lock. It begins while no operation with an lsn is under way on its block, and
//! until it is over no request gives the block an lsn. Reads go on beside it: the content stays the
//! same. A block that an operation under way has replaced here needs no mending to be copied; if
//! that is damaged in its turn while it waits, the lane gets the operation again.
//!
//! **Bounds.** [`PIECES_MAX`] pieces of a read are under way at a time, and [`HEALS_MAX`] blocks
//! are mended at a time; [`WANTED_MAX`] wait for it. A damaged block that finds no room is found
//! again by its next read.

use super::damage::{Damage, Mend, is_damage};
use super::follower::Body;
use super::{Command, Ctx, Effect, Kind, Mutant, Note, RESEND_MS, Replica, Work};
use crate::client::{Task, status_of};
use crate::conf::StoreId;
use lane::{Op, Outcome, Problem, REGION_BLOCKS};
use proto::disk::BufList;
use proto::wire::CheckedData;
use proto::{BLOCK_BYTES, Status, Tick};
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet};

/// Pieces of one read under way.
const PIECES_MAX: usize = 16;
/// Blocks that are mended at a time: few, because clients wait for the same disks.
const HEALS_MAX: usize = 8;
/// Blocks that wait to be mended.
pub(super) const WANTED_MAX: usize = 4_096;

/// What is under way.
#[derive(Default)]
pub(super) struct Repairs {
    /// By the task whose read it is.
    reads: BTreeMap<u32, Repair>,
    /// Task and first block of each piece under way. Told by its number, an answer cannot be taken
    /// for that to another read.
    asked: BTreeMap<u32, (u32, u32)>,
    /// Blocks that are to be written again.
    wanted: BTreeMap<u32, Mend>,
    /// Blocks that are being written again.
    healing: BTreeMap<u32, Heal>,
}

struct Heal {
    mend: Mend,
    /// Nobody has it.
    is_poisoned: bool,
}

/// A read that the lane could not do.
struct Repair {
    pieces: BTreeMap<u32, Piece>,
    /// What is good, by first block.
    found: BTreeMap<u32, (SmallVec<[u32; 4]>, BufList)>,
    /// Blocks that could not be read here, or by a member that was asked.
    damaged: BTreeSet<u32>,
    /// Of a block that nobody has.
    problem: Option<Problem>,
}

/// Adjacent blocks that are read together.
#[derive(Clone)]
struct Piece {
    count: u32,
    source: Source,
    /// Number and time of the question under way.
    asked: Option<(u32, Tick)>,
}

#[derive(Clone)]
enum Source {
    /// The own lane; whether the device has failed already to read this block.
    Own { is_again: bool },
    /// Members, because the own lane has this problem.
    Others { problem: Problem, asked: SmallVec<[StoreId; 4]>, is_unsure: bool },
}

impl Repairs {
    /// A task is over.
    pub(super) fn end(&mut self, task: u32) {
        if self.reads.remove(&task).is_some() {
            self.asked.retain(|_, place| place.0 != task);
        }
    }

    /// The blocks of a region that wait to be mended, or are.
    pub(super) fn mending(&self, region: u32) -> impl Iterator<Item = u32> {
        let blocks = region * REGION_BLOCKS..(region + 1) * REGION_BLOCKS;
        let wanted = self.wanted.range(blocks.clone()).map(|(&block, _)| block);
        wanted.chain(self.healing.range(blocks).map(|(&block, _)| block))
    }

    /// Whether a region is to be copied only later, because what is damaged in it here is being
    /// looked for or mended.
    pub(super) fn stand_against(&self, damage: &Damage, region: u32) -> bool {
        damage.is_probing(region) || self.mending(region).any(|block| damage.is_here(block))
    }

    /// The blocks that wait to be mended, ascending.
    pub(super) fn wanted(&self) -> impl Iterator<Item = u32> {
        self.wanted.keys().copied()
    }

    /// Whether one of these blocks is being written again.
    pub(super) fn is_healing(&self, (first, count): (u32, u32)) -> bool {
        self.healing.range(first..first + count).next().is_some()
    }

    /// Whether this answer belongs to a read.
    pub(super) fn has_asked(&self, number: u32) -> bool {
        self.asked.contains_key(&number)
    }
}

/// Whether a member that refuses so has shown that its copy is damaged.
pub(super) fn is_media(status: Status) -> bool {
    matches!(status, Status::MediaError | Status::BadChecksum)
}

impl Replica {
    fn repairs(&mut self) -> &mut Repairs {
        &mut self.reign().clients.repairs
    }

    /// The lane could not do a task's read.
    pub(super) fn begin_repair(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        task: u32,
        (first, count): (u32, u32),
        problem: Problem,
    ) {
        let piece = Piece { count, source: Source::Own { is_again: false }, asked: None };
        let repair = Repair {
            pieces: BTreeMap::from([(first, piece)]),
            found: BTreeMap::new(),
            damaged: BTreeSet::new(),
            problem: None,
        };
        self.repairs().reads.insert(task, repair);
        self.own_failed(task, first, problem);
        self.drive_repair(ctx, task);
    }

    /// Own blocks could not be read: halve them, try again, or ask the members.
    fn own_failed(&mut self, task: u32, first: u32, problem: Problem) {
        // Seeded bug: the others are asked for everything at once.
        let is_whole = self.mutant(Mutant::WholeRangeAsk);
        let repair = self.repairs().reads.get_mut(&task).expect("its piece was read");
        let piece = repair.pieces.get_mut(&first).expect("it was read");
        piece.asked = None;
        let is_again = matches!(piece.source, Source::Own { is_again: true });
        if is_damage(&problem) && piece.count > 1 && !is_whole {
            return repair.halve(first);
        }
        if matches!(problem, Problem::Media { .. }) && !is_again && !is_whole {
            piece.source = Source::Own { is_again: true };
            return;
        }
        let is_known = is_damage(&problem) && piece.count == 1;
        piece.source = Source::Others { problem, asked: SmallVec::new(), is_unsure: false };
        if is_known {
            repair.damaged.insert(first);
            self.know_damaged(first);
        }
    }

    /// Ask for the pieces of a read that nobody works on; it goes on when none is left.
    fn drive_repair(&mut self, ctx: &mut Ctx<'_, '_>, task: u32) {
        loop {
            let repair = self.repairs().reads.get_mut(&task).expect("its read goes on");
            let under_way = repair.pieces.values().filter(|piece| piece.asked.is_some()).count();
            let idle = repair.pieces.iter().find(|(_, piece)| piece.asked.is_none());
            let Some((&first, piece)) = idle.filter(|_| under_way < PIECES_MAX) else { break };
            let count = piece.count;
            if matches!(piece.source, Source::Own { .. }) {
                let number = self.piece_asked(ctx, task, first);
                let (reign, shard_ix) = (self.reign().epoch, self.options.shard_ix);
                let request = Op::Read { shard_ix, first, count, with_poison: false };
                self.lane(ctx, Work::Piece { reign, number }, request);
            } else if self.ask_elsewhere(ctx, task, first) {
                // The task was to heal a block that no member has: it poisons the block and waits
                // for that.
                return;
            }
        }
        if self.repairs().reads[&task].pieces.is_empty() {
            self.repaired(ctx, task);
        }
    }

    fn piece_asked(&mut self, ctx: &Ctx<'_, '_>, task: u32, first: u32) -> u32 {
        let number = self.next_job();
        let repairs = self.repairs();
        repairs.asked.insert(number, (task, first));
        let repair = repairs.reads.get_mut(&task).expect("its read goes on");
        repair.pieces.get_mut(&first).expect("a piece of it").asked = Some((number, ctx.now));
        number
    }

    /// Ask the next member for blocks that are damaged here; without one left they are lost. True:
    /// the read is over because its block was poisoned.
    fn ask_elsewhere(&mut self, ctx: &mut Ctx<'_, '_>, task: u32, first: u32) -> bool {
        let required = self.required(false);
        let repair = self.repairs().reads.get_mut(&task).expect("its read goes on");
        let piece = repair.pieces.get_mut(&first).expect("a piece of it");
        let count = piece.count;
        let Source::Others { problem, asked, is_unsure } = &mut piece.source else {
            unreachable!("own pieces are read here")
        };
        if let Some(&(to, _)) = required.iter().find(|(store, _)| !asked.contains(store)) {
            asked.push(to);
            let number = u64::from(self.piece_asked(ctx, task, first));
            self.ask_blocks(ctx, to, Command { kind: Kind::Repair, number }, first, count);
            return false;
        }
        let (problem, is_certain) = (problem.clone(), !*is_unsure && is_damage(problem));
        repair.pieces.remove(&first);
        repair.problem.get_or_insert(problem.clone());
        if is_certain {
            (first..first + count).for_each(|block| self.damage.lose(block));
        }
        self.poison_healed(ctx, task, first, &problem)
    }

    /// A block that was to be healed for a new copy, and cannot be, is poisoned in the end, so that
    /// it is the same everywhere and does not stand against that copy.
    fn poison_healed(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        task: u32,
        block: u32,
        problem: &Problem,
    ) -> bool {
        let is_alone = self.required(false).is_empty();
        let is_heal = self.is_heal(task);
        let heal = self.repairs().healing.get(&block);
        let may_poison = is_heal && heal.is_some_and(|heal| heal.mend == Mend::OrPoison);
        if !may_poison || !self.reign().is_lost(block, problem, is_alone) {
            return false;
        }
        self.repairs().end(task);
        self.repairs().healing.get_mut(&block).expect("just looked at").is_poisoned = true;
        self.damage.lose(block);
        ctx.out.push(Effect::Note(Note::Lost { block }));
        self.change(ctx, task, Body::Poison { first: block, count: 1 });
        true
    }

    /// The lane has read a piece again, or could not.
    pub(super) fn piece_read(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        number: u32,
        result: Result<Outcome, Problem>,
    ) {
        let Some((task, first)) = self.repairs().asked.remove(&number) else { return };
        match result {
            Ok(Outcome::Read { data, crcs }) => self.piece_found(task, first, crcs, data),
            Ok(Outcome::Done | Outcome::Created { .. }) => unreachable!("a read brings data"),
            Err(problem) => self.own_failed(task, first, problem),
        }
        self.drive_repair(ctx, task);
    }

    /// A member has read what is damaged here, or could not either.
    pub(super) fn read_elsewhere(
        &mut self,
        ctx: &mut Ctx<'_, '_>,
        (from, number): (StoreId, u64),
        result: Result<CheckedData, Status>,
    ) {
        let Ok(number) = u32::try_from(number) else { return };
        let Some(reign) = &mut self.reign else { return };
        if !reign.clients.repairs.has_asked(number) {
            return self.searched(ctx, from, number, result.map(drop));
        }
        let forgets = self.mutant(Mutant::MemberDamageForgotten);
        let is_whole = self.mutant(Mutant::WholeRangeAsk);
        let repairs = self.repairs();
        let (task, first) = repairs.asked[&number];
        let repair = repairs.reads.get_mut(&task).expect("its read goes on");
        let piece = repair.pieces.get_mut(&first).expect("a piece of it");
        let Source::Others { asked, is_unsure, .. } = &mut piece.source else { return };
        if asked.last() != Some(&from) {
            return;
        }
        repairs.asked.remove(&number);
        piece.asked = None;
        let bytes = u64::from(piece.count) * BLOCK_BYTES as u64;
        match result {
            Ok(content) if u64::from(content.length()) == bytes => {
                let count = piece.count;
                let (crcs, data) = content.into_parts();
                self.piece_found(task, first, crcs, data);
                self.damage.regain(first, count);
            }
            Err(status) if is_media(status) && piece.count > 1 && !is_whole => {
                asked.pop();
                repair.halve(first);
            }
            // Damaged there: what is found elsewhere mends that copy too.
            Err(status) if is_media(status) => {
                // Seeded bug: it is not remembered.
                if !forgets {
                    repair.damaged.insert(first);
                }
            }
            Ok(_) | Err(_) => *is_unsure = true,
        }
        self.drive_repair(ctx, task);
    }

    fn piece_found(&mut self, task: u32, first: u32, crcs: SmallVec<[u32; 4]>, data: BufList) {
        let repair = self.repairs().reads.get_mut(&task).expect("its read goes on");
        repair.pieces.remove(&first);
        repair.found.insert(first, (crcs, data));
    }

    /// Every piece of a read was found, or nobody has it.
    fn repaired(&mut self, ctx: &mut Ctx<'_, '_>, task: u32) {
        let first_only = self.mutant(Mutant::HealFirstOnly);
        let repair = self.repairs().reads.remove(&task).expect("its pieces are here");
        let has = |block: &u32| {
            let before = repair.found.range(..=block).next_back();
            before.is_some_and(|(first, (crcs, _))| *block < first + crcs.len() as u32)
        };
        // Seeded bug: the others are left as they are.
        let most = if first_only { 1 } else { usize::MAX };
        let damaged: Vec<u32> = repair.damaged.iter().copied().filter(has).take(most).collect();
        let is_heal = self.is_heal(task);
        for block in damaged.into_iter().filter(|_| !is_heal) {
            self.mend(ctx, block, Mend::Yes);
        }
        if let Some(problem) = repair.problem {
            return self.finish(ctx, task, Err(status_of(&problem)));
        }
        let (mut all_crcs, mut all_data) = (SmallVec::new(), BufList::new());
        for (crcs, data) in repair.found.into_values() {
            all_crcs.extend(crcs);
            all_data.extend(data);
        }
        self.read_over(ctx, task, all_crcs, all_data);
    }

    /// Ask again for what was not answered: the member may be gone.
    pub(super) fn tick_repairs(&mut self, ctx: &mut Ctx<'_, '_>) {
        let now = ctx.now;
        let is_late = |piece: &Piece| {
            let since = piece.asked.map(|(_, since)| since);
            matches!(piece.source, Source::Others { .. })
                && since.is_some_and(|since| now >= since.after_millis(RESEND_MS))
        };
        let repairs = self.repairs();
        let mut late = BTreeSet::new();
        for (&task, repair) in &mut repairs.reads {
            for piece in repair.pieces.values_mut().filter(|piece| is_late(piece)) {
                let (number, _) = piece.asked.take().expect("late");
                repairs.asked.remove(&number);
                if let Source::Others { asked, is_unsure, .. } = &mut piece.source {
                    asked.clear();
                    *is_unsure = false;
                }
                late.insert(task);
            }
        }
        for task in late {
            self.drive_repair(ctx, task);
        }
        self.start_heals(ctx);
    }

    // --------------------------------------------------------------------------------- mending --

    /// Write a damaged block again.
    pub(super) fn mend(&mut self, ctx: &mut Ctx<'_, '_>, block: u32, mend: Mend) {
        assert!(mend != Mend::No, "asked for by who mends");
        let repairs = self.repairs();
        if let Some(heal) = repairs.healing.get_mut(&block) {
            heal.mend = heal.mend.max(mend);
            return;
        }
        if repairs.wanted.len() < WANTED_MAX || repairs.wanted.contains_key(&block) {
            let wanted = repairs.wanted.entry(block).or_insert(mend);
            *wanted = mend.max(*wanted);
        }
        self.start_heals(ctx);
    }

    /// Mend what is known to be damaged here, at the beginning of a reign.
    pub(super) fn mend_known(&mut self, ctx: &mut Ctx<'_, '_>) {
        for block in self.damage.first_of_here(WANTED_MAX) {
            self.found_here(ctx, block, Mend::Yes);
        }
    }

    fn start_heals(&mut self, ctx: &mut Ctx<'_, '_>) {
        while let Some(reign) = self.reign.as_mut().filter(|reign| reign.takes_requests())
            && reign.clients.repairs.healing.len() < HEALS_MAX
            && let Some(block) = reign.next_to_heal()
        {
            let repairs = &mut reign.clients.repairs;
            let mend = repairs.wanted.remove(&block).expect("just found");
            repairs.healing.insert(block, Heal { mend, is_poisoned: false });
            ctx.out.push(Effect::Note(Note::Healing { block }));
            self.begin_task(ctx, Task::heal(block), 0..0, true);
        }
        if self.reign.as_ref().is_some_and(|reign| reign.takes_requests()) {
            self.restore_open(ctx);
        }
    }

    /// A task of `Task::heal` is over.
    pub(super) fn heal_over(&mut self, ctx: &mut Ctx<'_, '_>, block: u32, is_done: bool) {
        let heal = self.repairs().healing.remove(&block).expect("it was under way");
        if is_done && !heal.is_poisoned {
            ctx.out.push(Effect::Note(Note::Mended { block }));
            self.count_mended(block);
        }
        self.start_waiting(ctx);
        self.start_heals(ctx);
        self.poke_verify(ctx);
    }
}

impl Repair {
    /// Put two halves in the place of a piece.
    fn halve(&mut self, first: u32) {
        let piece = self.pieces.get_mut(&first).expect("a piece of it");
        let half = piece.count / 2;
        let second = Piece { count: piece.count - half, ..piece.clone() };
        piece.count = half;
        self.pieces.insert(first + half, second);
    }
}
