//! (d) Scenarios of a session against the removal of its port; see `removal.rs`.

use crate::explore;
use crate::generated::production::removal;

/// What control does wrong on purpose; errors in `mailbox.rs` itself are files under `mutants`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// It applies what it took out before the removal.
    StaleTurn,
}

#[test]
fn a_removed_port_does_not_come_back() {
    explore(2, || removal::remove(Fault::None));
}

#[test]
fn rings_that_were_stopped_are_left_alone() {
    explore(2, removal::stop);
}
