//! Helpers of the integration tests: real processes, each with a deadline on every wait and killed
//! when its value is dropped.
//!
//! - [`daemon`]: the `pollux` binary under test;
//! - [`backend`]: Pollux or, to check these tests themselves, one of the other backends in
//!   `benches/backends`;
//! - [`testpmd`]: DPDK's virtio-user driver, an independent frontend that needs no VM;
//! - [`process`]: what they share; [`park`]: a thread of a daemon, stopped;
//! - [`guest`], [`many`], [`traffic`]: scripted guests, also with many queues, and numbered frames
//!   between them in closed loops;
//! - [`linux`], [`netboot`]: a guest of QEMU, pings in a closed loop with it, and what its firmware
//!   loads it from;
//! - [`scene`]: bystanders that must notice nothing of what is done to a fourth port;
//! - [`waiters`]: what makes a call slow; [`user`]: somebody who is not root;
//! - [`events`], [`holdings`]: what the daemon tells of itself, and what it holds of the system;
//! - [`journey`]: pcap files sent through a backend by testpmd, and compared;
//! - [`recorder`]: the messages of a frontend, written down between it and the backend;
//! - [`capture`]: captures, and their files as tshark reads them;
//! - [`frames`]: numbered frames in pcap files, and their comparison after a journey.

// Each test binary compiles this module anew and uses its own part of it.
#![allow(dead_code)]

pub(crate) mod backend;
pub(crate) mod capture;
pub(crate) mod daemon;
pub(crate) mod events;
pub(crate) mod frames;
pub(crate) mod guest;
pub(crate) mod holdings;
pub(crate) mod journey;
pub(crate) mod linux;
pub(crate) mod many;
pub(crate) mod netboot;
pub(crate) mod park;
pub(crate) mod process;
pub(crate) mod recorder;
pub(crate) mod scene;
pub(crate) mod testpmd;
pub(crate) mod traffic;
pub(crate) mod user;
pub(crate) mod waiters;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A directory in `/tmp`, for the 107 bytes that a unix socket's path may have; removed on drop.
pub(crate) fn short_tempdir() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("plx-")
        .tempdir_in("/tmp")
        .expect("a temporary directory")
}

/// A directory in memory, which `/tmp` may not be; removed on drop.
pub(crate) fn memory_tempdir() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("plx-")
        .tempdir_in("/dev/shm")
        .expect("a directory in memory")
}

/// The socket of port `n` in `dir`, as the starters in `benches/backends` name it.
pub(crate) fn socket_path(dir: &Path, n: usize) -> PathBuf {
    dir.join(format!("p{n}.sock"))
}

/// CPUs for the backend's and for the client's polling thread: different ones where there are two.
pub(crate) fn cpus() -> (usize, usize) {
    let count = std::thread::available_parallelism().map_or(1, |n| n.get());
    (0, usize::from(count > 1))
}

/// How long anything may take that should happen soon: tests share their CPUs with each other.
const SOON: Duration = Duration::from_secs(20);

/// Gives the CPU to whoever is waited for.
pub(crate) fn pause() {
    std::thread::sleep(Duration::from_micros(50));
}

/// Waits until `condition` holds; fails past a generous deadline.
pub(crate) fn wait_for(what: &str, condition: impl FnMut() -> bool) {
    wait_for_within(SOON, what, condition);
}

/// The same with a deadline of one's own.
pub(crate) fn wait_for_within(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "{limit:?} were not enough for {what}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Ends a thread also when a check fails beside it.
#[derive(Debug)]
pub(crate) struct Stop<'a>(pub(crate) &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// `POLLUX_LONG=1`: the figures of the acceptance, else those that fit into every run.
pub(crate) fn long() -> bool {
    std::env::var_os("POLLUX_LONG").is_some_and(|value| value == "1")
}
