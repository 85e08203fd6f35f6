//! Calls to drivers that the session makes.
//!
//! These are calls that poll threads leave to the session because signalling them is slow, and one
//! call for each ring that starts. No poll thread makes the latter, because its other guests would
//! wait.
//!
//! The session, too, calls through kernel AIO: a `write` that blocks would hold session and port
//! for ever. If the frontend makes its calls slow, only that frontend waits, because this thread
//! makes no other guest's calls.

use std::sync::Arc;
use std::time::Duration;

use super::device::DeviceState;
use super::event::SessionEvent;
use crate::sys::aio::with_spare;
use crate::sys::call::{CallGuard, SLOW, Way};
use crate::sys::sched::own_cpu_time;
use crate::sys::wake::Wake;

/// A session spends at most one part in `SHARE` of its time on signalling, unless `LONGEST_PAUSE`
/// cuts the pause short.
const SHARE: u32 = 10;
/// Longest pause after slow signalling.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// The session's part in its port's calls.
pub(super) struct Deferred {
    guard: Arc<CallGuard>,
    /// Whether the last report was that calls are deferred.
    reported: bool,
}

impl Deferred {
    pub(super) fn new(guard: Arc<CallGuard>) -> Self {
        Deferred {
            guard,
            reported: false,
        }
    }

    /// The bell that is rung when there are calls to make.
    pub(super) fn bell(&self) -> &Wake {
        self.guard.bell()
    }

    /// Makes the calls that were left to the session. Returns how long to pause then, and whether
    /// the calls are still owed because the kernel has no AIO context for them.
    pub(super) fn make(&mut self, device: &mut DeviceState) -> (Duration, bool) {
        self.look(device);
        let made = with_spare(|caller| {
            let begun = own_cpu_time();
            // If a descriptor is refused, only its own call is lost.
            let due = device.calls().filter(|call| call.take_deferred());
            let made = caller.signal(due.map(std::os::fd::AsFd::as_fd), |_, _| {});
            (made, own_cpu_time().saturating_sub(begun))
        });
        let (made, cost) = match made {
            Ok(made) => made,
            Err(error) => {
                let reason = error.to_string().into();
                device.event(SessionEvent::CallsImpossible { reason });
                return (Duration::ZERO, true);
            }
        };
        self.guard.made_deferred(made as u64, cost);
        let pause = if self.guard.way() == Way::Batch && cost <= SLOW {
            Duration::ZERO
        } else {
            (cost * (SHARE - 1)).min(LONGEST_PAUSE)
        };
        (pause, false)
    }

    /// Lets the guard forgive after a calm, and reports if the way of making calls has changed.
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
