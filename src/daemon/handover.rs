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

    /// The thread that owns the queue now, or will own it next.
    pub(super) fn thread(self) -> usize {
        match self {
            Place::On(thread) | Place::Between { to: thread } => thread,
        }
    }

    /// Takes the queue from its owner, unless `to` owns it or will. Returns whether the queue
    /// moves. The caller must then publish the next view.
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
    /// Generation of the view in which nobody owns the queues, once it is published.
    generation: Option<u64>,
}

impl HandOver {
    /// A hand-over to the thread `to`, not published yet.
    pub(super) fn new(to: usize) -> Self {
        HandOver {
            to,
            generation: None,
        }
    }

    /// Notes that a view was published after the queues had left. Only the first one counts.
    pub(super) fn published(&mut self, generation: u64) {
        self.generation.get_or_insert(generation);
    }

    /// Whether the old owners have let go; `reached` says whether all poll threads have
    /// acknowledged a generation.
    pub(super) fn is_free(&self, reached: impl FnOnce(u64) -> bool) -> bool {
        self.generation.is_some_and(reached)
    }

    /// Gives a free queue to the new owner, from the next view on. Returns false if the queue was
    /// sent elsewhere meanwhile. A newer hand-over then has the queue and waits for its own view.
    pub(super) fn arrive(&self, place: &mut Place) -> bool {
        let here = *place == (Place::Between { to: self.to });
        if here {
            *place = Place::On(self.to);
        }
        here
    }
}
