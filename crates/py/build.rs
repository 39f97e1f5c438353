//! Hands the facts that only Cargo knows to `build_info.rs`: profile, optimisation level, target
//! and the features of this build. `cfg!` cannot answer the first three.

use std::env;

/// Cargo's variables that are passed on, each with the name it gets in the crate.
const FACTS: [(&str, &str); 3] = [
    ("PROFILE", "PUREFLASH_PROFILE"),
    ("OPT_LEVEL", "PUREFLASH_OPT_LEVEL"),
    ("TARGET", "PUREFLASH_TARGET"),
];

fn main() {
    for (source, target) in FACTS {
        let value = env::var(source).expect("Cargo sets it for every build script");
        println!("cargo::rustc-env={target}={value}");
    }
    let mut features: Vec<String> = env::vars()
        .filter_map(|(name, _)| name.strip_prefix("CARGO_FEATURE_").map(str::to_lowercase))
        .collect();
    features.sort();
    println!("cargo::rustc-env=PUREFLASH_FEATURES={}", features.join(","));
    println!("cargo::rerun-if-changed=build.rs");
}
