//! Calls to drivers, and which port pays for slow calls.
//!
//! A signal of an eventfd takes as long as waking all that wait on the eventfd. A frontend can hang
//! twenty thousand waiters on its own eventfd, which makes a signal take most of a millisecond. So
//! poll threads time their batches of calls, and a port moves between three ways of being called:
//!
//! - *Batch*: one system call for all calls of a pass. This is normal.
//! - *Alone*: after a slow batch each of its ports is a suspect. Poll threads make a suspect's
//!   calls one by one and time them by the thread's CPU clock. Time in which the thread had no CPU
//!   does not count: it says nothing about the port.
//! - *Deferred*: after one slow call made alone. Poll threads ring the bell of the port's session,
//!   and the session signals. Eight fast signals in a row lead back to *alone*.
//!
//! Once slow calls have cost poll threads more than [`BUDGET_US`], fast signals no longer lead
//! back. Only a minute without a slow signal forgives everything, from any state.
//!
//! The port is charged, not the descriptor or the session, because a frontend renews both at will.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::eventfd::{NotEventFd, eventfd};
use super::wake::Wake;

/// A signal that takes more CPU time than this is slow.
pub const SLOW: Duration = Duration::from_micros(50);
/// Time that each of several signals made at once may take, on top of [`SLOW`] for all of them: a
/// signal wakes somebody.
const SLOW_PER_SIGNAL: Duration = Duration::from_micros(3);

/// Whether a batch of `signals` signals that took the CPU time `cost` was slow.
pub fn are_slow(signals: u32, cost: Duration) -> bool {
    cost > SLOW.saturating_add(SLOW_PER_SIGNAL.saturating_mul(signals))
}

/// What a port's slow signals may cost poll threads, in microseconds, before its session makes them
/// for good.
pub const BUDGET_US: u32 = 500;
/// Fast signals of the session in a row after which poll threads try again. They try again because
/// a signal may have looked slow for another reason: interrupts are counted as CPU time of the
/// thread.
const PROBATION: u32 = 8;
/// Time without a slow signal after which all cost is forgiven.
const CALM: Duration = Duration::from_secs(60);

/// How a call is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// In a batch with others.
    Batch,
    /// By itself, and timed: the port is a suspect.
    Alone,
    /// By the port's session.
    Deferred,
}

/// What one port's calls have cost, over all of its sessions.
#[derive(Debug)]
pub struct CallGuard {
    /// CPU time of slow signals since the last calm, in microseconds; 1 means that the port is only
    /// a suspect.
    spent_us: AtomicU32,
    /// Fast signals that the session has still to make before poll threads try again.
    probation: AtomicU32,
    /// Time of the last slow signal, in milliseconds since `made`.
    last_slow_ms: AtomicU64,
    made: Instant,
    slow: AtomicU64,
    deferred: AtomicU64,
    bell: Wake,
}

impl CallGuard {
    /// A guard for a port that was never called.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(CallGuard {
            spent_us: AtomicU32::new(0),
            probation: AtomicU32::new(0),
            last_slow_ms: AtomicU64::new(0),
            made: Instant::now(),
            slow: AtomicU64::new(0),
            deferred: AtomicU64::new(0),
            bell: Wake::new()?,
        }))
    }

    /// Returns the bell that poll threads ring when the session has calls to make.
    pub fn bell(&self) -> &Wake {
        &self.bell
    }

    /// Returns how the port's calls are made now.
    #[inline]
    pub fn way(&self) -> Way {
        match self.spent_us.load(Ordering::Relaxed) {
            0 => Way::Batch,
            1..=BUDGET_US if self.probation.load(Ordering::Relaxed) == 0 => Way::Alone,
            _ => Way::Deferred,
        }
    }

    /// Returns the number of slow signals that poll threads have made one by one.
    pub fn slow(&self) -> u64 {
        self.slow.load(Ordering::Relaxed)
    }

    /// Returns the number of signals made by the port's sessions.
    pub fn deferred(&self) -> u64 {
        self.deferred.load(Ordering::Relaxed)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Notes that a batch with a call of this port was slow.
    pub fn suspect(&self) {
        self.last_slow_ms.store(self.now_ms(), Ordering::Relaxed);
        self.spent_us.fetch_max(1, Ordering::Relaxed);
    }

    /// Notes that a poll thread has made one call by itself, which took the CPU time `cost`.
    pub fn made_alone(&self, cost: Duration) {
        if cost <= SLOW {
            return;
        }
        self.slow.fetch_add(1, Ordering::Relaxed);
        self.last_slow_ms.store(self.now_ms(), Ordering::Relaxed);
        self.probation.store(PROBATION, Ordering::Relaxed);
        let cost = u32::try_from(cost.as_micros()).unwrap_or(u32::MAX);
        let add = |spent: u32| Some(spent.saturating_add(cost));
        // The closure never refuses.
        let _ = self
            .spent_us
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    /// Notes that the session has made `calls` calls at once, which took the CPU time `cost`
    /// together.
    pub fn made_deferred(&self, calls: u64, cost: Duration) {
        if self.way() == Way::Batch {
            // These calls were for rings that have started, and cost no poll thread anything. So
            // they do not count.
            return;
        }
        self.deferred.fetch_add(calls, Ordering::Relaxed);
        let calls = u32::try_from(calls).unwrap_or(u32::MAX);
        if are_slow(calls, cost) {
            self.last_slow_ms.store(self.now_ms(), Ordering::Relaxed);
            self.probation.store(PROBATION, Ordering::Relaxed);
            return;
        }
        let served = |left: u32| Some(left.saturating_sub(calls));
        // The closure never refuses.
        let _ = self
            .probation
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, served);
    }

    /// Forgives all cost after a calm. To be called now and then.
    pub fn forgive(&self) {
        let calm = self.now_ms() - self.last_slow_ms.load(Ordering::Relaxed).min(self.now_ms());
        if self.way() != Way::Batch && u128::from(calm) >= CALM.as_millis() {
            self.spent_us.store(0, Ordering::Relaxed);
            self.probation.store(0, Ordering::Relaxed);
        }
    }
}

/// The eventfd by which the device calls the driver.
#[derive(Debug)]
pub struct CallFd {
    fd: OwnedFd,
    guard: Arc<CallGuard>,
    /// Whether the session still has a call to make.
    owed: AtomicBool,
}

impl CallFd {
    /// Takes the descriptor if it is an eventfd. Otherwise closes it and returns an error.
    pub fn new(file: File, guard: Arc<CallGuard>) -> Result<Self, NotEventFd> {
        Ok(CallFd {
            fd: eventfd(file)?,
            guard,
            owed: AtomicBool::new(false),
        })
    }

    /// Returns the guard of the descriptor's port.
    #[inline]
    pub fn guard(&self) -> &CallGuard {
        &self.guard
    }

    /// Leaves a call to the session. Returns the bell to signal, unless the bell has been rung for
    /// an earlier call.
    pub fn defer(&self) -> Option<BorrowedFd<'_>> {
        (!self.owed.swap(true, Ordering::AcqRel)).then(|| self.guard.bell.as_fd())
    }

    /// Notes a call that the session makes anyway: for a ring that has started, or for a new
    /// descriptor.
    pub fn owe(&self) {
        self.owed.store(true, Ordering::Release);
    }

    /// Whether the session has a call to make.
    pub fn is_owed(&self) -> bool {
        self.owed.load(Ordering::Acquire)
    }

    /// Takes the call that was left to the session, which makes the call now. Returns whether there
    /// was one.
    pub fn take_deferred(&self) -> bool {
        self.owed.load(Ordering::Relaxed) && self.owed.swap(false, Ordering::AcqRel)
    }
}

impl AsFd for CallFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd as make};

    #[test]
    fn slow_signals_lead_to_the_session_and_fast_ones_do_not() {
        let guard = CallGuard::new().unwrap();
        assert_eq!(guard.way(), Way::Batch);
        guard.suspect();
        guard.made_alone(SLOW);
        assert_eq!((guard.way(), guard.slow()), (Way::Alone, 0));
        // 60 µs each: eight are within the budget, and each sends the next calls to the session.
        for slow in 1..=8 {
            guard.made_alone(Duration::from_micros(60));
            guard.made_deferred(u64::from(PROBATION) - 1, SLOW);
            assert_eq!((guard.way(), guard.slow()), (Way::Deferred, slow));
            // A slow one of the session: it begins anew.
            guard.made_deferred(1, 2 * SLOW);
            guard.made_deferred(1, SLOW);
            assert_eq!(guard.way(), Way::Deferred);
            guard.made_deferred(u64::from(PROBATION) - 1, SLOW);
            assert_eq!(guard.way(), Way::Alone);
        }
        guard.made_alone(Duration::from_micros(60));
        guard.made_deferred(100, SLOW);
        assert_eq!(guard.way(), Way::Deferred, "over the budget");
        guard.suspect();
        assert_eq!(guard.way(), Way::Deferred);
    }

    #[test]
    fn calls_that_a_session_makes_at_once_are_judged_by_how_many_they_are() {
        const RINGS: u32 = 24;
        let together = SLOW + RINGS * SLOW_PER_SIGNAL;
        let guard = CallGuard::new().unwrap();
        guard.made_alone(2 * SLOW);
        assert_eq!(guard.way(), Way::Deferred);
        guard.made_deferred(u64::from(RINGS), together + Duration::from_nanos(1));
        assert_eq!(guard.way(), Way::Deferred, "one of them was slow");
        guard.made_deferred(u64::from(RINGS), together);
        assert_eq!(guard.way(), Way::Alone);
        // One slow signal among few is as slow as it ever was.
        guard.made_alone(2 * SLOW);
        guard.made_deferred(u64::from(PROBATION), 2 * SLOW);
        assert_eq!(guard.way(), Way::Deferred);
        assert_eq!(guard.deferred(), u64::from(2 * RINGS + PROBATION));
    }

    #[test]
    fn nothing_is_forgiven_before_a_calm() {
        let mut guard = Arc::into_inner(CallGuard::new().unwrap()).unwrap();
        guard.made_alone(Duration::from_secs(10_000));
        guard.forgive();
        assert_eq!(guard.way(), Way::Deferred);
        guard.made -= CALM / 2;
        guard.made_deferred(1, 2 * SLOW);
        guard.made -= CALM / 2;
        guard.forgive();
        assert_eq!(guard.way(), Way::Deferred);
        guard.made_deferred(1, SLOW);
        guard.made -= CALM / 2;
        guard.forgive();
        assert_eq!((guard.way(), guard.deferred()), (Way::Batch, 2));
    }

    #[test]
    fn deferred_calls_ring_once_until_they_are_made() {
        let guard = CallGuard::new().unwrap();
        let fd = make(0, EventfdFlags::NONBLOCK).unwrap();
        let call = CallFd::new(fd.into(), guard.clone()).unwrap();
        assert!(!call.take_deferred());
        assert!(call.defer().is_some());
        assert!(call.defer().is_none());
        assert!(call.take_deferred());
        assert!(!call.take_deferred());
        assert!(call.defer().is_some());
    }
}
