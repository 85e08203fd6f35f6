//! Deliberate mistakes in the code of packed rings and their records. The tests must find every
//! single one. A simulation of killed processes that does not find them proves nothing.
//!
//! The mistakes exist under `cfg(test)` only. In a production build [`mutant!`](super) is the
//! constant `false`.

use std::cell::Cell;

/// One mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mutant {
    /// The record never says that a run is being published.
    NoRun,
    /// The record says that the run is over before the ring is written.
    EarlyEnd,
    /// The record has the run one descriptor too short.
    ShortRun,
    /// The record loses the wrap counter of the place where a run begins.
    BeginWithoutWrap,
    /// The record loses the wrap counter of the place where a run ended.
    EndWithoutWrap,
    /// A note has no length.
    NoteWithoutLength,
    /// A note has the id of another buffer.
    NoteOfAnother,
    /// The driver sees a run's first element before the others.
    FirstElementFirst,
    /// A run is written again although the driver has seen it.
    AlwaysAgain,
    /// A run that the driver has not seen is not written again.
    NeverAgain,
    /// After a run that the driver has seen, the next process goes on at the start of the run.
    RunForgotten,
    /// A ring that its driver has cleared goes on where its record says.
    ClearedBelieved,
    /// Notes are believed whatever they say.
    NotesBelieved,
    /// The position that a start has found is not recorded.
    StartUnrecorded,
    /// A ring without an event index is not marked as used by a device.
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

/// Whether the calling thread makes this mistake.
pub(super) fn is(mutant: Mutant) -> bool {
    MADE.get() == Some(mutant)
}

/// Sets the mistake that the calling thread makes from now on; `None` for no mistake.
pub(super) fn make(mutant: Option<Mutant>) {
    MADE.set(mutant);
}
