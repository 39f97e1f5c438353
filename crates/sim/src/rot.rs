//! Bit rot: blocks whose content on one disk is wrong from now on.
//!
//! **The budget.** A run of adjacent blocks, as one request reads it, loses some of its copies at
//! once: each block on a member of the ISR of its own choosing, so that often no copy has all of
//! the run, or all on one member. All others keep the block, and the ISR is whole then. Worlds with
//! rot that a seed chooses have no faults that take members out of the ISR: the last good copy must
//! not go by itself.
//!
//! **What is checked.** A request is not failed while each of its blocks has a good copy (I29).
//! What a primary knows to be damaged is mended within seconds, and at rest, after a verification
//! that repairs, no copy is damaged or told to be (I30).
//!
//! **Worlds that lose.** With rot and faults of members, both named in the options, the last good
//! copy of a block may go. A primary may call a block lost only while no member of its ISR has a
//! good copy, and only such a block may fail and stay damaged or poisoned; all else holds as
//! before: no wrong data, and every shard becomes whole and served.

use crate::check::Place;
use crate::phases::Phase;
use crate::store::{Input, shard_id};
use crate::world::World;
use lane::map::BlockState;
use proto::{BLOCK_BYTES, Buf};
use shard::conf::StoreId;

/// Blocks that one stroke damages, at most: as many as a request of a client has.
const RUN_MAX: u64 = 4;

/// One copy of a block that was damaged.
pub(crate) struct Rotten {
    store: StoreId,
    shard: u32,
    block: u32,
    offset: u64,
    /// What the disk holds there since.
    bytes: Buf,
}

impl World {
    /// Damage some copies of a run of blocks that clients use.
    pub(crate) fn rot(&mut self) {
        let at = self.random.below(self.hot.len() as u64) as usize;
        let run = self.hot[at..].iter().zip(self.hot[at]..);
        let run = run.take_while(|&(&block, next)| block == next).take(RUN_MAX as usize);
        let blocks: Vec<u64> = run.map(|(&block, _)| block).collect();
        let size = self.options.regions * crate::client::REGION_BLOCKS;
        // Half of them are of one disk: a read there meets several damages at once.
        let one = (self.random.below(2) == 0).then(|| self.random.number());
        for block in blocks {
            let (shard, block) = ((block / size) as u32, (block % size) as u32);
            let stores: Vec<StoreId> =
                self.conductor.conf(shard).isr_members().map(|member| member.store).collect();
            let is_good = |&&store: &&StoreId| self.is_good(store, shard, block) == Some(true);
            let good = stores.iter().filter(is_good).count();
            let choice = one.unwrap_or_else(|| self.random.number());
            let store = stores[(choice % stores.len() as u64) as usize];
            let is_whole = stores.len() as u64 == self.options.rf && stores.len() > 1;
            if is_whole && good == stores.len() {
                self.rot_copy(store, shard, block);
            }
        }
    }

    /// What a store that runs shows of a block, and where its content is, if it has any of its own.
    fn shown(&self, store: StoreId, shard: u32, block: u32) -> Option<(BlockState, Option<u64>)> {
        let store = &self.stores[store as usize - 1];
        let tables = store.process.as_ref()?.lane()?.tables();
        let head = tables.shard(tables.find(shard_id(shard))?)?.head;
        let (extent, within) = (block / lane::EXTENT_BLOCKS, block % lane::EXTENT_BLOCKS);
        let entry = tables.extent(head, extent)?;
        let state = entry.state(within);
        if state != BlockState::Data {
            return Some((state, None));
        }
        let geometry = lane::format::Geometry::new(&store.mount.entry).expect("it is open");
        let slot = entry.slot(within / lane::SLOT_BLOCKS).expect("a block with data has a slot");
        Some((state, Some(geometry.slot(slot, within % lane::SLOT_BLOCKS))))
    }

    fn offset_of(&self, store: StoreId, shard: u32, block: u32) -> Option<u64> {
        self.shown(store, shard, block)?.1
    }

    /// Whether a store that runs can read a block; `None`: it does not run.
    fn is_good(&self, store: StoreId, shard: u32, block: u32) -> Option<bool> {
        let (state, _) = self.shown(store, shard, block)?;
        Some(state != BlockState::Poison && !self.is_rotten(store, shard, block))
    }

    /// Whether the last good copy of a block may go.
    fn may_lose(&self) -> bool {
        self.options.rot_every_ms > 0 && self.options.clone().takes_members()
    }

    /// A primary says that nobody has a block; whether that is judged here.
    pub(crate) fn check_loss(&mut self, store: StoreId, shard: u32, block: u32) -> bool {
        if self.stores[store as usize - 1].has_failed_reads {
            // The medium failed here and nobody else could help: an error, not yet a loss. Whether
            // it is one shows at rest.
            self.count("unreadable");
            return true;
        }
        if !self.may_lose() {
            return false;
        }
        let process = self.stores[store as usize - 1].process.as_ref();
        let replica = process.and_then(|process| process.replica(shard));
        let conf = replica.and_then(|replica| replica.conf()).expect("a primary has said it");
        let members: Vec<StoreId> = conf.isr_members().map(|member| member.store).collect();
        if let Some(other) =
            members.into_iter().find(|&other| self.is_good(other, shard, block) == Some(true))
        {
            let text = format!(
                "I29: at {} ns store {store} says that nobody has block {block} of shard {shard}; \
                 store {other} has it",
                self.now
            );
            self.check.fail(text);
        }
        self.count("lost");
        let size = self.options.regions * crate::client::REGION_BLOCKS;
        self.losses.insert(u64::from(shard) * size + u64::from(block));
        true
    }

    fn rot_copy(&mut self, store: StoreId, shard: u32, block: u32) {
        let Some(offset) = self.offset_of(store, shard, block) else { return };
        let disk = &mut self.stores[store as usize - 1].disk;
        if disk.rot(offset, &mut self.random) {
            self.count("fault.rot");
            let bytes = self.stores[store as usize - 1].disk.read(offset, BLOCK_BYTES as u32);
            self.rotten.push(Rotten { store, shard, block, offset, bytes });
        }
    }

    /// Whether this copy is damaged still: nothing was written there since.
    fn is_rotten(&self, store: StoreId, shard: u32, block: u32) -> bool {
        let mut of_block = self
            .rotten
            .iter()
            .filter(|rotten| (rotten.store, rotten.shard, rotten.block) == (store, shard, block));
        of_block.any(|rotten| self.is_there(rotten))
    }

    fn is_there(&self, rotten: &Rotten) -> bool {
        let Rotten { store, shard, block, offset, ref bytes } = *rotten;
        let disk = &self.stores[store as usize - 1].disk;
        self.offset_of(store, shard, block) == Some(offset)
            && disk.read(offset, BLOCK_BYTES as u32)[..] == bytes[..]
    }

    /// I29: a request was failed because of damage.
    pub(crate) fn check_failed_read(&mut self, first: u64, count: u64) {
        // What one device fails to read for a moment all of them may.
        if self.options.rot_every_ms == 0 || self.options.eio_read + self.options.bit_flip > 0 {
            return;
        }
        let size = self.options.regions * crate::client::REGION_BLOCKS;
        let is_good = |block: u64| {
            let (shard, block) = ((block / size) as u32, (block % size) as u32);
            let conf = self.conductor.conf(shard);
            conf.isr_members().any(|member| self.is_good(member.store, shard, block) == Some(true))
        };
        let blocks = first..first + count;
        let is_lost = self.losses.range(blocks.clone()).next().is_some();
        if !is_lost && blocks.clone().all(is_good) {
            let text = format!(
                "I29: at {} ns a read of blocks {first}+{count} has failed; each of them has a \
                 good copy",
                self.now
            );
            self.check.fail(text);
        }
    }

    /// What a primary knows to be damaged in its own copy, and has not mended.
    pub(crate) fn known_damage(&self) -> Option<String> {
        (0..self.options.shards as u32).find_map(|shard| {
            let store = self.conductor.conf(shard).primary_member().store;
            let replica = self.stores[store as usize - 1].process.as_ref()?.replica(shard)?;
            let facts = replica.damaged();
            let is_mendable = facts.blocks > replica.lost().blocks;
            is_mendable.then(|| format!("shard {shard} on store {store}: {:?}", facts.runs))
        })
    }

    /// Let every primary look for damage, and mend it, before everything is looked at.
    pub(crate) fn verify_all(&mut self) {
        if self.options.rot_every_ms == 0 {
            return;
        }
        for shard in 0..self.options.shards as u32 {
            let primary = self.conductor.conf(shard).primary_member().store;
            self.tell(primary, Input::Verify { shard });
        }
    }

    /// I30: what was damaged is mended.
    pub(crate) fn check_rot(&mut self) {
        assert!(self.phase == Phase::Looking, "at rest");
        // A loss has no good copy anywhere in the ISR, and whoever has met it tells of it.
        let is_loss = |shard: u32, block: u32| {
            let mut members = self.conductor.conf(shard).isr_members();
            self.may_lose()
                && members.all(|member| self.is_good(member.store, shard, block) == Some(false))
        };
        let is_left = |rotten: &&Rotten| {
            let is_member = self.conductor.conf(rotten.shard).isr_members();
            let is_member = is_member.map(|member| member.store).any(|store| store == rotten.store);
            is_member && self.is_there(rotten) && !is_loss(rotten.shard, rotten.block)
        };
        let left = self.rotten.iter().find(is_left);
        if let Some(&Rotten { store, shard, block, .. }) = left {
            let place =
                Place { shard, store, incarnation: self.stores[store as usize - 1].incarnation };
            let replica =
                self.stores[store as usize - 1].process.as_ref().and_then(|p| p.replica(shard));
            let is_told = replica.is_some_and(|replica| replica.is_damaged(block));
            let text = format!(
                "I30: block {block} of {place:?} is damaged after a verification that repairs; \
                 told: {is_told}"
            );
            self.check.fail(text);
        }
        let replicas =
            self.stores.iter().filter_map(|store| Some((store.id, store.process.as_ref()?)));
        let told: Vec<(StoreId, u32, u32)> = replicas
            .flat_map(|(id, process)| {
                (0..self.options.shards as u32).filter_map(move |shard| {
                    Some((id, shard, process.replica(shard)?.damaged().runs))
                })
            })
            .flat_map(|(id, shard, runs)| {
                let blocks = runs.into_iter().flat_map(|(first, count)| first..first + count);
                blocks.map(move |block| (id, shard, block))
            })
            .collect();
        let mut false_ones = told.into_iter().filter(|&(store, shard, block)| {
            !self.may_lose() || self.is_good(store, shard, block) != Some(false)
        });
        if let Some((store, shard, block)) = false_ones.next() {
            let text = format!(
                "I30: block {block} of shard {shard} on store {store} is told to be damaged, and \
                 is not"
            );
            self.check.fail(text);
        }
    }
}
