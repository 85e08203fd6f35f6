//! Thin wrappers over Linux: one small file per facility, no policy.
//!
//! Callers are the poll threads (`aio`, `epoll`, `affinity`), sessions (`eventfd`, `call`, `peer`)
//! and the control side (`listen`, `wake`, `signal`, `sched`, `thread`); `refused` words what the
//! system refuses any of them. What has a safe wrapper in `rustix` or `vmm-sys-util` uses it; the
//! rest calls `libc`. Nothing here knows of rings, ports or messages.

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
