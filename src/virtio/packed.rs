//! The packed virtqueue as the device sees it (virtio 1.2 §2.8).
//!
//! Beside [`super::split::SplitRing`] this is the only place that knows the difference. A position
//! counts descriptors; its slot is `position % size`, its wrap counter 1 in even laps and 0 in odd
//! ones. Used elements are not written while a claim is filled (the slots behind an earlier,
//! unpublished claim still belong to it in the driver's eyes): they are noted in the ring's
//! [record](Redo), and the publisher writes a whole run.

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
/// Descriptor flag: used, likewise.
const F_USED: u16 = 1 << 15;
/// The flags of used elements in a lap of wrap counter 1; in the others they are 0.
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

/// Most descriptors of a chain that are read in search of its end, where the id stands that it is
/// returned by: 64 KiB of them, some 10 µs. A longer one, of a ring that is longer still, breaks
/// it.
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
    /// The bit of a position that changes from lap to lap, for sizes that are a power of two; else
    /// 0.
    lap_bit: u64,
    event_idx: bool,
    indirect: bool,
    /// By slot, used elements until their run is published; and how far that has come.
    redo: Redo,
}

impl PackedRing {
    /// Checks the geometry, and returns the ring with the position where its record says that an
    /// earlier process left it, else the one that SET_VRING_BASE names.
    ///
    /// The low half of the base is the next available slot with its wrap counter in bit 15; the
    /// used half is taken to be equal (virtio-user sends `0x8000` alone).
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
            // Drivers look at this word only where it counts, and start with zeros: see `resume`.
            let event = ring.device_event.window();
            event.store_u16(0, ring.word(0), Ordering::Relaxed);
        }
        Ok((ring, position))
    }

    /// Where the record says that an earlier process left this ring, with the run finished that it
    /// was publishing.
    ///
    /// `None` without a record, and where the driver has started anew since: it has cleared its
    /// ring then, and no process of ours has written that it is polling, or where it wants a kick.
    /// (Where the frontend knows of that start it has said so by another base, and the record is
    /// not this ring's.)
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

    /// Whether the notes of `[from, to)` are those of whole elements: a record that we did not
    /// write is not believed.
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

    /// The first position with this slot and wrap counter; `None` where there is no such slot.
    fn position(&self, word: u16) -> Option<u64> {
        let (slot, size) = (u64::from(word & 0x7fff), u64::from(self.size));
        let lap_start = if word & 0x8000 == 0 { size } else { 0 };
        (slot < size).then_some(lap_start + slot)
    }

    /// Slot and wrap counter of a position, as event suppression and SET_VRING_BASE write them.
    #[inline(always)]
    fn word(&self, position: u64) -> u16 {
        let (slot, lap) = self.place(position);
        // The wrap counter stands where this flag does.
        slot as u16 | lap & F_USED
    }

    /// The slot of a position, and the flags of used elements in its lap: these stand for its wrap
    /// counter everywhere here.
    #[inline(always)]
    fn place(&self, position: u64) -> (usize, u16) {
        let flags = |wrap| if wrap { USED_LAP } else { 0 };
        // Several times a frame: no division, and no shift by a number that has to be found first.
        if self.lap_bit != 0 {
            let slot = position & (self.lap_bit - 1);
            return (slot as usize, flags(position & self.lap_bit == 0));
        }
        let size = u64::from(self.size);
        let lap = position / size;
        ((position % size) as usize, flags(lap & 1 == 0))
    }

    /// The word that SET_VRING_BASE and GET_VRING_BASE exchange for a position, both halves equal.
    pub fn base(&self, position: u64) -> u32 {
        let half = u32::from(self.word(position));
        half | half << 16
    }

    /// Whether the descriptor at `position` is available.
    ///
    /// Acquire pairs with the driver's barrier before it writes the head's flags, last of a chain
    /// (§2.8.21): the rest of the chain and the buffers are visible.
    #[inline(always)]
    pub fn is_available(&self, position: u64) -> bool {
        let (slot, lap) = self.place(position);
        let rest = self.descriptors.load(2 * slot + 1, Ordering::Acquire);
        is_available((rest >> FLAGS_SHIFT) as u16, lap)
    }

    /// Whether the driver has written nothing: neither to the first descriptors nor to its event.
    pub fn is_blank(&self) -> bool {
        let words = 2 * usize::from(self.size).min(BLANK_DESCRIPTORS);
        let word = |at: usize| self.descriptors.load(at, Ordering::Relaxed);
        let event = self.driver_event.window().load_u32(0, Ordering::Relaxed);
        event == 0 && (0..words).all(|at| word(at) == 0)
    }

    /// Asks for the line of the descriptor at `position`.
    #[inline(always)]
    pub fn prefetch_available(&self, position: u64) {
        self.descriptors.prefetch(2 * self.place(position).0);
    }

    /// The chain at `position`, if it is available and one usable buffer.
    #[inline(always)]
    pub fn single(&self, position: u64, direction: Direction) -> Option<(Head, Window<'_>)> {
        let (_, head, window) = self.single_at(position, direction)?;
        Some((head, window))
    }

    /// The same of a transmitq, with its used element noted.
    #[inline(always)]
    pub fn take_single(&self, position: u64) -> Option<(Head, Window<'_>)> {
        let (slot, head, window) = self.single_at(position, Direction::Read)?;
        self.note(slot, head, 0);
        Some((head, window))
    }

    #[inline(always)]
    fn single_at(&self, position: u64, direction: Direction) -> Option<(usize, Head, Window<'_>)> {
        let (slot, lap) = self.place(position);
        // Acquire as in `is_available`; one load gives the flags and what they stand for.
        let [addr, rest] = self.descriptors.load_two(2 * slot, Ordering::Acquire);
        let descriptor = Descriptor::new(addr, rest);
        if !is_available(descriptor.fourth, lap) {
            return None;
        }
        let window = descriptor.alone(descriptor.fourth, direction, &self.memory)?;
        let (id, span) = (descriptor.third, 1);
        Some((slot, Head { id, span }, window))
    }

    /// Reads the chain at `position`, or `None` if the driver has not made it available.
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

    /// The same, into a collector.
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
            // After an error the chain is only counted: it is returned whole.
            if failed.is_none() && !collector.satisfied() {
                failed = self.add(descriptor, span, collector).err();
            } else {
                collector.skip();
            }
            if descriptor.fourth & F_NEXT == 0 {
                // §2.8.6: the id that counts is the last descriptor's.
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
        // §2.8.7: a table stands alone.
        if !self.indirect || span != 1 {
            return Err(ChainError::Indirect);
        }
        walk_packed_table(descriptor, collector)
    }

    /// Notes the used elements of `position` and behind; the publisher writes them.
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

    /// Asks the driver for kicks from `position` on, or to leave them out. The caller looks once
    /// more afterwards.
    pub fn want_kicks(&self, wanted: bool, position: u64) {
        let event = self.device_event.window();
        if wanted && self.event_idx {
            event.store_u16(0, self.word(position), Ordering::Relaxed);
            // The word before the flags that make it count.
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
    /// Writes the run's elements, each with one store, the first one last: the driver looks there,
    /// and finding it used must find the whole run used (§2.8.21), a mergeable frame included.
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
            // One lap's elements.
            let (begin, end) = (slot, size.min(slot + left));
            while slot < end {
                let note = Note::load(notes, slot);
                // Release, not relaxed: a driver may look at a later element's flags when a first
                // run ends inside a batch.
                descriptors.store(2 * slot + 1, note.used(lap), Ordering::Release);
                slot += note.span(notes, slot);
            }
            left = left.saturating_sub(slot - begin);
        }
        descriptors.store(first_at, first_word, Ordering::Release);
        self.redo.end(self.word(to));
    }

    /// The test is against the whole newly visible run, never a thread's own claim: another
    /// thread's claim may have become visible with this one, and the driver may be armed inside it.
    fn wants_call(&self, from: u64, to: u64) -> bool {
        let event = self.driver_event.window();
        let flags = event.load_u16(EVENT_FLAGS, Ordering::Acquire);
        match flags {
            EVENT_DISABLE => false,
            EVENT_DESCRIPTOR if self.event_idx => {
                let word = event.load_u16(0, Ordering::Relaxed);
                let (slot, wrap) = (u64::from(word & 0x7fff), word & 0x8000 != 0);
                // The armed position lies in the lap of `from` or the one after, whichever has its
                // wrap counter. A stale event may look like the next lap's: a spare call, never a
                // missing one.
                let size = u64::from(self.size);
                let lap = from / size;
                let lap = if (lap & 1 == 0) == wrap { lap } else { lap + 1 };
                let armed = lap * size + slot;
                (from..to).contains(&armed)
            }
            // 3 is reserved: a driver that writes it gets its calls.
            _ => true,
        }
    }
}
