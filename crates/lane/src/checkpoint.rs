//! Sharp checkpoints (R9): the tables at one instant, written as runs into ordinary slots.
//!
//! CRC pages that are to be merged are loaded first; then everything that changed is encoded in one
//! go (the freeze), so no copy-on-write of the tables is needed; CRC pages go to their unused sides
//! and runs to fresh slots; flush; both copies of the superblock; flush; and only now do the journal
//! tail advance and the replaced slots become free. Unchanged MAP and REGION runs are kept.

use crate::SLOT_BLOCKS;
use crate::format::{Pages, Replay, Run, RunKind, SLOT_BYTES, Superblock, encode_manifest};
use crate::lane::{Io, Lane, Outcome, Reply};
use crate::mutant::Mutant;
use crate::tables::SIDE_GROUP;
use proto::BLOCK_BYTES;
use proto::checksum::crc32c;
use proto::disk::DiskOp;
use std::collections::{BTreeMap, BTreeSet};

/// CRC pages merged by one checkpoint.
const MERGE_PAGES_MAX: usize = 1024;
/// Deltas below this are kept in the table and stored as such (12 B each).
const DELTA_MIN: usize = 4096;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    LoadingPages,
    Runs,
    Superblocks,
}

/// A checkpoint under way.
pub(crate) struct Checkpoint {
    phase: Phase,
    clean: bool,
    pages: Vec<u32>,
    missing: BTreeSet<u32>,
    left: u32,
    replay: Replay,
    stable: u64,
    superblock: Option<Superblock>,
    runs: BTreeMap<(RunKind, u64), Run>,
    manifest: Pages,
    slots: BTreeSet<u32>,
    obsolete: Vec<u32>,
    waiters: Vec<u64>,
}

impl Checkpoint {
    /// Phase and outstanding operations, for `Lane::describe`.
    pub(crate) fn progress(&self) -> String {
        format!("{:?}, {} writes, {} CRC pages", self.phase, self.left, self.missing.len())
    }
}

impl Lane {
    /// Begin a checkpoint; it goes on in `checkpoint_settled`.
    pub(crate) fn begin_checkpoint(&mut self, clean: bool) {
        if self.holds_decisions() {
            // The decisions take effect with the superblock, all at once: no block needs
            // verification then.
            self.journal.release_hold();
        }
        let budget = (self.geometry.slots as usize / 8).max(DELTA_MIN);
        let merge = clean
            || self.tables.tags.delta_len() > budget
            || self.mutant.is(Mutant::SingleTagSide)
            || self.merge_always;
        let (pages, missing) = if merge {
            self.tables.tags.merge_candidates(MERGE_PAGES_MAX)
        } else {
            (Vec::new(), Vec::new())
        };
        self.checkpoint = Some(Checkpoint {
            phase: Phase::LoadingPages,
            clean,
            pages,
            missing: missing.iter().copied().collect(),
            left: 0,
            replay: self.journal.replay_point(),
            stable: 0,
            superblock: None,
            runs: BTreeMap::new(),
            manifest: self.manifest,
            slots: BTreeSet::new(),
            obsolete: Vec::new(),
            waiters: std::mem::take(&mut self.checkpoint_waiters),
        });
        for &page in &missing {
            self.submit_tag_page(page);
        }
        if missing.is_empty() {
            self.freeze();
        }
    }

    /// A CRC page was read, perhaps for the checkpoint.
    pub(crate) fn checkpoint_page_loaded(&mut self, page: u32, loaded: bool) {
        let Some(checkpoint) = &mut self.checkpoint else { return };
        if !checkpoint.missing.remove(&page) {
            return;
        }
        if !loaded {
            // A page that cannot be read is not merged: its deltas stay in the table.
            checkpoint.pages.retain(|&other| other != page);
        }
        if checkpoint.missing.is_empty() && checkpoint.phase == Phase::LoadingPages {
            self.freeze();
        }
    }

    fn freeze(&mut self) {
        let mut checkpoint = self.checkpoint.take().expect("it begins");
        let single_side = self.mutant.is(Mutant::SingleTagSide);
        let merged = self.tables.tags.begin_merge(&checkpoint.pages, single_side);
        let changed = self.encode_changed(&merged.iter().map(|page| page.page).collect::<Vec<_>>());
        let mut kept = self.runs.clone();
        kept.retain(|(kind, _), _| {
            matches!(kind, RunKind::Map | RunKind::Region | RunKind::TagSide)
        });
        for key in changed.keys() {
            kept.remove(key);
        }
        let count = kept.len() + changed.values().filter(|bytes| !bytes.is_empty()).count();
        let Some((placed, manifest_pages)) = self.place(&changed, count) else {
            // No room even in the reserve: go on without, trims or deletes will bring some.
            self.tables.tags.abort_merge();
            self.checkpoint_waiters.append(&mut checkpoint.waiters);
            return;
        };
        self.tables.dirty_maps.clear();
        self.tables.dirty_regions.clear();
        checkpoint.phase = Phase::Runs;
        checkpoint.replay = self.journal.replay_point();
        checkpoint.stable = self.journal.stable();
        checkpoint.runs = kept;
        for (&(kind, key), bytes) in &changed {
            if let Some(&pages) = placed.get(&(kind, key)) {
                let run = Run { kind, key, pages, bytes: bytes.len() as u32, crc: crc32c(bytes) };
                checkpoint.runs.insert((kind, key), run);
            }
        }
        let version = self.version + 1;
        let list: Vec<Run> = checkpoint.runs.values().copied().collect();
        let manifest = encode_manifest(&self.geometry.uuid, version, &list);
        checkpoint.manifest = manifest_pages;
        checkpoint.superblock = Some(Superblock {
            version,
            manifest: manifest_pages,
            manifest_crc: crc32c(&manifest),
            replay: checkpoint.replay,
            stable_rec: checkpoint.stable,
            materialised: self.allocator.limit(),
            clean: checkpoint.clean,
        });
        checkpoint.slots = metadata_slots(list.iter(), manifest_pages);
        checkpoint.obsolete = self.metadata_slots.difference(&checkpoint.slots).copied().collect();
        checkpoint.obsolete.iter().for_each(|_| self.allocator.quarantine_metadata());
        checkpoint.left =
            self.write_runs(&changed, &placed, manifest_pages, &manifest) + merged.len() as u32;
        for page in merged {
            let offset = self.geometry.tag_page(page.side, page.page);
            self.submit_metadata(offset, &page.bytes);
        }
        self.checkpoint = Some(checkpoint);
    }

    /// Everything that this checkpoint writes anew; an empty value removes a run.
    fn encode_changed(&self, merged: &[u32]) -> BTreeMap<(RunKind, u64), Vec<u8>> {
        let mut changed = BTreeMap::new();
        for &key in &self.tables.dirty_maps {
            changed.insert((RunKind::Map, key), self.tables.encode_map(key));
        }
        for &key in &self.tables.dirty_regions {
            changed.insert((RunKind::Region, key), self.tables.encode_regions(key));
        }
        let sides: BTreeSet<u64> = merged.iter().map(|page| u64::from(page / SIDE_GROUP)).collect();
        for (kind, key, bytes) in self.tables.encode_small_runs() {
            let unchanged = kind == RunKind::TagSide
                && !sides.contains(&key)
                && self.runs.contains_key(&(kind, key));
            if !unchanged {
                changed.insert((kind, key), bytes);
            }
        }
        changed
    }

    /// Choose pages for the runs and the manifest: runs are packed, none crosses a slot.
    #[allow(clippy::type_complexity, reason = "a map and a place; a name would say less")]
    fn place(
        &mut self,
        changed: &BTreeMap<(RunKind, u64), Vec<u8>>,
        run_count: usize,
    ) -> Option<(BTreeMap<(RunKind, u64), Pages>, Pages)> {
        let manifest_pages = (64 + 32 * run_count).div_ceil(BLOCK_BYTES) as u32;
        let mut taken: Vec<u32> = Vec::new();
        let mut cursor = (0, SLOT_BLOCKS);
        let mut placed = BTreeMap::new();
        let mut ok = true;
        for (&key, bytes) in changed.iter().filter(|(_, bytes)| !bytes.is_empty()) {
            let pages = bytes.len().div_ceil(BLOCK_BYTES) as u32;
            if cursor.1 + pages > SLOT_BLOCKS {
                match self.allocator.pick_metadata(1) {
                    Some(slot) => {
                        taken.push(slot);
                        cursor = (slot, 0);
                    }
                    None => {
                        ok = false;
                        break;
                    }
                }
            }
            let place = Pages { slot: cursor.0, page: cursor.1 as u16, pages: pages as u16 };
            placed.insert(key, place);
            cursor.1 += pages;
        }
        let mut manifest =
            Pages { slot: cursor.0, page: cursor.1 as u16, pages: manifest_pages as u16 };
        if ok && cursor.1 + manifest_pages > SLOT_BLOCKS {
            let slots = manifest_pages.div_ceil(SLOT_BLOCKS);
            match self.allocator.pick_metadata(slots) {
                Some(slot) => {
                    taken.extend(slot..slot + slots);
                    manifest = Pages { slot, page: 0, pages: manifest_pages as u16 };
                }
                None => ok = false,
            }
        }
        if ok {
            return Some((placed, manifest));
        }
        for slot in taken {
            self.allocator.quarantine_metadata();
            self.allocator.free_quarantined(slot);
        }
        None
    }

    /// Write runs and manifest, one operation per stretch of pages; returns how many.
    fn write_runs(
        &mut self,
        changed: &BTreeMap<(RunKind, u64), Vec<u8>>,
        placed: &BTreeMap<(RunKind, u64), Pages>,
        manifest_pages: Pages,
        manifest: &[u8],
    ) -> u32 {
        let mut writes: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        let pieces = placed
            .iter()
            .map(|(key, &pages)| (pages, changed[key].as_slice()))
            .chain([(manifest_pages, manifest)]);
        for (pages, bytes) in pieces {
            let offset = self.geometry.slot(pages.slot, u32::from(pages.page));
            let mut padded = bytes.to_vec();
            padded.resize(usize::from(pages.pages) * BLOCK_BYTES, 0);
            writes.insert(offset, padded);
        }
        let mut joined: Vec<(u64, Vec<u8>)> = Vec::new();
        for (offset, bytes) in writes {
            match joined.last_mut() {
                Some((start, before))
                    if *start + before.len() as u64 == offset
                        && before.len() + bytes.len() <= SLOT_BYTES as usize =>
                {
                    before.extend_from_slice(&bytes);
                }
                _ => joined.push((offset, bytes)),
            }
        }
        for (offset, bytes) in &joined {
            self.submit_metadata(*offset, bytes);
        }
        joined.len() as u32
    }

    fn submit_metadata(&mut self, offset: u64, bytes: &[u8]) {
        let data = proto::block::single(self.pool.copy_of(bytes).freeze());
        self.submit(Io::Checkpoint, DiskOp::Write { offset, data });
    }

    /// One write of the checkpoint is durable (or one flush done).
    pub(crate) fn checkpoint_settled(&mut self) {
        let checkpoint = self.checkpoint.as_mut().expect("a checkpoint runs");
        checkpoint.left -= 1;
        if checkpoint.left > 0 {
            return;
        }
        match checkpoint.phase {
            Phase::LoadingPages => unreachable!("nothing is written yet"),
            Phase::Runs => self.write_superblocks(),
            Phase::Superblocks => self.finish_checkpoint(),
        }
    }

    fn write_superblocks(&mut self) {
        let checkpoint = self.checkpoint.as_mut().expect("a checkpoint runs");
        checkpoint.phase = Phase::Superblocks;
        checkpoint.left = 2;
        let superblock = checkpoint.superblock.as_ref().expect("made by the freeze");
        let (page, places) =
            (superblock.encode(&self.geometry.uuid), self.geometry.superblocks(superblock.version));
        for offset in places {
            self.submit_metadata(offset, &page);
        }
    }

    fn finish_checkpoint(&mut self) {
        let checkpoint = self.checkpoint.take().expect("a checkpoint runs");
        self.version = checkpoint.superblock.expect("made by the freeze").version;
        self.counters.checkpoints += 1;
        self.journal.advance(checkpoint.replay);
        self.tables.tags.finish_merge();
        self.runs = checkpoint.runs;
        self.manifest = checkpoint.manifest;
        self.metadata_slots = checkpoint.slots;
        for slot in checkpoint.obsolete {
            self.allocator.free_quarantined(slot);
        }
        self.open_journal();
        self.forget_retired(checkpoint.stable);
        for token in checkpoint.waiters {
            self.out.replies.push(Reply { token, result: Ok(Outcome::Done) });
        }
        if checkpoint.clean {
            self.closed();
        }
    }
}

/// The slots that runs and a manifest lie in.
pub(crate) fn metadata_slots<'a>(
    runs: impl Iterator<Item = &'a Run>,
    manifest: Pages,
) -> BTreeSet<u32> {
    let last = u32::from(manifest.page) + u32::from(manifest.pages);
    runs.map(|run| run.pages.slot)
        .chain(manifest.slot..manifest.slot + last.div_ceil(SLOT_BLOCKS))
        .collect()
}
