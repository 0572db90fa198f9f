//! Runs the simulation: `sds-sim --seed N` or `--seeds A..B`, with `--bug NAME` planted; with `--cluster` that of
//! a whole cluster.
#![allow(clippy::print_stdout, reason = "its output is its purpose")]

use std::process::ExitCode;

use clap::Parser;
use sds::planted::{Bug, plant};
use sds::sim::cluster;
use sds::sim::run::{Coverage, run};

/// Deterministic simulation of a node with faults, against an oracle.
#[derive(Parser)]
struct Args {
    /// One seed, with a trace of what happens (`SDS_LOG=sim=debug` shows more).
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// A range of seeds, `A..B`; B is not run.
    #[arg(long)]
    seeds: Option<String>,
    /// Plants a known bug; the exit code then tells whether it was found.
    #[arg(long)]
    bug: Option<String>,
    /// A whole cluster instead of one node.
    #[arg(long)]
    cluster: bool,
    /// Goes on after a failure.
    #[arg(long)]
    keep_going: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(error) = sds::obs::log::init("error") {
        println!("no log: {error}");
    }
    if let Some(name) = &args.bug {
        let Some(bug) = Bug::ALL.iter().chain(Bug::CLUSTER).find(|bug| format!("{bug:?}") == *name)
        else {
            println!("no bug {name}; there are {:?} and {:?}", Bug::ALL, Bug::CLUSTER);
            return ExitCode::from(2);
        };
        plant(Some(*bug));
    }
    let range = match (args.seed, &args.seeds) {
        (Some(seed), _) => seed..seed + 1,
        (None, Some(range)) => {
            let Some((Ok(from), Ok(to))) =
                range.split_once("..").map(|(a, b)| (a.parse(), b.parse()))
            else {
                println!("a range of seeds is written A..B, not {range}");
                return ExitCode::from(2);
            };
            from..to
        }
        (None, None) => 1..101,
    };
    let mut coverage = Coverage::new();
    let (mut runs, mut failed) = (0, 0);
    for seed in range {
        let report = if args.cluster { cluster::run(seed) } else { run(seed) };
        runs += 1;
        for (what, count) in report.coverage {
            *coverage.entry(what).or_default() += count;
        }
        if let Some(failure) = report.failure {
            failed += 1;
            println!("seed {seed}: {failure}");
            if !args.keep_going {
                break;
            }
        } else if args.seed.is_some() {
            println!("seed {seed}: clean, digest {:08x}", report.digest);
        }
    }
    for (what, count) in &coverage {
        println!("{count:>8}  {what}");
    }
    println!("{} passed, {failed} failed", runs - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
