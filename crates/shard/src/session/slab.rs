//! A table with cheap insert, lookup and removal, whose keys die with their entries: a key that is
//! still in some queue after its entry has gone finds nothing, and never the entry's successor.

/// Names one entry for as long as it lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Key {
    index: u32,
    generation: u32,
}

#[derive(Debug)]
struct Place<T> {
    generation: u32,
    value: Option<T>,
}

#[derive(Debug)]
pub(super) struct Slab<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub fn new() -> Slab<T> {
        Slab { places: Vec::new(), free: Vec::new() }
    }

    pub fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub fn insert(&mut self, value: T) -> Key {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place { generation: 0, value: None });
            u32::try_from(self.places.len() - 1).expect("entries are bounded far below 2^32")
        });
        let place = &mut self.places[index as usize];
        assert!(place.value.is_none(), "a free place is empty");
        place.value = Some(value);
        Key { index, generation: place.generation }
    }

    pub fn get(&self, key: Key) -> Option<&T> {
        let place = &self.places[key.index as usize];
        if place.generation == key.generation { place.value.as_ref() } else { None }
    }

    pub fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let place = &mut self.places[key.index as usize];
        if place.generation == key.generation { place.value.as_mut() } else { None }
    }

    pub fn remove(&mut self, key: Key) -> Option<T> {
        let place = &mut self.places[key.index as usize];
        if place.generation != key.generation {
            return None;
        }
        let value = place.value.take()?;
        place.generation = place.generation.wrapping_add(1);
        self.free.push(key.index);
        Some(value)
    }

    pub fn keys(&self) -> Vec<Key> {
        let places = self.places.iter().zip(0u32..);
        let full = places.filter(|(place, _)| place.value.is_some());
        full.map(|(place, index)| Key { index, generation: place.generation }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_dies_with_its_entry() {
        let mut slab = Slab::new();
        let (first, second) = (slab.insert("first"), slab.insert("second"));
        assert_eq!(slab.remove(first), Some("first"));
        let third = slab.insert("third");
        assert_eq!(third.index, first.index, "the place is used again");
        assert!(slab.get(first).is_none() && slab.remove(first).is_none());
        assert_eq!((slab.get(second), slab.get(third)), (Some(&"second"), Some(&"third")));
        assert_eq!((slab.len(), slab.keys()), (2, vec![third, second]));
    }
}
