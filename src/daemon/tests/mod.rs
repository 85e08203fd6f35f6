//! The registry under random operations, against lists of ports, queues and views (`model`): what is published, who owns
//! which queue, which answers come when, and that every device goes when nobody can reach it any more, on the reaper.
//!
//! Poll threads are scripted: the test takes views over and falls asleep in their place. Every run prints its seed;
//! `POLLUX_SEED` repeats it, and `POLLUX_LONG=1` takes more.

mod model;
mod script;
mod threads;

use crate::random_tests::with_seeds;
use script::Script;

use super::registry::MAX_THREADS;

/// Operations of one run.
const STEPS: u32 = 400;

#[test]
fn whatever_is_registered_posted_moved_and_removed_the_views_are_as_a_list_says() {
    with_seeds(10, |seed| {
        let mut script = Script::new(seed);
        for step in 0..STEPS {
            script.step(step);
            if step % 100 == 99 {
                script.settle();
            }
        }
        script.end();
    });
}
