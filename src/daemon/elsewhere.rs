//! Keeps threads that do not poll off the CPUs of poll threads, if there are other CPUs. A poll
//! thread that loses its CPU to a session stops serving all its guests.
//!
//! The masks of all threads of the process are set from here. A thread inherits the mask of its
//! creator, and poll CPUs change with poll threads. So this works only for a process that is
//! nothing but the switch.

use std::collections::HashSet;
use std::io;
use std::path::Path;

use crate::sys::affinity;

/// Upper bound of passes over the list of threads. A thread started during a pass by one that had
/// not been restricted yet inherits the old mask. The next pass finds it.
const LISTINGS: usize = 8;

/// The CPUs that the process may use.
#[derive(Debug)]
pub(super) struct Elsewhere(Vec<usize>);

impl Elsewhere {
    /// Takes the CPUs allowed to the calling thread as those of the process.
    pub(super) fn new() -> io::Result<Self> {
        affinity::allowed_cpus().map(Elsewhere)
    }

    /// Returns the CPUs that are not in `taken`, or all CPUs if none would be left.
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

    /// Keeps all threads of the process except `pinned` off the CPUs in `taken`.
    pub(super) fn keep_off(&self, taken: &HashSet<usize>, pinned: &HashSet<u32>) {
        let rest = self.rest(taken);
        for _ in 0..LISTINGS {
            let mut any = false;
            for thread in threads().filter(|thread| !pinned.contains(thread)) {
                // Errors are ignored. The thread may have ended, or others may have forbidden it
                // these CPUs. It then keeps its mask.
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

/// The thread ids of this process. Empty if `/proc` is not mounted.
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
