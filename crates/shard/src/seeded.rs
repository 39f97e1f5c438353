//! Seeded bugs that one machine by itself shows: each rule holds without its bug and is broken with
//! it. Random worlds catch the rest (`Mutant::OF_WORLDS`, crates/sim/tests/mutants.rs); those here
//! need a schedule so particular that random ones meet it too rarely to be a test.

use crate::mutant::Mutant;

/// A rule and the seeded bug that breaks it.
pub(crate) struct Rule {
    mutant: Mutant,
    name: &'static str,
    holds: fn(Mutant) -> Result<(), String>,
}

impl Rule {
    pub(crate) const fn new(
        mutant: Mutant,
        name: &'static str,
        holds: fn(Mutant) -> Result<(), String>,
    ) -> Rule {
        Rule { mutant, name, holds }
    }
}

/// An error unless something is as it must be; `what` says what went wrong otherwise.
pub(crate) fn demand(is_so: bool, what: &str) -> Result<(), String> {
    if is_so { Ok(()) } else { Err(what.to_owned()) }
}

fn rules() -> impl Iterator<Item = &'static Rule> {
    let replica = crate::replica::tests::rules::RULES.iter();
    replica.chain(&crate::heartbeat::tests::RULES).chain(&crate::paths::tests::RULES)
}

#[test]
fn every_rule_holds() {
    let broken: Vec<String> = rules()
        .filter_map(|rule| Some(format!("{}: {}", rule.name, (rule.holds)(Mutant::None).err()?)))
        .collect();
    assert_eq!(broken, [""; 0]);
}

#[test]
fn every_seeded_bug_is_in_one_table() {
    for mutant in Mutant::ALL {
        let here = rules().filter(|rule| rule.mutant == mutant).count();
        let worlds = Mutant::OF_WORLDS.iter().filter(|&&other| other == mutant).count();
        assert_eq!(here + worlds, 1, "{mutant:?}: {here} rules, {worlds} times for worlds");
    }
}

#[cfg(feature = "mutants")]
#[test]
fn every_seeded_bug_breaks_its_rule() {
    println!("mutant | caught by | test");
    let mut alive = Vec::new();
    for Rule { mutant, name, holds } in rules() {
        match holds(*mutant) {
            Err(why) => println!("{mutant:?} | {why} | {name}"),
            Ok(()) => alive.push(mutant),
        }
    }
    assert!(alive.is_empty(), "not caught: {alive:?}");
}
