//! Deliberate mistakes in the code of packed rings and their records, of which the tests must find
//! every single one: a simulation of killed processes that does not find them proves nothing.
//!
//! It exists under `cfg(test)` only; in a production build [`mutant!`](super) is the constant
//! `false`.

use std::cell::Cell;

/// One mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mutant {
    /// The record never says that a run is being published.
    NoRun,
    /// It says that the run is over before the ring is written.
    EarlyEnd,
    /// It has the run one descriptor too short.
    ShortRun,
    /// It loses the wrap counter of where a run begins.
    BeginWithoutWrap,
    /// It loses the wrap counter of where a run ended.
    EndWithoutWrap,
    /// The length in a note is not what was written.
    NoteWithoutLength,
    /// The buffer's id in a note is another one's.
    NoteOfAnother,
    /// The driver sees a run's first element before the others.
    FirstElementFirst,
    /// A run is written again although the driver has seen it.
    AlwaysAgain,
    /// A run that the driver has not seen is left as it is.
    NeverAgain,
    /// A run that the driver has seen is taken for one that never was.
    RunForgotten,
    /// A ring that its driver has cleared is believed to be where its record says.
    ClearedBelieved,
    /// Notes are believed whatever they say.
    NotesBelieved,
    /// What a start has found is not recorded.
    StartUnrecorded,
    /// A ring without an event index does not show that a device has been there.
    StartUnmarked,
    /// A new record does not say where its ring starts.
    NewAtZero,
}

pub(super) const ALL: [Mutant; 16] = [
    Mutant::NoRun,
    Mutant::EarlyEnd,
    Mutant::ShortRun,
    Mutant::BeginWithoutWrap,
    Mutant::EndWithoutWrap,
    Mutant::NoteWithoutLength,
    Mutant::NoteOfAnother,
    Mutant::FirstElementFirst,
    Mutant::AlwaysAgain,
    Mutant::NeverAgain,
    Mutant::RunForgotten,
    Mutant::ClearedBelieved,
    Mutant::NotesBelieved,
    Mutant::StartUnrecorded,
    Mutant::StartUnmarked,
    Mutant::NewAtZero,
];

thread_local! {
    static MADE: Cell<Option<Mutant>> = const { Cell::new(None) };
}

/// Whether this thread makes this mistake.
pub(super) fn is(mutant: Mutant) -> bool {
    MADE.get() == Some(mutant)
}

/// Makes a mistake on this thread from now on, or none any more.
pub(super) fn make(mutant: Option<Mutant>) {
    MADE.set(mutant);
}
