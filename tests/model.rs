//! Exhaustive model of roots, fences, leases and take-overs.
#![allow(missing_docs, unreachable_pub, reason = "a test has no API")]

#[path = "model/config.rs"]
mod config;
#[path = "model/history.rs"]
mod history;
#[path = "model/state.rs"]
mod state;
#[path = "model/steps.rs"]
mod steps;

use stateright::{Checker, HasDiscoveries, Model};

use crate::config::{Bug, Config, Rules};
use crate::state::Used;

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

/// Name and configuration of everything that is checked.
fn small() -> Vec<(&'static str, Config)> {
    vec![
        ("takeover", Config { budget: Used { downs: 1, ..used(2, 1) }, ..base() }),
        ("rolling", Config { budget: Used { downs: 1, rolls: 1, ..used(2, 1) }, ..three() }),
        ("succession", Config { budget: Used { downs: 1, crashes: 1, ..used(2, 2) }, ..three() }),
        (
            "doubt",
            Config {
                budget: Used { crashes: 1, swaps: 1, ..used(1, 2) },
                doubt: true,
                checkpoints: true,
                frees: true,
                ..three()
            },
        ),
        (
            "domains",
            Config { domains: [0, 0, 1, 2], budget: Used { downs: 1, ..used(2, 1) }, ..base() },
        ),
        ("lease", Config { lease: 1, budget: used(1, 1), ..three() }),
        (
            "release",
            Config {
                sets: vec![(0b0011, 1)],
                lease: 1,
                budget: Used { releases: 1, ..used(1, 2) },
                ..base()
            },
        ),
        (
            "change",
            Config {
                sets: vec![THREE, (0b1011, 2)],
                budget: Used { swaps: 1, ..used(2, 1) },
                doubt: true,
                checkpoints: true,
                ..base()
            },
        ),
        (
            "change lease",
            Config {
                lease: 1,
                budget: Used { swaps: 1, ..used(1, 1) },
                doubt: true,
                checkpoints: true,
                ..lone()
            },
        ),
        (
            "shrink",
            Config {
                sets: vec![(0b0111, 3), (0b0011, 2)],
                budget: Used { swaps: 1, downs: 1, ..used(2, 1) },
                doubt: true,
                ..base()
            },
        ),
        (
            "settle",
            Config {
                budget: Used { swaps: 1, crashes: 1, ..used(1, 2) },
                settle_changes_set: true,
                ..apart()
            },
        ),
        (
            "move",
            Config {
                budget: Used { swaps: 1, losses: 1, downs: 1, crashes: 1, ..used(1, 2) },
                checkpoints: true,
                frees: true,
                ..lone()
            },
        ),
        (
            "recover",
            Config {
                budget: Used { swaps: 1, losses: 1, crashes: 1, ..used(1, 2) },
                checkpoints: true,
                frees: true,
                ..three()
            },
        ),
        (
            "operator",
            Config {
                sets: vec![THREE, (0b1100, 2)],
                budget: Used { swaps: 1, losses: 1, downs: 2, ..used(1, 1) },
                operator: true,
                returns: false,
                ..base()
            },
        ),
    ]
}

fn planted() -> Vec<(Bug, Config)> {
    let lease = || Config { lease: 1, ..three() };
    vec![
        (Bug::SkipFence, Config { budget: used(1, 1), ..base() }),
        (Bug::CountPartDomains, Config { domains: [0, 0, 1, 2], budget: used(1, 1), ..base() }),
        (Bug::CountUnread, Config { budget: Used { downs: 1, ..used(1, 1) }, ..three() }),
        (Bug::ForgetFence, Config { budget: Used { downs: 1, ..used(1, 1) }, ..three() }),
        (Bug::BelieveFailedSwap, Config { budget: Used { crashes: 2, ..used(1, 3) }, ..three() }),
        (
            Bug::BelieveOldRead,
            Config {
                budget: Used { swaps: 1, ..used(1, 1) },
                doubt: true,
                checkpoints: true,
                ..apart()
            },
        ),
        (
            Bug::IgnoreWantedSet,
            Config {
                budget: Used { swaps: 1, ..used(1, 1) },
                doubt: true,
                checkpoints: true,
                ..apart()
            },
        ),
        (Bug::UncheckedSwap, Config { budget: Used { swaps: 1, ..used(1, 1) }, ..apart() }),
        (
            Bug::UncheckedSwap,
            Config {
                sets: vec![THREE, (0b0111, 3)],
                budget: Used { swaps: 1, ..used(1, 1) },
                ..base()
            },
        ),
        (
            Bug::UncheckedSwap,
            Config {
                sets: vec![(0b1111, 2), (0b0011, 1)],
                budget: Used { swaps: 1, ..used(1, 1) },
                ..base()
            },
        ),
        (Bug::ChangeSetBeforeFence, Config { budget: used(1, 1), ..apart() }),
        (Bug::ReplayOtherEpoch, Config { budget: Used { crashes: 1, ..used(2, 2) }, ..three() }),
        (Bug::ExtendStaleShard, Config { budget: Used { crashes: 1, ..used(2, 2) }, ..three() }),
        (Bug::AcknowledgeEarly, Config { budget: Used { downs: 1, ..used(1, 1) }, ..three() }),
        (Bug::ServeBeforeLease, Config { budget: used(1, 1), ..lease() }),
        (Bug::LeaseFromReceipt, Config { budget: used(1, 1), ..lease() }),
        (Bug::ReleaseEarly, Config { budget: Used { releases: 1, ..used(1, 2) }, ..lease() }),
        (
            Bug::ServeBeforeForce,
            Config { budget: Used { losses: 1, crashes: 1, ..used(1, 2) }, ..three() },
        ),
        (
            Bug::UseSetBeforeForce,
            Config { budget: Used { swaps: 1, losses: 1, downs: 1, ..used(1, 1) }, ..lone() },
        ),
        (
            Bug::FreeInDoubt,
            Config {
                budget: Used { swaps: 1, ..used(1, 1) },
                doubt: true,
                checkpoints: true,
                frees: true,
                ..three()
            },
        ),
        (
            Bug::FreeBeforeForce,
            Config {
                budget: Used { swaps: 1, losses: 1, ..used(1, 1) },
                checkpoints: true,
                frees: true,
                ..three()
            },
        ),
        (
            Bug::FormerSetForgotten,
            Config {
                budget: Used { swaps: 1, losses: 1, downs: 1, crashes: 1, ..used(1, 2) },
                ..lone()
            },
        ),
        (
            Bug::OneFormerMirror,
            Config {
                sets: vec![THREE, (0b1100, 2)],
                budget: Used { swaps: 1, losses: 1, downs: 2, ..used(1, 1) },
                operator: true,
                returns: false,
                ..base()
            },
        ),
        (
            Bug::RecoverReadsFirst,
            Config { budget: Used { losses: 1, crashes: 1, ..used(1, 2) }, ..three() },
        ),
        (
            Bug::RecoverPartly,
            Config { budget: Used { losses: 1, crashes: 1, ..used(1, 2) }, ..three() },
        ),
    ]
}

#[test]
fn sizes() {
    let planted = planted()
        .into_iter()
        .map(|(bug, config)| (format!("{bug:?}"), Config { bug: Some(bug), ..config }));
    for (name, config) in small().into_iter().map(|(a, b)| (a.to_owned(), b)).chain(planted) {
        let only = std::env::var("ONLY").unwrap_or_default();
        if !only.is_empty() && !only.split(',').any(|o| o == name) {
            continue;
        }
        let start = std::time::SystemTime::now();
        let checker = Rules::new(config)
            .checker()
            .threads(2)
            .finish_when(HasDiscoveries::AnyFailures)
            .target_state_count(9_000_000)
            .spawn_bfs()
            .join();
        println!(
            "RES {name}: {} states {} unique depth {} in {:?}",
            checker.state_count(),
            checker.unique_state_count(),
            checker.max_depth(),
            start.elapsed()
        );
        for (property, path) in checker.discoveries() {
            if property.starts_with("a later") && checker.discoveries().len() == 1 {
                println!("RES   vacuous: no");
            }
            if property.starts_with("a later") {
                continue;
            }
            println!(
                "RES   {property}: {}",
                path.into_actions().iter().map(|a| format!("{a:?}")).collect::<Vec<_>>().join("; ")
            );
        }
    }
}
