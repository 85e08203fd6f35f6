//! Helpers of the integration tests: real processes, each with a deadline on every wait and killed
//! when its value is dropped.
//!
//! - [`daemon`]: the `pollux` binary under test;
//! - [`backend`]: Pollux or, to check these tests themselves, one of the other backends in
//!   `benches/backends`;
//! - [`testpmd`]: DPDK's virtio-user driver, an independent frontend that needs no VM;
//! - [`process`]: what they share;
//! - [`frames`]: numbered frames in pcap files, and their comparison after a journey.

// Each test binary compiles this module anew and uses its own part of it.
#![allow(dead_code)]

pub(crate) mod backend;
pub(crate) mod daemon;
pub(crate) mod frames;
pub(crate) mod process;
pub(crate) mod testpmd;

use std::path::{Path, PathBuf};

/// A directory in `/tmp`, for the 107 bytes that a unix socket's path may have; removed on drop.
pub(crate) fn short_tempdir() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("plx-")
        .tempdir_in("/tmp")
        .expect("a temporary directory")
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
