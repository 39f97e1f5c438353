//! The crash explorer (ring 0): the real lane over a disk that loses, keeps or tears every write
//! that is not durable, at every boundary, crashed again inside recovery.
//!
//! Checks after each recovery: C1 every acknowledged write is there; C2 a block under an unfinished
//! write holds the old or the new content; C3 never-written and discarded blocks are zeros; C4 the
//! region map never claims a write that is missing, nor a learner's; C5 the space counters agree
//! with the map, and the lane goes on to work and closes cleanly. The seeded bugs of `lane::Mutant`
//! must each be caught (feature `mutants`).

mod disk;
mod harness;
mod random;
mod relocation;

use disk::Fate;
use harness::{Config, Harness, SHARD_BLOCKS, Stats, random_fate};
use lane::Op;
use lane::record::RangeKind;
use random::Random;

/// The store's alphabet for exhaustive workloads: touch, overwrite, small and large, across slots
/// and extents, discard, checkpoint.
#[derive(Clone, Copy, Debug)]
enum Action {
    Write(u32, u32),
    Discard(u32, u32),
    Poison(u32, u32),
    Checkpoint,
    Idle,
}

const ALPHABET: [Action; 10] = [
    Action::Write(0, 1),
    Action::Write(1, 1),
    Action::Write(0, 2),
    Action::Write(12, 6),
    Action::Write(1022, 4),
    Action::Discard(0, 1),
    Action::Discard(0, 20),
    Action::Poison(1, 2),
    Action::Checkpoint,
    Action::Idle,
];

fn act(harness: &mut Harness, action: Action) {
    match action {
        Action::Write(first, count) => harness.write(first, count, false),
        Action::Discard(first, count) => harness.take_data(first, count, RangeKind::Inherit),
        Action::Poison(first, count) => harness.take_data(first, count, RangeKind::Poison),
        Action::Checkpoint => harness.control(Op::Checkpoint),
        Action::Idle => harness.idle(),
    }
}

/// Crash states of one boundary: all subsets of at most 6 open writes with a torn variant of each,
/// else samples.
fn fates_of(undecided: usize, random: &mut Random) -> Vec<Vec<Fate>> {
    if undecided <= 6 {
        (0..1u32 << undecided)
            .flat_map(|subset| {
                let plain: Vec<Fate> = (0..undecided)
                    .map(|bit| if subset >> bit & 1 == 1 { Fate::Landed } else { Fate::Lost })
                    .collect();
                let torn = plain
                    .iter()
                    .map(|fate| match fate {
                        Fate::Landed => Fate::Torn(random.next()),
                        Fate::Lost | Fate::Torn(_) => Fate::Lost,
                    })
                    .collect();
                if subset == 0 { vec![plain] } else { vec![plain, torn] }
            })
            .collect()
    } else {
        (0..64).map(|_| (0..undecided).map(|_| random_fate(random)).collect()).collect()
    }
}

fn configs() -> Vec<Config> {
    let base = Config::PLAIN;
    vec![
        base,
        Config { volatile: true, ..base },
        Config { atomic_blocks: false, solo: true, ..base },
        Config { volatile: true, atomic_blocks: false, solo: true, ..base },
        Config { volatile: true, atomic_blocks: false, ..base },
    ]
}

/// Run `workload` and crash at every boundary in every way.
fn explore(config: Config, setup: &[Action], workload: &[Action], stats: &mut Stats) {
    let story = format!("{config:?} after {setup:?}: {workload:?}");
    // The boundaries: after each action and each completion, first in, first out.
    for boundary in 0..200 {
        let mut harness = Harness::new(config).expect("a fresh lane");
        for &action in setup {
            act(&mut harness, action);
            harness.settle().expect("setup");
        }
        let mut actions = workload.iter();
        let mut ended = false;
        for step in 0..=boundary {
            if step == boundary {
                break;
            }
            if let Some(&action) = actions.next() {
                act(&mut harness, action);
                harness.turn();
            } else if harness.disk.outstanding() > 0 {
                harness.complete(0);
                harness.turn();
            } else {
                ended = true;
                break;
            }
        }
        let mut random = Random::new(boundary);
        for fates in fates_of(harness.disk.undecided(), &mut random) {
            for nested in [None, Some(random.next())] {
                let mut crashed = harness.fork();
                stats.crash_states += 1;
                crashed
                    .crash(&fates, nested)
                    .unwrap_or_else(|why| panic!("{story}, boundary {boundary}, {fates:?}: {why}"));
                crashed.stats.crash_states = 0;
                stats.add(&crashed.stats);
            }
        }
        if ended {
            return;
        }
    }
    panic!("{story}: does not end");
}

#[test]
#[expect(clippy::disallowed_methods, reason = "two halves of the cases on two cores")]
fn every_workload_of_one_or_two_operations_survives_every_crash() {
    let setups: [&[Action]; 2] = [&[], &[Action::Write(0, 18)]];
    // Two threads share the work: every other configuration each.
    let half = |parity: usize| {
        let mut stats = Stats::default();
        for config in configs().into_iter().skip(parity).step_by(2) {
            for setup in setups {
                for first in ALPHABET {
                    for second in ALPHABET {
                        explore(config, setup, &[first, second], &mut stats);
                    }
                }
            }
        }
        stats
    };
    let (mut stats, other) = std::thread::scope(|scope| {
        let other = scope.spawn(|| half(1));
        (half(0), other.join().expect("no panic in the other half"))
    });
    stats.add(&other);
    println!("exhaustive: {stats:?}");
    assert!(stats.crash_states > 20_000, "{stats:?}");
}

/// One seeded life: run, crash, recover, run, crash, recover ...
fn trial(config: Config, seed: u64) -> Result<Stats, String> {
    let mut random = Random::new(seed);
    let mut harness = Harness::new(config)?;
    let hot = 1 + random.below(40) as u32;
    let learners = random.percent(20);
    for _ in 0..3 + random.below(4) {
        let actions = 1 + random.below(60);
        if random.percent(20) {
            harness.disk.fail_write_in = Some(random.below(20) as u32);
        }
        let bad_slots = config.solo && random.percent(50);
        for _ in 0..actions {
            random_action(&mut harness, &mut random, hot, learners);
            if bad_slots && random.percent(5) {
                let slot = harness.any_slot(random.next());
                harness.disk.bad.extend(slot.map(u64::from));
            }
            if bad_slots && random.percent(5) {
                harness.disk.fail_slot_write_in = Some(random.below(3) as u32);
            }
            if harness.lane().failure().is_some() {
                break;
            }
        }
        (harness.disk.fail_write_in, harness.disk.fail_slot_write_in) = (None, None);
        harness.heal_free_slots();
        if random.percent(10) && settles(&mut harness)? {
            harness.close_and_reopen()?;
        } else {
            let fates: Vec<Fate> =
                (0..harness.disk.undecided()).map(|_| random_fate(&mut random)).collect();
            let nested = random.percent(30).then(|| random.next());
            harness.crash(&fates, nested)?;
            if random.percent(40) {
                harness.resend(1 + random.below(3) as usize);
            }
        }
    }
    harness.heal_free_slots();
    if !settles(&mut harness)? {
        harness.disk.bad.clear();
        harness.crash(&vec![Fate::Lost; harness.disk.undecided()], None)?;
        harness.settle()?;
    }
    harness.close_and_reopen()?;
    Ok(harness.stats)
}

/// Run until nothing is left to do. False: the lane has stopped, as it may where slots are bad and none
/// is free for what was acknowledged.
fn settles(harness: &mut Harness) -> Result<bool, String> {
    if harness.lane().failure().is_some() {
        return Ok(false);
    }
    match harness.settle() {
        Ok(()) => {
            harness.heal_free_slots();
            Ok(true)
        }
        Err(why) if why.contains("finds no slot that takes it") => Ok(false),
        // A slot that was freed before anybody found out.
        Err(why) if why.contains("checkpoint: disk") && !harness.disk.bad.is_empty() => Ok(false),
        Err(why) => Err(why),
    }
}

fn random_action(harness: &mut Harness, random: &mut Random, hot: u32, learners: bool) {
    let first = if random.percent(85) {
        random.below(u64::from(hot)) as u32
    } else {
        1016 + random.below(16) as u32
    };
    let count = match random.below(10) {
        0..=5 => 1,
        6 | 7 => 1 + random.below(4) as u32,
        8 => 1 + random.below(20) as u32,
        _ => 1 + random.below(64) as u32,
    }
    .min(SHARD_BLOCKS - first);
    match random.below(100) {
        0..=29 => harness.write(first, count, learners && random.percent(30)),
        30..=35 => harness.take_data(first, count, RangeKind::Inherit),
        36 => harness.take_data(first, count, RangeKind::Poison),
        37..=42 => harness.read(first, count),
        43..=44 => harness.control(Op::Checkpoint),
        45 => harness.idle(),
        46..=70 => harness.turn(),
        _ => {
            let outstanding = harness.disk.outstanding() as u64;
            if outstanding > 0 {
                harness.complete(random.below(outstanding) as usize);
            }
        }
    }
}

/// Configurations of the random trials: those of the exhaustive ones, tight space and rings, file
/// media.
fn random_config(seed: u64) -> Config {
    let mut random = Random::new(seed ^ 0xc0ff_ee00);
    let all = configs();
    let base = all[random.below(all.len() as u64) as usize];
    Config {
        sparse: random.percent(25),
        journal_pages: [16, 24, 64][random.below(3) as usize],
        slots: if random.percent(20) { 17 } else { 150 },
        solo: base.solo || random.percent(30),
        ..base
    }
}

/// Rot of a durable frame is told from a torn tail; a rotten block is never returned as data.
#[test]
fn rot_is_found_and_never_served() {
    // A ring so large that no checkpoint moves the replay point.
    let config = Config { journal_pages: 256, ..Config::PLAIN };
    let mut harness = Harness::new(config).expect("a fresh lane");
    for block in 0..6 {
        harness.write(block, 1, false);
        harness.settle().expect("writes");
    }
    harness.idle();
    harness.settle().expect("the SEAL frame");
    // Frame 4 of the ring: an early one, relied upon by all later ones.
    let mut rotten = harness.fork();
    rotten.disk.rot(harness::JOURNAL_START + 3 * 4096 + 100);
    let problem = rotten.crash(&[], None).expect_err("a durable frame is damaged");
    assert!(problem.contains("acknowledged writes may be lost"), "{problem}");
    // The last frame before the SEAL, without which it would look like a torn tail.
    let last = harness.last_frame_page();
    let mut rotten = harness.fork();
    rotten.disk.rot(harness::JOURNAL_START + u64::from(last - 1) * 4096 + 100);
    let problem = rotten.crash(&[], None).expect_err("the last write is damaged");
    assert!(problem.contains("acknowledged writes may be lost"), "{problem}");
    // A block: refused, counted, never returned.
    harness.control(Op::Checkpoint);
    harness.settle().expect("a checkpoint");
    let place = harness.place_of(2);
    harness.disk.rot(place);
    harness.read(2, 1);
    harness.settle().expect("the read is answered");
    assert_eq!(harness.lane().counters().checksum_errors, 1, "the rotten block was noticed");
    assert_eq!(harness.stats.refused_reads, 1, "and it was refused");
}

/// Whatever byte rots, anywhere on the disk: the lane refuses to open, or refuses the block, or was not
/// touched where it matters. It never returns wrong data and never panics.
#[test]
fn rot_anywhere_is_refused_or_harmless() {
    let (mut faulted, mut refused, mut harmless) = (0, 0, 0);
    for seed in 0..400 {
        let config = random_config(seed);
        let mut random = Random::new(seed);
        let mut harness = Harness::new(config).expect("a fresh lane");
        for _ in 0..80 {
            random_action(&mut harness, &mut random, 30, false);
        }
        harness.settle().expect("nothing fails here");
        harness.idle();
        harness
            .settle()
            .expect("the SEAL frame, without which the last frame is not told from torn");
        for _ in 0..12 {
            let mut rotten = harness.fork();
            let used = rotten.disk.used_pages();
            let page = used[random.below(used.len() as u64) as usize];
            rotten.disk.rot(page + random.below(4096));
            let fates: Vec<Fate> = vec![Fate::Landed; rotten.disk.undecided()];
            match rotten.crash(&fates, None) {
                Ok(()) => harmless += 1,
                Err(why) if why.starts_with("the lane is FAULTED") => faulted += 1,
                Err(why) if why.contains("is damaged") || why.contains("is lost") => refused += 1,
                Err(why) => panic!("seed {seed} {config:?}: {why}"),
            }
        }
    }
    println!("rot: {faulted} lanes refused, {refused} blocks refused, {harmless} harmless");
    assert!(faulted > 100 && refused > 100 && harmless > 100, "each outcome must occur");
}

/// Trials of an ordinary run: enough for each kind of event to occur 100 times.
const TRIALS: u64 = 4_000;

/// Which seeds to try: PF_CRASH_SEED is the first (alone: the only one), PF_CRASH_TRIALS how many.
#[expect(clippy::disallowed_methods, reason = "whoever runs the explorer chooses its seeds")]
fn seeds() -> std::ops::Range<u64> {
    let number = |name| -> Option<u64> {
        let text = std::env::var(name).ok()?;
        Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text}")))
    };
    let first = number("PF_CRASH_SEED");
    let count = number("PF_CRASH_TRIALS").unwrap_or(if first.is_some() { 1 } else { TRIALS });
    let first = first.unwrap_or(0);
    first..first + count
}

#[test]
fn random_lives_lose_nothing() {
    let mut stats = Stats::default();
    let seeds = seeds();
    for seed in seeds.clone() {
        let config = random_config(seed);
        match std::panic::catch_unwind(|| trial(config, seed)) {
            Ok(Ok(found)) => stats.add(&found),
            Ok(Err(why)) => panic!("seed {seed} {config:?}: {why}"),
            Err(_) => panic!("seed {seed} {config:?}: panicked"),
        }
    }
    let (first, count) = (seeds.start, seeds.end - seeds.start);
    println!("random: {count} trials, {stats:?}");
    // For tools/deep.py; alone on its line.
    println!("\nfigures: first_seed={first} seeds={count} states={}", stats.crashes);
    assert_eq!(stats.refused_reads, 0, "nothing rots here");
    if count < TRIALS {
        return;
    }
    for (name, count) in [
        ("acked", stats.acked),
        ("checkpoints", stats.checkpoints),
        ("journal wraps", stats.wraps),
        ("torn writes", stats.torn),
        ("crashes in recovery", stats.nested),
        ("restored blocks", stats.restored),
        ("placed blocks", stats.placed),
        ("poisoned blocks", stats.poisoned),
        ("refusals for space", stats.no_space),
        ("failed writes", stats.media),
        ("touches", stats.touches),
        ("redos", stats.redos),
        ("intents", stats.intents),
        ("relocated slots", stats.relocated),
        ("relocations that failed", stats.not_relocated),
    ] {
        assert!(count >= 100, "{name} happened only {count} times: {stats:?}");
    }
}

#[cfg(feature = "mutants")]
#[test]
fn every_seeded_bug_is_caught() {
    use lane::Mutant;
    std::panic::set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    println!("| seeded bug | caught at seed | how |\n|---|---|---|");
    for mutant in Mutant::ALL {
        let caught = (0..20_000u64).find_map(|seed| {
            let config = Config { mutant, ..random_config(seed) };
            match std::panic::catch_unwind(|| trial(config, seed)) {
                Ok(Ok(_)) => None,
                Ok(Err(why)) => Some((seed, why)),
                Err(panic) => {
                    let text = panic.downcast_ref::<String>().cloned();
                    Some((seed, text.unwrap_or_else(|| "assertion".into())))
                }
            }
        });
        match caught {
            Some((seed, why)) => {
                println!("| {mutant:?} | {seed} | {} |", &why[..why.len().min(90)])
            }
            None => {
                println!("| {mutant:?} | not caught | |");
                missed.push(mutant);
            }
        }
    }
    let _ = std::panic::take_hook();
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
