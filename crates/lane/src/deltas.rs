//! Tags that are newer than their CRC page, by page.
//!
//! Every read and write of a block asks here first, and between two merges there may be hundreds of
//! thousands of entries. One ordered map of blocks of that size is six levels of nodes that no cache
//! holds, about a microsecond a look. So the map is of pages, a thousandth of the size; a page with
//! few tags keeps them as a sorted list, one with many as a table of all its places. Order is kept
//! throughout, because a checkpoint stores deltas in order and merges pages in order.

use crate::format::TAGS_PER_PAGE;
use std::collections::BTreeMap;

const PLACES: usize = TAGS_PER_PAGE as usize;
/// Tags from which on a page has a table: it takes 4 KiB, the list by then a half of that.
const TABLE_FROM: usize = 256;
const _: () = assert!(PLACES <= 1 << 16 && PLACES.is_multiple_of(64), "an index has 16 bits");

/// Tags by physical block.
#[derive(Default)]
pub(crate) struct Deltas {
    /// No page is empty.
    pages: BTreeMap<u32, Tagged>,
    len: usize,
}

/// The tags of one page.
enum Tagged {
    /// Index in the page and tag, ascending.
    Few(Vec<(u16, u32)>),
    Many(Box<Table>),
}

struct Table {
    tags: [u32; PLACES],
    /// Which of them are set.
    set: [u64; PLACES / 64],
}

impl Table {
    fn of(few: &[(u16, u32)]) -> Box<Table> {
        let mut table = Box::new(Table { tags: [0; PLACES], set: [0; PLACES / 64] });
        for &(index, tag) in few {
            table.set(index, tag);
        }
        table
    }

    fn holds(&self, index: u16) -> bool {
        self.set[usize::from(index) / 64] >> (index % 64) & 1 == 1
    }

    /// True when it is new.
    fn set(&mut self, index: u16, tag: u32) -> bool {
        let is_new = !self.holds(index);
        self.set[usize::from(index) / 64] |= 1 << (index % 64);
        self.tags[usize::from(index)] = tag;
        is_new
    }
}

impl Tagged {
    /// True when it is new.
    fn set(&mut self, index: u16, tag: u32) -> bool {
        match self {
            Tagged::Many(table) => table.set(index, tag),
            Tagged::Few(tags) => match tags.binary_search_by_key(&index, |&(found, _)| found) {
                Ok(at) => {
                    tags[at].1 = tag;
                    false
                }
                Err(at) => {
                    tags.insert(at, (index, tag));
                    if tags.len() >= TABLE_FROM {
                        *self = Tagged::Many(Table::of(tags));
                    }
                    true
                }
            },
        }
    }

    fn get(&self, index: u16) -> Option<u32> {
        match self {
            Tagged::Many(table) => table.holds(index).then(|| table.tags[usize::from(index)]),
            Tagged::Few(tags) => {
                let at = tags.binary_search_by_key(&index, |&(found, _)| found).ok()?;
                Some(tags[at].1)
            }
        }
    }

    /// Index in the page and tag, ascending.
    fn list(&self) -> Vec<(u16, u32)> {
        match self {
            Tagged::Few(tags) => tags.clone(),
            Tagged::Many(table) => {
                let all = (0u16..).zip(table.tags);
                all.filter(|&(index, _)| table.holds(index)).collect()
            }
        }
    }
}

fn place(block: u64) -> (u32, u16) {
    ((block / TAGS_PER_PAGE) as u32, (block % TAGS_PER_PAGE) as u16)
}

impl Deltas {
    /// Set the tag of a block.
    pub(crate) fn set(&mut self, block: u64, tag: u32) {
        let (page, index) = place(block);
        let tags = self.pages.entry(page).or_insert_with(|| Tagged::Few(Vec::new()));
        self.len += usize::from(tags.set(index, tag));
    }

    /// The tag of a block, if it is here.
    pub(crate) fn get(&self, block: u64) -> Option<u32> {
        let (page, index) = place(block);
        self.pages.get(&page)?.get(index)
    }

    /// Number of tags.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// True when there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Pages with tags, ascending.
    pub(crate) fn pages(&self) -> impl Iterator<Item = u32> + '_ {
        self.pages.keys().copied()
    }

    /// Take the tags of a page out: index in the page and tag, ascending.
    pub(crate) fn take_page(&mut self, page: u32) -> Vec<(u16, u32)> {
        let tags = self.pages.remove(&page).map_or(Vec::new(), |tags| tags.list());
        self.len -= tags.len();
        tags
    }

    /// Put the tags of a page in; what is here already is newer and stays.
    pub(crate) fn put_back(&mut self, page: u32, tags: Vec<(u16, u32)>) {
        for (index, tag) in tags {
            let block = u64::from(page) * TAGS_PER_PAGE + u64::from(index);
            if self.get(block).is_none() {
                self.set(block, tag);
            }
        }
    }

    /// All of them, ascending by block.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.pages.iter().flat_map(|(&page, tags)| {
            let first = u64::from(page) * TAGS_PER_PAGE;
            tags.list().into_iter().map(move |(index, tag)| (first + u64::from(index), tag))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn they_are_an_ordered_map_of_blocks(
            steps in prop::collection::vec((0..2 * TAGS_PER_PAGE, any::<u32>(), 0..300u16), 1..2000),
        ) {
            let (mut deltas, mut oracle) = (Deltas::default(), BTreeMap::new());
            for (block, tag, what) in steps {
                let page = (block / TAGS_PER_PAGE) as u32;
                if what == 0 {
                    let taken = deltas.take_page(page);
                    let first = u64::from(page) * TAGS_PER_PAGE;
                    let kept = oracle.split_off(&first);
                    let mut inside = kept;
                    let mut beyond = inside.split_off(&(first + TAGS_PER_PAGE));
                    let expected: Vec<(u16, u32)> =
                        inside.iter().map(|(&block, &tag)| ((block - first) as u16, tag)).collect();
                    prop_assert_eq!(&taken, &expected);
                    oracle.append(&mut beyond);
                    if tag % 2 == 0 {
                        deltas.set(first, tag);
                        deltas.put_back(page, taken);
                        inside.insert(first, tag);
                        oracle.append(&mut inside);
                    }
                } else {
                    deltas.set(block, tag);
                    oracle.insert(block, tag);
                }
                prop_assert_eq!(deltas.len(), oracle.len());
                prop_assert_eq!(deltas.is_empty(), oracle.is_empty());
                prop_assert_eq!(deltas.get(block), oracle.get(&block).copied());
            }
            let pages: Vec<u32> = deltas.pages().collect();
            let mut expected: Vec<u32> =
                oracle.keys().map(|block| (block / TAGS_PER_PAGE) as u32).collect();
            expected.dedup();
            prop_assert_eq!(pages, expected);
            prop_assert!(deltas.iter().eq(oracle.into_iter()));
        }
    }
}
