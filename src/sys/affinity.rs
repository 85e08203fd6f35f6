//! Pinning threads to CPUs, and the CPUs that a thread may run on.

use std::io;
use std::path::Path;

/// Highest CPU number that is supported, plus one. The kernel's limit on the largest x86-64 builds
/// is 8192.
pub const MAX_CPUS: usize = 4096;

const WORDS: usize = MAX_CPUS / 64;

/// Why a thread could not be pinned.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The machine has no such CPU, or the CPU is offline.
    #[error("CPU {cpu} does not exist or is offline")]
    NoSuchCpu {
        /// The CPU asked for.
        cpu: usize,
    },
    /// The CPU exists, but this process may not use it.
    #[error("CPU {cpu} is not allowed for this process (cpuset of its cgroup or container)")]
    NotAllowed {
        /// The CPU asked for.
        cpu: usize,
    },
    /// Any other error.
    #[error("thread cannot be pinned to CPU {cpu}")]
    Os {
        /// The CPU asked for.
        cpu: usize,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Pins the calling thread to one CPU.
pub fn pin(cpu: usize) -> Result<(), PinError> {
    if cpu >= MAX_CPUS {
        return Err(PinError::NoSuchCpu { cpu });
    }
    let mut mask = [0u64; WORDS];
    mask[cpu / 64] = 1 << (cpu % 64);
    // SAFETY: `mask` is valid for reading its own size; 0 means the calling thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&mask), mask.as_ptr().cast()) };
    if result == 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    // EINVAL means that the CPU is offline or not allowed, so /sys is asked which.
    Err(match source.raw_os_error() {
        Some(libc::EINVAL) if !is_online(cpu) => PinError::NoSuchCpu { cpu },
        Some(libc::EINVAL) => PinError::NotAllowed { cpu },
        _ => PinError::Os { cpu, source },
    })
}

fn is_online(cpu: usize) -> bool {
    match std::fs::read_to_string("/sys/devices/system/cpu/online") {
        Ok(list) => list_contains(list.trim(), cpu),
        // Without /sys the CPU is assumed to exist.
        Err(_) => true,
    }
}

/// Whether a list in the kernel's form (`0-3,8`) contains `number`.
fn list_contains(list: &str, number: usize) -> bool {
    list.split(',').any(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.parse::<usize>(), last.parse::<usize>()) {
            (Ok(first), Ok(last)) => (first..=last).contains(&number),
            _ => false,
        }
    })
}

/// Returns the CPUs that the calling thread may run on, in ascending order.
pub fn allowed_cpus() -> io::Result<Vec<usize>> {
    allowed_cpus_of(0)
}

/// Returns the CPUs that a thread may run on, by the thread's id; 0 is the calling thread.
pub fn allowed_cpus_of(thread: u32) -> io::Result<Vec<usize>> {
    let thread = libc::pid_t::try_from(thread).unwrap_or(libc::pid_t::MAX);
    let mut mask = [0u64; WORDS];
    // SAFETY: `mask` is valid for writing its own size.
    let result =
        unsafe { libc::sched_getaffinity(thread, size_of_val(&mask), mask.as_mut_ptr().cast()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let is_set = |cpu: &usize| mask[cpu / 64] >> (cpu % 64) & 1 == 1;
    Ok((0..MAX_CPUS).filter(is_set).collect())
}

/// Lets a thread, by its id, run on `cpus` only.
pub fn restrict(thread: u32, cpus: &[usize]) -> io::Result<()> {
    let thread = libc::pid_t::try_from(thread).unwrap_or(libc::pid_t::MAX);
    let mut mask = [0u64; WORDS];
    for cpu in cpus {
        if let Some(word) = mask.get_mut(cpu / 64) {
            *word |= 1 << (cpu % 64);
        }
    }
    // SAFETY: `mask` is valid for reading its own size.
    let result =
        unsafe { libc::sched_setaffinity(thread, size_of_val(&mask), mask.as_ptr().cast()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Returns the NUMA node of a CPU; `None` on machines without nodes and for CPUs that do not exist.
pub fn numa_node(cpu: usize) -> Option<usize> {
    node_in(Path::new(&format!("/sys/devices/system/cpu/cpu{cpu}")))
}

/// Returns the node after which a link in a CPU's directory is named.
fn node_in(directory: &Path) -> Option<usize> {
    std::fs::read_dir(directory).ok()?.find_map(|entry| {
        let name = entry.ok()?.file_name();
        name.to_str()?.strip_prefix("node")?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_pinned_to_each_allowed_cpu() {
        let pinned = std::thread::spawn(|| {
            let cpus = allowed_cpus().unwrap();
            assert!(!cpus.is_empty());
            for cpu in cpus {
                pin(cpu).unwrap();
                assert_eq!(allowed_cpus().unwrap(), [cpu]);
            }
        });
        pinned.join().unwrap();
    }

    #[test]
    fn a_thread_is_restricted_from_outside() {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(crate::sys::sched::thread_id()).unwrap();
            let _ = ended.recv();
        });
        let id = told.recv().unwrap();
        let all = allowed_cpus_of(id).unwrap();
        for cpus in [&all[..1], &all[all.len() - 1..], &all] {
            restrict(id, cpus).unwrap();
            assert_eq!(allowed_cpus_of(id).unwrap(), cpus);
        }
        assert!(restrict(id, &[]).is_err());
        drop(end);
        thread.join().unwrap();
    }

    #[test]
    fn a_cpu_that_does_not_exist_is_named() {
        for cpu in [MAX_CPUS - 1, MAX_CPUS, usize::MAX] {
            let refused = pin(cpu).unwrap_err();
            assert!(matches!(refused, PinError::NoSuchCpu { cpu: c } if c == cpu));
        }
    }

    #[test]
    fn lists_of_the_kernel_are_understood() {
        for (list, number, expected) in [
            ("0-3,8", 3, true),
            ("0-3,8", 8, true),
            ("0-3,8", 4, false),
            ("0", 0, true),
            ("", 0, false),
        ] {
            assert_eq!(list_contains(list, number), expected, "{list} {number}");
        }
    }

    #[test]
    fn the_node_is_read_from_the_link() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(node_in(dir.path()), None);
        std::fs::create_dir(dir.path().join("node_of_nothing")).unwrap();
        std::fs::create_dir(dir.path().join("node3")).unwrap();
        assert_eq!(node_in(dir.path()), Some(3));
        assert_eq!(numa_node(usize::MAX), None);
    }
}
