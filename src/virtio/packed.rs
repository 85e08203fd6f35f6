//! The packed virtqueue as the device sees it (virtio 1.2 §2.8).
//!
//! Only this file and [`super::split::SplitRing`] know the difference. A position counts
//! descriptors. Its slot is `position % size`; its wrap counter is 1 in even laps and 0 in odd
//! ones. Used elements are not written while a claim is filled: the driver could see them before
//! those of an earlier, unpublished claim. So they are noted in the ring's [record](Redo), and the
//! publisher writes a whole run.

mod note;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use self::note::{FLAGS_SHIFT, LONG, NOTED, Note};

use super::chain::{
    ChainError, Collector, DESCRIPTOR_SIZE, Descriptor, Direction, F_INDIRECT, F_NEXT, MAX_CHAIN,
    Windows, walk_packed_table,
};
use super::claim::Publish;
use super::redo::Redo;
use super::{BLANK_DESCRIPTORS, Broken, Chain, Head, RingSetup, SetupError};
use crate::memory::{GuestMemory, PinnedArray, PinnedWindow, Window};

/// Descriptor flag: made available in a lap whose wrap counter equals the bit (§2.8.1).
const F_AVAIL: u16 = 1 << 7;
/// Descriptor flag: used in a lap whose wrap counter equals this bit and `F_AVAIL` (§2.8.1).
const F_USED: u16 = 1 << 15;
/// The flags of used elements in a lap of wrap counter 1. In other laps these flags are 0.
const USED_LAP: u16 = F_AVAIL | F_USED;

/// Event suppression structure (§2.8.10): offset and wrap counter, then flags.
const EVENT_FLAGS: usize = 2;
/// `flags`: notify always.
const EVENT_ENABLE: u16 = 0;
/// `flags`: notify never.
const EVENT_DISABLE: u16 = 1;
/// `flags`: notify when the descriptor named in the first word is reached.
const EVENT_DESCRIPTOR: u16 = 2;
/// Bytes of an event suppression structure.
const EVENT_SIZE: u64 = 4;

/// The buffer id of a packed chain is in its last descriptor. Up to this many descriptors (64 KiB,
/// about 10 µs) are read to find it. A longer chain breaks the ring.
const LONGEST_WALK: u16 = 4 * MAX_CHAIN as u16;

/// Sizes in bytes of descriptor ring, driver area and device area of a packed virtqueue (§2.8).
pub fn layout(size: u16) -> (u64, u64, u64) {
    (
        DESCRIPTOR_SIZE as u64 * u64::from(size),
        EVENT_SIZE,
        EVENT_SIZE,
    )
}

/// A started packed ring.
#[derive(Debug)]
pub struct PackedRing {
    descriptors: PinnedArray<u64>,
    driver_event: PinnedWindow,
    device_event: PinnedWindow,
    memory: Arc<GuestMemory>,
    size: u16,
    /// The bit of a position that changes from lap to lap; 0 if the size is no power of two.
    lap_bit: u64,
    event_idx: bool,
    indirect: bool,
    /// Used elements by slot, until their run is published; and the published position.
    redo: Redo,
}

impl PackedRing {
    /// Checks the geometry. Returns the ring with its first position: where its record says that an
    /// earlier process stopped, or else what SET_VRING_BASE says.
    ///
    /// The base's low half is the next available slot, with its wrap counter in bit 15. The used
    /// half is taken to be equal (virtio-user sends `0x8000` alone).
    pub fn start(setup: &RingSetup) -> Result<(Self, u64), SetupError> {
        if setup.size == 0 || u32::from(setup.size) > super::MAX_RING_SIZE {
            return Err(SetupError::Size(setup.size));
        }
        let (descriptors, driver_event, device_event) = layout(setup.size);
        for (window, len, align) in [
            (&setup.descriptors, descriptors, 16),
            (&setup.available, driver_event, 4),
            (&setup.used, device_event, 4),
        ] {
            let window = window.window();
            if (window.len() as u64) < len {
                return Err(SetupError::Short);
            }
            if !window.address().is_multiple_of(align) {
                return Err(SetupError::Alignment);
            }
        }
        let ring = PackedRing {
            descriptors: PinnedArray::new(&setup.descriptors).ok_or(SetupError::Alignment)?,
            driver_event: setup.available.clone(),
            device_event: setup.used.clone(),
            memory: setup.memory.clone(),
            size: setup.size,
            lap_bit: if setup.size.is_power_of_two() {
                setup.size.into()
            } else {
                0
            },
            event_idx: setup.features.event_idx,
            indirect: setup.features.indirect,
            redo: setup
                .redo
                .clone()
                .unwrap_or_else(|| Redo::private(setup.size)),
        };
        let asked = ring
            .position(setup.base as u16)
            .ok_or(SetupError::Base(setup.base))?;
        let position = ring.resume().unwrap_or(asked);
        if !mutant!(StartUnrecorded) {
            ring.redo.end(ring.word(position));
        }
        if !ring.event_idx && !mutant!(StartUnmarked) {
            // Without EVENT_IDX no driver reads this word. `resume` does: 0 is a cleared ring.
            let event = ring.device_event.window();
            event.store_u16(0, ring.word(0), Ordering::Relaxed);
        }
        Ok((ring, position))
    }

    /// Finishes the run that an earlier process was publishing. Returns where the run ends.
    ///
    /// Returns `None` without a record, and if the driver has started anew since: it has then
    /// cleared its ring. (If the frontend knows of that start, it sends another base: another
    /// record.)
    fn resume(&self) -> Option<u64> {
        let cleared = self.device_event.window().load_u32(0, Ordering::Acquire) == 0;
        if !self.redo.resumes() || cleared && !mutant!(ClearedBelieved) {
            return None;
        }
        let run = self.redo.run();
        let from = self.position(run.place)?;
        let to = from + u64::from(run.len);
        if run.len != 0 && (self.is_available(from) || mutant!(AlwaysAgain)) {
            if !self.has_notes(from, to) && !mutant!(NotesBelieved) {
                return None;
            }
            if mutant!(NeverAgain) {
                return Some(from);
            }
            self.publish(from, to);
        }
        Some(if mutant!(RunForgotten) { from } else { to })
    }

    /// Whether the notes of `[from, to)` are whole elements. If not, we did not write the record.
    fn has_notes(&self, from: u64, to: u64) -> bool {
        let mut position = from;
        while position < to {
            let (slot, _) = self.place(position);
            let note = Note::load(self.redo.notes(), slot);
            if note.0 & NOTED == 0 {
                return false;
            }
            position += note.span(self.redo.notes(), slot) as u64;
        }
        position == to && to - from <= u64::from(self.size)
    }

    /// Returns the first position with this slot and wrap counter; `None` if there is no such slot.
    fn position(&self, word: u16) -> Option<u64> {
        let (slot, size) = (u64::from(word & 0x7fff), u64::from(self.size));
        let lap_start = if word & 0x8000 == 0 { size } else { 0 };
        (slot < size).then_some(lap_start + slot)
    }

    /// Returns a position's slot and wrap counter, as in event suppression and SET_VRING_BASE.
    #[inline(always)]
    fn word(&self, position: u64) -> u16 {
        let (slot, lap) = self.place(position);
        // The wrap counter is in the same bit as this flag.
        slot as u16 | lap & F_USED
    }

    /// Returns the slot of a position, and the flags of used elements in its lap, which stand for
    /// the wrap counter everywhere here.
    #[inline(always)]
    fn place(&self, position: u64) -> (usize, u16) {
        let flags = |wrap| if wrap { USED_LAP } else { 0 };
        // Called several times a frame: no division, and no shift by a number from memory.
        if self.lap_bit != 0 {
            let slot = position & (self.lap_bit - 1);
            return (slot as usize, flags(position & self.lap_bit == 0));
        }
        let size = u64::from(self.size);
        let lap = position / size;
        ((position % size) as usize, flags(lap & 1 == 0))
    }

    /// Returns a position in the form of SET_VRING_BASE and GET_VRING_BASE, with both halves equal.
    pub fn base(&self, position: u64) -> u32 {
        let half = u32::from(self.word(position));
        half | half << 16
    }

    /// Whether the descriptor at `position` is available.
    ///
    /// Acquire pairs with the driver's barrier before it writes the head's flags, which it does
    /// last of a chain (§2.8.21). So the rest of the chain and the buffers are visible.
    #[inline(always)]
    pub fn is_available(&self, position: u64) -> bool {
        let (slot, lap) = self.place(position);
        let rest = self.descriptors.load(2 * slot + 1, Ordering::Acquire);
        is_available((rest >> FLAGS_SHIFT) as u16, lap)
    }

    /// Whether the driver never wrote to the first descriptors nor to its event.
    pub fn is_blank(&self) -> bool {
        let words = 2 * usize::from(self.size).min(BLANK_DESCRIPTORS);
        let word = |at: usize| self.descriptors.load(at, Ordering::Relaxed);
        let event = self.driver_event.window().load_u32(0, Ordering::Relaxed);
        event == 0 && (0..words).all(|at| word(at) == 0)
    }

    /// Prefetches the line of the descriptor at `position`.
    #[inline(always)]
    pub fn prefetch_available(&self, position: u64) {
        self.descriptors.prefetch(2 * self.place(position).0);
    }

    /// Returns the chain at `position`, if it is available and is one usable buffer.
    #[inline(always)]
    pub fn single(&self, position: u64, direction: Direction) -> Option<(Head, Window<'_>)> {
        let (_, head, window) = self.single_at(position, direction)?;
        Some((head, window))
    }

    /// As [`PackedRing::single`] for a transmitq, and also notes the used element of length 0.
    #[inline(always)]
    pub fn take_single(&self, position: u64) -> Option<(Head, Window<'_>)> {
        let (slot, head, window) = self.single_at(position, Direction::Read)?;
        self.note(slot, head, 0);
        Some((head, window))
    }

    #[inline(always)]
    fn single_at(&self, position: u64, direction: Direction) -> Option<(usize, Head, Window<'_>)> {
        let (slot, lap) = self.place(position);
        // Acquire as in `is_available`. One load of both words, so flags and buffer match.
        let [addr, rest] = self.descriptors.load_two(2 * slot, Ordering::Acquire);
        let descriptor = Descriptor::new(addr, rest);
        if !is_available(descriptor.fourth, lap) {
            return None;
        }
        let window = descriptor.alone(descriptor.fourth, direction, &self.memory)?;
        let (id, span) = (descriptor.third, 1);
        Some((slot, Head { id, span }, window))
    }

    /// Reads the chain at `position` until `wanted` bytes are there. `None` if it is not available.
    #[inline(always)]
    pub fn read_chain<'m, const N: usize>(
        &'m self,
        position: u64,
        direction: Direction,
        wanted: u32,
        windows: &mut Windows<'m, N>,
    ) -> Result<Option<Chain>, Broken> {
        let mut collector = Collector::new(&self.memory, direction, wanted, windows);
        self.walk(position, &mut collector)
    }

    /// As [`PackedRing::read_chain`], into a collector.
    #[inline(always)]
    pub fn walk<'m, const N: usize>(
        &'m self,
        position: u64,
        collector: &mut Collector<'_, 'm, N>,
    ) -> Result<Option<Chain>, Broken> {
        if !self.is_available(position) {
            return Ok(None);
        }
        let (mut slot, _) = self.place(position);
        let mut failed = None;
        let mut span = 0_u16;
        loop {
            let descriptor = Descriptor::of_ring(&self.descriptors, slot);
            span += 1;
            // After an error, descriptors are only counted, because the chain is returned whole.
            if failed.is_none() && !collector.satisfied() {
                failed = self.add(descriptor, span, collector).err();
            } else {
                collector.skip();
            }
            if descriptor.fourth & F_NEXT == 0 {
                // §2.8.6: the buffer id is in the last descriptor.
                let head = Head {
                    id: descriptor.third,
                    span,
                };
                let len = match failed {
                    Some(error) => {
                        collector.undo();
                        Err(error)
                    }
                    None => collector.total(),
                };
                return Ok(Some(Chain { head, len }));
            }
            let size = self.size.min(LONGEST_WALK);
            if span >= size {
                return Err(Broken::EndlessChain { size });
            }
            slot += 1;
            if slot == usize::from(self.size) {
                slot = 0;
            }
        }
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    #[inline(always)]
    fn add<const N: usize>(
        &self,
        descriptor: Descriptor,
        span: u16,
        collector: &mut Collector<'_, '_, N>,
    ) -> Result<(), ChainError> {
        let flags = descriptor.fourth;
        if usize::from(span) > MAX_CHAIN {
            collector.skip();
            return Err(ChainError::TooManyBuffers);
        }
        if flags & F_INDIRECT == 0 {
            return collector.add(descriptor.addr, descriptor.len, flags);
        }
        // §2.8.7: a descriptor with a table is the only one of its chain.
        if !self.indirect || span != 1 {
            return Err(ChainError::Indirect);
        }
        walk_packed_table(descriptor, collector)
    }

    /// Notes the used elements from `position` on. The publisher writes them to the ring.
    #[inline(always)]
    pub fn write_used(&self, position: u64, heads: impl Iterator<Item = (Head, u32)>) {
        let (mut slot, _) = self.place(position);
        let size = usize::from(self.size);
        for (head, len) in heads {
            self.note(slot, head, len);
            slot += usize::from(head.span);
            if slot >= size {
                slot -= size;
            }
        }
    }

    #[inline(always)]
    fn note(&self, slot: usize, head: Head, len: u32) {
        let mut note = Note::new(head.id, len);
        if head.span != 1 {
            let next = Note::next(self.redo.notes(), slot);
            self.redo.set_note(next, head.span.into());
            note.0 |= LONG;
        }
        self.redo.set_note(slot, note.0);
    }

    /// Asks the driver for kicks from `position` on, or asks for none. The full barrier pairs with
    /// the driver's, so the caller must look for available chains once more afterwards.
    pub fn want_kicks(&self, wanted: bool, position: u64) {
        let event = self.device_event.window();
        if wanted && self.event_idx {
            event.store_u16(0, self.word(position), Ordering::Relaxed);
            // Release: the position must be visible before the flags that make it valid.
            event.store_u16(EVENT_FLAGS, EVENT_DESCRIPTOR, Ordering::Release);
        } else {
            let flags = if wanted { EVENT_ENABLE } else { EVENT_DISABLE };
            event.store_u16(EVENT_FLAGS, flags, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }
}

/// Whether a descriptor with these flags is available to a device in a lap of these flags (§2.8.1).
#[inline(always)]
fn is_available(flags: u16, lap: u16) -> bool {
    flags & USED_LAP == lap ^ F_USED
}

impl Publish for PackedRing {
    /// Writes the run's elements, each with one store, and the first element last. A driver that
    /// finds the first element used must find the whole run used (§2.8.21).
    fn publish(&self, from: u64, to: u64) {
        self.redo.begin(self.word(from), (to - from) as u16);
        let size = usize::from(self.size);
        let (notes, descriptors) = (&self.redo.notes()[..size], self.descriptors.array());
        let (mut slot, lap) = self.place(from);
        let mut lap = u64::from(lap) << FLAGS_SHIFT;
        let first = Note::load(notes, slot);
        let (first_at, first_word) = (2 * slot + 1, first.used(lap));
        if mutant!(EarlyEnd) {
            self.redo.end(self.word(to));
        }
        if mutant!(FirstElementFirst) {
            descriptors.store(first_at, first_word, Ordering::Release);
        }
        let span = first.span(notes, slot);
        slot += span;
        let mut left = ((to - from) as usize).saturating_sub(span);
        while left > 0 {
            if slot >= size {
                slot -= size;
                lap ^= u64::from(USED_LAP) << FLAGS_SHIFT;
            }
            // The elements of one lap.
            let (begin, end) = (slot, size.min(slot + left));
            while slot < end {
                let note = Note::load(notes, slot);
                // Release, not relaxed: a driver may look at a later element's flags when a first
                // run ends inside a batch of descriptors.
                descriptors.store(2 * slot + 1, note.used(lap), Ordering::Release);
                slot += note.span(notes, slot);
            }
            left = left.saturating_sub(slot - begin);
        }
        descriptors.store(first_at, first_word, Ordering::Release);
        self.redo.end(self.word(to));
    }

    /// Tests the whole run, because the driver's event may be in another thread's claim within it.
    fn wants_call(&self, from: u64, to: u64) -> bool {
        let event = self.driver_event.window();
        let flags = event.load_u16(EVENT_FLAGS, Ordering::Acquire);
        match flags {
            EVENT_DISABLE => false,
            EVENT_DESCRIPTOR if self.event_idx => {
                let word = event.load_u16(0, Ordering::Relaxed);
                let (slot, wrap) = (u64::from(word & 0x7fff), word & 0x8000 != 0);
                // The event is in the lap of `from` or in the next: whichever has its wrap counter.
                // A stale event may look like the next lap's: one call in vain.
                let size = u64::from(self.size);
                let lap = from / size;
                let lap = if (lap & 1 == 0) == wrap { lap } else { lap + 1 };
                let armed = lap * size + slot;
                (from..to).contains(&armed)
            }
            // 3 is reserved. A driver that writes 3 gets all calls.
            _ => true,
        }
    }
}
