//! (b), (c) Scenarios of publish, acknowledge, retire and of a moving transmit queue; see
//! `views.rs`.

use crate::explore;
use crate::generated::production::views;

/// What a reader does wrong on purpose; errors in `snapshot.rs` itself are files under `mutants`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum ReadFault {
    None,
    /// It looks at its view after it stored that it sleeps. (Safe code cannot: the borrow is
    /// exclusive.)
    KeepsItsBorrow,
}

/// What goes wrong on purpose when a queue moves.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum MoveFault {
    None,
    /// Sleeps after asking for kicks, without looking again.
    NoSecondLook,
}

#[test]
fn one_reader_two_publications() {
    explore(4, || views::publish_and_retire(1, 2, ReadFault::None));
}

#[test]
fn two_readers_two_publications() {
    explore(2, || views::publish_and_retire(2, 2, ReadFault::None));
}

#[test]
fn a_transmit_queue_moves() {
    explore(2, || views::hand_over(MoveFault::None, &[1]));
}

#[test]
fn a_transmit_queue_is_sent_back_on_its_way() {
    explore(2, || views::hand_over(MoveFault::None, &[1, 0]));
}

#[test]
fn a_transmit_queue_is_sent_elsewhere_on_its_way() {
    explore(1, || views::hand_over(MoveFault::None, &[1, 2]));
}
