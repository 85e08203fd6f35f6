//! Limits how often a port may make control or its session work: a burst at once, then a steady
//! rate. A port that wants more waits. No other port waits for it.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Messages of a port's frontends that are handled at once. After that, one is handled every
/// `MESSAGE_EVERY`. A start of 128 queue pairs and 509 regions takes about 3000 messages. QEMU
/// before 8.0 adds its memory once for each pair, and sends more than that with dozens of regions.
pub(super) const MESSAGES: u32 = 16_384;
pub(super) const MESSAGE_EVERY: Duration = Duration::from_micros(500);

/// The message pace of a port, shared by its successive sessions. A frontend that hangs up and
/// comes back gets no new burst.
pub(super) type Messages = Arc<Mutex<Pace>>;

/// Returns the message pace of a new port.
pub(super) fn messages(now: Instant) -> Messages {
    Arc::new(Mutex::new(Pace::new(MESSAGES, MESSAGE_EVERY, now)))
}

/// A token bucket, full at the beginning.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    burst: u32,
    refill: Duration,
    left: u32,
    /// When the newest token was added.
    refilled: Instant,
    refused: u64,
}

impl Pace {
    /// A bucket of `burst` tokens that gains one token every `refill`.
    pub(super) fn new(burst: u32, refill: Duration, now: Instant) -> Self {
        Pace {
            burst,
            refill,
            left: burst,
            refilled: now,
            refused: 0,
        }
    }

    /// Takes a token. Returns whether there was one.
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

    /// Takes the next token. Returns how long the caller must sleep until that token is due.
    pub(super) fn wait(&mut self, now: Instant) -> Duration {
        if self.admits(now) {
            return Duration::ZERO;
        }
        // Reserves the next token for this caller, who sleeps until it is due.
        let wait = self.next().saturating_duration_since(now);
        self.refilled += self.refill;
        wait
    }

    /// Returns when the next token is due, after [`Pace::admits`] returned false.
    pub(super) fn next(&self) -> Instant {
        self.refilled + self.refill
    }

    /// Returns how often [`Pace::admits`] returned false since the last call.
    pub(super) fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MAX_QUEUE_PAIRS;

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
        // After a long rest the bucket is full, with `burst` tokens and no more.
        assert_eq!([5000; 4].map(&mut admits), [true, true, true, false]);
        assert_eq!(pace.next(), begun + Duration::from_millis(5010));
        assert_eq!(pace.take_refused(), 5);
        assert_eq!(pace.take_refused(), 0);
    }

    #[test]
    fn whoever_waits_for_each_token_gets_them_at_the_pace() {
        const EACH: Duration = Duration::from_millis(10);
        let begun = Instant::now();
        let mut pace = Pace::new(3, EACH, begun);
        let mut now = begun;
        for _ in 0..103 {
            now += pace.wait(now);
        }
        assert_eq!(now - begun, 100 * EACH);
        // Tokens that came while nobody waited are available at once.
        now += 2 * EACH;
        let waits = [(); 3].map(|()| pace.wait(now));
        assert_eq!(waits, [Duration::ZERO, Duration::ZERO, EACH]);
    }

    #[test]
    fn a_start_with_all_queues_and_regions_is_not_slowed() {
        // SET_MEM_TABLE or ADD_MEM_REG, then the messages of each ring, twice the most that a known
        // frontend sends.
        let start = u32::from(MAX_QUEUE_PAIRS) * 2 * 16 + 509 + 50;
        let mut pace = Pace::new(MESSAGES, MESSAGE_EVERY, Instant::now());
        let now = Instant::now();
        assert!((0..start).all(|_| pace.wait(now).is_zero()));
    }
}
