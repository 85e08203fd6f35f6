//! Model checking of the lock-free parts with loom: every interleaving, and every value that the
//! memory model allows a load to see, up to a stated number of preemptions.
//!
//! | file | what |
//! |---|---|
//! | `build.rs` | makes the modules: `production` is `virtio/claim.rs`, `sys/snapshot.rs`, `daemon/handover.rs`, `daemon/mailbox.rs`, `observe/pen.rs` and `stats/counter.rs` as they stand, over loom's atomics; for each deliberate mistake there is a module with one place changed |
//! | `delivery.rs` | (a) claim, fill, commit, publish: producers and a driver, split and packed |
//! | `views.rs` | (b) publish, acknowledge, retire; (c) a transmit queue changes its poll thread |
//! | `removal.rs` | (d) a session that enables or disables its rings against the removal of its port |
//! | `observers.rs` | (e) an observer comes, is written to and read, and goes; its client is killed; poll threads change |
//! | `mutants.rs` | the same models with a deliberate error, each of which must be found |
//!
//! Production code is what `build.rs` names, and nothing else. What surrounds it is modelled:
//! in (a) the ring in guest memory, so what `virtio/split.rs` and `virtio/packed.rs` do to publish
//! and to look at the driver's event (their bytes and their order are compared with other
//! implementations in `tests/oracle`), and the tries of `ReceiveQueue` to claim; in (b) to (e) the
//! loops of poll threads, of sessions and of control, with the lock around the mailbox.
//!
//! No RUSTFLAGS: the included files take their atomics from `crate::sync`, which is loom's here. A
//! model is exhaustive within its bound of preemptions, the first argument of `explore`: 1 for
//! three producers, 3 for two with a driver, of either kind of ring as for the mutants of the same
//! model, 2 where they go round the ring, 2 to 4 for views. One or two claims a producer.
//! `cargo test --release -p pollux-models` takes two to three minutes on two cores.
#![cfg(test)]
#![allow(unreachable_pub, reason = "modules of a test program")]
#![allow(clippy::unwrap_used, reason = "test code")]
#![allow(
    clippy::duplicate_mod,
    reason = "a model is compiled once for every mutant"
)]
#![allow(clippy::drop_non_drop, reason = "where a borrow ends is the point")]
#![allow(unsafe_code, reason = "shared cells, whose accesses loom checks")]

mod delivery_models;
mod mutants;
mod observer_models;
mod removal_models;
mod sync;
mod view_models;

/// The production files and their mistakes, each with models over it: what `build.rs` wrote.
mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

/// Runs `model` in every interleaving with at most `preemptions` preemptions.
fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 10_000;
    builder.check(move || {
        sync::start_iteration();
        model();
    });
}
