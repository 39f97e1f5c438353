//! Run worlds from the shell: `cargo run --release -p pureflash-sim --example seeds -- FIRST COUNT
//! [OPTIONS [trace]]`. Prints one line per broken invariant, then counts and speed; status 1 if any.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let mut number = |what: &str| -> u64 {
        let text = arguments.next().unwrap_or_else(|| panic!("usage: FIRST COUNT; no {what}"));
        text.parse().unwrap_or_else(|_| panic!("{what} is a number"))
    };
    let (first, count) = (number("FIRST"), number("COUNT"));
    let options = arguments.next().unwrap_or_else(|| "{}".into());
    let is_traced = arguments.next().is_some();
    let mut totals: BTreeMap<&'static str, u64> = BTreeMap::new();
    let (started, mut broken) = (Instant::now(), 0);
    for seed in first..first + count {
        let mut world = sim::World::new(seed, &options, is_traced).expect("options of a world");
        world.run();
        if is_traced {
            print!("{}", world.take_trace());
        }
        if let Some(violation) = world.violation() {
            broken += 1;
            println!("seed {seed}: {violation}\n    {}", world.options());
        }
        for (name, value) in world.counts() {
            *totals.entry(name).or_default() += value;
        }
    }
    let cpu = started.elapsed().as_secs_f64();
    let simulated = totals.get("sim.nanos").copied().unwrap_or_default() as f64 / 1e9;
    for (name, value) in &totals {
        println!("{name:28} {value}");
    }
    println!("{broken} of {count} worlds broken; {simulated:.0} s simulated in {cpu:.1} s");
    if broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
