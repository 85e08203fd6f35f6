//! What a daemon holds of the operating system, and that it returns it.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::daemon::Daemon;

/// For a return; the API's helpers end some seconds after a request.
const LIMIT: Duration = Duration::from_secs(40);

/// What the daemon holds: descriptors, threads, mappings of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Holdings {
    pub(crate) fds: usize,
    threads: usize,
    pub(crate) mappings: usize,
}

impl Holdings {
    pub(crate) fn of(daemon: &Daemon) -> Holdings {
        let proc = PathBuf::from(format!("/proc/{}", daemon.pid()));
        let count = |name: &str| fs::read_dir(proc.join(name)).expect("its /proc").count();
        let maps = fs::read_to_string(proc.join("maps")).expect("its /proc");
        Holdings {
            fds: count("fd"),
            threads: count("task"),
            mappings: maps.lines().filter(|l| l.contains("pollux-guest")).count(),
        }
    }

    /// Waits until the daemon holds no more than this again.
    pub(crate) fn wait_for_return(self, daemon: &Daemon) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let now = Holdings::of(daemon);
            if now.fds <= self.fds && now.threads <= self.threads && now.mappings == self.mappings {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "the daemon holds {now:?}, before it was {self:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
