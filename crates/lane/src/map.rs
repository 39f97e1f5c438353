//! The extent map: for each 4 MiB extent of a layer, which slots hold it and what each block is.
//!
//! Three forms keep the common case small. NATURAL: 64 adjacent slots, position i at base + i, a
//! mask says which exist. SCATTERED: a slot per position. UNIFORM_ZERO: no slots, all zeros. Block
//! states take 2 bits each and are absent where every existing position is all data. The map is
//! changed by `apply` only, at the completion of an operation or at replay.

use crate::record::{Cursor, RecordError, put32};
use crate::{EXTENT_BLOCKS, EXTENT_SLOTS, NO_SLOT, SLOT_BLOCKS};

/// What a block of a layer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum BlockState {
    /// Shows what the parent layer shows; zeros at the root.
    Inherit = 0,
    /// Holds data in its slot, with a tag.
    Data = 1,
    /// Shows zeros.
    Zero = 2,
    /// Known to be lost: EIO until overwritten.
    Poison = 3,
}

impl BlockState {
    /// The state with this number.
    #[must_use]
    pub fn parse(value: u8) -> Option<BlockState> {
        match value {
            0 => Some(BlockState::Inherit),
            1 => Some(BlockState::Data),
            2 => Some(BlockState::Zero),
            3 => Some(BlockState::Poison),
            _ => None,
        }
    }
}

/// Sixteen states of one position, 2 bits each.
type Word = u32;
const ALL_DATA: Word = 0x5555_5555;

#[derive(Clone, PartialEq, Eq, Debug, Default)]
enum Form {
    #[default]
    Empty,
    UniformZero,
    Natural {
        base: u32,
        mask: u64,
    },
    Scattered(Box<[u32; EXTENT_SLOTS as usize]>),
}

/// One extent of one layer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Extent {
    form: Form,
    /// `None`: positions with a slot are all data, the others inherit (or are zero: UNIFORM_ZERO).
    states: Option<Box<[Word; EXTENT_SLOTS as usize]>>,
}

impl Extent {
    /// True when nothing is stored here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.form == Form::Empty && self.states.is_none()
    }

    /// Slot of `position` (0..64).
    #[must_use]
    pub fn slot(&self, position: u32) -> Option<u32> {
        match &self.form {
            Form::Empty | Form::UniformZero => None,
            Form::Natural { base, mask } => (mask >> position & 1 == 1).then(|| base + position),
            Form::Scattered(slots) => {
                Some(slots[position as usize]).filter(|&slot| slot != NO_SLOT)
            }
        }
    }

    /// All slots in use, with their position.
    pub fn slots(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        (0..EXTENT_SLOTS).filter_map(|position| Some((position, self.slot(position)?)))
    }

    /// Base of the 64 adjacent slots that this extent prefers.
    #[must_use]
    pub fn natural_base(&self) -> Option<u32> {
        match &self.form {
            Form::Natural { base, .. } => Some(*base),
            Form::Empty | Form::UniformZero | Form::Scattered(_) => None,
        }
    }

    fn word(&self, position: u32) -> Word {
        match &self.states {
            Some(states) => states[position as usize],
            None if self.form == Form::UniformZero => uniform(BlockState::Zero),
            None if self.slot(position).is_some() => ALL_DATA,
            None => 0,
        }
    }

    /// State of `block` (0..1024).
    #[must_use]
    pub fn state(&self, block: u32) -> BlockState {
        let word = self.word(block / SLOT_BLOCKS);
        BlockState::parse((word >> (block % SLOT_BLOCKS * 2) & 3) as u8).expect("two bits")
    }

    /// Blocks (0..1024) in the state `Poison`.
    pub fn poisoned(&self) -> impl Iterator<Item = u32> + '_ {
        // Both bits of a state are set only in `Poison`.
        let words = self.states.iter().flat_map(|states| states.iter()).enumerate();
        words.filter(|&(_, word)| word & word >> 1 & ALL_DATA != 0).flat_map(|(position, word)| {
            let first = position as u32 * SLOT_BLOCKS;
            (0..SLOT_BLOCKS).filter(move |at| word >> (at * 2) & 3 == 3).map(move |at| first + at)
        })
    }

    /// Give `position` a slot; its blocks keep their states.
    ///
    /// Panics when the position has another slot: two owners of one position are our own bug.
    pub fn set_slot(&mut self, position: u32, slot: u32) {
        if let Some(old) = self.slot(position) {
            assert_eq!(old, slot, "position {position} already has a slot");
            return;
        }
        self.hold_states();
        match &mut self.form {
            Form::Natural { base, mask } if *base + position == slot => *mask |= 1 << position,
            Form::Empty | Form::UniformZero if slot % EXTENT_SLOTS == position => {
                self.form = Form::Natural { base: slot - position, mask: 1 << position };
            }
            Form::Scattered(slots) => slots[position as usize] = slot,
            Form::Empty | Form::UniformZero | Form::Natural { .. } => {
                let mut slots = Box::new([NO_SLOT; EXTENT_SLOTS as usize]);
                for (position, slot) in self.slots() {
                    slots[position as usize] = slot;
                }
                slots[position as usize] = slot;
                self.form = Form::Scattered(slots);
            }
        }
    }

    /// Take the slot from a position, whatever its blocks are: another one follows (replay, and the
    /// move out of a bad slot).
    pub fn drop_slot(&mut self, position: u32) {
        self.hold_states();
        match &mut self.form {
            Form::Natural { mask, .. } => *mask &= !(1 << position),
            Form::Scattered(slots) => slots[position as usize] = NO_SLOT,
            Form::Empty | Form::UniformZero => {}
        }
        if let Form::Natural { mask: 0, .. } = self.form {
            self.form = Form::Empty;
        }
    }

    /// Set the state of one block. Call `tidy` after the last change of a position.
    pub fn set_state(&mut self, block: u32, state: BlockState) {
        if self.state(block) == state {
            return;
        }
        self.hold_states();
        let states = self.states.as_mut().expect("just made");
        let (word, shift) = (&mut states[(block / SLOT_BLOCKS) as usize], block % SLOT_BLOCKS * 2);
        *word = *word & !(3 << shift) | (state as u32) << shift;
    }

    fn hold_states(&mut self) {
        if self.states.is_none() {
            let words = std::array::from_fn(|position| self.word(position as u32));
            self.states = Some(Box::new(words));
        }
    }

    /// Drop the slot of a position that holds no data, returning it, and states that say nothing.
    pub fn tidy(&mut self, position: u32) -> Option<u32> {
        let word = self.word(position);
        let freed = self.slot(position).filter(|_| !has_data(word));
        if freed.is_some() {
            self.drop_slot(position);
        }
        self.compact(word);
        freed
    }

    /// Return to the smallest form; `word` is the state word just changed (a cheap first test).
    fn compact(&mut self, word: Word) {
        let uniform_word = word == 0 || word == ALL_DATA || word == uniform(BlockState::Zero);
        let Some(states) = self.states.as_deref().filter(|_| uniform_word) else { return };
        let plain = (0..EXTENT_SLOTS).all(|position| {
            let expected = if self.slot(position).is_some() { ALL_DATA } else { 0 };
            states[position as usize] == expected
        });
        if plain {
            self.states = None;
            if self.slots().next().is_none() {
                self.form = Form::Empty;
            }
        } else if states.iter().all(|&word| word == uniform(BlockState::Zero))
            && self.slots().next().is_none()
        {
            self.states = None;
            self.form = Form::UniformZero;
        }
    }

    /// Append the disk form: form u8, has_states u8, slots, states.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let form = match &self.form {
            Form::Empty => 0,
            Form::UniformZero => 1,
            Form::Natural { .. } => 2,
            Form::Scattered(_) => 3,
        };
        out.extend_from_slice(&[form, u8::from(self.states.is_some()), 0, 0]);
        match &self.form {
            Form::Empty | Form::UniformZero => {}
            Form::Natural { base, mask } => {
                put32(out, *base);
                out.extend_from_slice(&mask.to_le_bytes());
            }
            Form::Scattered(slots) => slots.iter().for_each(|&slot| put32(out, slot)),
        }
        if let Some(states) = &self.states {
            states.iter().for_each(|&word| put32(out, word));
        }
    }

    /// Decode what `encode` wrote. `slots` is the number of slots of the lane.
    pub(crate) fn decode(cursor: &mut Cursor<'_>, slots: u32) -> Result<Extent, RecordError> {
        let (form, has_states) = (cursor.u8()?, cursor.u8()?);
        cursor.u16()?;
        let form = match form {
            0 => Form::Empty,
            1 => Form::UniformZero,
            2 => {
                let (base, mask) = (cursor.u32()?, cursor.u64()?);
                let last = u64::from(base) + 63 - u64::from(mask.leading_zeros().min(63));
                if base % EXTENT_SLOTS != 0 || last >= u64::from(slots) {
                    return Err(cursor.fail("natural extent outside the lane"));
                }
                Form::Natural { base, mask }
            }
            3 => {
                let mut list = Box::new([NO_SLOT; EXTENT_SLOTS as usize]);
                for slot in list.iter_mut() {
                    *slot = cursor.u32()?;
                    if *slot != NO_SLOT && *slot >= slots {
                        return Err(cursor.fail("slot outside the lane"));
                    }
                }
                Form::Scattered(list)
            }
            _ => return Err(cursor.fail("unknown extent form")),
        };
        let states = if has_states == 1 {
            let mut words = Box::new([0; EXTENT_SLOTS as usize]);
            for word in words.iter_mut() {
                *word = cursor.u32()?;
            }
            Some(words)
        } else {
            None
        };
        let extent = Extent { form, states };
        for position in 0..EXTENT_SLOTS {
            if has_data(extent.word(position)) && extent.slot(position).is_none() {
                return Err(cursor.fail("data without a slot"));
            }
        }
        Ok(extent)
    }
}

/// True when some of the sixteen blocks is data (01).
fn has_data(word: Word) -> bool {
    word & !(word >> 1) & ALL_DATA != 0
}

fn uniform(state: BlockState) -> Word {
    ALL_DATA * state as u32
}

const _: () = assert!(EXTENT_BLOCKS == EXTENT_SLOTS * SLOT_BLOCKS);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// The slow, obvious extent: a state per block and a slot per position.
    #[derive(Default)]
    struct Oracle {
        states: BTreeMap<u32, BlockState>,
        slots: BTreeMap<u32, u32>,
    }

    #[derive(Clone, Debug)]
    enum Change {
        Data { first: u32, count: u32, scattered: bool },
        Other { first: u32, count: u32, state: BlockState },
    }

    fn change() -> impl Strategy<Value = Change> {
        let range = (0u32..EXTENT_BLOCKS, 1u32..40)
            .prop_map(|(first, count)| (first, count.min(EXTENT_BLOCKS - first)));
        let whole = Just((0, EXTENT_BLOCKS));
        (prop_oneof![8 => range, 1 => whole], 0u8..5).prop_map(
            |((first, count), kind)| match kind {
                0 | 1 => Change::Data { first, count, scattered: kind == 1 },
                2 => Change::Other { first, count, state: BlockState::Inherit },
                3 => Change::Other { first, count, state: BlockState::Zero },
                _ => Change::Other { first, count, state: BlockState::Poison },
            },
        )
    }

    proptest! {
        #[test]
        fn extent_agrees_with_a_state_per_block(changes in prop::collection::vec(change(), 1..25)) {
            let (mut extent, mut oracle, mut next) = (Extent::default(), Oracle::default(), 64 * 5);
            for change in changes {
                let (first, count, state) = match change {
                    Change::Data { first, count, scattered } => {
                        for position in crate::record::positions(first, count) {
                            if extent.slot(position).is_none() {
                                next += 64;
                                let natural = 64 + position;
                                let slot = if scattered { next } else { natural };
                                extent.set_slot(position, slot);
                                oracle.slots.insert(position, slot);
                            }
                        }
                        (first, count, BlockState::Data)
                    }
                    Change::Other { first, count, state } => (first, count, state),
                };
                for block in first..first + count {
                    extent.set_state(block, state);
                    oracle.states.insert(block, state);
                }
                for position in crate::record::positions(first, count) {
                    let data = (position * 16..position * 16 + 16)
                        .any(|block| oracle.states.get(&block) == Some(&BlockState::Data));
                    let freed = extent.tidy(position);
                    let expected =
                        if data { None } else { oracle.slots.remove(&position) };
                    prop_assert_eq!(freed, expected);
                }
            }
            let poisoned: Vec<u32> = oracle
                .states
                .iter()
                .filter(|&(_, &state)| state == BlockState::Poison)
                .map(|(&block, _)| block)
                .collect();
            prop_assert_eq!(extent.poisoned().collect::<std::collections::BTreeSet<u32>>(),
                poisoned.into_iter().collect());
            for block in 0..EXTENT_BLOCKS {
                let expected = oracle.states.get(&block).copied().unwrap_or(BlockState::Inherit);
                prop_assert_eq!(extent.state(block), expected);
            }
            prop_assert_eq!(extent.slots().collect::<BTreeMap<_, _>>(), oracle.slots);
            let mut bytes = Vec::new();
            extent.encode(&mut bytes);
            let mut cursor = Cursor { bytes: &bytes, at: 0, kind: 0 };
            prop_assert_eq!(Extent::decode(&mut cursor, 1 << 20).expect("round trip"), extent);
        }
    }
}
