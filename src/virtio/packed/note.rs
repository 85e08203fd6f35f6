//! Notes: used elements of a packed ring before they are published.
//!
//! The [record](super::super::redo) of the ring keeps one note a slot, so that another process can
//! publish a run again.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::virtio::chain::{F_INDIRECT, F_NEXT, F_WRITE};

/// Where the buffer id stands in the second word of a descriptor, behind the length.
const ID_SHIFT: u32 = 32;
/// Where its flags stand, behind the id.
pub(super) const FLAGS_SHIFT: u32 = 48;

/// A used element that is not published yet: the second word of its descriptor as the driver will
/// find it. The flags of the lap are missing, because they are the same for a whole run. `NOTED`
/// and `LONG` are flags of ours.
#[derive(Clone, Copy)]
pub(super) struct Note(pub(super) u64);

/// There is a note.
pub(super) const NOTED: u64 = (F_INDIRECT as u64) << FLAGS_SHIFT;
/// The chain has several descriptors. Their number is in the note of the second descriptor, because
/// no used element is written there.
pub(super) const LONG: u64 = (F_NEXT as u64) << FLAGS_SHIFT;

impl Note {
    #[inline(always)]
    pub(super) fn new(id: u16, len: u32) -> Self {
        let written = u64::from(len != 0) * (u64::from(F_WRITE) << FLAGS_SHIFT);
        Note(u64::from(len) | u64::from(id) << ID_SHIFT | written | NOTED)
    }

    #[inline(always)]
    pub(super) fn load(notes: &[AtomicU64], slot: usize) -> Self {
        Note(notes[slot].load(Ordering::Relaxed))
    }

    /// Returns the number of descriptors of the chain: at least 1, so that a loop over notes ends.
    #[inline(always)]
    pub(super) fn span(self, notes: &[AtomicU64], slot: usize) -> usize {
        if self.0 & LONG == 0 {
            return 1;
        }
        let span = Note::load(notes, Note::next(notes, slot)).0;
        usize::from(span as u16).max(1)
    }

    /// Returns the slot after `slot`.
    #[inline(always)]
    pub(super) fn next(notes: &[AtomicU64], slot: usize) -> usize {
        if slot + 1 == notes.len() { 0 } else { slot + 1 }
    }

    /// The word as the driver will find it, in a lap of these flags. Whatever a note says: a chain
    /// that reaches past the end of what its driver may have in flight overwrites another one's.
    #[inline(always)]
    pub(super) fn used(self, lap: u64) -> u64 {
        const KEPT: u64 = (F_WRITE as u64) << FLAGS_SHIFT | ((1 << FLAGS_SHIFT) - 1);
        self.0 & KEPT | lap
    }
}
