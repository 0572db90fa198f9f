//! Planted bugs: each deviation from the protocol is found in the configuration named here.

use crate::config::{Bug, Config};
use crate::state::Used;
use crate::{THREE, apart, base, finds, lone, three, used};

#[test]
fn skip_fence() {
    finds(Bug::SkipFence, Config { budget: used(1, 1), ..base() });
}

#[test]
fn count_part_domains() {
    finds(Bug::CountPartDomains, Config { domains: [0, 0, 1, 2], budget: used(1, 1), ..base() });
}

#[test]
fn count_unread() {
    finds(Bug::CountUnread, Config { budget: Used { downs: 1, ..used(1, 1) }, ..three() });
}

#[test]
fn forget_fence() {
    finds(Bug::ForgetFence, Config { budget: Used { downs: 1, ..used(1, 1) }, ..three() });
}

#[test]
fn believe_failed_swap() {
    finds(Bug::BelieveFailedSwap, Config { budget: Used { crashes: 2, ..used(1, 3) }, ..three() });
}

#[test]
fn believe_old_read() {
    finds(
        Bug::BelieveOldRead,
        Config {
            budget: Used { swaps: 1, ..used(1, 1) },
            doubt: true,
            checkpoints: true,
            ..apart()
        },
    );
}

#[test]
fn ignore_wanted_set() {
    finds(
        Bug::IgnoreWantedSet,
        Config {
            budget: Used { swaps: 1, ..used(1, 1) },
            doubt: true,
            checkpoints: true,
            ..apart()
        },
    );
}

#[test]
fn unchecked_swap_moves() {
    finds(Bug::UncheckedSwap, Config { budget: Used { swaps: 1, ..used(1, 1) }, ..apart() });
}

#[test]
fn unchecked_swap_widens() {
    finds(
        Bug::UncheckedSwap,
        Config {
            sets: vec![THREE, (0b0111, 3)],
            budget: Used { swaps: 1, ..used(1, 1) },
            ..base()
        },
    );
}

#[test]
fn unchecked_swap_shrinks() {
    finds(
        Bug::UncheckedSwap,
        Config {
            sets: vec![(0b1111, 2), (0b0011, 1)],
            budget: Used { swaps: 1, ..used(1, 1) },
            ..base()
        },
    );
}

#[test]
fn change_set_before_fence() {
    finds(Bug::ChangeSetBeforeFence, Config { budget: used(1, 1), ..apart() });
}

#[test]
fn replay_other_epoch() {
    finds(Bug::ReplayOtherEpoch, Config { budget: Used { crashes: 1, ..used(2, 2) }, ..three() });
}

#[test]
fn extend_stale_shard() {
    finds(Bug::ExtendStaleShard, Config { budget: Used { crashes: 1, ..used(2, 2) }, ..three() });
}

#[test]
fn acknowledge_early() {
    finds(Bug::AcknowledgeEarly, Config { budget: Used { downs: 1, ..used(1, 1) }, ..three() });
}

#[test]
fn serve_before_lease() {
    finds(Bug::ServeBeforeLease, Config { budget: used(1, 1), lease: 1, ..three() });
}

#[test]
fn lease_from_receipt() {
    finds(Bug::LeaseFromReceipt, Config { budget: used(1, 1), lease: 1, ..three() });
}

#[test]
fn release_early() {
    finds(
        Bug::ReleaseEarly,
        Config { budget: Used { releases: 1, ..used(1, 2) }, lease: 1, ..three() },
    );
}

#[test]
fn stays_released() {
    finds(
        Bug::StaysReleased,
        Config {
            sets: vec![(0b0011, 1)],
            lease: 1,
            budget: Used { releases: 1, ..used(1, 2) },
            ..base()
        },
    );
}

#[test]
fn serve_before_force() {
    finds(
        Bug::ServeBeforeForce,
        Config { budget: Used { losses: 1, crashes: 1, ..used(1, 2) }, ..three() },
    );
}

#[test]
fn use_set_before_force() {
    finds(
        Bug::UseSetBeforeForce,
        Config { budget: Used { swaps: 1, losses: 1, downs: 1, ..used(1, 1) }, ..lone() },
    );
}

#[test]
fn free_in_doubt() {
    finds(
        Bug::FreeInDoubt,
        Config {
            budget: Used { swaps: 1, ..used(1, 1) },
            doubt: true,
            checkpoints: true,
            frees: true,
            ..three()
        },
    );
}

#[test]
fn free_before_force() {
    finds(
        Bug::FreeBeforeForce,
        Config {
            budget: Used { swaps: 1, losses: 1, ..used(1, 1) },
            checkpoints: true,
            frees: true,
            ..three()
        },
    );
}

#[test]
fn former_set_forgotten() {
    finds(
        Bug::FormerSetForgotten,
        Config {
            budget: Used { swaps: 1, losses: 1, downs: 1, crashes: 1, ..used(1, 2) },
            ..lone()
        },
    );
}

#[test]
fn one_former_mirror() {
    finds(
        Bug::OneFormerMirror,
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
fn recover_reads_first() {
    finds(
        Bug::RecoverReadsFirst,
        Config { budget: Used { losses: 1, crashes: 1, ..used(1, 2) }, ..three() },
    );
}

#[test]
fn recover_partly() {
    finds(
        Bug::RecoverPartly,
        Config { budget: Used { losses: 1, crashes: 1, ..used(1, 2) }, ..three() },
    );
}

#[test]
fn recover_released() {
    finds(
        Bug::RecoverReleased,
        Config {
            sets: vec![(0b0011, 1)],
            lease: 1,
            budget: Used { losses: 1, ..used(1, 1) },
            ..base()
        },
    );
}
