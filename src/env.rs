//! Time and randomness: the one place that touches a clock or entropy.
//!
//! Time is tokio's clock ([`tokio::time::Instant`]), which the simulation pauses and advances;
//! randomness is a seeded stream cipher. Wall-clock time appears in log lines and in the admin
//! API only, never in a decision; but certificates are valid by it ([`crate::trust`]).

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

/// Time since 1970, for what people read and for how long certificates are valid; never for a decision of the engine.
#[allow(clippy::disallowed_methods, reason = "the one place that asks for it")]
pub fn wall_clock() -> Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default()
}

/// The randomness of one node. Clones share the stream.
#[derive(Clone)]
pub struct Env {
    rng: Rc<RefCell<ChaCha8Rng>>,
}

impl Env {
    /// Randomness from the operating system: what a real node runs on.
    pub fn from_entropy() -> Self {
        Self { rng: Rc::new(RefCell::new(ChaCha8Rng::from_os_rng())) }
    }

    /// Randomness that is a function of `seed`: what the simulation runs on.
    pub fn from_seed(seed: u64) -> Self {
        Self { rng: Rc::new(RefCell::new(ChaCha8Rng::seed_from_u64(seed))) }
    }

    /// 64 random bits.
    pub fn random_u64(&self) -> u64 {
        self.rng.borrow_mut().next_u64()
    }

    /// A number below `bound`, close to uniform. `bound` must not be zero.
    pub fn random_below(&self, bound: u64) -> u64 {
        assert!(bound > 0, "no number lies below zero");
        let wide = u128::from(self.random_u64()) * u128::from(bound);
        u64::try_from(wide >> 64).expect("a 64-bit fraction of a 64-bit bound")
    }

    /// Whether an event of probability `numerator / denominator` happens.
    pub fn chance(&self, numerator: u64, denominator: u64) -> bool {
        self.random_below(denominator) < numerator
    }

    /// 16 random bytes, for an id.
    pub fn random_bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        self.rng.borrow_mut().fill_bytes(&mut bytes);
        bytes
    }
}
