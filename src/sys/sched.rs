//! How much a thread ran, and how long it waited for its CPU.
//!
//! A poll thread that waits was not alone on its CPU: its guests see that as latency, so the control
//! thread watches it.

use std::io;
use std::time::Duration;

/// Times of one thread since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadTimes {
    /// Nanoseconds on a CPU.
    pub run_ns: u64,
    /// Nanoseconds ready to run, while something else ran.
    pub wait_ns: u64,
    /// How often it was put on a CPU.
    pub slices: u64,
}

/// The calling thread's id, as /proc and `top -H` show it.
pub fn thread_id() -> u32 {
    rustix::thread::gettid()
        .as_raw_nonzero()
        .get()
        .unsigned_abs()
}

/// The times of a thread of this process.
pub fn thread_times(id: u32) -> io::Result<ThreadTimes> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{id}/schedstat"))?;
    parse(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn parse(text: &str) -> Option<ThreadTimes> {
    let mut numbers = text.split_ascii_whitespace().map(|n| n.parse().ok());
    Some(ThreadTimes {
        run_ns: numbers.next()??,
        wait_ns: numbers.next()??,
        slices: numbers.next()??,
    })
}

/// How long the calling thread ran. A system call: not for every pass.
pub fn own_cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let nanos = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(time.tv_sec.unsigned_abs(), nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_thread_has_run() {
        let before = own_cpu_time();
        while own_cpu_time() - before < Duration::from_millis(5) {}
        let times = thread_times(thread_id()).unwrap();
        assert!(times.run_ns > 1_000_000, "{times:?}");
        assert!(times.slices > 0);
    }

    #[test]
    fn a_thread_that_does_not_exist_is_an_error() {
        assert!(thread_times(u32::MAX).is_err());
    }

    #[test]
    fn the_kernel_s_line_is_understood() {
        let times = parse("12 34 5\n").unwrap();
        assert_eq!((times.run_ns, times.wait_ns, times.slices), (12, 34, 5));
        assert_eq!(parse("12 34"), None);
        assert_eq!(parse("a b c"), None);
    }
}
