//! How often a port may make control do something: a burst at once, then one after the other.

use std::time::{Duration, Instant};

/// A bucket of tokens, full at the beginning.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    burst: u32,
    refill: Duration,
    left: u32,
    /// When the newest token of those that are left came.
    refilled: Instant,
    refused: u64,
}

impl Pace {
    /// `burst` at once, then one every `refill`.
    pub(super) fn new(burst: u32, refill: Duration, now: Instant) -> Self {
        Pace {
            burst,
            refill,
            left: burst,
            refilled: now,
            refused: 0,
        }
    }

    /// Whether there is a token, which is taken.
    pub(super) fn admits(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.refilled).as_nanos();
        let came = u32::try_from(passed / self.refill.as_nanos()).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(came).min(self.burst);
        if self.left == self.burst {
            self.refilled = now;
        } else {
            self.refilled += self.refill * came;
        }
        if self.left == 0 {
            self.refused += 1;
            return false;
        }
        self.left -= 1;
        true
    }

    /// When there is a token again, after [`Pace::admits`] said no.
    pub(super) fn next(&self) -> Instant {
        self.refilled + self.refill
    }

    /// How often it said no since this was last asked.
    pub(super) fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_one_at_a_time() {
        const EACH: Duration = Duration::from_millis(10);
        let begun = Instant::now();
        let mut pace = Pace::new(3, EACH, begun);
        let mut admits = |ms: u64| pace.admits(begun + Duration::from_millis(ms));
        assert_eq!(
            [0, 0, 0, 0, 9].map(&mut admits),
            [true, true, true, false, false]
        );
        assert_eq!(
            [10, 10, 19, 20].map(&mut admits),
            [true, false, false, true]
        );
        // After a long rest it is full and no more than that.
        assert_eq!([5000; 4].map(&mut admits), [true, true, true, false]);
        assert_eq!(pace.next(), begun + Duration::from_millis(5010));
        assert_eq!(pace.take_refused(), 5);
        assert_eq!(pace.take_refused(), 0);
    }
}
