//! The registry under random operations, against lists of ports, queues and views (`model`): what
//! is published, who owns which queue, which answers come when, and that every device goes when
//! nobody can reach it any more, on the reaper.
//!
//! Poll threads are scripted: the test takes views over and falls asleep in their place. Every run
//! prints its seed; `POLLUX_SEED` repeats it, and `POLLUX_LONG=1` takes more.

mod mirrors;
mod model;
mod script;
mod slow;
mod threads;

use crossbeam_channel::bounded;

use crate::api::{ControlError, What};
use crate::config::ObserveDirection;
use crate::observe::{Filter, Kind, Observer, ObserverSpec};
use crate::random_tests::with_seeds;
use script::Script;

use super::observers::ObserverRecord;
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

#[test]
fn a_move_and_an_observer_that_are_pending_when_their_port_goes_are_told_so() {
    let mut script = Script::new(0);
    let name = "victim".to_string();
    script.register_as(name.clone(), false);
    let to = 1 - script.model.ports[0].owners[0].thread();
    let (reply, moved) = bounded(1);
    let names = std::slice::from_ref(&name);
    let prospect = script.registry.prospect(Some(names), None).unwrap();
    let ordered = script.registry.move_queues(&name, None, to, Some(reply));
    assert!(ordered.is_ok());
    script.unregister_as(&name);
    // Its name and its slot are another port's, which neither of the two is about.
    script.register_as(name.clone(), false);
    let spec = ObserverSpec {
        kind: Kind::Drops,
        ports: prospect.ports.map(Vec::into_boxed_slice),
        direction: ObserveDirection::Both,
        snaplen: 64,
        filter: Filter::default(),
    };
    let observed = script.registry.observe(ObserverRecord {
        name: "drops".to_string(),
        observer: Observer::with_reader(spec, std::iter::empty()).0,
        ports: names.to_vec(),
        to: None,
    });
    let gone = ControlError::Gone {
        what: What::Port(name.clone()),
    };
    let is_gone = |error: &ControlError| error.to_string() == gone.to_string();
    assert!(observed.is_err_and(|error| is_gone(&error)));
    script.registry.finish_moves();
    let answer = moved.try_recv().unwrap();
    assert!(answer.is_err_and(|error| is_gone(&error)));
}
