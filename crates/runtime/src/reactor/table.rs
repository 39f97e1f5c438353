//! Connections by id: a slot number and a generation, so that an id of a closed connection never
//! means its successor in the same slot.

use super::ConnId;

/// Bits of an id that are the slot number.
const SLOT_BITS: u32 = 24;
const GENERATION_MASK: u64 = u32::MAX as u64;

struct Slot<T> {
    generation: u32,
    value: Option<Box<T>>,
}

pub(super) struct Table<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

impl<T> Table<T> {
    pub fn new() -> Table<T> {
        Table { slots: Vec::new(), free: Vec::new() }
    }

    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Put in what `make` builds for its id.
    pub fn insert(&mut self, make: impl FnOnce(ConnId) -> T) -> ConnId {
        let index = self.free.pop().unwrap_or_else(|| {
            assert!(self.slots.len() < 1 << SLOT_BITS, "connections are bounded well below");
            self.slots.push(Slot { generation: 0, value: None });
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[index as usize];
        assert!(slot.value.is_none(), "a free slot holds nothing");
        let id = ConnId(u64::from(slot.generation) << SLOT_BITS | u64::from(index));
        slot.value = Some(Box::new(make(id)));
        id
    }

    pub fn get_mut(&mut self, id: ConnId) -> Option<&mut T> {
        let slot = self.slots.get_mut(index_of(id))?;
        if slot.generation == generation_of(id) { slot.value.as_deref_mut() } else { None }
    }

    pub fn get(&self, id: ConnId) -> Option<&T> {
        let slot = self.slots.get(index_of(id))?;
        if slot.generation == generation_of(id) { slot.value.as_deref() } else { None }
    }

    pub fn remove(&mut self, id: ConnId) -> Option<Box<T>> {
        let index = index_of(id);
        let slot = self.slots.get_mut(index)?;
        if slot.generation != generation_of(id) {
            return None;
        }
        let value = slot.value.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index as u32);
        Some(value)
    }
}

fn index_of(id: ConnId) -> usize {
    (id.0 & ((1 << SLOT_BITS) - 1)) as usize
}

fn generation_of(id: ConnId) -> u32 {
    (id.0 >> SLOT_BITS & GENERATION_MASK) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_dies_with_its_connection() {
        let mut table = Table::new();
        let first = table.insert(|_| "first");
        let second = table.insert(|_| "second");
        assert_eq!(table.remove(first).as_deref(), Some(&"first"));
        let third = table.insert(|_| "third");
        assert_ne!(first, third);
        assert_eq!(third.0 & 0xFF_FFFF, first.0 & 0xFF_FFFF, "the slot is used again");
        assert!(table.get_mut(first).is_none() && table.remove(first).is_none());
        assert_eq!(table.get(third), Some(&"third"));
        assert_eq!(table.get(second), Some(&"second"));
        assert_eq!(table.len(), 2);
    }
}
