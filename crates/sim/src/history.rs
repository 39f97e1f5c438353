//! What clients asked and were told, per block, and whether a value may be seen.
//!
//! Each block is a register with unique values (0: zeros, which many operations may write). A write
//! that has no reply stays possible for ever, and a write may be applied more than once until it is
//! acknowledged (a session sends it again), so a value `v` of a write `w` may be seen by a read iff
//!
//! 1. `w` began before the read ended, and was not refused;
//! 2. no write lies wholly between the end of `w` and the beginning of the read;
//! 3. no read that lies wholly between them saw another value.
//!
//! (2) and (3) are what linearizability of one register asks of a read against the operations that
//! ended before it began; all of those are known when the read ends, so each read is checked once,
//! then. Moments are numbers of a counter: no two are equal.
//!
//! When a person forces a history (T7), every write that had ended may be undone: it counts as one
//! that ends at that moment, so any of them may be seen after it, and all agree on which.

use std::collections::BTreeMap;

/// Position among all begins and ends of requests.
pub type Moment = u64;

#[derive(Clone, Debug)]
struct Written {
    value: u64,
    begun: Moment,
    ended: Option<Moment>,
    is_refused: bool,
    at: u64,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    value: u64,
    begun: Moment,
    ended: Moment,
    at: u64,
}

#[derive(Clone, Debug, Default)]
struct Block {
    writes: Vec<Written>,
    reads: Vec<Seen>,
    /// When the last history was forced; 0: never.
    forced: Moment,
}

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Reads a range.
    Read,
    /// Writes unique values.
    Write,
    /// Makes zeros.
    Zero,
    /// Waits for nothing.
    Flush,
}

/// A request without reply.
#[derive(Clone, Debug)]
pub struct Open {
    /// What it does.
    pub kind: Kind,
    /// First block of the volume.
    pub first: u64,
    /// What it writes, one per block; zeros for the others.
    pub values: Vec<u64>,
    /// When it began.
    pub begun: Moment,
    /// When it began, in nanoseconds.
    pub at: u64,
}

/// All of one volume.
#[derive(Clone, Debug, Default)]
pub struct History {
    last: Moment,
    blocks: BTreeMap<u64, Block>,
    open: BTreeMap<(u64, u64), Open>,
}

impl History {
    /// A moment after all earlier ones.
    pub fn moment(&mut self) -> Moment {
        self.last += 1;
        self.last
    }

    /// A request begins.
    pub fn begin(&mut self, now: u64, request: (u64, u64), kind: Kind, first: u64, values: &[u64]) {
        let begun = self.moment();
        if kind == Kind::Write || kind == Kind::Zero {
            for (block, &value) in (first..).zip(values) {
                let write = Written { value, begun, ended: None, is_refused: false, at: now };
                self.blocks.entry(block).or_default().writes.push(write);
            }
        }
        let open = Open { kind, first, values: values.to_vec(), begun, at: now };
        let before = self.open.insert(request, open);
        assert!(before.is_none(), "the workload numbers its requests");
    }

    /// A request is answered: `values` of a successful read. The second answer to a request is one
    /// too many.
    pub fn end(
        &mut self,
        now: u64,
        request: (u64, u64),
        result: Result<&[u64], bool>,
    ) -> Result<(), String> {
        let Some(open) = self.open.remove(&request) else {
            let (client, id) = request;
            return Err(format!("I27: request {id} of client {client} is answered twice"));
        };
        let ended = self.moment();
        match (open.kind, result) {
            (Kind::Read, Ok(values)) => {
                for (block, &value) in (open.first..).zip(values) {
                    self.check(block, value, open.begun, now)
                        .map_err(|why| format!("I3: {why}"))?;
                    let seen = Seen { value, begun: open.begun, ended, at: now };
                    self.blocks.entry(block).or_default().reads.push(seen);
                }
            }
            (Kind::Write | Kind::Zero, result) => {
                for block in open.first..open.first + open.values.len() as u64 {
                    let writes = &mut self.blocks.get_mut(&block).expect("it was begun").writes;
                    let write = writes.iter_mut().find(|write| write.begun == open.begun);
                    let write = write.expect("it was begun");
                    match result {
                        Ok(_) => write.ended = Some(ended),
                        // Whether it happens is open for ever, unless it was refused.
                        Err(is_refused) => write.is_refused = is_refused,
                    }
                }
            }
            (Kind::Read, Err(_)) | (Kind::Flush, _) => {}
        }
        Ok(())
    }

    /// Whether whoever looks since the moment `begun` may see `value` in `block` now.
    pub fn check(&self, block: u64, value: u64, begun: Moment, now: u64) -> Result<(), String> {
        let none = Block::default();
        let known = self.blocks.get(&block).unwrap_or(&none);
        let initial = Written { value: 0, begun: 0, ended: Some(0), is_refused: false, at: 0 };
        let mut why = format!("block {block} holds {value:#x} at {now} ns, which nobody wrote");
        for write in known.writes.iter().chain(std::iter::once(&initial)) {
            if write.value != value {
                continue;
            }
            if write.is_refused {
                why = format!(
                    "block {block} holds {value:#x} at {now} ns, of the write begun at {} ns that \
                     was refused",
                    write.at
                );
                continue;
            }
            match overwritten(known, write, begun) {
                None => return Ok(()),
                Some(by) => why = format!("block {block} holds {value:#x} at {now} ns, {by}"),
            }
        }
        Err(why)
    }

    /// A person decides on the content of these blocks, now; gives all values that they may hold.
    pub fn forced(&mut self, blocks: &[u64]) -> Vec<u64> {
        let moment = self.moment();
        let mut values = Vec::new();
        for block in blocks {
            let known = self.blocks.entry(*block).or_default();
            known.forced = moment;
            values.extend(known.writes.iter().map(|write| write.value));
        }
        values
    }

    /// A client has ended: what it had open is never answered, and may have happened.
    pub fn abandon(&mut self, client: u64) {
        self.open.retain(|(asker, _), _| *asker != client);
    }

    /// Requests without reply, with who asked.
    pub fn open(&self) -> impl Iterator<Item = (&(u64, u64), &Open)> {
        self.open.iter()
    }

    /// Blocks that were ever written, in order.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks.keys().copied()
    }
}

/// What lies wholly between the end of `write` and `begun` and contradicts it.
fn overwritten(block: &Block, write: &Written, begun: Moment) -> Option<String> {
    let ended = write.ended?.max(block.forced);
    let later = block.writes.iter().find(|later| {
        later.begun > ended
            && later.ended.is_some_and(|end| end < begun)
            && later.value != write.value
    });
    if let Some(later) = later {
        return Some(format!(
            "of the write begun at {} ns; {:#x}, begun at {} ns, was acknowledged since",
            write.at, later.value, later.at
        ));
    }
    let seen = block
        .reads
        .iter()
        .find(|seen| seen.begun > ended && seen.ended < begun && seen.value != write.value);
    seen.map(|seen| {
        format!(
            "of the write begun at {} ns; a read has seen {:#x} at {} ns since",
            write.at, seen.value, seen.at
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests of one block: 'w' value, 'r' value, with overlaps as the test says.
    struct Story {
        history: History,
        id: u64,
    }

    impl Story {
        fn new() -> Story {
            Story { history: History::default(), id: 0 }
        }

        fn begin(&mut self, kind: Kind, value: u64) -> u64 {
            self.id += 1;
            self.history.begin(self.id, (1, self.id), kind, 7, &[value]);
            self.id
        }

        fn end(&mut self, id: u64, value: u64) -> Result<(), String> {
            self.history.end(100 + id, (1, id), Ok(&[value]))
        }

        fn write(&mut self, value: u64) {
            let id = self.begin(Kind::Write, value);
            self.end(id, value).expect("a write is not checked");
        }

        fn read(&mut self, value: u64) -> Result<(), String> {
            let id = self.begin(Kind::Read, 0);
            self.end(id, value)
        }
    }

    #[test]
    fn the_last_write_is_read_and_nothing_else() {
        let mut story = Story::new();
        story.read(0).expect("zeros before the first write");
        story.write(5);
        story.read(5).expect("what was written");
        story.write(6);
        let why = story.read(5).expect_err("overwritten");
        assert!(why.starts_with("I3: block 7 holds 0x5") && why.contains("0x6"), "{why}");
        assert!(story.read(0).is_err(), "zeros were overwritten");
        assert!(story.read(99).expect_err("out of the air").contains("nobody wrote"));
    }

    #[test]
    fn a_write_without_reply_stays_possible_and_may_happen_twice() {
        let mut story = Story::new();
        let lost = story.begin(Kind::Write, 1);
        story.write(2);
        story.read(2).expect("the other one");
        story.read(1).expect("it happened now");
        story.write(3);
        story.read(3).expect("the last one");
        story.read(1).expect("and again: it has not been acknowledged");
        story.end(lost, 1).expect("acknowledged");
        assert!(story.read(3).is_err(), "3 was acknowledged before 1 was read");
        story.read(1).expect("it happened last");
    }

    #[test]
    fn reads_do_not_go_back_once_a_write_is_acknowledged() {
        let mut story = Story::new();
        story.write(1);
        let _open = story.begin(Kind::Write, 2);
        story.read(1).expect("before");
        story.read(2).expect("after");
        assert!(story.read(1).expect_err("back again").contains("has seen 0x2"));
    }

    #[test]
    fn a_forced_history_may_go_back_once() {
        let mut story = Story::new();
        story.write(1);
        story.write(2);
        story.read(2).expect("the last one");
        assert_eq!(story.history.forced(&[7, 8]), [1, 2], "block 8 was never written");
        story.read(1).expect("what was acknowledged since is lost");
        assert!(story.read(2).is_err(), "and stays lost");
        assert!(story.read(0).is_err());
        story.write(3);
        assert!(story.read(1).is_err(), "the new history is one as any other");
        story.read(3).expect("the last one");
        assert!(story.read(4).is_err(), "never written, whoever decides");
    }

    #[test]
    fn overlapping_reads_may_see_either_value() {
        let mut story = Story::new();
        story.write(1);
        let read = story.begin(Kind::Read, 0);
        story.write(2);
        story.end(read, 1).expect("it began before 2 was acknowledged");
    }

    #[test]
    fn a_refused_write_is_never_seen_and_one_reply_is_all() {
        let mut story = Story::new();
        let id = story.begin(Kind::Write, 4);
        story.history.end(9, (1, id), Err(true)).expect("refused");
        assert!(story.read(4).expect_err("no effect").contains("refused"));
        let again = story.history.end(9, (1, id), Err(true)).expect_err("twice");
        assert!(again.starts_with("I27"), "{again}");
    }
}
