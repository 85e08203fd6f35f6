//! Threads that do not poll keep off the CPUs of poll threads, if there are other CPUs. A poll
//! thread that loses its CPU to a session stands still for all its guests.
//!
//! The masks are set from outside, for all threads of the process at once: a thread inherits its
//! maker's mask, and CPUs come and go with poll threads. So this is for a process that is nothing
//! but the switch.

use std::collections::HashSet;
use std::io;
use std::path::Path;

use crate::sys::affinity;

/// Listings of the threads until one brings nothing new. A thread that is made during the first by
/// one that was not looked at yet is in the second.
const LISTINGS: usize = 8;

/// The CPUs of this process, as they were given to it.
#[derive(Debug)]
pub(super) struct Elsewhere(Vec<usize>);

impl Elsewhere {
    /// What the calling thread may use is what the process may.
    pub(super) fn new() -> io::Result<Self> {
        affinity::allowed_cpus().map(Elsewhere)
    }

    /// The CPUs that are not `taken`; all of them, if that would be none.
    fn rest(&self, taken: &HashSet<usize>) -> Vec<usize> {
        let rest: Vec<usize> = self
            .0
            .iter()
            .copied()
            .filter(|cpu| !taken.contains(cpu))
            .collect();
        if rest.is_empty() {
            self.0.clone()
        } else {
            rest
        }
    }

    /// Keeps all threads of the process but `pinned` ones off the CPUs that are `taken`.
    pub(super) fn keep_off(&self, taken: &HashSet<usize>, pinned: &HashSet<u32>) {
        let rest = self.rest(taken);
        for _ in 0..LISTINGS {
            let mut any = false;
            for thread in threads().filter(|thread| !pinned.contains(thread)) {
                // It may have ended meanwhile, or somebody has forbidden it those CPUs: then it
                // stays where it is.
                if affinity::allowed_cpus_of(thread).is_ok_and(|cpus| cpus != rest) {
                    any |= affinity::restrict(thread, &rest).is_ok();
                }
            }
            if !any {
                return;
            }
        }
    }
}

/// The threads of this process; none where `/proc` is not there.
fn threads() -> impl Iterator<Item = u32> {
    let tasks = std::fs::read_dir(Path::new("/proc/self/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    tasks.filter_map(|task| task.file_name().to_str()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_what_is_not_taken_unless_that_is_nothing() {
        let elsewhere = Elsewhere(vec![0, 2, 5]);
        let rest = |taken: &[usize]| elsewhere.rest(&taken.iter().copied().collect());
        assert_eq!(rest(&[]), [0, 2, 5]);
        assert_eq!(rest(&[2, 3]), [0, 5]);
        assert_eq!(rest(&[5, 0, 2]), [0, 2, 5]);
    }
}
