//! A bound on how often something is logged that others can cause: a client that connects in vain a
//! thousand times a second must not fill the disk that the log is on.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// Lets [`Throttle::LINES`] lines pass in each [`Throttle::PERIOD`] and counts those it held back.
#[derive(Debug, Default)]
pub struct Throttle {
    since: Cell<Option<Instant>>,
    passed: Cell<u32>,
    held: Cell<u64>,
}

impl Throttle {
    /// Lines that may pass in one period.
    pub const LINES: u32 = 50;
    /// How long a period lasts.
    pub const PERIOD: Duration = Duration::from_secs(10);

    /// Whether a line may be logged now. The first of a new period tells how many `what` were held
    /// back in the last.
    pub fn passes(&self, what: &str) -> bool {
        let now = Instant::now();
        if self.since.get().is_none_or(|since| now - since >= Self::PERIOD) {
            self.since.set(Some(now));
            self.passed.set(0);
            let held = self.held.take();
            if held > 0 {
                tracing::warn!(held, what, "lines were left out of the log: too many");
            }
        }
        let passes = self.passed.get() < Self::LINES;
        if passes {
            self.passed.set(self.passed.get() + 1);
        } else {
            self.held.set(self.held.get().saturating_add(1));
        }
        passes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_cut_and_counted() {
        let throttle = Throttle::default();
        let passed = |n: u32| (0..n).filter(|_| throttle.passes("tests")).count();
        assert_eq!(passed(1000), 50);
        assert_eq!(throttle.held.get(), 950);
        tokio::time::advance(Throttle::PERIOD).await;
        assert_eq!(passed(20), 20, "a new period");
        assert_eq!(throttle.held.get(), 0, "told when the new period began");
    }
}
