//! What a lane knows: layers with their extents, shards with their region maps and tails, tags.
//!
//! `apply` is the only way to change it and takes a journal record: the same code runs when an
//! operation completes, when recovery replays the journal, and in the crash explorer's oracle of
//! idempotence. Encoding and decoding of checkpoint runs live here too, beside the fields.

use crate::format::{RUN_BYTES_MAX, RunKind, TAGS_PER_PAGE, physical_block};
use crate::map::{BlockState, Extent};
use crate::record::{
    Body, Cursor, FLAG_COPY, FLAG_LEARNER, RangeKind, Record, RecordError, ShardChange, positions,
    put16, put32, put64,
};
use crate::tags::Tags;
use crate::{EXTENT_BLOCKS, EXTENT_SLOTS, REGION_BLOCKS, SHARD_BLOCKS_MAX};
use proto::{Epoch, Lsn, ReplicaId, Seq, ShardId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// Extents of one MAP run: 120 x 520 B worst case and its head fit one slot.
pub const MAP_GROUP_EXTENTS: u32 = 120;
/// Regions of one REGION run.
pub const REGION_GROUP: u32 = 4096;
/// CRC pages of one TAGSIDE run.
pub const SIDE_GROUP: u32 = 4096;
/// Deltas of one TAGDELTA run (12 B each).
pub const DELTA_GROUP: usize = 5000;
/// Shards of one lane; checked before a replica is created.
pub const SHARDS_MAX: u32 = 4096;

/// One layer of a shard: what was written between two snapshots.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layer {
    /// Shard it belongs to.
    pub shard_ix: u32,
    /// Volume family, part of every tag.
    pub family: VolumeId,
    /// One per 4 MiB of the shard.
    pub extents: Vec<Extent>,
}

/// One replica.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shard {
    /// Which replica.
    pub replica: ReplicaId,
    /// Its size.
    pub blocks: u32,
    /// Index of the layer that writes go to.
    pub head: u32,
    /// The configuration blob, opaque here.
    pub conf: Vec<u8>,
    /// Highest commit watermark seen.
    pub commit: Seq,
    /// Highest lsn applied.
    pub applied: Lsn,
    /// Per region `seq << 1 | SUSPECT`.
    pub regions: Vec<u64>,
    /// Records above the commit watermark, in lsn order.
    pub tail: BTreeMap<Seq, Vec<Record>>,
    /// Slots of its layers. Not stored: counted when recovery is over, kept by the lane from there.
    pub used_slots: u32,
    /// Blocks that were announced (first, count) and whose record has not taken effect: they have
    /// content whatever the map says. Not stored.
    pub unplaced: Vec<(u32, u32)>,
}

impl Shard {
    /// Regions a shard of `blocks` has.
    #[must_use]
    pub fn region_count(blocks: u32) -> usize {
        blocks.div_ceil(REGION_BLOCKS) as usize
    }
}

/// Slots that one record took from or gave back to the map.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SlotChanges {
    /// Slots that the map did not name before.
    pub claimed: Vec<u32>,
    /// Slots that it no longer names.
    pub freed: Vec<u32>,
    /// Natural bases whose extent is gone.
    pub released: Vec<u32>,
}

/// A record that contradicts the tables: a damaged disk, or our own bug.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("journal contradicts the tables: {problem}")]
pub struct Contradiction {
    /// What does not fit.
    pub problem: String,
}

fn contradiction<T>(problem: impl Into<String>) -> Result<T, Contradiction> {
    Err(Contradiction { problem: problem.into() })
}

/// Everything that a checkpoint stores and replay rebuilds.
pub struct Tables {
    /// Slots of the lane, for range checks.
    pub slots: u32,
    /// By shard index.
    pub shards: Vec<Option<Shard>>,
    /// By layer index.
    pub layers: Vec<Option<Layer>>,
    /// Stored checksums.
    pub tags: Tags,
    /// Slots never to be used.
    pub bad_slots: BTreeSet<u32>,
    /// MAP runs that changed since the last checkpoint.
    pub dirty_maps: BTreeSet<u64>,
    /// REGION runs that changed since the last checkpoint.
    pub dirty_regions: BTreeSet<u64>,
    /// Replay meets a checkpoint that may hold later effects: after-images then win over what is
    /// there, and records of replicas deleted later are skipped. Off once the lane is open.
    pub replaying: bool,
    /// Indices of shards whose records were skipped; a DELETE must explain each.
    pub skipped: BTreeSet<u32>,
}

impl Tables {
    /// Empty tables of a lane.
    #[must_use]
    pub fn new(slots: u32, tag_pages: u32) -> Tables {
        Tables {
            slots,
            shards: Vec::new(),
            layers: Vec::new(),
            tags: Tags::new(tag_pages),
            bad_slots: BTreeSet::new(),
            dirty_maps: BTreeSet::new(),
            dirty_regions: BTreeSet::new(),
            replaying: false,
            skipped: BTreeSet::new(),
        }
    }

    /// The shard with this index.
    #[must_use]
    pub fn shard(&self, ix: u32) -> Option<&Shard> {
        self.shards.get(ix as usize)?.as_ref()
    }

    /// Index of a replica of this shard.
    #[must_use]
    pub fn find(&self, shard: ShardId) -> Option<u32> {
        self.shards
            .iter()
            .position(|entry| entry.as_ref().is_some_and(|entry| entry.replica.shard == shard))
            .map(|ix| ix as u32)
    }

    /// Extent `extent` of layer `layer`.
    #[must_use]
    pub fn extent(&self, layer: u32, extent: u32) -> Option<&Extent> {
        self.layers.get(layer as usize)?.as_ref()?.extents.get(extent as usize)
    }

    fn extent_mut(&mut self, layer: u32, extent: u32) -> Result<&mut Extent, Contradiction> {
        self.layers
            .get_mut(layer as usize)
            .and_then(Option::as_mut)
            .and_then(|layer| layer.extents.get_mut(extent as usize))
            .ok_or_else(|| Contradiction {
                problem: format!("no extent {extent} of layer {layer}"),
            })
    }

    /// Whether a block of a shard has content of its own: a read of it may bring more than zeros.
    #[must_use]
    pub fn has_content(&self, ix: u32, block: u32) -> bool {
        let Some(shard) = self.shard(ix) else { return false };
        let extent = self.extent(shard.head, block / EXTENT_BLOCKS);
        let is_mapped = extent.is_some_and(|extent| match extent.state(block % EXTENT_BLOCKS) {
            BlockState::Data | BlockState::Poison => true,
            BlockState::Inherit | BlockState::Zero => false,
        });
        let is_in = |&(first, count): &(u32, u32)| (first..first + count).contains(&block);
        is_mapped || shard.unplaced.iter().any(is_in)
    }

    /// Whether a block of a shard is known to be lost.
    #[must_use]
    pub fn is_poisoned(&self, ix: u32, block: u32) -> bool {
        let Some(shard) = self.shard(ix) else { return false };
        let extent = self.extent(shard.head, block / EXTENT_BLOCKS);
        let is_in = |&(first, count): &(u32, u32)| (first..first + count).contains(&block);
        extent.is_some_and(|extent| extent.state(block % EXTENT_BLOCKS) == BlockState::Poison)
            && !shard.unplaced.iter().any(is_in)
    }

    /// The blocks of a shard that are known to be lost, ascending: a look at each extent that has
    /// states of blocks, 4 bytes for 16 of them.
    pub fn poisoned(&self, ix: u32) -> impl Iterator<Item = u32> + '_ {
        let layer = self.shard(ix).and_then(|shard| self.layers.get(shard.head as usize)?.as_ref());
        let extents = layer.into_iter().flat_map(|layer| &layer.extents).enumerate();
        extents
            .flat_map(|(at, extent)| extent.poisoned().map(move |b| at as u32 * EXTENT_BLOCKS + b))
            .filter(move |&block| self.is_poisoned(ix, block))
    }

    /// Slots that a write of these blocks could need: one for each position without.
    #[must_use]
    pub fn slots_needed(&self, ix: u32, first: u32, count: u32) -> u32 {
        let Some(shard) = self.shard(ix) else { return 0 };
        let has_none = |position: &u32| {
            let (extent, position) = (position / EXTENT_SLOTS, position % EXTENT_SLOTS);
            self.extent(shard.head, extent).is_none_or(|entry| entry.slot(position).is_none())
        };
        positions(first, count).filter(has_none).count() as u32
    }

    /// Count the slots of every shard.
    pub fn count_slots(&mut self) {
        for shard in self.shards.iter_mut().flatten() {
            shard.used_slots = 0;
        }
        for layer in self.layers.iter().flatten() {
            let slots =
                layer.extents.iter().map(|extent| extent.slots().count() as u32).sum::<u32>();
            if let Some(Some(shard)) = self.shards.get_mut(layer.shard_ix as usize) {
                shard.used_slots += slots;
            }
        }
    }

    /// Apply one record and tell which slots changed hands.
    pub fn apply(&mut self, record: &Record) -> Result<SlotChanges, Contradiction> {
        let mut changes = SlotChanges::default();
        if self.replaying && record.needs_shard() && self.shard(record.shard_ix).is_none() {
            self.skipped.insert(record.shard_ix);
            return Ok(changes);
        }
        match &record.body {
            Body::Intent(part) | Body::Redo(part) => {
                let placed = (part.extent * EXTENT_BLOCKS + part.first, part.count());
                let unplaced = &mut self.shard_mut(record.shard_ix)?.unplaced;
                if let Some(index) = unplaced.iter().position(|&range| range == placed) {
                    unplaced.swap_remove(index);
                }
                for (index, position) in positions(part.first, part.count()).enumerate() {
                    self.take_slot(
                        part.layer,
                        part.extent,
                        position,
                        part.slots[index],
                        &mut changes,
                    )?;
                }
                for (block, slot, in_slot, tag) in part.blocks() {
                    self.tags.set(physical_block(slot, in_slot), tag);
                    self.extent_mut(part.layer, part.extent)?.set_state(block, BlockState::Data);
                }
                self.tidy(part.layer, part.extent, part.first, part.count(), &mut changes)?;
                self.raise_regions(record, part.extent * EXTENT_BLOCKS + part.first, part.count())?;
            }
            Body::Range { layer, kind, first, count } => {
                let state = match kind {
                    RangeKind::Inherit => BlockState::Inherit,
                    RangeKind::Zero => BlockState::Zero,
                    RangeKind::Poison => BlockState::Poison,
                };
                self.apply_range(*layer, state, *first, *count, &mut changes)?;
                self.raise_regions(record, *first, *count)?;
            }
            Body::Resolve(part) => {
                for (index, position) in
                    positions(part.first, part.decided.len() as u32).enumerate()
                {
                    if let Some(slot) = part.slots[index] {
                        self.leave_slot(part.layer, part.extent, position, slot, &mut changes)?;
                        self.take_slot(part.layer, part.extent, position, slot, &mut changes)?;
                    }
                }
                let first_position = part.first / crate::SLOT_BLOCKS;
                for (index, decided) in part.decided.iter().enumerate() {
                    let block = part.first + index as u32;
                    if decided.state == BlockState::Data {
                        let position = (block / crate::SLOT_BLOCKS - first_position) as usize;
                        let slot = part.slots[position].expect("checked when decoded");
                        let physical = physical_block(slot, block % crate::SLOT_BLOCKS);
                        self.tags.set(physical, decided.tag);
                    }
                    self.extent_mut(part.layer, part.extent)?.set_state(block, decided.state);
                }
                let count = part.decided.len() as u32;
                self.tidy(part.layer, part.extent, part.first, count, &mut changes)?;
                self.suspect_regions(
                    record.shard_ix,
                    part.extent * EXTENT_BLOCKS + part.first,
                    count,
                )?;
            }
            Body::Conf(blob) => self.shard_mut(record.shard_ix)?.conf.clone_from(blob),
            Body::Region { region, value } => {
                let key = region_key(record.shard_ix, *region);
                let shard = self.shard_mut(record.shard_ix)?;
                match shard.regions.get_mut(*region as usize) {
                    // The seq was read when the record was made: a write that completed since may
                    // have raised it, and a region's lsn must never become too low.
                    Some(entry) => *entry = (*entry >> 1).max(*value >> 1) << 1 | (*value & 1),
                    None => return contradiction(format!("no region {region}")),
                }
                self.dirty_regions.insert(key);
            }
            Body::Shard(change) => self.apply_change(record.shard_ix, change, &mut changes)?,
            Body::BadSlot { slot } => {
                if *slot >= self.slots {
                    return contradiction(format!("bad slot {slot} outside the lane"));
                }
                self.bad_slots.insert(*slot);
            }
            Body::Commit | Body::Mount { .. } | Body::Seal | Body::Pad => {}
        }
        self.note_lsn(record)?;
        Ok(changes)
    }

    /// Note the lsn and the regions of a record that was acknowledged before it takes effect (REDO):
    /// whoever asks for tails or region lsns must see it from then on.
    pub fn announce(&mut self, record: &Record) -> Result<(), Contradiction> {
        if let Body::Redo(part) = &record.body {
            let first = part.extent * EXTENT_BLOCKS + part.first;
            self.raise_regions(record, first, part.count())?;
            self.shard_mut(record.shard_ix)?.unplaced.push((first, part.count()));
        }
        self.note_lsn(record)
    }

    fn shard_mut(&mut self, ix: u32) -> Result<&mut Shard, Contradiction> {
        self.shards
            .get_mut(ix as usize)
            .and_then(Option::as_mut)
            .ok_or_else(|| Contradiction { problem: format!("no shard with index {ix}") })
    }

    fn take_slot(
        &mut self,
        layer: u32,
        extent: u32,
        position: u32,
        slot: u32,
        changes: &mut SlotChanges,
    ) -> Result<(), Contradiction> {
        if slot >= self.slots {
            return contradiction(format!("slot {slot} outside the lane"));
        }
        let replaying = self.replaying;
        let entry = self.extent_mut(layer, extent)?;
        match entry.slot(position) {
            Some(old) if old == slot => return Ok(()),
            // The checkpoint already holds a later slot of this position; the records up to it
            // follow.
            Some(_) if replaying => entry.drop_slot(position),
            Some(old) => {
                return contradiction(format!(
                    "position {position} has slot {old}, the record says {slot}"
                ));
            }
            None => {}
        }
        entry.set_slot(position, slot);
        changes.claimed.push(slot);
        Ok(())
    }

    /// A failed write was decided to be in another slot of this position: give up the old slot.
    fn leave_slot(
        &mut self,
        layer: u32,
        extent: u32,
        position: u32,
        slot: u32,
        changes: &mut SlotChanges,
    ) -> Result<(), Contradiction> {
        let entry = self.extent_mut(layer, extent)?;
        if let Some(old) = entry.slot(position).filter(|&old| old != slot) {
            entry.drop_slot(position);
            changes.freed.push(old);
        }
        Ok(())
    }

    fn tidy(
        &mut self,
        layer: u32,
        extent: u32,
        first: u32,
        count: u32,
        changes: &mut SlotChanges,
    ) -> Result<(), Contradiction> {
        self.dirty_maps.insert(map_key(layer, extent));
        let entry = self.extent_mut(layer, extent)?;
        let base = entry.natural_base();
        changes.freed.extend(positions(first, count).filter_map(|position| entry.tidy(position)));
        if let Some(base) = base.filter(|_| entry.natural_base().is_none()) {
            changes.released.push(base);
        }
        Ok(())
    }

    fn apply_range(
        &mut self,
        layer: u32,
        state: BlockState,
        first: u32,
        count: u32,
        changes: &mut SlotChanges,
    ) -> Result<(), Contradiction> {
        let mut block = first;
        while block < first + count {
            let in_extent = block % EXTENT_BLOCKS;
            let here = (EXTENT_BLOCKS - in_extent).min(first + count - block);
            let extent = block / EXTENT_BLOCKS;
            let entry = self.extent_mut(layer, extent)?;
            for block in in_extent..in_extent + here {
                entry.set_state(block, state);
            }
            self.tidy(layer, extent, in_extent, here, changes)?;
            block += here;
        }
        Ok(())
    }

    fn raise_regions(
        &mut self,
        record: &Record,
        first: u32,
        count: u32,
    ) -> Result<(), Contradiction> {
        // A learner's live write says nothing about the rest of its region (lane.md 6).
        if record.flags & FLAG_LEARNER != 0 {
            return Ok(());
        }
        let seq = record.lsn.seq.0;
        for region in first / REGION_BLOCKS..(first + count).div_ceil(REGION_BLOCKS) {
            self.dirty_regions.insert(region_key(record.shard_ix, region));
            let shard = self.shard_mut(record.shard_ix)?;
            match shard.regions.get_mut(region as usize) {
                Some(entry) => *entry = (*entry >> 1).max(seq) << 1 | (*entry & 1),
                None => return contradiction(format!("no region {region}")),
            }
        }
        Ok(())
    }

    fn suspect_regions(&mut self, ix: u32, first: u32, count: u32) -> Result<(), Contradiction> {
        for region in first / REGION_BLOCKS..(first + count).div_ceil(REGION_BLOCKS) {
            self.dirty_regions.insert(region_key(ix, region));
            match self.shard_mut(ix)?.regions.get_mut(region as usize) {
                Some(entry) => *entry |= 1,
                None => return contradiction(format!("no region {region}")),
            }
        }
        Ok(())
    }

    fn apply_change(
        &mut self,
        ix: u32,
        change: &ShardChange,
        changes: &mut SlotChanges,
    ) -> Result<(), Contradiction> {
        match *change {
            ShardChange::Create { replica, blocks, layer, family } => {
                if self.shard(ix).is_some_and(|shard| shard.replica == replica) {
                    return Ok(());
                }
                if ix >= SHARDS_MAX || layer >= SHARDS_MAX * 1024 || blocks > SHARD_BLOCKS_MAX {
                    return contradiction(format!("replica {replica} is outside the limits"));
                }
                if self.shard(ix).is_some() {
                    return contradiction(format!("shard index {ix} is taken"));
                }
                grow(&mut self.shards, ix as usize);
                grow(&mut self.layers, layer as usize);
                let extents = vec![Extent::default(); blocks.div_ceil(EXTENT_BLOCKS) as usize];
                self.layers[layer as usize] = Some(Layer { shard_ix: ix, family, extents });
                self.shards[ix as usize] = Some(Shard {
                    replica,
                    blocks,
                    head: layer,
                    conf: Vec::new(),
                    commit: Seq(0),
                    applied: Lsn::default(),
                    regions: vec![0; Shard::region_count(blocks)],
                    tail: BTreeMap::new(),
                    used_slots: 0,
                    unplaced: Vec::new(),
                });
                let map_groups = blocks.div_ceil(EXTENT_BLOCKS).div_ceil(MAP_GROUP_EXTENTS);
                let region_groups = (Shard::region_count(blocks) as u32).div_ceil(REGION_GROUP);
                self.dirty_maps
                    .extend((0..map_groups).map(|group| map_key(layer, group * MAP_GROUP_EXTENTS)));
                self.dirty_regions
                    .extend((0..region_groups).map(|group| region_key(ix, group * REGION_GROUP)));
            }
            ShardChange::Delete => {
                self.skipped.remove(&ix);
                // Replayed over a checkpoint without the shard: already done.
                let Some(shard) = self.shards.get_mut(ix as usize).and_then(Option::take) else {
                    return Ok(());
                };
                for layer_ix in 0..self.layers.len() {
                    if self.layers[layer_ix].as_ref().is_some_and(|layer| layer.shard_ix == ix) {
                        let layer = self.layers[layer_ix].take().expect("just looked at");
                        for extent in &layer.extents {
                            changes.freed.extend(extent.slots().map(|(_, slot)| slot));
                            changes.released.extend(extent.natural_base());
                        }
                        let groups = (layer.extents.len() as u32).div_ceil(MAP_GROUP_EXTENTS);
                        self.dirty_maps.extend(
                            (0..groups)
                                .map(|group| map_key(layer_ix as u32, group * MAP_GROUP_EXTENTS)),
                        );
                    }
                }
                let groups = (shard.regions.len() as u32).div_ceil(REGION_GROUP);
                self.dirty_regions
                    .extend((0..groups).map(|group| region_key(ix, group * REGION_GROUP)));
            }
            ShardChange::Resize { blocks } => {
                let shard = self.shard_mut(ix)?;
                if blocks > SHARD_BLOCKS_MAX {
                    return contradiction(format!("{blocks} blocks are above the shard limit"));
                }
                let (head, old_regions) = (shard.head, shard.regions.len() as u32);
                // Growth only; a replay over a later checkpoint must not shrink.
                shard.blocks = shard.blocks.max(blocks);
                let (regions, extents) =
                    (Shard::region_count(shard.blocks), shard.blocks.div_ceil(EXTENT_BLOCKS));
                shard.regions.resize(regions, 0);
                let layer =
                    self.layers[head as usize].as_mut().expect("a shard has its head layer");
                let old_extents = layer.extents.len() as u32;
                layer.extents.resize(extents as usize, Extent::default());
                self.dirty_maps.extend((old_extents..extents).map(|extent| map_key(head, extent)));
                self.dirty_regions
                    .extend((old_regions..regions as u32).map(|region| region_key(ix, region)));
            }
        }
        Ok(())
    }

    /// Watermark, highest lsn and tail of the record's shard.
    fn note_lsn(&mut self, record: &Record) -> Result<(), Contradiction> {
        let operation = match &record.body {
            Body::Intent(_) | Body::Redo(_) | Body::Range { .. } => true,
            Body::Commit => false,
            Body::Resolve(_)
            | Body::Conf(_)
            | Body::Region { .. }
            | Body::Shard(_)
            | Body::BadSlot { .. }
            | Body::Mount { .. }
            | Body::Seal
            | Body::Pad => return Ok(()),
        };
        let shard = self.shard_mut(record.shard_ix)?;
        if record.commit > shard.commit {
            shard.commit = record.commit;
            shard.tail = shard.tail.split_off(&Seq(record.commit.0 + 1));
        }
        if operation {
            shard.applied = shard.applied.max(record.lsn);
            // What a COPY brings is committed content under the region's lsn, not an operation.
            if record.lsn.seq > shard.commit && record.flags & FLAG_COPY == 0 {
                let records = shard.tail.entry(record.lsn.seq).or_default();
                // Replayed over a checkpoint that already holds it.
                if !records.contains(record) {
                    records.push(record.clone());
                }
            }
        }
        Ok(())
    }

    // ------------------------------------------------------------------------ checkpoint runs --

    /// Encode the MAP run `key`; empty when nothing is stored there.
    #[must_use]
    pub fn encode_map(&self, key: u64) -> Vec<u8> {
        let (layer_ix, first) = ((key >> 32) as u32, (key & 0xffff_ffff) as u32);
        let mut out = Vec::new();
        let Some(layer) = self.layers.get(layer_ix as usize).and_then(Option::as_ref) else {
            return out;
        };
        let extents = layer.extents.iter().enumerate().skip(first as usize);
        for (extent, entry) in extents.take(MAP_GROUP_EXTENTS as usize) {
            if !entry.is_empty() {
                put32(&mut out, extent as u32);
                entry.encode(&mut out);
            }
        }
        assert!(out.len() <= RUN_BYTES_MAX, "a MAP run fits one slot");
        out
    }

    /// Encode the REGION run `key`; empty when the shard is gone.
    #[must_use]
    pub fn encode_regions(&self, key: u64) -> Vec<u8> {
        let (ix, first) = ((key >> 32) as u32, (key & 0xffff_ffff) as usize);
        let mut out = Vec::new();
        if let Some(shard) = self.shard(ix) {
            let group = shard.regions.iter().skip(first).take(REGION_GROUP as usize);
            group.for_each(|&value| put64(&mut out, value));
        }
        out
    }

    /// Encode the runs that every checkpoint writes anew: kind, key, bytes.
    #[must_use]
    pub fn encode_small_runs(&self) -> Vec<(RunKind, u64, Vec<u8>)> {
        let mut runs = Vec::new();
        let mut pack = |kind: RunKind, items: &mut dyn Iterator<Item = Vec<u8>>| {
            let (mut bytes, mut key) = (Vec::new(), 0);
            for item in items {
                if bytes.len() + item.len() > RUN_BYTES_MAX {
                    runs.push((kind, key, std::mem::take(&mut bytes)));
                    key += 1;
                }
                bytes.extend_from_slice(&item);
            }
            if !bytes.is_empty() {
                runs.push((kind, key, bytes));
            }
        };
        let layers = self.layers.iter().enumerate();
        pack(
            RunKind::Layer,
            &mut layers.filter_map(|(ix, layer)| Some(encode_layer(ix as u32, layer.as_ref()?))),
        );
        let shards = self.shards.iter().enumerate();
        pack(
            RunKind::Shard,
            &mut shards.filter_map(|(ix, shard)| Some(encode_shard(ix as u32, shard.as_ref()?))),
        );
        let tails = self.shards.iter().flatten().flat_map(|shard| shard.tail.values().flatten());
        pack(
            RunKind::Tail,
            &mut tails.map(|record| {
                let mut bytes = Vec::new();
                record.encode(&mut bytes);
                bytes
            }),
        );
        pack(RunKind::BadSlot, &mut self.bad_slots.iter().map(|slot| slot.to_le_bytes().to_vec()));
        let sides = self.tags.sides_after_merge();
        for (group, chunk) in sides.chunks(SIDE_GROUP as usize).enumerate() {
            let mut bytes = Vec::new();
            for side in chunk {
                let (side, crc) = side.map_or((0xff, 0), |(side, crc)| (side, crc));
                put32(&mut bytes, crc);
                bytes.extend_from_slice(&[side, 0, 0, 0]);
            }
            runs.push((RunKind::TagSide, group as u64, bytes));
        }
        let deltas: Vec<_> = self.tags.deltas().collect();
        for (group, chunk) in deltas.chunks(DELTA_GROUP).enumerate() {
            let mut bytes = Vec::new();
            for &(block, tag) in chunk {
                put64(&mut bytes, block);
                put32(&mut bytes, tag);
            }
            runs.push((RunKind::TagDelta, group as u64, bytes));
        }
        runs
    }

    /// Take in one run. Runs must come in the order LAYER, SHARD, then the others.
    pub fn decode_run(&mut self, kind: RunKind, key: u64, bytes: &[u8]) -> Result<(), RecordError> {
        let mut cursor = Cursor { bytes, at: 0, kind: kind as u8 };
        while cursor.at < bytes.len() {
            match kind {
                RunKind::Layer => self.decode_layer(&mut cursor)?,
                RunKind::Shard => self.decode_shard(&mut cursor)?,
                RunKind::Map => self.decode_extent((key >> 32) as u32, &mut cursor)?,
                RunKind::Region => {
                    let index = (key & 0xffff_ffff) as usize + cursor.at / 8;
                    let value = cursor.u64()?;
                    let shard = self.shards.get_mut((key >> 32) as usize).and_then(Option::as_mut);
                    *shard
                        .and_then(|shard| shard.regions.get_mut(index))
                        .ok_or_else(|| cursor.fail("region of no shard"))? = value;
                }
                RunKind::Tail => self.decode_tail(&mut cursor)?,
                RunKind::BadSlot => {
                    let slot = cursor.u32()?;
                    if slot >= self.slots {
                        return Err(cursor.fail("slot outside the lane"));
                    }
                    self.bad_slots.insert(slot);
                }
                RunKind::TagSide => {
                    let page = key.saturating_mul(u64::from(SIDE_GROUP)) + cursor.at as u64 / 8;
                    let (crc, side) = (cursor.u32()?, cursor.u8()?);
                    cursor.take(3)?;
                    if page >= self.tags.sides().len() as u64 || (side > 1 && side != 0xff) {
                        return Err(cursor.fail("CRC page outside the lane"));
                    }
                    self.tags.set_side(page as u32, (side < 2).then_some((side, crc)));
                }
                RunKind::TagDelta => {
                    let (block, tag) = (cursor.u64()?, cursor.u32()?);
                    if block / TAGS_PER_PAGE >= self.tags.sides().len() as u64 {
                        return Err(cursor.fail("block outside the lane"));
                    }
                    self.tags.set(block, tag);
                }
            }
        }
        Ok(())
    }

    fn decode_layer(&mut self, cursor: &mut Cursor<'_>) -> Result<(), RecordError> {
        let (ix, shard_ix, extents) = (cursor.u32()?, cursor.u32()?, cursor.u32()?);
        let family = VolumeId(cursor.u64()?);
        if ix >= SHARDS_MAX * 1024 || extents > SHARD_BLOCKS_MAX / EXTENT_BLOCKS {
            return Err(cursor.fail("layer outside the limits"));
        }
        grow(&mut self.layers, ix as usize);
        let extents = vec![Extent::default(); extents as usize];
        self.layers[ix as usize] = Some(Layer { shard_ix, family, extents });
        Ok(())
    }

    fn decode_shard(&mut self, cursor: &mut Cursor<'_>) -> Result<(), RecordError> {
        let (ix, blocks, head) = (cursor.u32()?, cursor.u32()?, cursor.u32()?);
        let shard = ShardId { volume: VolumeId(cursor.u64()?), index: cursor.u32()? };
        let replica = ReplicaId { shard, copy: cursor.u8()? };
        let commit = Seq(cursor.u64()?);
        let applied = Lsn { epoch: Epoch(cursor.u64()?), seq: Seq(cursor.u64()?) };
        let conf_len = usize::from(cursor.u16()?);
        let conf = cursor.take(conf_len)?.to_vec();
        let head_fits = self
            .layers
            .get(head as usize)
            .and_then(Option::as_ref)
            .is_some_and(|layer| layer.extents.len() as u32 == blocks.div_ceil(EXTENT_BLOCKS));
        if ix >= SHARDS_MAX || blocks > SHARD_BLOCKS_MAX || !head_fits {
            return Err(cursor.fail("shard outside the limits, or without its head layer"));
        }
        grow(&mut self.shards, ix as usize);
        self.shards[ix as usize] = Some(Shard {
            replica,
            blocks,
            head,
            conf,
            commit,
            applied,
            regions: vec![0; Shard::region_count(blocks)],
            tail: BTreeMap::new(),
            used_slots: 0,
            unplaced: Vec::new(),
        });
        Ok(())
    }

    fn decode_extent(&mut self, layer: u32, cursor: &mut Cursor<'_>) -> Result<(), RecordError> {
        let index = cursor.u32()?;
        let extent = Extent::decode(cursor, self.slots)?;
        let entry = self
            .layers
            .get_mut(layer as usize)
            .and_then(Option::as_mut)
            .and_then(|layer| layer.extents.get_mut(index as usize))
            .ok_or_else(|| cursor.fail("extent of no layer"))?;
        *entry = extent;
        Ok(())
    }

    fn decode_tail(&mut self, cursor: &mut Cursor<'_>) -> Result<(), RecordError> {
        let (record, len) = Record::decode(&cursor.bytes[cursor.at..])?;
        cursor.at += len;
        let record = record.ok_or_else(|| cursor.fail("unknown record in a tail"))?;
        let shard = self
            .shards
            .get_mut(record.shard_ix as usize)
            .and_then(Option::as_mut)
            .ok_or_else(|| cursor.fail("tail of no shard"))?;
        shard.tail.entry(record.lsn.seq).or_default().push(record);
        Ok(())
    }
}

/// Key of the MAP run that holds an extent.
#[must_use]
pub fn map_key(layer: u32, extent: u32) -> u64 {
    u64::from(layer) << 32 | u64::from(extent / MAP_GROUP_EXTENTS * MAP_GROUP_EXTENTS)
}

/// Key of the REGION run that holds a region.
#[must_use]
pub fn region_key(shard_ix: u32, region: u32) -> u64 {
    u64::from(shard_ix) << 32 | u64::from(region / REGION_GROUP * REGION_GROUP)
}

fn grow<T>(list: &mut Vec<Option<T>>, ix: usize) {
    while list.len() <= ix {
        list.push(None);
    }
}

fn encode_layer(ix: u32, layer: &Layer) -> Vec<u8> {
    let mut out = Vec::new();
    put32(&mut out, ix);
    put32(&mut out, layer.shard_ix);
    put32(&mut out, layer.extents.len() as u32);
    put64(&mut out, layer.family.0);
    out
}

fn encode_shard(ix: u32, shard: &Shard) -> Vec<u8> {
    let mut out = Vec::new();
    put32(&mut out, ix);
    put32(&mut out, shard.blocks);
    put32(&mut out, shard.head);
    put64(&mut out, shard.replica.shard.volume.0);
    put32(&mut out, shard.replica.shard.index);
    out.push(shard.replica.copy);
    put64(&mut out, shard.commit.0);
    put64(&mut out, shard.applied.epoch.0);
    put64(&mut out, shard.applied.seq.0);
    put16(&mut out, shard.conf.len() as u16);
    out.extend_from_slice(&shard.conf);
    out
}
