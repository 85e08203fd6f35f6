//! The atomics of the lock-free parts.
//!
//! The files that a model checker runs (`virtio/claim.rs`, `sys/snapshot.rs`, `observe/pen.rs`,
//! `stats/counter.rs`) take their atomics from here and use nothing else. The models in
//! `tests/models` include these files unchanged, beside a `sync` module of their own, which has the
//! checker's types.

pub use crossbeam_utils::atomic::AtomicCell;
pub use std::sync::Arc;
pub use std::sync::OnceLock;
pub use std::sync::atomic;
