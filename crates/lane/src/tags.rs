//! Tags: the stored checksum of every physical block.
//!
//! Tags live in CRC pages of 1,024 on two sides; the checkpoint names the valid side of each page
//! and its CRC. Tags newer than their page are in the *delta* table, which every checkpoint saves,
//! and which is merged into pages (written to the side that is not valid) when it has grown. Only
//! the completion of a write puts a tag here, so a page never holds the tag of data in flight.
//!
//! Pages are cached up to a bound and read on demand; the lane asks `lookup` and loads what is
//! missing.

use crate::deltas::Deltas;
use crate::format::TAGS_PER_PAGE;
use proto::BLOCK_BYTES;
use proto::checksum::crc32c;
use proto::id_map::IdMap;
use std::collections::VecDeque;

/// CRC pages kept in memory per lane (4 KiB each, 16 MiB in all: tags of 16 GiB).
const CACHED_PAGES_MAX: usize = 4096;

type Page = Box<[u32; TAGS_PER_PAGE as usize]>;

/// Valid side and CRC of one CRC page; `None` where no page was ever written.
pub type PageSide = Option<(u8, u32)>;

/// Answer of `lookup`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lookup {
    /// The tag.
    Known(u32),
    /// Load this CRC page first.
    Missing(u32),
    /// No tag was ever stored for this block: the map and the tags contradict each other.
    Never,
}

/// A CRC page to be written: page, side, content.
pub struct MergedPage {
    /// Page index.
    pub page: u32,
    /// Side to write.
    pub side: u8,
    /// CRC32C of the content.
    pub crc: u32,
    /// 4 KiB.
    pub bytes: Vec<u8>,
}

/// All tags of a lane.
#[derive(Default)]
pub struct Tags {
    delta: Deltas,
    /// Deltas that the running checkpoint merges into pages.
    merging: Deltas,
    merged: Vec<(u32, u8, u32, Page)>,
    sides: Vec<PageSide>,
    cache: IdMap<u32, Page>,
    cache_order: VecDeque<u32>,
}

impl Tags {
    /// No tags yet, for a lane with `pages` CRC pages.
    #[must_use]
    pub fn new(pages: u32) -> Tags {
        Tags { sides: vec![None; pages as usize], ..Tags::default() }
    }

    /// Set the tag of a physical block.
    pub fn set(&mut self, block: u64, tag: u32) {
        self.delta.set(block, tag);
    }

    /// The tag of a physical block, or the page to load.
    #[must_use]
    pub fn lookup(&self, block: u64) -> Lookup {
        if let Some(tag) = self.delta.get(block).or_else(|| self.merging.get(block)) {
            return Lookup::Known(tag);
        }
        let page = (block / TAGS_PER_PAGE) as u32;
        match self.cache.get(&page) {
            Some(tags) => Lookup::Known(tags[(block % TAGS_PER_PAGE) as usize]),
            None if self.sides[page as usize].is_some() => Lookup::Missing(page),
            None => Lookup::Never,
        }
    }

    /// Number of tags newer than their page.
    #[must_use]
    pub fn delta_len(&self) -> usize {
        self.delta.len() + self.merging.len()
    }

    /// Valid side of a page.
    #[must_use]
    pub fn side(&self, page: u32) -> PageSide {
        self.sides[page as usize]
    }

    /// All sides, for a checkpoint.
    #[must_use]
    pub fn sides(&self) -> &[PageSide] {
        &self.sides
    }

    /// Restore a side from a checkpoint.
    pub fn set_side(&mut self, page: u32, side: PageSide) {
        self.sides[page as usize] = side;
    }

    /// Take in a CRC page read from its valid side; false when its content fails its CRC.
    pub fn load(&mut self, page: u32, bytes: &[u8]) -> bool {
        let (_, crc) = self.sides[page as usize].expect("only existing pages are loaded");
        if crc32c(bytes) != crc {
            return false;
        }
        self.insert(page, decode_page(bytes));
        true
    }

    fn insert(&mut self, page: u32, tags: Page) {
        if self.cache.insert(page, tags).is_none() {
            self.cache_order.push_back(page);
            if self.cache_order.len() > CACHED_PAGES_MAX {
                let oldest = self.cache_order.pop_front().expect("just pushed");
                self.cache.remove(&oldest);
            }
        }
    }

    /// Pages that deltas belong to, at most `max`, and those of them that must be loaded first.
    #[must_use]
    pub fn merge_candidates(&self, max: usize) -> (Vec<u32>, Vec<u32>) {
        let pages: Vec<u32> = self.delta.pages().take(max).collect();
        let missing = pages
            .iter()
            .copied()
            .filter(|page| !self.cache.contains_key(page) && self.sides[*page as usize].is_some())
            .collect();
        (pages, missing)
    }

    /// Start merging the deltas of `pages`; pages that are not cached and exist are left alone.
    ///
    /// Until `finish_merge` the old sides stay valid and the deltas still answer look-ups.
    pub fn begin_merge(&mut self, pages: &[u32], same_side: bool) -> Vec<MergedPage> {
        assert!(self.merging.is_empty(), "one merge at a time");
        let mut out = Vec::new();
        for &page in pages {
            let old = self.sides[page as usize];
            let mut tags = match self.cache.get(&page) {
                Some(tags) => tags.clone(),
                None if old.is_none() => Box::new([0; TAGS_PER_PAGE as usize]),
                None => continue,
            };
            let moved = self.delta.take_page(page);
            moved.iter().for_each(|&(index, tag)| tags[usize::from(index)] = tag);
            self.merging.put_back(page, moved);
            let other = old.map_or(0, |(side, _)| if same_side { side } else { 1 - side });
            let bytes: Vec<u8> = tags.iter().flat_map(|tag| tag.to_le_bytes()).collect();
            let crc = crc32c(&bytes);
            self.merged.push((page, other, crc, tags));
            out.push(MergedPage { page, side: other, crc, bytes });
        }
        out
    }

    /// The sides as the running checkpoint will store them.
    #[must_use]
    pub fn sides_after_merge(&self) -> Vec<PageSide> {
        let mut sides = self.sides.clone();
        for (page, side, crc, _) in &self.merged {
            sides[*page as usize] = Some((*side, *crc));
        }
        sides
    }

    /// Deltas that the running checkpoint must store: those it does not merge.
    pub fn deltas(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.delta.iter()
    }

    /// The checkpoint was given up before anything was written: the deltas are deltas again.
    pub fn abort_merge(&mut self) {
        self.merged.clear();
        let mut merging = std::mem::take(&mut self.merging);
        for page in merging.pages().collect::<Vec<u32>>() {
            self.delta.put_back(page, merging.take_page(page));
        }
    }

    /// The checkpoint is durable: the merged pages are the valid ones.
    pub fn finish_merge(&mut self) {
        self.merging = Deltas::default();
        for (page, side, crc, tags) in std::mem::take(&mut self.merged) {
            self.sides[page as usize] = Some((side, crc));
            self.insert(page, tags);
        }
    }
}

fn decode_page(bytes: &[u8]) -> Page {
    assert_eq!(bytes.len(), BLOCK_BYTES);
    let mut tags = Box::new([0; TAGS_PER_PAGE as usize]);
    for (tag, chunk) in tags.iter_mut().zip(bytes.chunks_exact(4)) {
        *tag = u32::from_le_bytes(chunk.try_into().expect("chunks of four"));
    }
    tags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_merge_moves_deltas_to_the_other_side_and_look_ups_never_miss() {
        let mut tags = Tags::new(4);
        tags.set(5, 50);
        tags.set(1030, 60);
        assert_eq!((tags.lookup(5), tags.lookup(6)), (Lookup::Known(50), Lookup::Never));
        let (pages, missing) = tags.merge_candidates(10);
        assert_eq!((pages.clone(), missing.len()), (vec![0, 1], 0));
        let written = tags.begin_merge(&pages, false);
        tags.set(5, 51);
        assert_eq!((tags.lookup(5), tags.lookup(1030)), (Lookup::Known(51), Lookup::Known(60)));
        assert_eq!(tags.deltas().collect::<Vec<_>>(), vec![(5, 51)]);
        tags.finish_merge();
        assert_eq!((tags.lookup(5), tags.lookup(1030)), (Lookup::Known(51), Lookup::Known(60)));
        assert_eq!(tags.side(0), Some((0, written[0].crc)));
        let again = tags.begin_merge(&[0], false);
        assert_eq!(again[0].side, 1, "the valid side is never overwritten");
    }

    #[test]
    fn a_damaged_page_is_not_taken_in() {
        let mut tags = Tags::new(1);
        tags.set_side(0, Some((0, crc32c(&[7; BLOCK_BYTES]))));
        assert_eq!(tags.lookup(9), Lookup::Missing(0));
        assert!(!tags.load(0, &[8; BLOCK_BYTES]));
        assert!(tags.load(0, &[7; BLOCK_BYTES]));
        assert_eq!(tags.lookup(9), Lookup::Known(0x0707_0707));
    }
}
