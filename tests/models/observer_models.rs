//! (e) Scenarios of an observer's life; see `observers.rs`.

use crate::explore;
use crate::generated::production::observers;

/// What control does, one after the other, while poll threads work and a client reads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The observer comes.
    Attach,
    /// It goes.
    Remove,
    /// The first transmit queue goes to this poll thread.
    Move(usize),
    /// The first poll thread ends, and another one takes its number over.
    Replace,
}

/// An error that is put in on purpose; those in the production files are copies under `mutants`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// All poll threads write into the feed of the first.
    OneFeed,
}

#[derive(Clone, Copy)]
pub struct Scenario {
    pub steps: &'static [Step],
    /// Poll threads, each of which has a transmit queue.
    pub threads: usize,
    /// Views that each of them works with before it sleeps for good.
    pub turns: usize,
    /// Looks of the client while the others work. The rest of its looks come later.
    pub looks: usize,
    /// It is killed after them.
    pub killed: bool,
    pub fault: Fault,
}

/// One poll thread and a client.
pub const ONE: Scenario = Scenario {
    steps: &[Step::Attach, Step::Remove],
    threads: 1,
    turns: 2,
    looks: 2,
    killed: false,
    fault: Fault::None,
};

/// Two poll threads.
pub const TWO: Scenario = Scenario { threads: 2, ..ONE };

/// A transmit queue changes its poll thread, and its frames the feed.
pub const MOVES: Scenario = Scenario {
    steps: &[Step::Attach, Step::Move(1), Step::Remove],
    looks: 1,
    ..TWO
};

/// A poll thread ends, and another one goes on with its feeds.
pub const REPLACED: Scenario = Scenario {
    steps: &[Step::Attach, Step::Replace, Step::Remove],
    turns: 1,
    ..ONE
};

#[test]
fn an_observer_comes_and_goes_under_one_poll_thread() {
    explore(3, || observers::run(&ONE));
}

#[test]
fn an_observer_comes_and_goes_under_two_poll_threads() {
    explore(1, || observers::run(&TWO));
}

#[test]
fn an_observer_whose_client_is_killed() {
    for looks in [0, 1] {
        let scenario = Scenario {
            looks,
            killed: true,
            ..ONE
        };
        explore(2, move || observers::run(&scenario));
    }
}

#[test]
fn an_observer_while_a_transmit_queue_moves() {
    explore(1, || observers::run(&MOVES));
}

#[test]
fn an_observer_while_a_poll_thread_is_replaced() {
    explore(2, || observers::run(&REPLACED));
}
