//! Load for measuring: a closed loop of requests against a volume, a lane or a bare disk engine.
//!
//! **What it owns.** One reactor for the time of one run. `depth` requests are outstanding; each
//! answer begins the next one, until the time or the number of operations is over. Then what is
//! outstanding is waited for and the report is handed out, so every request is counted once.
//!
//! **Why it is here.** The same generator drives all three depths of the stack, so the difference
//! between two reports is the cost of what lies between, and not of another program. It runs per
//! I/O; `pf bench` and the scripts of `bench/` only start it.
//!
//! **What it guarantees.** The clock starts with the answer to a first request, so connecting and
//! opening are not measured. Which blocks are touched follows from the seed alone.

mod lane;
mod raw;
mod session;

use crate::direct::DirectProblem;
use crate::{ClientProblem, VolumeSpec};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use proto::block::single;
use proto::buffer::BUFFER_BYTES_MAX;
use proto::disk::BufList;
use proto::{BLOCK_BYTES, Pool, Status, Tick};
use runtime::clock;
use runtime::metrics::{Histogram, HistogramSnapshot};
use std::time::Duration;

pub use lane::run_lane;
pub use raw::run_disk;
pub use session::run_volume;

/// Requests outstanding, at most: what one reactor's command queue and one engine take.
pub const DEPTH_MAX: u32 = 256;
/// Longest run.
pub const SECONDS_MAX: u64 = 3600;

/// What to ask for.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Requests outstanding.
    pub depth: u32,
    /// Bytes of one request, a multiple of 4,096.
    pub block_bytes: u32,
    /// Of 100 requests, how many read.
    pub read_percent: u32,
    /// The first this many bytes are used.
    pub span_bytes: u64,
    /// One after the other from the start, instead of anywhere.
    pub is_sequential: bool,
    /// Ends after this time ...
    pub time: Duration,
    /// ... or after this many requests.
    pub operations: Option<u64>,
    /// Of the sequence of blocks.
    pub seed: u64,
}

impl LoadOptions {
    /// Why these cannot be used on something of `size_bytes`, if so.
    fn problem(&self, size_bytes: u64) -> Option<String> {
        let block = u64::from(self.block_bytes);
        if self.depth == 0 || self.depth > DEPTH_MAX {
            return Some(format!("depth {}: 1 to {DEPTH_MAX}", self.depth));
        }
        let is_blocks = block > 0 && block.is_multiple_of(BLOCK_BYTES as u64);
        if !is_blocks || block as usize > BUFFER_BYTES_MAX - BLOCK_BYTES {
            return Some(format!("requests of {block} bytes: a multiple of 4096, at most 1 MiB"));
        }
        if self.read_percent > 100 {
            return Some(format!("{} % reads", self.read_percent));
        }
        if self.span_bytes < block || self.span_bytes > size_bytes {
            let span = self.span_bytes;
            return Some(format!("a span of {span} bytes: {block} to {size_bytes}"));
        }
        let is_time = !self.time.is_zero() && self.time <= Duration::from_secs(SECONDS_MAX);
        if !is_time || self.operations == Some(0) {
            return Some(format!("1 or more operations, and a time up to {SECONDS_MAX} s"));
        }
        None
    }
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum LoadProblem {
    /// It cannot be asked for.
    #[error("{0}")]
    Options(String),
    /// The volume.
    #[error(transparent)]
    Client(#[from] ClientProblem),
    /// The lane or its disk.
    #[error(transparent)]
    Direct(#[from] DirectProblem),
    /// A request failed; the run ended there.
    #[error("a request failed: {0}")]
    Failed(String),
}

impl LoadProblem {
    /// The code that tells the user how to react.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            LoadProblem::Options(_) => Status::Invalid,
            LoadProblem::Client(problem) => problem.status(),
            LoadProblem::Direct(problem) => crate::status::of_direct(problem),
            LoadProblem::Failed(_) => Status::MediaError,
        }
    }
}

/// What a run did.
#[derive(Clone, Debug)]
pub struct LoadReport {
    /// Requests answered within the time that counts.
    pub operations: u64,
    /// From the first request that counts to the last answer.
    pub elapsed: Duration,
    /// Time of each read, in nanoseconds.
    pub reads: HistogramSnapshot,
    /// Time of each write, in nanoseconds.
    pub writes: HistogramSnapshot,
    /// Flushes that a lane asked its engine for; `None` where they are somebody else's.
    pub flushes: Option<u64>,
}

/// Waits for a report.
pub struct PendingLoad {
    result: Receiver<Result<LoadReport, LoadProblem>>,
    /// Of a volume.
    news: Option<session::News>,
}

impl PendingLoad {
    /// Whether requests have begun to wait for a newer description since this was asked last.
    #[must_use]
    pub fn wants_news(&self) -> bool {
        self.news.as_ref().is_some_and(session::News::is_wanted)
    }

    /// Tell a newer description of the volume.
    ///
    /// Panics for a load on something else.
    pub fn update(&self, spec: VolumeSpec) -> Result<(), ClientProblem> {
        self.news.as_ref().expect("only a volume has a description").tell(spec)
    }

    /// Wait for a while. `None`: not yet.
    #[must_use]
    pub fn wait_for(&self, time: Duration) -> Option<Result<LoadReport, LoadProblem>> {
        match self.result.recv_timeout(time) {
            Ok(result) => Some(result),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(ClientProblem::Stopped.into())),
        }
    }
}

/// One request of the load.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Ask {
    /// Which of the places of the loop, `0..depth`.
    place: u32,
    offset: u64,
    is_read: bool,
}

/// The loop without its target: which request comes next, and what was measured.
struct Loop {
    options: LoadOptions,
    random: u64,
    issued: u64,
    outstanding: u32,
    begun: Tick,
    until: Tick,
    /// When each place's request was begun.
    since: Vec<(Tick, bool)>,
    payload: BufList,
    reads: Histogram,
    writes: Histogram,
    answer: Option<Sender<Result<LoadReport, LoadProblem>>>,
}

impl Loop {
    fn new(
        options: LoadOptions,
        pool: &Pool,
        answer: Sender<Result<LoadReport, LoadProblem>>,
    ) -> Loop {
        let mut payload = pool.alloc(options.block_bytes as usize);
        // Not zeros, and no block like another: nothing on the way may find a pattern to profit by.
        let mut random = options.seed | 1;
        for word in payload.chunks_exact_mut(8) {
            word.copy_from_slice(&next_random(&mut random).to_le_bytes());
        }
        Loop {
            random: options.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            issued: 0,
            outstanding: 0,
            begun: Tick(0),
            until: Tick(0),
            since: vec![(Tick(0), true); options.depth as usize],
            payload: single(payload.freeze()),
            reads: Histogram::default(),
            writes: Histogram::default(),
            answer: Some(answer),
            options,
        }
    }

    /// The clock starts.
    fn begin(&mut self) {
        self.begun = clock::now();
        let nanos = u64::try_from(self.options.time.as_nanos()).expect("an hour at most");
        self.until = self.begun.after_nanos(nanos);
    }

    /// The next request of a place that is free, or `None` when it was the last.
    fn next(&mut self, place: u32) -> Option<Ask> {
        let now = clock::now();
        let is_over = self.options.operations.is_some_and(|most| self.issued >= most);
        if is_over || now >= self.until || self.answer.is_none() {
            return None;
        }
        let block = u64::from(self.options.block_bytes);
        let blocks = self.options.span_bytes / block;
        let index = if self.options.is_sequential {
            self.issued % blocks
        } else {
            next_random(&mut self.random) % blocks
        };
        // From other bits than the place: the two must not be related.
        let is_read = next_random(&mut self.random) >> 32 & 0xffff_ffff
            < u64::from(self.options.read_percent) * ((1 << 32) / 100 + 1);
        self.issued += 1;
        self.outstanding += 1;
        self.since[place as usize] = (now, is_read);
        Some(Ask { place, offset: index * block, is_read })
    }

    /// A place's request was answered.
    fn done(&mut self, place: u32) {
        let (since, is_read) = self.since[place as usize];
        let nanos = clock::now().0 - since.0;
        if is_read {
            self.reads.record(nanos)
        } else {
            self.writes.record(nanos)
        }
        assert!(self.outstanding > 0, "an answer to a request of the loop");
        self.outstanding -= 1;
    }

    /// True when nothing is outstanding any more, and none will be.
    fn is_over(&self) -> bool {
        self.outstanding == 0
    }

    /// Hand out the report.
    fn finish(&mut self, flushes: Option<u64>) {
        let (reads, writes) = (self.reads.snapshot(), self.writes.snapshot());
        let report = LoadReport {
            operations: reads.count() + writes.count(),
            elapsed: Duration::from_nanos(clock::now().0 - self.begun.0),
            reads,
            writes,
            flushes,
        };
        self.give(Ok(report));
    }

    fn fail(&mut self, problem: impl Into<LoadProblem>) {
        self.give(Err(problem.into()));
    }

    fn give(&mut self, result: Result<LoadReport, LoadProblem>) {
        if let Some(answer) = self.answer.take() {
            // Whoever asked may have given up.
            let _ = answer.send(result);
        }
    }
}

/// Xorshift: the sequence only has to spread, and to be the same for the same seed.
fn next_random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;

    fn options() -> LoadOptions {
        LoadOptions {
            depth: 4,
            block_bytes: 4096,
            read_percent: 30,
            span_bytes: 1 << 20,
            is_sequential: false,
            time: Duration::from_secs(60),
            operations: Some(10_000),
            seed: 7,
        }
    }

    fn all(options: &LoadOptions) -> Vec<Ask> {
        let (answer, _result) = bounded(1);
        let mut work = Loop::new(options.clone(), &Pool::new(1 << 20), answer);
        work.begin();
        let mut asks = Vec::new();
        while let Some(ask) = work.next(asks.len() as u32 % 4) {
            asks.push(ask);
            work.done(ask.place);
        }
        assert!(work.is_over());
        asks
    }

    #[test]
    fn the_seed_alone_decides_what_is_asked() {
        let asks = all(&options());
        assert_eq!(asks.len(), 10_000, "the number of operations ends it");
        assert_eq!(asks, all(&options()));
        assert_ne!(asks, all(&LoadOptions { seed: 8, ..options() }));
        let reads = asks.iter().filter(|ask| ask.is_read).count();
        assert!((2_800..3_200).contains(&reads), "30 % of 10,000: {reads}");
        assert!(asks.iter().all(|ask| ask.offset.is_multiple_of(4096) && ask.offset < 1 << 20));
        let mut touched = [false; 256];
        asks.iter().for_each(|ask| touched[(ask.offset / 4096) as usize] = true);
        assert!(touched.iter().all(|&is_touched| is_touched), "every block of the span");
    }

    #[test]
    fn all_or_nothing_is_exactly_that() {
        let share = |read_percent| {
            let asks = all(&LoadOptions { read_percent, ..options() });
            asks.iter().filter(|ask| ask.is_read).count()
        };
        assert_eq!((share(0), share(100)), (0, 10_000));
    }

    #[test]
    fn sequential_covers_the_span_in_order() {
        let asks = all(&LoadOptions { is_sequential: true, operations: Some(256), ..options() });
        let offsets: Vec<u64> = asks.iter().map(|ask| ask.offset).collect();
        assert_eq!(offsets, (0..256).map(|index| index * 4096).collect::<Vec<u64>>());
    }

    #[test]
    fn what_cannot_be_done_is_said() {
        let bad = [
            LoadOptions { depth: 0, ..options() },
            LoadOptions { depth: DEPTH_MAX + 1, ..options() },
            LoadOptions { block_bytes: 512, ..options() },
            LoadOptions { block_bytes: 2 << 20, ..options() },
            LoadOptions { read_percent: 101, ..options() },
            LoadOptions { span_bytes: (1 << 20) + 1, ..options() },
            LoadOptions { operations: Some(0), ..options() },
            LoadOptions { time: Duration::ZERO, ..options() },
        ];
        assert!(bad.iter().all(|options| options.problem(1 << 20).is_some()));
        assert_eq!(options().problem(1 << 20), None);
    }
}
