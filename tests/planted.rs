//! The simulation finds each planted bug within the number of seeds that docs/simulation.md states.
#![cfg(feature = "simulation")]

use std::collections::BTreeMap;

use sds::planted::{Bug, plant};
use sds::sim::run::run;

/// Found later than this, a bug is a matter of `tools/planted` alone: the test would take too long.
const SEEDS_MAX: u64 = 150;

/// Bugs that the simulation does not find yet: no other may join them unnoticed.
const NOT_FOUND_YET: [Bug; 4] =
    [Bug::ReplayOtherEpoch, Bug::AckBeforeAll, Bug::ReuseBeforeReap, Bug::StaleShardAccepted];

/// Bug and number of seeds, of the table's rows.
fn table() -> BTreeMap<String, Option<u64>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/simulation.md");
    let text = std::fs::read_to_string(path).expect("the document is there");
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        (cells[1].trim_matches('`').to_owned(), cells[3].parse().ok())
    })
    .collect()
}

/// Whether the simulation fails on a seed, by its oracle or by a panic of the simulated node.
fn found(seed: u64) -> bool {
    std::panic::catch_unwind(|| run(seed).failure.is_some()).unwrap_or(true)
}

#[test]
fn every_planted_bug_is_found() {
    let table = table();
    let mut found_soon = 0;
    for bug in Bug::ALL {
        let name = format!("{bug:?}");
        let seeds = table.get(&name).unwrap_or_else(|| panic!("{name} is not in the table"));
        let Some(seeds) = *seeds else {
            assert!(NOT_FOUND_YET.contains(bug), "{name} was never found");
            continue;
        };
        if seeds > SEEDS_MAX {
            continue;
        }
        plant(None);
        assert!(!found(seeds), "seed {seeds} fails without {name}");
        plant(Some(*bug));
        assert!(found(seeds), "{name} is not found by seed {seeds}");
        plant(None);
        found_soon += 1;
    }
    assert!(found_soon >= 12, "only {found_soon} bugs are found within {SEEDS_MAX} seeds");
}
