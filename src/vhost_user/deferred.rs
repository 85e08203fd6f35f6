//! Calls that poll threads leave to the session, because signalling them is slow.
//!
//! By kernel AIO here, too: a `write` that blocks would pin session and port. What the frontend makes slow, it
//! waits for itself: nobody else is called by this thread.

use std::sync::Arc;
use std::time::Duration;

use super::device::DeviceState;
use super::event::SessionEvent;
use crate::sys::aio::Caller;
use crate::sys::call::{CallGuard, Way};
use crate::sys::sched::own_cpu_time;
use crate::sys::wake::Wake;

/// Calls of one system call.
const BATCH: usize = 8;
/// A session spends at most one part in so many of its time on signalling.
const SHARE: u32 = 10;
/// Longest pause for that.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// The session's part in its port's calls.
pub(super) struct Deferred {
    guard: Arc<CallGuard>,
    /// Made when it is first needed.
    caller: Option<Caller>,
    /// What was reported last.
    reported: bool,
}

impl Deferred {
    pub(super) fn new(guard: Arc<CallGuard>) -> Self {
        Deferred {
            guard,
            caller: None,
            reported: false,
        }
    }

    /// Rung when there is something to make.
    pub(super) fn bell(&self) -> &Wake {
        self.guard.bell()
    }

    /// Makes the calls that were left to it. Returns how long to do nothing then.
    pub(super) fn make(&mut self, device: &mut DeviceState) -> Duration {
        self.look(device);
        if self.caller.is_none() {
            match Caller::for_batches(BATCH) {
                Ok(caller) => self.caller = Some(caller),
                Err(error) => {
                    let reason = error.to_string().into();
                    device.event(SessionEvent::CallsImpossible { reason });
                    // The calls stay owed; ringing again tries again.
                    self.bell().wake();
                    return LONGEST_PAUSE;
                }
            }
        }
        let Some(caller) = &mut self.caller else {
            return Duration::ZERO;
        };
        let begun = own_cpu_time();
        // A descriptor that is refused costs its own call only.
        let due = device.calls().filter(|call| call.take_deferred());
        let made = caller.signal(due.map(std::os::fd::AsFd::as_fd), |_, _| {});
        let cost = own_cpu_time().saturating_sub(begun);
        self.guard.made_deferred(made as u64, cost);
        (cost * (SHARE - 1)).min(LONGEST_PAUSE)
    }

    /// Forgives what is long past, and reports what has changed.
    pub(super) fn look(&mut self, device: &mut DeviceState) {
        self.guard.forgive();
        let deferred = self.guard.way() == Way::Deferred;
        if deferred != std::mem::replace(&mut self.reported, deferred) {
            device.event(if deferred {
                SessionEvent::CallsDeferred
            } else {
                SessionEvent::CallsDirect
            });
        }
    }
}
