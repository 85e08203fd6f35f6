//! CPU time, page faults and waits of a thread.
//!
//! A poll thread reads its own CPU time once a second and after a long pass. The difference to the
//! clock is the time in which the thread had no CPU. Its guests see that time as latency, so the
//! thread counts it.

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

/// What the calling thread has met since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Page faults.
    pub faults: u64,
    /// Times that it waited for something: in a page fault too, if that had to wait.
    pub waits: u64,
    /// Times that the kernel gave its CPU to another thread.
    pub preemptions: u64,
}

/// What the calling thread has met. A system call: not for every pass.
pub fn own_usage() -> Usage {
    // SAFETY: all zeroes is a valid rusage.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is valid for writing. With these arguments the call does not fail.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    let count = |n: libc::c_long| u64::try_from(n).unwrap_or(0);
    Usage {
        faults: count(usage.ru_minflt) + count(usage.ru_majflt),
        waits: count(usage.ru_nvcsw),
        preemptions: count(usage.ru_nivcsw),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_and_waits_of_the_thread_are_counted() {
        const PAGES: usize = 64;
        let before = own_usage();
        // More than the allocator keeps: new pages.
        let mut memory = vec![0_u8; 64 << 20];
        (0..PAGES).for_each(|page| memory[page << 19] = 1);
        let touched = own_usage();
        assert_eq!(std::hint::black_box(memory)[0], 1);
        assert!(
            touched.faults >= before.faults + PAGES as u64,
            "{touched:?}"
        );
        std::thread::sleep(Duration::from_millis(1));
        assert!(own_usage().waits > touched.waits);
    }

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
