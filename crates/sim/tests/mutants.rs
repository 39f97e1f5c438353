//! Each seeded bug of `shard` is caught by some world: the checks work.
#![cfg(feature = "mutants")]

use shard::mutant::Mutant;
use sim::World;
use std::fmt::Write;

/// Worlds that a seeded bug may live through.
const SEEDS_MAX: u64 = 400;

fn run(seed: u64, number: usize) -> Option<String> {
    let options = format!("{{\"mutant\": {number}}}");
    let mut world = World::new(seed, &options, false).expect("options of a world");
    world.run();
    world.violation().map(str::to_owned)
}

fn caught(number: usize) -> Option<(u64, String)> {
    (0..SEEDS_MAX).find_map(|seed| {
        // What breaks without the seeded bug too says nothing about it.
        let why = run(seed, number).filter(|_| run(seed, 0).is_none())?;
        Some((seed + 1, why))
    })
}

#[test]
fn every_seeded_bug_is_caught() {
    let mut table = String::from("mutant | caught by | seeds\n");
    let mut alive = Vec::new();
    for (index, &mutant) in Mutant::ALL.iter().enumerate() {
        match caught(index + 1) {
            Some((seeds, why)) => {
                let name = why.split(':').next().unwrap_or_default().to_owned();
                writeln!(table, "{mutant:?} | {name} | {seeds}").expect("a String grows");
                println!("{mutant:?} | {seeds} | {}", why.chars().take(200).collect::<String>());
            }
            None => alive.push(mutant),
        }
    }
    println!("{table}");
    assert!(alive.is_empty(), "not caught in {SEEDS_MAX} worlds: {alive:?}\n{table}");
}
