//! The cost of touching the memory of a port's guest, and which port pays for it.
//!
//! A frontend can make its guest's memory slow to touch. While the frontend punches a hole, a
//! thread that touches a page inside waits until the whole hole is punched. A page that does not
//! exist is made by the thread that touches it first. So poll threads notice page faults in long
//! passes, find out whose memory it was (`poll::watch`), and charge the port here. A port whose
//! memory has cost more than [`BUDGET_US`] is *slow*. From then on only one thread touches its
//! memory: the thread that all slow ports share.
//!
//! - The budget counts time, not faults, because a guest's first use of each page is one short
//!   fault. A burst of 64 frames, each in a page used for the first time, stays below what
//!   `poll::watch` charges. [`REFILL_US`] a second are forgiven, for guests that now and then need
//!   more.
//! - The port stays slow until a minute has passed without a slow touch. A new session does not
//!   restart that minute.
//! - A slow port may make the switch touch more than `LAPS` times as many new pages as its guest
//!   has. Then its frontend must be punching holes again and again, and its session is ended.
//! - Pages that are made quickly are not charged, and a frontend may bring new memory again and
//!   again. So this file does not bound the memory that is charged to the switch's memory cgroup.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a port's memory may cost poll threads, in microseconds, before the port is slow.
pub const BUDGET_US: u32 = 50_000;
/// How much of the cost is forgiven each second, in microseconds.
pub const REFILL_US: u32 = 10_000;
/// Time without a slow touch after which a slow port is normal again.
const CALM: Duration = Duration::from_secs(60);
/// A slow guest may make the switch touch so many times as many new pages as it has, in one
/// session.
const LAPS: u64 = 4;
/// Pages that every guest may have made in addition, however small it is (1 GiB of 4 KiB pages).
const FEW_PAGES: u64 = 1 << 18;

/// Who touches a port's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Pace {
    /// Any poll thread.
    #[default]
    Normal,
    /// Poll threads that are not alarmed: a poll thread found that the memory is slow, and control
    /// has not seen the mark yet.
    Marked,
    /// Only the thread of slow ports.
    Slow,
    /// Any poll thread, but frames that are already on their way to the thread of slow ports go
    /// first.
    Returning,
}

/// What one port's memory has cost, over all of its sessions.
#[derive(Debug)]
pub struct PageGuard {
    pace: AtomicU8,
    /// Cost that has not been forgiven, in microseconds.
    spent_us: AtomicU32,
    /// Time of the last slow touch, in milliseconds since `made`.
    last_ms: AtomicU64,
    made: Instant,
    faults: AtomicU64,
    cost_us: AtomicU64,
    /// Number of faults when the port's pace last changed or its last session began, whichever was
    /// later.
    faults_before: AtomicU64,
}

impl Default for PageGuard {
    fn default() -> Self {
        PageGuard {
            pace: AtomicU8::new(Pace::Normal as u8),
            spent_us: AtomicU32::new(0),
            last_ms: AtomicU64::new(0),
            made: Instant::now(),
            faults: AtomicU64::new(0),
            cost_us: AtomicU64::new(0),
            faults_before: AtomicU64::new(0),
        }
    }
}

impl PageGuard {
    /// Returns who touches the memory now.
    #[inline]
    pub fn pace(&self) -> Pace {
        match self.pace.load(Ordering::Relaxed) {
            0 => Pace::Normal,
            1 => Pace::Marked,
            2 => Pace::Slow,
            _ => Pace::Returning,
        }
    }

    /// Sets who touches the memory. Only control calls this: poll threads mark a port with
    /// [`charge`](Self::charge).
    pub fn set_pace(&self, pace: Pace) {
        if pace == Pace::Normal {
            self.spent_us.store(0, Ordering::Relaxed);
        }
        self.begin_count();
        self.pace.store(pace as u8, Ordering::Relaxed);
    }

    /// Begins to count new pages for [`is_endless`](Self::is_endless): a session has begun.
    pub fn begin_count(&self) {
        self.faults_before.store(self.faults(), Ordering::Relaxed);
    }

    /// Returns the number of slow page faults in all sessions.
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// Returns the cost of all slow page faults.
    pub fn cost(&self) -> Duration {
        Duration::from_micros(self.cost_us.load(Ordering::Relaxed))
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Charges the port for `faults` page faults that have cost a thread the time `cost`. Returns
    /// whether the port was marked because of this charge.
    pub fn charge(&self, cost: Duration, faults: u64) -> bool {
        let cost_us = u32::try_from(cost.as_micros()).unwrap_or(u32::MAX);
        self.faults.fetch_add(faults, Ordering::Relaxed);
        self.cost_us.fetch_add(cost_us.into(), Ordering::Relaxed);
        self.last_ms.store(self.now_ms(), Ordering::Relaxed);
        let add = |spent: u32| Some(spent.saturating_add(cost_us));
        // The closure never refuses.
        let spent = self
            .spent_us
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        let spent = spent.map_or(0, |before| before.saturating_add(cost_us));
        let (normal, marked) = (Pace::Normal as u8, Pace::Marked as u8);
        let mut from = normal;
        if self.pace() == Pace::Returning {
            from = Pace::Returning as u8;
        }
        spent > BUDGET_US
            && self
                .pace
                .compare_exchange(from, marked, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Forgives [`REFILL_US`]. To be called once a second.
    pub fn refill(&self) {
        if self.spent_us.load(Ordering::Relaxed) > 0 {
            let less = |spent: u32| Some(spent.saturating_sub(REFILL_US));
            // The closure never refuses.
            let _ = self
                .spent_us
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        }
    }

    /// Whether the last slow touch was a minute ago or more.
    pub fn is_calm(&self) -> bool {
        let last = self.last_ms.load(Ordering::Relaxed);
        let calm = self.now_ms().saturating_sub(last);
        u128::from(calm) >= CALM.as_millis()
    }

    /// Whether a slow guest with `bytes` bytes of memory has made the switch touch more new pages
    /// than an honest guest can.
    pub fn is_endless(&self, bytes: u64) -> bool {
        let page = rustix::param::page_size() as u64;
        let faults = self.faults()
            - self
                .faults_before
                .load(Ordering::Relaxed)
                .min(self.faults());
        self.pace() == Pace::Slow && faults > LAPS.saturating_mul(bytes / page) + FEW_PAGES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn charge(guard: &PageGuard, us: u64, faults: u64) -> bool {
        guard.charge(Duration::from_micros(us), faults)
    }

    #[test]
    fn a_port_is_marked_once_beyond_its_budget() {
        let guard = PageGuard::default();
        assert!(!charge(&guard, BUDGET_US.into(), 9));
        assert_eq!(guard.pace(), Pace::Normal);
        guard.refill();
        assert!(!charge(&guard, REFILL_US.into(), 1), "it was forgiven");
        assert!(charge(&guard, 1, 1));
        assert!(!charge(&guard, 1_000_000, 1), "it is marked already");
        assert_eq!((guard.pace(), guard.faults()), (Pace::Marked, 12));
        assert_eq!(
            guard.cost().as_micros(),
            u128::from(BUDGET_US + REFILL_US + 1_000_001)
        );
        guard.set_pace(Pace::Slow);
        assert!(!charge(&guard, 1_000_000, 1));
        assert_eq!(guard.pace(), Pace::Slow);
    }

    #[test]
    fn one_long_wait_is_enough() {
        let guard = PageGuard::default();
        assert!(charge(&guard, 700_000, 1));
    }

    #[test]
    fn a_minute_without_a_slow_touch_is_a_calm() {
        let mut guard = PageGuard::default();
        assert!(charge(&guard, 700_000, 1));
        guard.set_pace(Pace::Slow);
        guard.made -= CALM / 2;
        assert!(!guard.is_calm());
        charge(&guard, 10, 1);
        guard.made -= CALM / 2;
        assert!(!guard.is_calm());
        guard.made -= CALM / 2;
        assert!(guard.is_calm());
        // On its way back it may be found slow again; once it is back it begins anew.
        guard.set_pace(Pace::Returning);
        assert!(charge(&guard, 1, 1));
        guard.set_pace(Pace::Normal);
        assert!(!charge(&guard, BUDGET_US.into(), 1));
    }

    #[test]
    fn pages_without_end_are_more_than_the_guest_has() {
        let guard = PageGuard::default();
        let bytes = 1 << 32;
        guard.set_pace(Pace::Slow);
        charge(&guard, 0, LAPS * (bytes >> 12) + FEW_PAGES);
        assert!(!guard.is_endless(bytes));
        charge(&guard, 0, 1);
        assert!(guard.is_endless(bytes));
        guard.begin_count();
        assert!(!guard.is_endless(bytes), "another session");
    }
}
