//! (a) Scenarios of claim, fill, commit, publish; see `delivery.rs`.

use crate::explore;
use crate::generated::production::delivery;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Split,
    Packed,
}

/// An error that is put in on purpose; those in `claim.rs` itself are files under `mutants`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Commit before fill.
    CommitFirst,
    /// `used.idx` is stored without release.
    RelaxedIndex,
    /// Packed: flags are stored without release.
    RelaxedFlags,
    /// Packed: a run's first flags are not written last.
    FirstFlagsFirst,
    /// The event is tested against the publisher's own claims only.
    OwnRange,
}

#[derive(Clone, Copy)]
pub struct Scenario {
    pub kind: Kind,
    pub size: u64,
    pub start: u64,
    /// By producer, buffers of each frame.
    pub producers: &'static [&'static [u64]],
    /// Times that the driver looks before it gives up without sleeping.
    pub driver_rounds: usize,
    /// The driver offers more than it may: buffers that were not returned, again and again.
    pub hasty: bool,
    pub fault: Fault,
}

/// Two producers with a frame of two buffers and one of one, a ring of four, a driver that sleeps.
pub const TWO: Scenario = Scenario {
    kind: Kind::Split,
    size: 4,
    start: 2,
    producers: &[&[2], &[1]],
    driver_rounds: 2,
    hasty: false,
    fault: Fault::None,
};

/// Two producers that go round a ring of two.
pub const LAPS: Scenario = Scenario {
    size: 2,
    producers: &[&[1, 1], &[1]],
    ..TWO
};

/// Three producers, one frame each.
pub const THREE: Scenario = Scenario {
    producers: &[&[1], &[1], &[1]],
    driver_rounds: 1,
    ..TWO
};

/// Two producers go round the ring, and the driver offers buffers that were not returned.
pub const HASTY: Scenario = Scenario {
    hasty: true,
    driver_rounds: 0,
    ..LAPS
};

pub fn packed(scenario: Scenario) -> Scenario {
    Scenario {
        kind: Kind::Packed,
        ..scenario
    }
}

#[test]
fn two_producers_and_a_driver_split() {
    explore(3, || delivery::run(&TWO));
}

#[test]
fn two_producers_go_round_the_ring_split() {
    explore(2, || delivery::run(&LAPS));
}

#[test]
fn three_producers_and_a_driver_split() {
    explore(1, || delivery::run(&THREE));
}

#[test]
fn two_producers_and_a_driver_packed() {
    explore(3, || delivery::run(&packed(TWO)));
}

#[test]
fn two_producers_go_round_the_ring_packed() {
    explore(2, || delivery::run(&packed(LAPS)));
}

#[test]
fn three_producers_and_a_driver_packed() {
    explore(1, || delivery::run(&packed(THREE)));
}

#[test]
fn a_driver_that_offers_too_much_split() {
    explore(2, || delivery::run(&HASTY));
}

#[test]
fn a_driver_that_offers_too_much_packed() {
    explore(2, || delivery::run(&packed(HASTY)));
}
