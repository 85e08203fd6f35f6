//! Thin wrappers over Linux: one small file per facility.
//!
//! Two files hold policy as well, because they count the cost of a system facility by port: `call`
//! (slow signals) and `pages` (slow page faults). `snapshot` is no wrapper: it is the
//! read-copy-update by which control reaches the poll threads. No file knows of rings, messages or
//! frames.
//!
//! `refused` words what the system refuses. System calls go through the safe wrappers of `rustix`
//! and `vmm-sys-util` where these exist, and through `libc` otherwise.

pub mod affinity;
pub mod aio;
pub mod call;
pub mod epoll;
pub mod eventfd;
pub mod listen;
pub mod memfd;
pub mod numa;
pub mod pages;
pub mod peer;
pub mod refused;
pub mod sched;
pub mod signal;
pub mod snapshot;
#[cfg(test)]
mod snapshot_tests;
pub mod thread;
pub mod wake;
