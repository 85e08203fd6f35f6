//! What a daemon holds of the operating system, and that it returns it.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

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

/// Numbers of the daemon's descriptors.
pub(crate) fn descriptors(daemon: &Daemon) -> BTreeSet<u64> {
    let all = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("its /proc");
    let names = all.map(|entry| entry.expect("its entries").file_name());
    names
        .map(|name| name.to_string_lossy().parse().expect("a number"))
        .collect()
}

/// Connections of the API that the daemon has not closed yet; it closes them some time after their
/// clients have ended.
pub(crate) fn api_connections(daemon: &Daemon) -> usize {
    // Flag of a socket that listens, `__SO_ACCEPTCON`.
    const LISTENS: &str = "00010000";
    let path = daemon.dir().join("api.sock");
    let path_text = path.to_str().expect("UTF-8");
    // Names of others' sockets may be of any bytes.
    let sockets = fs::read("/proc/net/unix").expect("sockets");
    let sockets = String::from_utf8_lossy(&sockets);
    let ours = sockets.lines().filter(|l| l.ends_with(path_text));
    ours.filter(|l| l.split_whitespace().nth(3) != Some(LISTENS))
        .count()
}

/// Sets how many descriptors the daemon may have; `None` for as many as ever.
pub(crate) fn limit_descriptors(daemon: &Daemon, limit: Option<u64>) {
    let pid = Pid::from_raw(i32::try_from(daemon.pid()).expect("a PID"));
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = limit.or(maximum);
    prlimit(pid, Resource::Nofile, Rlimit { current, maximum }).expect("a limit");
}
