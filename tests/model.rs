//! Exhaustive model of roots, fences, leases and take-overs (design, section 6).
//!
//! Each test walks every state that one configuration can reach and asks whether clients could
//! have seen a lie; `docs/protocol-model.md` says what is modelled, what is left out and what was
//! found. The configurations marked `ignored` are larger and run by `tools/model`.
#![allow(missing_docs, unreachable_pub, reason = "a test has no API")]
#![allow(clippy::print_stdout, reason = "counts and traces, shown with --nocapture")]

#[path = "model/config.rs"]
mod config;
#[path = "model/faults.rs"]
mod faults;
#[path = "model/history.rs"]
mod history;
#[path = "model/planted.rs"]
mod planted;
#[path = "model/roots.rs"]
mod roots;
#[path = "model/serving.rs"]
mod serving;
#[path = "model/state.rs"]
mod state;
#[path = "model/steps.rs"]
mod steps;
#[path = "model/takeover.rs"]
mod takeover;

use stateright::{Checker, HasDiscoveries, Model};

use crate::config::{Bug, Config, Rules};
use crate::state::Used;
use crate::steps::LATER_HEAD;

const NO_BUDGET: Used =
    Used { writes: 0, crashes: 0, downs: 0, claims: 0, swaps: 0, rolls: 0, releases: 0, losses: 0 };

fn base() -> Config {
    Config {
        domains: [0, 1, 2, 3],
        sets: vec![(0b1111, 2)],
        budget: Used { writes: 2, claims: 1, ..NO_BUDGET },
        lease: 0,
        frees: false,
        checkpoints: false,
        settle_changes_set: false,
        doubt: false,
        operator: false,
        returns: true,
        bug: None,
    }
}

fn used(writes: u8, claims: u8) -> Used {
    Used { writes, claims, ..NO_BUDGET }
}

const THREE: (u8, u8) = (0b0111, 2);

fn three() -> Config {
    Config { sets: vec![THREE], ..base() }
}

/// Two sets without a common disk, each of width 2.
fn apart() -> Config {
    Config { sets: vec![(0b0011, 2), (0b1100, 2)], ..base() }
}

/// Two sets of one disk each: the smallest in which a volume moves.
fn lone() -> Config {
    Config { sets: vec![(0b0001, 1), (0b0010, 1)], ..base() }
}

/// Walks all states of a configuration: no lie can be told, and the model does something.
fn holds(name: &str, config: Config) {
    let checker =
        Rules::new(config).checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    println!(
        "{name}: {} states, {} transitions",
        checker.unique_state_count(),
        checker.state_count()
    );
    checker.assert_properties();
}

/// The checker finds the planted bug.
fn finds(bug: Bug, config: Config) {
    let config = Config { bug: Some(bug), ..config };
    let checker =
        Rules::new(config).checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let lies: Vec<_> =
        checker.discoveries().into_iter().filter(|(property, _)| *property != LATER_HEAD).collect();
    assert!(!lies.is_empty(), "{bug:?} was not found in {} states", checker.unique_state_count());
    for (property, path) in lies {
        let steps = path.into_actions();
        println!(
            "{bug:?}: {} states, not \"{property}\" after {} steps:",
            checker.unique_state_count(),
            steps.len()
        );
        println!(
            "  {}",
            steps.iter().map(|step| format!("{step:?}")).collect::<Vec<_>>().join("; ")
        );
    }
}

#[test]
fn takeover() {
    holds("takeover", Config { budget: Used { downs: 1, ..used(2, 1) }, ..base() });
}

#[test]
fn rolling() {
    holds("rolling", Config { budget: Used { downs: 1, rolls: 1, ..used(2, 1) }, ..three() });
}

#[test]
fn succession() {
    holds("succession", Config { budget: Used { downs: 1, crashes: 1, ..used(2, 2) }, ..three() });
}

#[test]
fn doubt() {
    holds(
        "doubt",
        Config {
            budget: Used { crashes: 1, swaps: 1, ..used(1, 2) },
            doubt: true,
            checkpoints: true,
            frees: true,
            ..three()
        },
    );
}

#[test]
fn domains() {
    holds(
        "domains",
        Config { domains: [0, 0, 1, 2], budget: Used { downs: 1, ..used(2, 1) }, ..base() },
    );
}

#[test]
fn lease() {
    holds("lease", Config { lease: 1, budget: used(1, 1), ..three() });
}

#[test]
fn release() {
    holds(
        "release",
        Config {
            sets: vec![(0b0011, 1)],
            lease: 1,
            budget: Used { releases: 1, ..used(1, 2) },
            ..base()
        },
    );
}

/// A volume moves in order while its log set lies on domains of several disks, one of which goes.
#[test]
fn release_domains() {
    holds(
        "release_domains",
        Config {
            domains: [0, 0, 1, 2],
            sets: vec![(0b0111, 1)],
            lease: 1,
            budget: Used { releases: 1, ..used(1, 2) },
            ..base()
        },
    );
}

/// The same with a store that does not say what became of the swap.
#[test]
fn release_doubt() {
    holds(
        "release_doubt",
        Config { lease: 1, doubt: true, budget: Used { releases: 1, ..used(1, 2) }, ..lone() },
    );
}

/// The set changes, the head releases the volume, and the old disks go on answering.
#[test]
fn release_change() {
    holds(
        "release_change",
        Config { lease: 1, budget: Used { swaps: 1, releases: 1, ..used(1, 2) }, ..lone() },
    );
}

/// `recover` runs while the old head serves and reads on its lease.
#[test]
fn recover_lease() {
    holds(
        "recover_lease",
        Config {
            sets: vec![(0b0011, 1)],
            lease: 1,
            budget: Used { losses: 1, releases: 1, ..used(1, 2) },
            ..base()
        },
    );
}

/// `recover` over domains of several disks, while the old head goes on.
#[test]
fn recover_domains() {
    holds(
        "recover_domains",
        Config {
            domains: [0, 0, 1, 2],
            budget: Used { losses: 1, downs: 1, crashes: 1, ..used(1, 2) },
            ..three()
        },
    );
}

#[test]
fn change() {
    holds(
        "change",
        Config {
            sets: vec![THREE, (0b1011, 2)],
            budget: Used { swaps: 1, ..used(2, 1) },
            doubt: true,
            checkpoints: true,
            ..base()
        },
    );
}

#[test]
fn change_lease() {
    holds(
        "change_lease",
        Config {
            lease: 1,
            budget: Used { swaps: 1, ..used(1, 1) },
            doubt: true,
            checkpoints: true,
            ..lone()
        },
    );
}

#[test]
fn shrink() {
    holds(
        "shrink",
        Config {
            sets: vec![(0b0111, 3), (0b0011, 2)],
            budget: Used { swaps: 1, downs: 1, ..used(2, 1) },
            doubt: true,
            ..base()
        },
    );
}

#[test]
fn settle() {
    holds(
        "settle",
        Config {
            budget: Used { swaps: 1, crashes: 1, ..used(1, 2) },
            settle_changes_set: true,
            ..apart()
        },
    );
}

#[test]
fn moving() {
    holds(
        "moving",
        Config {
            budget: Used { swaps: 1, losses: 1, downs: 1, crashes: 1, ..used(1, 2) },
            checkpoints: true,
            frees: true,
            ..lone()
        },
    );
}

#[test]
fn recover() {
    holds(
        "recover",
        Config {
            budget: Used { swaps: 1, losses: 1, crashes: 1, ..used(1, 2) },
            checkpoints: true,
            frees: true,
            ..three()
        },
    );
}

#[test]
fn operator() {
    holds(
        "operator",
        Config {
            sets: vec![THREE, (0b1100, 2)],
            budget: Used { swaps: 1, losses: 1, downs: 2, ..used(1, 1) },
            operator: true,
            returns: false,
            ..base()
        },
    );
}

#[test]
#[ignore = "larger: run by tools/model"]
fn large_rolling() {
    holds("large_rolling", Config { budget: Used { downs: 1, rolls: 1, ..used(2, 1) }, ..base() });
}

#[test]
#[ignore = "larger: run by tools/model"]
fn large_succession() {
    holds(
        "large_succession",
        Config {
            budget: Used { downs: 2, crashes: 1, swaps: 1, ..used(2, 2) },
            doubt: true,
            checkpoints: true,
            frees: true,
            ..three()
        },
    );
}

#[test]
#[ignore = "larger: run by tools/model"]
fn large_lease() {
    holds(
        "large_lease",
        Config { lease: 2, budget: Used { releases: 1, crashes: 1, ..used(2, 2) }, ..three() },
    );
}

#[test]
#[ignore = "larger: run by tools/model"]
fn large_change() {
    holds(
        "large_change",
        Config {
            sets: vec![THREE, (0b1011, 2)],
            budget: Used { swaps: 2, rolls: 1, downs: 1, ..used(2, 1) },
            doubt: true,
            checkpoints: true,
            ..base()
        },
    );
}

#[test]
#[ignore = "larger: run by tools/model"]
fn large_shrink() {
    holds(
        "large_shrink",
        Config {
            sets: vec![(0b0111, 3), (0b0011, 2)],
            budget: Used { swaps: 2, rolls: 1, downs: 1, ..used(2, 1) },
            doubt: true,
            checkpoints: true,
            ..base()
        },
    );
}

#[test]
#[ignore = "larger: run by tools/model"]
fn large_settle() {
    holds(
        "large_settle",
        Config {
            budget: Used { swaps: 1, downs: 1, crashes: 1, ..used(1, 2) },
            settle_changes_set: true,
            ..apart()
        },
    );
}

#[test]
#[ignore = "larger: run by tools/model"]
fn large_moving() {
    holds(
        "large_moving",
        Config {
            budget: Used { swaps: 1, losses: 1, downs: 1, crashes: 1, ..used(1, 2) },
            checkpoints: true,
            doubt: true,
            frees: true,
            ..lone()
        },
    );
}

#[test]
#[ignore = "larger: run by tools/model"]
fn large_recover() {
    holds(
        "large_recover",
        Config {
            budget: Used { swaps: 1, losses: 1, downs: 1, crashes: 1, ..used(2, 2) },
            doubt: true,
            checkpoints: true,
            frees: true,
            ..three()
        },
    );
}
