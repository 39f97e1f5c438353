//! Whole worlds: a fixed list of seeds, replay, and what options do.

use sim::World;

fn run(seed: u64, options: &str) -> World {
    let mut world = World::new(seed, options, false).expect("options of a world");
    world.run();
    world
}

#[test]
fn nothing_is_broken_in_the_first_worlds() {
    let mut totals = std::collections::BTreeMap::new();
    for seed in 0..24 {
        let world = run(seed, "{}");
        assert_eq!(world.violation(), None, "seed {seed}: {}", world.options());
        for (name, value) in world.counts() {
            *totals.entry(name).or_insert(0) += value;
        }
    }
    // Worlds in which nothing happens prove nothing.
    for name in [
        "fault.crash",
        "fault.drop",
        "fault.duplicate",
        "fault.partition",
        "fault.pause",
        "fault.connection",
        "fault.conductor",
        "fault.frame_hold",
        "transition.T1",
        "transition.T2",
        "transition.T3",
        "transition.T4",
        "transition.T6",
        "transition.T8",
        "settled",
        "copied",
        "recovered_twice",
    ] {
        assert!(totals.get(name).copied().unwrap_or(0) >= 5, "{name} in {totals:?}");
    }
    assert!(totals["committed"] > 1_000 && totals["audit"] > 1_000, "{totals:?}");
}

/// T7: whole ISRs are lost, a person decides on what is left, and the lost stores come back with
/// more than that. Each history by itself holds every invariant.
#[test]
fn histories_that_a_person_forces_are_sound() {
    let mut totals = std::collections::BTreeMap::new();
    // 1070: the life of a primary that was cut off is chosen, and knows nothing of its successors.
    for seed in (0..24).chain([1070]) {
        let world = run(seed, r#"{"lose_every_ms": 3000}"#);
        assert_eq!(world.violation(), None, "seed {seed}: {}", world.options());
        for (name, value) in world.counts() {
            *totals.entry(name).or_insert(0) += value;
        }
    }
    // Learners are chosen as well, and whoever was left behind is admitted again.
    for name in ["fault.lose", "transition.T7", "transition.T4", "copied"] {
        assert!(totals.get(name).copied().unwrap_or(0) >= 20, "{name} in {totals:?}");
    }
}

#[test]
fn i28_the_same_seed_is_the_same_world() {
    for seed in [3, 11] {
        let (first, mut second) = (run(seed, "{}"), World::new(seed, "{}", true).expect("valid"));
        // However it is stepped, and whether lines are kept.
        while second.step(777) {}
        assert_eq!(first.trace_hash(), second.trace_hash(), "seed {seed}");
        assert_eq!(first.counts(), second.counts());
        assert!(second.take_trace().lines().count() > 100);
        assert_ne!(first.trace_hash(), run(seed + 1, "{}").trace_hash());
    }
}

#[test]
fn a_calm_world_is_served_by_its_first_primaries() {
    let calm = r#"{"partition_every_ms": 0, "crash_every_ms": 0, "crash_all_every_ms": 0,
        "pause_every_ms": 0, "eio_read": 0, "eio_write": 0, "slow_disk_every_ms": 0,
        "stuck_disk_every_ms": 0, "conductor_every_ms": 0, "connection_every_ms": 0,
        "frame_hold": 0, "drop": 0, "slow_message": 0, "duplicate": 0, "transfer_every_ms": 0,
        "demote_every_ms": 0, "delay_us": 100, "disk_us": 100, "safety_ms": 5000}"#;
    let world = run(5, calm);
    assert_eq!(world.violation(), None);
    let counts = world.counts();
    assert!(!counts.keys().any(|name| name.starts_with("transition.")), "{counts:?}");
    assert!(counts["reply"] > 30 && !counts.contains_key("reply.error"), "{counts:?}");
}

#[test]
fn worlds_of_one_two_and_five_stores_are_whole() {
    for (seed, options) in [
        (1, r#"{"stores": 1, "rf": 1, "min_write": 1}"#),
        (2, r#"{"stores": 2, "rf": 2, "min_write": 1}"#),
        (3, r#"{"stores": 5, "crash_every_ms": 3000}"#),
        (4, r#"{"stores": 5, "rf": 2, "min_write": 1, "crash_every_ms": 3000}"#),
    ] {
        let world = run(seed, options);
        assert_eq!(world.violation(), None, "{options}: {}", world.options());
        assert!(world.counts()["committed"] > 10, "{options}");
    }
}

/// Rot on several copies, and on several blocks of one read: no request is failed whose blocks are
/// good somewhere, and in the end every copy is good.
#[test]
fn copies_that_rot_are_mended() {
    let mut totals = std::collections::BTreeMap::new();
    let has_rot = |seed: &u64| sim::options::Options::of_seed(*seed).rot_every_ms > 0;
    for seed in (0..).filter(has_rot).take(12) {
        let world = run(seed, "{}");
        assert_eq!(world.violation(), None, "seed {seed}: {}", world.options());
        for (name, value) in world.counts() {
            *totals.entry(name).or_insert(0) += value;
        }
    }
    let of = |name: &str| totals.get(name).copied().unwrap_or(0);
    assert!(of("fault.rot") > 200 && of("mended") > 50, "{totals:?}");
}

/// Rot while members come and go: the last good copy of a block may be lost, nothing else is, and
/// every shard becomes whole again.
#[test]
fn what_rots_while_members_come_and_go_is_lost_at_most() {
    let mut totals = std::collections::BTreeMap::new();
    for fault in ["crash_every_ms", "pause_every_ms", "demote_every_ms", "partition_every_ms"] {
        for seed in 0..12 {
            let options = format!(
                r#"{{"{fault}": 1000, "rot_every_ms": 300, "eio_read": 0, "bit_flip": 0}}"#
            );
            let world = run(seed, &options);
            assert_eq!(world.violation(), None, "seed {seed}: {}", world.options());
            for (name, value) in world.counts() {
                *totals.entry(name).or_insert(0) += value;
            }
        }
    }
    let of = |name: &str| totals.get(name).copied().unwrap_or(0);
    assert!(of("fault.rot") > 500 && of("mended") > 100 && of("lost") > 20, "{totals:?}");
    assert!(of("transition.T1") > 100 && of("copied") > 500, "{totals:?}");
}
