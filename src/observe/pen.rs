//! Who has the pen of a feed, and when a reader has all that was written with it. Nothing here is
//! about what is written, so that the model checker runs this file unchanged (`tests/models`).
//!
//! A poll thread takes its pens once it has borrowed a topology, and a pen that it takes borrows
//! from that topology. So each pen is in its place again before the thread acknowledges another
//! topology, sleeps, or ends. From the acknowledgement on nobody has a pen of an observer that
//! left. Such a pen goes with its observer, wherever the last reference to the observer is dropped,
//! which is never on a poll thread. A thread that gets the number of a thread that ended finds that
//! thread's pens.

use crate::sync::{AtomicCell, OnceLock};

/// Where the pen of a feed lies while nobody writes.
pub struct Place<P>(AtomicCell<Option<Box<P>>>);

/// What a poll thread has found there; it lays it back when it lets go of this.
pub struct Held<'l, P> {
    place: &'l Place<P>,
    /// The pen. None where another thread of the same number has it, which cannot be, and while it
    /// is lent.
    pub pen: Option<Box<P>>,
}

impl<P> Place<P> {
    /// A place with its pen.
    pub fn new(pen: P) -> Self {
        Place(AtomicCell::new(Some(Box::new(pen))))
    }

    /// Takes the pen: an exchange of one word.
    pub fn take(&self) -> Held<'_, P> {
        Held {
            place: self,
            pen: self.0.take(),
        }
    }
}

impl<P> Drop for Held<'_, P> {
    fn drop(&mut self) {
        if let Some(pen) = self.pen.take() {
            self.place.0.store(Some(pen));
        }
    }
}

impl<P> std::fmt::Debug for Place<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Place")
    }
}

impl<P> std::fmt::Debug for Held<'_, P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Held({})",
            if self.pen.is_some() {
                "a pen"
            } else {
                "nothing"
            }
        )
    }
}

/// Why an observer has ended, and the generation of the first topology without it. The first reason
/// stays.
#[derive(Debug, Default)]
pub struct Ending(OnceLock<(String, u64)>);

impl Ending {
    /// It was taken out with this generation, which is published.
    pub fn set(&self, reason: String, generation: u64) {
        let _ = self.0.set((reason, generation));
    }

    /// Whether it was taken out; poll threads may still write to it.
    pub fn is_set(&self) -> bool {
        self.0.get().is_some()
    }

    /// Why it has ended, once nobody writes to it any more: `reached` says whether all poll threads
    /// have acknowledged a generation.
    pub fn settled(&self, reached: impl FnOnce(u64) -> bool) -> Option<&str> {
        let (reason, generation) = self.0.get()?;
        reached(*generation).then_some(reason)
    }
}

/// One look of a reader: it takes what was written, and learns whether that was all. `end` says
/// whether nobody writes any more, and `take` takes records, all there are unless it says that
/// there may be more.
pub fn take_to_the_end<S, E>(
    stream: &mut S,
    end: impl FnOnce(&mut S) -> Option<E>,
    take: impl FnOnce(&mut S) -> bool,
) -> Option<E> {
    // Looked at before the records are: what was written until the end is then among them.
    let end = end(stream);
    let more = take(stream);
    end.filter(|_| !more)
}
