//! Converts the raw clock of poll threads to the time of day.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often the two clocks are compared, because the system's clock may be set.
const COMPARE: Duration = Duration::from_secs(1);

/// Converts a reading of the raw clock to the time of day.
#[derive(Debug)]
pub struct WallClock {
    clock: quanta::Clock,
    raw: u64,
    wall: Duration,
    compared: Instant,
}

impl Default for WallClock {
    fn default() -> Self {
        let clock = quanta::Clock::new();
        WallClock {
            raw: clock.raw(),
            wall: since_1970(),
            compared: Instant::now(),
            clock,
        }
    }
}

impl WallClock {
    /// Compares the clocks again, if the last comparison is a second old.
    pub fn refresh(&mut self) {
        if self.compared.elapsed() >= COMPARE {
            *self = WallClock::default();
        }
    }

    /// Returns the time of day when the raw clock read `raw`, counted from 1970-01-01 00:00 UTC.
    pub fn at(&self, raw: u64) -> Duration {
        if raw >= self.raw {
            self.wall + Duration::from_nanos(self.clock.delta_as_nanos(self.raw, raw))
        } else {
            let before = Duration::from_nanos(self.clock.delta_as_nanos(raw, self.raw));
            self.wall.saturating_sub(before)
        }
    }
}

/// Returns the present time of day, counted from 1970-01-01 00:00 UTC.
pub fn since_1970() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}
