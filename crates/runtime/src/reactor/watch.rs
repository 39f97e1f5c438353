//! Since when each operation of one disk is under way.
//!
//! A device that has stopped answering lets its reactor live: nothing else would notice. So each
//! operation goes to its engine under the number of a place here, which keeps its own name and the
//! time of its iteration. Cost: a push and a pop per operation, and a walk over the places (as many
//! as were ever under way at once) some times a second.

use proto::Tick;
use proto::disk::IoId;

/// No operation is in this place.
const FREE: Tick = Tick(u64::MAX);

#[derive(Default)]
pub(super) struct Watch {
    places: Vec<(IoId, Tick)>,
    free: Vec<u32>,
}

impl Watch {
    /// An operation is given to the engine, under the name returned.
    pub fn begin(&mut self, id: IoId, now: Tick) -> IoId {
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push((id, FREE));
            u32::try_from(self.places.len() - 1).expect("memory ends before that")
        });
        self.places[place as usize] = (id, now);
        IoId(u64::from(place))
    }

    /// The engine has answered it: its own name.
    pub fn end(&mut self, place: IoId) -> IoId {
        let index = u32::try_from(place.0).expect("made by `begin`");
        let (id, since) = self.places[index as usize];
        assert!(since != FREE, "an operation is answered once");
        self.places[index as usize].1 = FREE;
        self.free.push(index);
        id
    }

    /// When the oldest operation under way was given.
    pub fn oldest(&self) -> Option<Tick> {
        self.places.iter().map(|(_, since)| *since).min().filter(|since| *since != FREE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_what_has_not_been_answered() {
        let mut watch = Watch::default();
        assert_eq!(watch.oldest(), None);
        let first = watch.begin(IoId(900), Tick(5));
        let second = watch.begin(IoId(901), Tick(6));
        let third = watch.begin(IoId(900), Tick(7));
        assert_eq!(watch.end(second), IoId(901));
        assert_eq!(watch.oldest(), Some(Tick(5)), "others overtake it");
        assert_eq!(watch.end(first), IoId(900));
        assert_eq!(watch.oldest(), Some(Tick(7)), "a name that is used twice is two operations");
        assert_eq!(watch.begin(IoId(1), Tick(8)), first, "places are used again");
        assert_eq!(watch.end(third), IoId(900));
        assert_eq!(watch.oldest(), Some(Tick(8)));
    }

    #[test]
    #[should_panic(expected = "answered once")]
    fn a_second_answer_is_a_bug() {
        let mut watch = Watch::default();
        let place = watch.begin(IoId(1), Tick(5));
        watch.end(place);
        watch.end(place);
    }
}
