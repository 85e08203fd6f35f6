//! The split virtqueue as the device sees it (virtio 1.2 §2.7).
//!
//! This file only touches the ring in guest memory. Positions, claims and completions are kept by
//! [`super::ReceiveQueue`] and [`super::TransmitQueue`].
//!
//! - The device's own `used.idx` is read once, at ring start. A guest can rewrite it, so the 64-bit
//!   position is kept privately.
//! - Used elements are written while a claim is filled. No private copy is needed, because no
//!   driver reads them before `used.idx` passes them. (Packed rings need private notes: their flags
//!   make the elements visible.)

use std::sync::atomic::{Ordering, fence};

use super::chain::{Collector, Descriptor, Direction, Windows, walk_split};
use super::claim::Publish;
use super::{BLANK_DESCRIPTORS, Broken, Chain, Head, RingSetup, SetupError};
use crate::memory::{GuestMemory, PinnedArray, Window};
use std::sync::Arc;

/// Place of `flags` in the available and the used ring, in words of 16 bits.
const FLAGS: usize = 0;
/// Place of `idx` in both.
const IDX: usize = 1;
/// Place of the first entry in both.
const ENTRIES: usize = 2;
/// Place of the first element in the used ring, in words of 32 bits.
const ELEMENTS: usize = 1;
/// `used.flags`: the device needs no kicks (§2.7.10).
const F_NO_NOTIFY: u16 = 1;
/// `avail.flags`: the driver needs no calls (§2.7.7).
const F_NO_INTERRUPT: u16 = 1;

/// Sizes in bytes of descriptor table, available ring and used ring of a split virtqueue (§2.7).
///
/// The event words at the end count only where EVENT_IDX was negotiated.
pub fn layout(size: u16, event_idx: bool) -> (u64, u64, u64) {
    let (size, event) = (u64::from(size), if event_idx { 2 } else { 0 });
    (16 * size, 4 + 2 * size + event, 4 + 8 * size + event)
}

/// A started split ring.
#[derive(Debug)]
pub struct SplitRing {
    descriptors: PinnedArray<u64>,
    available: PinnedArray<u16>,
    used: PinnedArray<u16>,
    /// The same place as `used`.
    elements: PinnedArray<u32>,
    memory: Arc<GuestMemory>,
    size: u16,
    event_idx: bool,
    indirect: bool,
    notify_on_empty: bool,
}

impl SplitRing {
    /// Checks the geometry, and returns the ring with the position it starts at: `used.idx` as
    /// found in memory, whatever SET_VRING_BASE said. That is exact for QEMU, for cloud-hypervisor
    /// with IN_ORDER (it sends `avail_idx`) and for DPDK's virtio-user (it sends 0).
    pub fn start(setup: &RingSetup) -> Result<(Self, u64), SetupError> {
        if !setup.size.is_power_of_two() {
            return Err(SetupError::Size(setup.size));
        }
        let (descriptors, available, used) = layout(setup.size, setup.features.event_idx);
        for (window, len, align) in [
            (&setup.descriptors, descriptors, 16),
            (&setup.available, available, 2),
            (&setup.used, used, 4),
        ] {
            let window = window.window();
            if (window.len() as u64) < len {
                return Err(SetupError::Short);
            }
            if !window.address().is_multiple_of(align) {
                return Err(SetupError::Alignment);
            }
        }
        let ring = SplitRing {
            descriptors: PinnedArray::new(&setup.descriptors).ok_or(SetupError::Alignment)?,
            available: PinnedArray::new(&setup.available).ok_or(SetupError::Alignment)?,
            used: PinnedArray::new(&setup.used).ok_or(SetupError::Alignment)?,
            elements: PinnedArray::new(&setup.used).ok_or(SetupError::Alignment)?,
            memory: setup.memory.clone(),
            size: setup.size,
            event_idx: setup.features.event_idx,
            indirect: setup.features.indirect,
            notify_on_empty: setup.features.notify_on_empty,
        };
        let start = ring.used.load(IDX, Ordering::Acquire);
        Ok((ring, u64::from(start)))
    }

    #[inline(always)]
    fn slot(&self, position: u64) -> usize {
        position as usize & (usize::from(self.size) - 1)
    }

    /// The position up to which buffers are available, seen from `position`.
    ///
    /// Acquire pairs with the driver's write barrier before it stores `avail.idx` (§2.7.13.3):
    /// entries and descriptors behind the index are visible. Read once a burst, not once a frame:
    /// the line is the driver's.
    #[inline(always)]
    pub fn available_to(&self, position: u64) -> Result<u64, Broken> {
        let idx = self.available.load(IDX, Ordering::Acquire);
        let ahead = idx.wrapping_sub(position as u16);
        if ahead > self.size {
            return Err(Broken::AvailableIndex {
                ahead,
                size: self.size,
            });
        }
        Ok(position + u64::from(ahead))
    }

    /// Whether the driver has written nothing: neither to the first descriptors nor to the
    /// available index.
    pub fn is_blank(&self) -> bool {
        let words = 2 * usize::from(self.size).min(BLANK_DESCRIPTORS);
        let word = |at: usize| self.descriptors.load(at, Ordering::Relaxed);
        self.available.load(IDX, Ordering::Relaxed) == 0 && (0..words).all(|at| word(at) == 0)
    }

    /// Asks for the line of the available index.
    #[inline(always)]
    pub fn prefetch_available(&self) {
        self.available.prefetch(IDX);
    }

    /// Asks for the descriptor of `position`, if that is available, and for its place in the used
    /// ring, to be written.
    ///
    /// Only then: a driver that waits looks at the used index all the time, and would lose the line
    /// each time.
    #[inline(always)]
    pub fn prefetch_next(&self, position: u64) {
        if self.available.load(IDX, Ordering::Relaxed) != position as u16 {
            // A hint: whatever the entry says, the mask keeps it inside the table.
            let slot = self.slot(position);
            let head = self.head(slot) & (self.size - 1);
            self.descriptors.prefetch(2 * usize::from(head));
            self.used.prefetch_write(IDX);
            let element = ELEMENTS + 2 * slot;
            self.elements.prefetch_write(element);
        }
    }

    /// The first descriptor of the chain whose entry is in `slot`.
    #[inline(always)]
    fn head(&self, slot: usize) -> u16 {
        self.available.load(ENTRIES + slot, Ordering::Relaxed)
    }

    /// The chain at `position`, which [`SplitRing::available_to`] said is available, if it is one
    /// usable buffer.
    #[inline(always)]
    pub fn single(&self, position: u64, direction: Direction) -> Option<(Head, Window<'_>)> {
        self.single_at(self.slot(position), direction)
    }

    /// The same of a transmitq, with its used element written.
    #[inline(always)]
    pub fn take_single(&self, position: u64) -> Option<(Head, Window<'_>)> {
        let slot = self.slot(position);
        let (head, window) = self.single_at(slot, Direction::Read)?;
        self.store_used(slot, head, 0);
        Some((head, window))
    }

    #[inline(always)]
    fn single_at(&self, slot: usize, direction: Direction) -> Option<(Head, Window<'_>)> {
        let head = self.head(slot);
        if head >= self.size {
            return None;
        }
        let descriptor = Descriptor::of_ring(&self.descriptors, usize::from(head));
        let window = descriptor.alone(descriptor.third, direction, &self.memory)?;
        Some((Head { id: head, span: 1 }, window))
    }

    /// Reads the chain at `position`, which [`SplitRing::available_to`] said is available.
    pub fn read_chain<'m, const N: usize>(
        &'m self,
        position: u64,
        direction: Direction,
        wanted: u32,
        windows: &mut Windows<'m, N>,
    ) -> Result<Chain, Broken> {
        let mut collector = Collector::new(&self.memory, direction, wanted, windows);
        self.walk(position, &mut collector)
    }

    /// The same, into a collector.
    #[inline(always)]
    pub fn walk<'m, const N: usize>(
        &'m self,
        position: u64,
        collector: &mut Collector<'_, 'm, N>,
    ) -> Result<Chain, Broken> {
        let head = self.head(self.slot(position));
        if head >= self.size {
            // Cannot be returned: there is no such buffer.
            return Err(Broken::Head {
                head,
                size: self.size,
            });
        }
        let table = self.descriptors.window();
        let len = walk_split(table, u32::from(self.size), head, self.indirect, collector);
        Ok(Chain {
            head: Head { id: head, span: 1 },
            len,
        })
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Writes the used elements of `position` and behind; the driver sees them after the next
    /// publish.
    #[inline(always)]
    pub fn write_used(&self, position: u64, heads: impl Iterator<Item = (Head, u32)>) {
        let (mut slot, mask) = (self.slot(position), usize::from(self.size) - 1);
        for (head, len) in heads {
            self.store_used(slot, head, len);
            slot = (slot + 1) & mask;
        }
    }

    #[inline(always)]
    fn store_used(&self, slot: usize, head: Head, len: u32) {
        let element = [u32::from(head.id), len];
        self.elements
            .store_two(ELEMENTS + 2 * slot, element, Ordering::Relaxed);
    }

    /// Asks the driver for kicks (when about to sleep) or to leave them out (while polling), from
    /// `position` on.
    ///
    /// The caller looks for available buffers once more after asking: the full barrier pairs with
    /// the driver's between its index and its look at our word (§2.7.13.4.1).
    pub fn want_kicks(&self, wanted: bool, position: u64) {
        if self.event_idx {
            // Only the event counts; without one in reach the driver does not kick. Flags must be 0
            // (§2.7.10.1).
            if wanted {
                let event = ENTRIES + 4 * usize::from(self.size);
                self.used.store(event, position as u16, Ordering::Relaxed);
            }
        } else {
            let flags = if wanted { 0 } else { F_NO_NOTIFY };
            self.used.store(FLAGS, flags, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }
}

impl Publish for SplitRing {
    #[inline(always)]
    fn publish(&self, _from: u64, to: u64) {
        // Release: the elements before the index (§2.7.8.2).
        self.used.store(IDX, to as u16, Ordering::Release);
    }

    #[inline(always)]
    fn wants_call(&self, from: u64, to: u64) -> bool {
        // Whatever else the driver has asked for; legacy drivers only.
        if self.notify_on_empty && self.available.load(IDX, Ordering::Relaxed) == to as u16 {
            return true;
        }
        if self.event_idx {
            // §2.7.7.2: call when the event lies in [from, to). Both sides of the comparison are
            // distances back from `to` in 16 bits, so that it holds across the wrap:
            //
            //     from = 65534, to = 2 (wrapped)
            //     event = 65535:  2 - 65535 - 1 = 2  <  2 - 65534 = 4   call
            //     event = 65533:  2 - 65533 - 1 = 4  <  4               no call
            //
            // `event >= from && event < to` is the tempting form, and wrong at the wrap.
            let event = ENTRIES + usize::from(self.size);
            let event = self.available.load(event, Ordering::Relaxed);
            let to = to as u16;
            to.wrapping_sub(event).wrapping_sub(1) < to.wrapping_sub(from as u16)
        } else {
            self.available.load(FLAGS, Ordering::Relaxed) & F_NO_INTERRUPT == 0
        }
    }
}
