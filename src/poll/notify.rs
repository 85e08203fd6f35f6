//! Makes calls, with one system call for all calls of a pass.
//!
//! Calls are also made within a pass: after `PASS_COPIES` copies, and when the list of queues to
//! call is full. Suspect ports are called one by one. Slow calls are left to the sessions of their
//! ports (`sys::call`).

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use arrayvec::ArrayVec;

use super::egress::{TOUCHED, Tools};
use crate::sys::call::{CallFd, Way, are_slow};
use crate::sys::sched::own_cpu_time;

/// Most calls of one batch.
pub(super) const CALLS: usize = 2 * TOUCHED;

/// Signals every driver of `calls`.
#[cold]
pub(super) fn signal(tools: &mut Tools<'_>, calls: &[&CallFd]) {
    let mut batch: ArrayVec<BorrowedFd<'_>, CALLS> = ArrayVec::new();
    for call in calls {
        match call.guard().way() {
            Way::Batch => batch.push(call.as_fd()),
            Way::Alone => signal_alone(tools, call),
            Way::Deferred => batch.extend(call.defer()),
        }
    }
    let stats = tools.stats;
    let begun = tools.clock.raw();
    tools
        .caller
        .signal(batch.iter().copied(), |_, _| stats.calls_refused.add(1));
    let ns = tools.clock.delta_as_nanos(begun, tools.clock.raw());
    stats.calls.add(calls.len() as u64);
    if are_slow(batch.len() as u32, Duration::from_nanos(ns)) {
        for guard in calls.iter().map(|call| call.guard()) {
            if guard.way() == Way::Batch {
                guard.suspect();
            }
        }
    }
}

/// Signals one driver, and charges the CPU time to its port.
fn signal_alone(tools: &mut Tools<'_>, call: &CallFd) {
    let stats = tools.stats;
    let begun = own_cpu_time();
    tools
        .caller
        .signal([call.as_fd()], |_, _| stats.calls_refused.add(1));
    call.guard()
        .made_alone(own_cpu_time().saturating_sub(begun));
}
