//! What a world is like: sizes, workload, and each fault with its strength. The seed chooses (swarm
//! testing: a world with every fault at once hides what a world with two shows), JSON overrides.
//!
//! Every option is a whole number: counts, microseconds, milliseconds, or chances in ten thousand.
//! The text form is one flat JSON object.

use crate::random::Random;

/// Why a text is no set of options.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OptionsProblem {
    /// Not a flat JSON object of whole numbers.
    #[error("options are one JSON object of whole numbers: {0:?} is not")]
    Syntax(String),
    /// No option has this name.
    #[error("no option is called {0:?}")]
    Unknown(String),
    /// Outside what the world can do.
    #[error("option {name} is {value}: {expected}")]
    Range {
        /// Which.
        name: &'static str,
        /// What was given.
        value: u64,
        /// What is allowed.
        expected: &'static str,
    },
}

macro_rules! options {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// The options of one world.
        #[derive(Clone, PartialEq, Eq, Debug, Default)]
        pub struct Options {
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl Options {
            fn field(&mut self, name: &str) -> Option<&mut u64> {
                match name {
                    $(stringify!($name) => Some(&mut self.$name),)+
                    // A string has no end of values.
                    _ => None,
                }
            }

            /// Name and value of each, in the order of their definition.
            #[must_use]
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)+]
            }
        }
    };
}

options! {
    /// Store nodes, 1 to 5.
    stores,
    /// Replicas wanted of each shard, at most `stores`.
    rf,
    /// Replicas without which no write is committed.
    min_write,
    /// Shards of the one volume.
    shards,
    /// Regions (1 MiB) of a shard.
    regions,
    /// Sessions.
    clients,
    /// Blocks that clients use, few so that they collide.
    hot_blocks,
    /// Requests per simulated second, of all clients together.
    ops_per_s,
    /// Requests that one client has open at once.
    depth,
    /// Percent of the requests that write.
    write_percent,
    /// Percent of the requests that make zeros.
    zero_percent,
    /// Length of the phase with faults.
    safety_ms,
    /// Most time until a healthy core is healthy.
    liveness_ms,
    /// Length of the phase without a conductor.
    conductorless_ms,
    /// 1: a completed write survives power failure; 0: only a flushed one.
    plp,
    /// 1: the device never tears a block.
    atomic_blocks,
    /// Pages of the journal.
    journal_pages,
    /// Mean time of a disk operation.
    disk_us,
    /// Mean time of a message.
    delay_us,
    /// Chance that a message is lost.
    drop,
    /// Chance that a message comes twice.
    duplicate,
    /// Chance that a message takes a hundred times as long.
    slow_message,
    /// 1: messages between two stores overtake one another.
    reorder,
    /// Mean time between changes of who reaches whom.
    partition_every_ms,
    /// Percent of the partitions that cut one direction only.
    asymmetric_percent,
    /// Percent of the partitions after which one store alone reaches both sides.
    bridge_percent,
    /// 1: a cut link comes and goes.
    flap,
    /// Mean time between crashes of one store.
    crash_every_ms,
    /// Mean time until a crashed store is started again.
    restart_ms,
    /// Chance that a start crashes in the middle of recovery.
    crash_in_recovery,
    /// Mean time between crashes of all stores at once.
    crash_all_every_ms,
    /// Percent of the crashes that are followed by three more of the same store.
    storm_percent,
    /// 1: a crash is one of the machine: completed writes that were not flushed may be lost.
    lose_unflushed,
    /// 1: a crash may tear writes.
    torn,
    /// Mean time between pauses of one store.
    pause_every_ms,
    /// Mean length of a pause.
    pause_ms,
    /// Percent of the pauses that are longer than every lease.
    long_pause_percent,
    /// Chance that a disk read fails.
    eio_read,
    /// Chance that a disk write fails.
    eio_write,
    /// Mean time between times in which one disk is slow.
    slow_disk_every_ms,
    /// Mean time between disk operations that get stuck for seconds.
    stuck_disk_every_ms,
    /// Most clock rate error of a store, in thousandths.
    clock_permille,
    /// Mean time between absences of the conductor.
    conductor_every_ms,
    /// Mean time between losses of a client's connection.
    connection_every_ms,
    /// Mean time between ends of a client whose requests stay unanswered; another takes its place.
    client_every_ms,
    /// Chance that a primary is cut off, with the conductor or without, while it proposes a
    /// learner.
    ambush,
    /// Chance that a client's frame is held up for seconds.
    frame_hold,
    /// Mean time between attaches that fence earlier writers (T9).
    attach_every_ms,
    /// Mean time between requests that a primary give its reign away (T5).
    transfer_every_ms,
    /// Mean time between members that are left out of an ISR although they are well (T1).
    demote_every_ms,
    /// Mean time between losses of a whole ISR, after which a person decides on an older copy (T7).
    /// No seed chooses it: what was acknowledged is lost then, and I1 is judged per history.
    lose_every_ms,
    /// Chance that a disk read brings a flipped bit.
    bit_flip,
    /// Mean time between damages to copies of some blocks, for good.
    rot_every_ms,
    /// Percent of the crashes after which recovery is run twice and compared.
    twice_percent,
    /// Seeded bug of `shard`, by its place in `Mutant::ALL` from 1; 0 none.
    mutant,
}

impl Options {
    /// What the seed chooses.
    #[must_use]
    pub fn of_seed(seed: u64) -> Options {
        let mut random = Random::new(seed ^ 0x6f70_7469_6f6e_7321);
        let random = &mut random;
        let mut options = Options::calm();
        options.plp = random.below(2);
        options.atomic_blocks = random.below(2);
        options.hot_blocks = *random.pick(&[4, 12, 12, 24, 60]);
        options.ops_per_s = *random.pick(&[10, 20, 20, 40]);
        options.write_percent = *random.pick(&[30, 50, 70]);
        options.journal_pages = *random.pick(&[64, 64, 128]);
        options.disk_us = *random.pick(&[100, 100, 1_000, 5_000]);
        options.delay_us = *random.pick(&[100, 100, 1_000, 10_000]);
        // Each fault is in about half of the worlds.
        let mut maybe =
            |choices: &[u64]| if random.below(2) == 0 { 0 } else { *random.pick(choices) };
        options.drop = maybe(&[10, 100, 1_000, 2_500]);
        options.duplicate = maybe(&[100, 1_000]);
        options.slow_message = maybe(&[20, 200, 1_000]);
        options.reorder = maybe(&[1]);
        options.partition_every_ms = maybe(&[500, 1_500, 4_000]);
        options.asymmetric_percent = maybe(&[20, 60]);
        options.bridge_percent = maybe(&[20]);
        options.flap = maybe(&[1]);
        options.crash_every_ms = maybe(&[1_000, 3_000, 6_000]);
        options.crash_in_recovery = maybe(&[1_000, 4_000]);
        options.crash_all_every_ms = maybe(&[5_000, 15_000]);
        options.storm_percent = maybe(&[10, 30]);
        options.lose_unflushed = maybe(&[1]);
        options.torn = maybe(&[1]);
        options.pause_every_ms = maybe(&[1_000, 3_000]);
        options.long_pause_percent = maybe(&[20, 60]);
        options.eio_read = maybe(&[5, 50]);
        options.eio_write = maybe(&[2, 10]);
        options.slow_disk_every_ms = maybe(&[3_000]);
        options.stuck_disk_every_ms = maybe(&[3_000]);
        options.clock_permille = maybe(&[10, 100]);
        options.conductor_every_ms = maybe(&[2_000, 6_000]);
        options.connection_every_ms = maybe(&[500, 2_000]);
        options.frame_hold = maybe(&[10, 100]);
        options.client_every_ms = maybe(&[1_000, 4_000]);
        options.ambush = maybe(&[2_000, 6_000]);
        options.restart_ms = *random.pick(&[100, 500, 2_000]);
        options.pause_ms = *random.pick(&[100, 400, 1_000]);
        options.transfer_every_ms = *random.pick(&[0, 500, 2_000]);
        options.demote_every_ms = *random.pick(&[0, 0, 1_000]);
        if random.below(8) == 0 {
            options.rot_every_ms = *random.pick(&[100, 400, 1_500]);
            options.keep_members();
        }
        options
    }

    /// The faults that take a member out of an ISR, or keep a good copy from being read: a copy
    /// that is damaged could become the last one.
    fn faults_of_members(&mut self) -> [&mut u64; 14] {
        [
            &mut self.partition_every_ms,
            &mut self.crash_every_ms,
            &mut self.crash_all_every_ms,
            &mut self.crash_in_recovery,
            &mut self.pause_every_ms,
            &mut self.stuck_disk_every_ms,
            &mut self.slow_disk_every_ms,
            &mut self.eio_write,
            &mut self.ambush,
            &mut self.demote_every_ms,
            &mut self.lose_every_ms,
            // A second longer than a member may be silent.
            &mut self.slow_message,
            &mut self.clock_permille,
            // What one device fails to read for a moment all of them may: no request would be safe.
            &mut self.eio_read,
        ]
    }

    /// Whether a member may be taken out of an ISR.
    pub(crate) fn takes_members(&mut self) -> bool {
        self.faults_of_members().into_iter().any(|fault| *fault > 0)
    }

    /// Without those faults.
    fn keep_members(&mut self) {
        self.faults_of_members().into_iter().for_each(|fault| *fault = 0);
        self.drop = self.drop.min(100);
        self.delay_us = self.delay_us.min(1_000);
        // A part of the requests is read over several blocks; more of them meet several damages.
        self.write_percent = 30;
    }

    /// A world in which nothing goes wrong.
    #[must_use]
    pub fn calm() -> Options {
        Options {
            stores: 3,
            rf: 3,
            min_write: 2,
            shards: 2,
            regions: 8,
            clients: 2,
            hot_blocks: 24,
            ops_per_s: 20,
            depth: 4,
            write_percent: 50,
            zero_percent: 5,
            safety_ms: 20_000,
            liveness_ms: 30_000,
            conductorless_ms: 3_000,
            plp: 1,
            atomic_blocks: 1,
            journal_pages: 64,
            disk_us: 100,
            delay_us: 100,
            restart_ms: 500,
            pause_ms: 400,
            twice_percent: 25,
            ..Options::default()
        }
    }

    /// Replace what `text` names, a flat JSON object of whole numbers; `true` is 1, `false` 0.
    ///
    /// With a fault that takes members out of an ISR a world has no rot, unless `text` names that
    /// too.
    pub fn set(&mut self, text: &str) -> Result<(), OptionsProblem> {
        let syntax = || OptionsProblem::Syntax(text.to_owned());
        let body = text.trim().strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
        let body = body.ok_or_else(syntax)?.trim();
        if body.is_empty() {
            return Ok(());
        }
        for entry in body.split(',') {
            let (name, value) = entry.split_once(':').ok_or_else(syntax)?;
            let name = name.trim().strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
            let name = name.ok_or_else(syntax)?;
            let value = match value.trim() {
                "true" => 1,
                "false" => 0,
                number => number.parse().map_err(|_| syntax())?,
            };
            let unknown = || OptionsProblem::Unknown(name.to_owned());
            *self.field(name).ok_or_else(unknown)? = value;
        }
        if self.takes_members() && !text.contains("\"rot_every_ms\"") {
            self.rot_every_ms = 0;
        }
        self.check()
    }

    fn check(&self) -> Result<(), OptionsProblem> {
        let problem = |name, value, expected| Err(OptionsProblem::Range { name, value, expected });
        if !(1..=5).contains(&self.stores) {
            return problem("stores", self.stores, "1 to 5");
        }
        if self.rf == 0 || self.rf > self.stores {
            return problem("rf", self.rf, "1 to the number of stores");
        }
        if self.min_write == 0 || self.min_write > self.rf {
            return problem("min_write", self.min_write, "1 to rf");
        }
        if !(1..=4).contains(&self.shards) {
            return problem("shards", self.shards, "1 to 4");
        }
        if !(1..=16).contains(&self.regions) {
            return problem("regions", self.regions, "1 to 16");
        }
        if !(1..=4).contains(&self.clients) {
            return problem("clients", self.clients, "1 to 4");
        }
        if self.hot_blocks == 0 || self.hot_blocks > 64 {
            return problem("hot_blocks", self.hot_blocks, "1 to 64");
        }
        if self.ops_per_s == 0 || self.ops_per_s > 100_000 {
            return problem("ops_per_s", self.ops_per_s, "1 to 100000");
        }
        if !(1..=32).contains(&self.depth) {
            return problem("depth", self.depth, "1 to 32");
        }
        if !(24..=1024).contains(&self.journal_pages) {
            return problem("journal_pages", self.journal_pages, "24 to 1024");
        }
        if self.disk_us == 0 || self.delay_us == 0 {
            return problem("disk_us", 0, "disk_us and delay_us are not 0");
        }
        let mutants =
            if shard::mutant::MUTANTS { shard::mutant::Mutant::ALL.len() as u64 } else { 0 };
        if self.mutant > mutants {
            return problem("mutant", self.mutant, "only builds with seeded bugs have any");
        }
        Ok(())
    }

    /// The text form.
    #[must_use]
    pub fn to_json(&self) -> String {
        let entries: Vec<String> =
            self.all().iter().map(|(name, value)| format!("\"{name}\": {value}")).collect();
        format!("{{{}}}", entries.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_form_round_trips_for_every_seed() {
        for seed in 0..200 {
            let options = Options::of_seed(seed);
            options.check().expect("what a seed chooses is possible");
            let mut read = Options::default();
            read.set(&options.to_json()).expect("our own text");
            assert_eq!(read, options, "seed {seed}");
        }
    }

    #[test]
    fn seeds_differ_and_every_fault_is_in_some_world_and_not_in_some() {
        let worlds: Vec<Options> = (0..64).map(Options::of_seed).collect();
        for (index, (name, _)) in worlds[0].all().iter().enumerate() {
            let values: Vec<u64> = worlds.iter().map(|options| options.all()[index].1).collect();
            let calm = Options::calm().all()[index].1;
            let is_fixed = values.iter().all(|&value| value == calm);
            let is_swarm = values.contains(&0) && values.iter().any(|&value| value > 0)
                || values.iter().any(|&value| value != values[0]);
            assert!(is_fixed || is_swarm, "{name}: {values:?}");
        }
        assert_ne!(worlds[0], worlds[1]);
    }

    #[test]
    fn rot_and_faults_of_members_do_not_meet_by_accident() {
        let mut options = Options { rot_every_ms: 400, ..Options::calm() };
        options.set(r#"{"drop": 7}"#).expect("an option");
        assert_eq!(options.rot_every_ms, 400);
        options.set(r#"{"crash_every_ms": 1000, "rot_every_ms": 50}"#).expect("both are named");
        assert_eq!(options.rot_every_ms, 50);
        options.set(r#"{"torn": 1}"#).expect("an option");
        assert_eq!(options.rot_every_ms, 0, "it has crashes");
        for seed in 0..200 {
            let mut options = Options::of_seed(seed);
            let takes_members = options.faults_of_members().into_iter().any(|fault| *fault > 0);
            assert!(options.rot_every_ms == 0 || !takes_members, "seed {seed}");
        }
    }

    #[test]
    fn what_is_no_option_is_refused() {
        let mut options = Options::calm();
        options.set(r#"{"drop": 7, "torn": true}"#).expect("two options");
        assert_eq!((options.drop, options.torn), (7, 1));
        options.set(" {} ").expect("nothing to change");
        assert_eq!(options.set("[]"), Err(OptionsProblem::Syntax("[]".into())));
        assert_eq!(options.set(r#"{"dorp": 1}"#), Err(OptionsProblem::Unknown("dorp".into())));
        assert!(matches!(options.set(r#"{"drop": -1}"#), Err(OptionsProblem::Syntax(_))));
        assert!(matches!(options.set(r#"{"stores": 9}"#), Err(OptionsProblem::Range { .. })));
        assert!(matches!(options.set(r#"{"mutant": 99}"#), Err(OptionsProblem::Range { .. })));
    }
}
