//! What a packed ring needs to go on after its process was killed.
//!
//! Nothing in a packed ring says where the device stands. A used element overwrites only the first
//! slot of its chain, and the other slots go on looking available. So the position cannot be found
//! by looking, and QEMU, which knows only where the ring started, cannot tell it either. This
//! record can:
//!
//! ```text
//! words 0..8    whose record it is (vhost_user: ring, memory, what SET_VRING_BASE said)
//! word  8       slot and wrap counter of the published position; descriptors of the run that is
//!               being published, or 0
//! words 16..    by slot, the used element that is to be written there; for a chain of several
//!               descriptors, the word behind the element says how many
//! ```
//!
//! A record takes 128 bytes and 8 bytes a slot. It has no lap or sequence number of its own. The
//! flags in the ring, which the driver sees too, say which of the three cases below holds. The
//! identity tells another ring's record.
//!
//! The notes are what a packed ring needs anyway, because the publisher writes the elements of
//! other threads. What the record adds to the data path is two stores of one word a run: before the
//! first store to the ring, and after the last.
//!
//! A process that is killed stops between two of its stores. Then, for the run of the record:
//!
//! | the word says | the run's first head | so | and the next process |
//! |---|---|---|---|
//! | no run | – | nothing is half done | goes on there |
//! | a run | still available | its flags come last: the driver has seen nothing of the run | writes the run again, from the same notes |
//! | a run | used, or reused by the driver | the whole run is visible | goes on behind the run |
//!
//! Writing a run twice is the same as writing it once, because nobody touches its slots before its
//! first flags are there. Its frames were copied before it was committed. Frames in claims that
//! were not published are lost here. Their senders send them again, because their chains are
//! completed after publication.
//!
//! `redo_tests` kills the process at each of these stores, and makes deliberate mistakes that it
//! must find (`mutants`). No record can tell two things, and then the ring stands still until its
//! driver resets the device:
//!
//! - There is no record, because there was no memory for the file.
//! - A driver started anew while no process was there, and left the ring's memory as it was. No
//!   driver known does: a new ring is made of zeros.

use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use crate::memory::Words;

/// Number of words at the start that say whose record it is.
pub const IDENTITY: usize = 8;
/// Index of the word of position and run, which has a cache line of its own.
const RUN: usize = 8;
/// Index of the first note.
const NOTES: usize = 16;

/// The published position of a ring, and the run that was being published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Slot of the published position, with the wrap counter in bit 15.
    pub(super) place: u16,
    /// Number of descriptors of the run that was being published from `place` on; 0 without a run.
    pub(super) len: u16,
}

/// The record of one packed ring. Clones refer to one record.
#[derive(Clone, Debug)]
pub struct Redo {
    words: Words,
    resumes: bool,
}

impl Redo {
    /// Returns the number of words that the record of a ring of `size` entries takes.
    pub fn words(size: u16) -> usize {
        NOTES + usize::from(size)
    }

    /// Makes a record in private memory, for a ring whose record no other process will read.
    pub(super) fn private(size: u16) -> Self {
        Redo {
            words: Words::zeroed(Redo::words(size)),
            resumes: false,
        }
    }

    /// Makes a new record in `words`, which are as many as [`Redo::words`] says. The ring is to
    /// start at the slot and wrap counter `place`. The record names that place at once: a process
    /// that is killed before it has started the ring leaves its record, too.
    pub fn new(words: Words, identity: &[u64; IDENTITY], place: u16) -> Self {
        for (word, value) in words.iter().zip(identity) {
            word.store(*value, Ordering::Relaxed);
        }
        let place = if mutant!(NewAtZero) { 0 } else { place };
        words[RUN].store(place.into(), Ordering::Relaxed);
        Redo {
            words,
            resumes: false,
        }
    }

    /// Returns the record found in `words`, or `None` if the record is of another ring.
    pub fn found(words: Words, identity: &[u64; IDENTITY]) -> Option<Self> {
        let same = |(word, value): (&AtomicU64, &u64)| word.load(Ordering::Relaxed) == *value;
        words.iter().zip(identity).all(same).then_some(Redo {
            words,
            resumes: true,
        })
    }

    /// Whether an earlier process has left this record.
    pub(super) fn resumes(&self) -> bool {
        self.resumes
    }

    /// Returns the published position, and the run that was being published.
    pub(super) fn run(&self) -> Run {
        let word = self.words[RUN].load(Ordering::Relaxed);
        Run {
            place: word as u16,
            len: (word >> 16) as u16,
        }
    }

    /// Records that a run is about to be written to the ring: `len` descriptors from `place` on.
    /// Their notes must be complete.
    #[inline(always)]
    pub(super) fn begin(&self, place: u16, len: u16) {
        #[cfg(test)]
        let (place, len) = match () {
            () if mutant!(NoRun) => return,
            () if mutant!(BeginWithoutWrap) => (place & 0x7fff, len),
            () if mutant!(ShortRun) => (place, len - 1),
            () => (place, len),
        };
        let word = u64::from(place) | u64::from(len) << 16;
        // Release: this store stays behind those of the notes. The fence: the stores to the ring
        // stay behind this one. A process is killed between two instructions, so the order of
        // instructions is the order that counts, and only the compiler may change it.
        self.words[RUN].store(word, Ordering::Release);
        #[cfg(test)]
        crate::memory::probe::stored();
        compiler_fence(Ordering::SeqCst);
    }

    /// Records that everything before `place` is published. Release: this store stays behind those
    /// to the ring.
    #[inline(always)]
    pub(super) fn end(&self, place: u16) {
        #[cfg(test)]
        let place = if mutant!(EndWithoutWrap) {
            place & 0x7fff
        } else {
            place
        };
        self.words[RUN].store(u64::from(place), Ordering::Release);
        #[cfg(test)]
        crate::memory::probe::stored();
    }

    /// Returns the notes of used elements, by slot.
    #[inline(always)]
    pub(super) fn notes(&self) -> &[AtomicU64] {
        &self.words[NOTES..]
    }

    /// Writes the note of a used element. Relaxed: the tag's release (receiveq) or the single owner
    /// (transmitq) orders this store before the publisher's load.
    #[inline(always)]
    pub(super) fn set_note(&self, slot: usize, note: u64) {
        #[cfg(test)]
        let note = match () {
            () if mutant!(NoteWithoutLength) => note >> 32 << 32,
            () if mutant!(NoteOfAnother) => note ^ 1 << 32,
            () => note,
        };
        self.words[NOTES + slot].store(note, Ordering::Relaxed);
        #[cfg(test)]
        crate::memory::probe::stored();
    }
}
