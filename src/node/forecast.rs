//! When a pool will be full: the trend of its net growth.
//!
//! Two rings of samples, of half an hour and of a day; in each a straight line is fitted (least
//! squares). The trend that fills the pool sooner counts, so that a load that began an hour ago is seen
//! and one that ends every night is not taken for the whole day's. Memory is bounded: the rings have a
//! fixed size.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::admin::space::Forecast;

/// Samples of a ring.
const SAMPLES: usize = 60;
/// Samples that make a trend.
const SAMPLES_MIN: usize = 10;
/// Pause between two samples of the short ring: half an hour in all.
const SHORT: Duration = Duration::from_secs(30);
/// The same of the long ring: a day in all.
const LONG: Duration = Duration::from_mins(24);
/// What fills the pool later than this is no growth.
const HORIZON: Duration = Duration::from_hours(10 * 365 * 24);

/// Samples at a fixed pace, the newest last.
#[derive(Debug)]
struct Ring {
    pace: Duration,
    samples: VecDeque<(Instant, u64)>,
}

impl Ring {
    const fn new(pace: Duration) -> Self {
        Self { pace, samples: VecDeque::new() }
    }

    fn note(&mut self, now: Instant, bytes: u64) {
        if self.samples.back().is_some_and(|(at, _)| now < *at + self.pace) {
            return;
        }
        if self.samples.len() == SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back((now, bytes));
    }

    /// Bytes a second, by least squares; none before there are enough samples.
    #[allow(clippy::cast_precision_loss, reason = "an estimate")]
    fn slope(&self) -> Option<f64> {
        if self.samples.len() < SAMPLES_MIN {
            return None;
        }
        let (start, first) = *self.samples.front()?;
        let points = || {
            let point = |(at, bytes): &(Instant, u64)| {
                ((*at - start).as_secs_f64(), *bytes as f64 - first as f64)
            };
            self.samples.iter().map(point)
        };
        let count = self.samples.len() as f64;
        let (sum_x, sum_y) = points().fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
        let (mean_x, mean_y) = (sum_x / count, sum_y / count);
        let (mut xy, mut xx) = (0.0, 0.0);
        for (x, y) in points() {
            xy += (x - mean_x) * (y - mean_y);
            xx += (x - mean_x) * (x - mean_x);
        }
        (xx > 0.0).then(|| xy / xx)
    }
}

/// The history of one pool.
#[derive(Debug)]
pub(super) struct History {
    short: Ring,
    long: Ring,
}

impl Default for History {
    fn default() -> Self {
        Self { short: Ring::new(SHORT), long: Ring::new(LONG) }
    }
}

impl History {
    /// Notes how many bytes are taken for good; to be called more often than samples are taken.
    pub(super) fn note(&mut self, now: Instant, bytes: u64) {
        self.short.note(now, bytes);
        self.long.note(now, bytes);
    }

    /// When `room` more bytes will be taken.
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an estimate, of numbers that are positive and below the horizon"
    )]
    pub(super) fn forecast(&self, room: u64) -> Forecast {
        let slopes = [self.short.slope(), self.long.slope()];
        let Some(slope) = slopes.into_iter().flatten().reduce(f64::max) else {
            return Forecast::Unknown;
        };
        if slope <= 0.0 || room as f64 / slope > HORIZON.as_secs_f64() {
            return Forecast::NotGrowing;
        }
        Forecast::Growing {
            bytes_per_day: (slope * 86_400.0) as u64,
            full_in_s: (room as f64 / slope) as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A history of so many seconds, with what is taken after each.
    fn history(seconds: u64, bytes: impl Fn(u64) -> u64) -> History {
        let start = Instant::now();
        let mut history = History::default();
        for second in 0..=seconds {
            history.note(start + Duration::from_secs(second), bytes(second));
        }
        history
    }

    fn full_in(forecast: Forecast) -> u64 {
        match forecast {
            Forecast::Growing { full_in_s, .. } => full_in_s,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn nothing_is_said_before_there_is_a_trend() {
        assert_eq!(history(120, |s| s * MIB).forecast(MIB), Forecast::Unknown);
    }

    #[tokio::test]
    async fn a_steady_growth_is_told_to_the_minute() {
        let steady = history(1800, |s| 10 * MIB + s * MIB);
        assert!(full_in(steady.forecast(3600 * MIB)).abs_diff(3600) <= 60);
        let Forecast::Growing { bytes_per_day, .. } = steady.forecast(MIB) else { panic!() };
        assert!(bytes_per_day.abs_diff(86_400 * MIB) < 1000 * MIB, "{bytes_per_day}");
        assert_eq!(full_in(steady.forecast(0)), 0);
    }

    #[tokio::test]
    async fn what_does_not_grow_says_so() {
        assert_eq!(history(1800, |_| 5 * MIB).forecast(MIB), Forecast::NotGrowing);
        let shrinks = history(1800, |s| (4000 - s) * MIB);
        assert_eq!(shrinks.forecast(MIB), Forecast::NotGrowing);
        // A byte an hour will not fill a terabyte.
        assert_eq!(history(7200, |s| s / 3600).forecast(1 << 40), Forecast::NotGrowing);
    }

    #[tokio::test]
    async fn noise_around_a_level_is_no_growth_to_speak_of() {
        // Garbage comes and goes: 100 MiB up and down every few minutes.
        let noise = history(3600, |s| (1000 + s % 300 / 3) * MIB);
        match noise.forecast(100_000 * MIB) {
            Forecast::NotGrowing => {}
            other => assert!(full_in(other) > 86_400, "{other:?}"),
        }
    }

    #[tokio::test]
    async fn the_sooner_of_two_trends_counts_and_memory_is_bounded() {
        // Still for a day, then a load.
        let day = 86_400;
        let load = history(day + 1800, |s| s.saturating_sub(day) * MIB);
        assert!(full_in(load.forecast(3600 * MIB)).abs_diff(3600) <= 120);
        // Slowly all day, not at all for the last half hour.
        let slow = history(day, |s| s.min(day - 1800) / 60 * MIB);
        let expected = 1000 * 60;
        assert!(full_in(slow.forecast(1000 * MIB)).abs_diff(expected) < expected / 5);
        assert!(load.short.samples.len() == SAMPLES && load.long.samples.len() == SAMPLES);
    }
}
