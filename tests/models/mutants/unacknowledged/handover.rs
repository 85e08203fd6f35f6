//! Who owns a transmit queue, and the two steps in which it changes hands (see `placement` for the
//! reason). Decisions only, so that the model checker runs this file unchanged (`tests/models`).
//!
//! First a topology is published in which nobody owns the queue. When every poll thread has
//! acknowledged that topology, the next one is published, in which the new thread owns the queue.

/// The owner of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A poll thread.
    On(usize),
    /// Nobody, until the old owner is known to have let go.
    Between {
        /// The next owner.
        to: usize,
    },
}

impl Place {
    /// The thread that owns the queue now.
    pub(super) fn owner(self) -> Option<usize> {
        match self {
            Place::On(thread) => Some(thread),
            Place::Between { .. } => None,
        }
    }

    /// The thread that owns it or will.
    pub(super) fn thread(self) -> usize {
        match self {
            Place::On(thread) | Place::Between { to: thread } => thread,
        }
    }

    /// Takes the queue from its owner. Whether it has to move at all; the next view must be
    /// published then.
    pub(super) fn leave_for(&mut self, to: usize) -> bool {
        let moves = self.thread() != to;
        if moves {
            *self = Place::Between { to };
        }
        moves
    }
}

/// A hand-over of some queues that have [left](Place::leave_for) for one thread.
#[derive(Clone, Copy, Debug)]
pub(super) struct HandOver {
    to: usize,
    /// The view in which nobody owns them, once it is published.
    generation: Option<u64>,
}

impl HandOver {
    /// Not published yet.
    pub(super) fn new(to: usize) -> Self {
        HandOver {
            to,
            generation: None,
        }
    }

    /// A view was published after the queues had left.
    pub(super) fn published(&mut self, generation: u64) {
        self.generation.get_or_insert(generation);
    }

    /// Whether the old owners have let go; `reached` says whether all poll threads have
    /// acknowledged a generation.
    pub(super) fn is_free(&self, reached: impl FnOnce(u64) -> bool) -> bool {
        self.generation.map(reached).is_some()
    }

    /// Gives a free queue to the new owner, from the next view on. False if it was sent elsewhere
    /// meanwhile: that is another hand-over's, which waits for a view of its own.
    pub(super) fn arrive(&self, place: &mut Place) -> bool {
        let here = *place == (Place::Between { to: self.to });
        if here {
            *place = Place::On(self.to);
        }
        here
    }
}
