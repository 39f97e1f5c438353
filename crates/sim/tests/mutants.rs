//! The seeded bugs of `shard` that random worlds catch: the simulator's checks work. The others are
//! caught by one machine by itself (crates/shard/src/seeded.rs, which also asserts that each is in one
//! of the two tables).
#![cfg(feature = "mutants")]

use shard::mutant::Mutant;
use sim::World;

/// Worlds that a seeded bug may live through: three times what the most patient of them takes now. One
/// that needs more is a matter of luck, and belongs into the other table.
const SEEDS_MAX: u64 = 200;

fn run(seed: u64, number: usize) -> Option<String> {
    let options = format!("{{\"mutant\": {number}}}");
    let mut world = World::new(seed, &options, false).expect("options of a world");
    world.run();
    world.violation().map(str::to_owned)
}

fn caught(mutant: Mutant) -> Option<(u64, String)> {
    let index = Mutant::ALL.iter().position(|&other| other == mutant);
    let number = index.expect("every seeded bug is listed") + 1;
    (0..SEEDS_MAX).find_map(|seed| {
        // What breaks without the seeded bug too says nothing about it.
        let why = run(seed, number).filter(|_| run(seed, 0).is_none())?;
        Some((seed + 1, why))
    })
}

#[test]
fn every_seeded_bug_is_caught() {
    println!("mutant | caught by | worlds");
    let mut alive = Vec::new();
    for mutant in Mutant::OF_WORLDS {
        match caught(mutant) {
            Some((worlds, why)) => {
                let why: String = why.chars().take(100).collect();
                println!("{mutant:?} | {why} | {worlds}");
            }
            None => alive.push(mutant),
        }
    }
    assert!(alive.is_empty(), "not caught in {SEEDS_MAX} worlds: {alive:?}");
}
