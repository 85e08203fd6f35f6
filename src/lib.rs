//! Pollux: a software switch for virtual machines.
//!
//! Guests attach over vhost-user sockets. Poll threads read each guest's virtqueues straight out of
//! guest memory and copy every frame once, from the sender's buffer into the receiver's. This page
//! is the architecture. A decision stands at the head of the file that it binds.
//!
//! # Promises
//!
//! - **No transmit lock.** Any poll thread may deliver into any port at any time, and no thread
//!   waits for another to do so ([`virtio::claim`]).
//! - **Removal that nobody else feels.** No other port loses a frame or stalls when a port is
//!   added, removed, rebooted or killed ([`sys::snapshot`]).
//! - **Guests and frontends are hostile.** What they can reach never panics, never blocks a poll
//!   thread, and costs nobody but themselves ([`vhost_user`], [`memory`],
//!   `docs/hostile-inputs.md`).
//!
//! # Picture
//!
//! ```text
//!  frontend ──unix socket── session ──newest device──▶ control ──publish──▶ Topology (immutable)
//!                              ▲                         │ ▲                 │ one look a burst
//!                              └── wait for generation ──┼─┴── acknowledge ─ poll threads (borrow)
//!                                                        └── retired by all, then ──▶ reaper
//!  guest A memory ══════════════════════════ one copy ═══════════════════════════▶ guest B memory
//! ```
//!
//! Control publishes a new [`topology::Topology`] for every change. Poll threads borrow it, adopt a
//! newer one after the burst that they are at, and acknowledge its generation. Only then are the
//! rings and the memory that the old one held freed, by another thread. The threads, and which of
//! them may block, are listed in [`daemon`].
//!
//! # The path of a frame
//!
//! Ten functions in six files of `src`: `poll/mod.rs`, `poll/pass.rs`, `frame.rs`,
//! `switch/forward.rs`, `poll/egress.rs`, `poll/deliver.rs`.
//!
//! 1. `Poller::serve` borrows a topology and makes passes until the topology is out of date.
//! 2. `Pass::run` is one pass: one turn over the thread's transmit queues.
//! 3. `Pass::take` reads descriptors of one queue, each once, and checks them against guest memory.
//! 4. `Burst::load_heads` copies the first 128 bytes of each frame: what is judged is delivered.
//! 5. `Pass::decide` asks for each frame's verdict; frames of one flow share the answer.
//! 6. `forward::decide` learns the source, looks the destination up, and says unicast, flood or
//!    drop.
//! 7. `Delivery::dispatch` groups the burst by egress port and receive queue.
//! 8. `Target::deliver` claims buffers of that queue, copies, commits and publishes.
//! 9. `Delivery::complete` returns the transmit chains whose frames are published.
//! 10. `Delivery::notify` calls the drivers that asked for a call, at the end of the pass.
//!
//! # Modules
//!
//! A module may use those in its last column and no other. Every row names only rows below it, so
//! there are no cycles. The data path does not know that vhost-user exists; the protocol does not
//! know that a switch exists. `tests/architecture` reads this table. Unsafe code stands in
//! `memory` and `sys`.
//!
//! | module | role | may use |
//! |---|---|---|
//! | `main` | parse, run, exit code | `cli`, `bench`, `config`, `daemon` |
//! | [`cli`] | arguments and client commands | `api`, `bench`, `config`, `log`, `wire` |
//! | [`daemon`] | composition root: control, registry, sessions' glue, reaper | `api`, `bench`, `config`, `log`, `memory`, `observe`, `poll`, `port`, `stats`, `switch`, `sys`, `topology`, `vhost_user`, `wire` |
//! | [`mod@bench`] | the load generator: guests that measure a switch | `config`, `memory`, `virtio` |
//! | [`api`] | HTTP/JSON: types, server, client | `config`, `sys`, `wire` |
//! | [`vhost_user`] | the protocol with one frontend | `memory`, `port`, `sys`, `virtio` |
//! | [`poll`] | poll thread: pass, delivery, idle policy | `config`, `frame`, `memory`, `observe`, `stats`, `switch`, `sys`, `topology`, `virtio`, `wire` |
//! | [`topology`] | the snapshot | `memory`, `observe`, `port`, `stats`, `switch`, `sync`, `sys`, `virtio` |
//! | [`port`] | a port's two halves | `config`, `memory`, `stats`, `switch`, `sys`, `virtio` |
//! | [`observe`] | captures, traces, mirrors: buffers, filters, formats | `config`, `memory`, `stats`, `switch`, `sync`, `wire` |
//! | [`switch`] | decisions and FDB; no clock, thread or I/O | `stats`, `wire` |
//! | [`frame`] | header snapshot, burst | `memory`, `stats`, `virtio`, `wire` |
//! | [`virtio`] | rings, chains, claims; and the driver's side for `bench` and tests | `memory`, `sync` |
//! | [`memory`] | regions, windows, SIGBUS fence | `sys` |
//! | [`log`] | the log, which nobody waits for | `sys` |
//! | [`sys`] | thin wrappers over Linux; snapshots | `sync` |
//! | [`stats`] | counters, drop reasons | `sync` |
//! | [`config`] | plain values, parsed and checked | – |
//! | [`wire`] | views of header bytes | – |
//! | [`sync`] | the atomics that a model checker replaces | – |
//!
//! # Words
//!
//! - *frontend*: the VMM's side of vhost-user. *backend*: this switch, seen by the protocol.
//! - *driver*: code in the guest. *device*: this switch, seen by the driver.
//! - *session*: the conversation with one frontend, and its thread.
//! - *port*: what the operator made. *uplink*: a port that is no guest (there is none yet).
//! - *transmitq*, *receiveq*: the virtio names, from the **guest's** view. *controlq*: the ring by
//!   which a driver sends commands. *descriptor, chain, head*: as in virtio.
//! - *rx*, *tx*: from the **switch's** view. A frame received (rx) comes out of a transmitq.
//! - *ingress*, *egress*: the port that a frame comes from, and a port that it goes to.
//! - *kick*: a notification from driver to device. *call*: one from device to driver.
//! - *claim, fill, commit, publish*: the steps of a delivery into a receiveq ([`virtio::claim`]).
//! - *burst*: up to 64 frames handled together. *pass*: one turn of the poll loop.
//! - *verdict*: unicast, flood or drop. *FDB*: the forwarding data base, from addresses to ports.
//! - *window*: a checked place in guest memory, with its length.
//! - *topology*: the snapshot that poll threads work with. *generation*: the number of a topology,
//!   or of a port in its slot. *publish*: control makes a new topology current. *adopt*: a poll
//!   thread begins to work with it. *acknowledge*: a poll thread tells that it has let go of the
//!   topology before. *retire*: take a topology out of use.
//! - *observer*: a capture, trace or mirror. *recorder*: a poll thread's part that writes records
//!   for observers. *feed*: one poll thread's part of one observer: a buffer that this thread alone
//!   writes, with counters. *writer*: the writing end of a feed.
//! - *steer*: choose the receive queue of a frame by the hash of the frame's flow.
//!
//! "virtio" with a section number is OASIS VIRTIO 1.2, July 2022. "vhost-user" is QEMU's
//! `docs/interop/vhost-user.rst` of version 7.2, cited by the names of its sections.

// Tests share the benches' rig, which names the crate as everybody outside does.
#[cfg(test)]
extern crate self as pollux;

pub mod api;
pub mod bench;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod frame;
pub mod log;
#[allow(unsafe_code)]
pub mod memory;
pub mod observe;
pub mod poll;
pub mod port;
#[cfg(test)]
mod random_tests;
pub mod stats;
pub mod switch;
pub mod sync;
#[allow(unsafe_code)]
pub mod sys;
pub mod topology;
pub mod vhost_user;
pub mod virtio;
pub mod wire;
