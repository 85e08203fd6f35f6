//! CPU time, page faults and waits of a thread.
//!
//! A poll thread reads its own CPU time once a second and after a long pass. The difference to the
//! clock is the time in which the thread had no CPU. Its guests see that time as latency, so the
//! thread counts it.

use std::time::Duration;

/// The calling thread's id, as /proc and `top -H` show it.
pub fn thread_id() -> u32 {
    rustix::thread::gettid()
        .as_raw_nonzero()
        .get()
        .unsigned_abs()
}

/// How long the calling thread ran. A system call: not for every pass.
pub fn own_cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let nanos = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(time.tv_sec.unsigned_abs(), nanos)
}

/// Page faults and waits of the calling thread since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Page faults.
    pub faults: u64,
    /// Times that the thread waited for something, page faults that had to wait included.
    pub waits: u64,
    /// Times that the kernel gave its CPU to another thread.
    pub preemptions: u64,
}

/// Returns page faults and waits of the calling thread. This is a system call, so not for every
/// pass.
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
    }
}
