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

/// Index of `flags` in the available and the used ring, in words of 16 bits.
const FLAGS: usize = 0;
/// Index of `idx` in both rings.
const IDX: usize = 1;
/// Index of the first entry in both rings.
const ENTRIES: usize = 2;
/// Index of the first element in the used ring, in words of 32 bits.
const ELEMENTS: usize = 1;
/// `used.flags`: the device needs no kicks (§2.7.10).
const F_NO_NOTIFY: u16 = 1;
/// `avail.flags`: the driver needs no calls (§2.7.7).
const F_NO_INTERRUPT: u16 = 1;

/// Returns the sizes in bytes of descriptor table, available ring and used ring of a split
/// virtqueue (§2.7).
///
/// The event words at the end are part of the rings only if EVENT_IDX was negotiated.
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
    /// The used ring again, in words of 32 bits.
    elements: PinnedArray<u32>,
    memory: Arc<GuestMemory>,
    size: u16,
    event_idx: bool,
    indirect: bool,
    notify_on_empty: bool,
}

impl SplitRing {
    /// Checks the geometry, and returns the ring with its first position: `used.idx` as found in
    /// memory, whatever SET_VRING_BASE said. That is exact for QEMU, for cloud-hypervisor with
    /// IN_ORDER (it sends `avail_idx`) and for DPDK's virtio-user (it sends 0).
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

    /// Returns the end of the available buffers, seen from `position`. Returns an error if the
    /// index is further ahead than the ring has entries.
    ///
    /// Acquire pairs with the driver's write barrier before it stores `avail.idx` (§2.7.13.3). So
    /// entries and descriptors before the index are visible. To be called once a burst, not once a
    /// frame, because the driver writes this line.
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

    /// Whether the driver never wrote to the first descriptors nor to the available index.
    pub fn is_blank(&self) -> bool {
        let words = 2 * usize::from(self.size).min(BLANK_DESCRIPTORS);
        let word = |at: usize| self.descriptors.load(at, Ordering::Relaxed);
        self.available.load(IDX, Ordering::Relaxed) == 0 && (0..words).all(|at| word(at) == 0)
    }

    /// Prefetches the line of the available index.
    #[inline(always)]
    pub fn prefetch_available(&self) {
        self.available.prefetch(IDX);
    }

    /// If `position` is available, prefetches its descriptor for reading, and its element in the
    /// used ring and the used index for writing.
    ///
    /// Not otherwise: a driver that waits reads the used index all the time, and would lose the
    /// line each time.
    #[inline(always)]
    pub fn prefetch_next(&self, position: u64) {
        if self.available.load(IDX, Ordering::Relaxed) != position as u16 {
            // A hint only: whatever the entry says, the mask keeps the index inside the table.
            let slot = self.slot(position);
            let head = self.head(slot) & (self.size - 1);
            self.descriptors.prefetch(2 * usize::from(head));
            self.used.prefetch_write(IDX);
            let element = ELEMENTS + 2 * slot;
            self.elements.prefetch_write(element);
        }
    }

    /// Returns the index of the first descriptor of the chain whose entry is in `slot`. The caller
    /// checks it.
    #[inline(always)]
    fn head(&self, slot: usize) -> u16 {
        self.available.load(ENTRIES + slot, Ordering::Relaxed)
    }

    /// Returns the chain at `position` if it is one usable buffer. [`SplitRing::available_to`] has
    /// said that `position` is available.
    #[inline(always)]
    pub fn single(&self, position: u64, direction: Direction) -> Option<(Head, Window<'_>)> {
        self.single_at(self.slot(position), direction)
    }

    /// As [`SplitRing::single`] for a transmitq, and also writes the used element of length 0. The
    /// driver sees the element after the next publish.
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

    /// Reads the chain at `position` until `wanted` bytes are collected.
    /// [`SplitRing::available_to`] has said that `position` is available.
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

    /// As [`SplitRing::read_chain`], into a collector.
    #[inline(always)]
    pub fn walk<'m, const N: usize>(
        &'m self,
        position: u64,
        collector: &mut Collector<'_, 'm, N>,
    ) -> Result<Chain, Broken> {
        let head = self.head(self.slot(position));
        if head >= self.size {
            // Such an entry cannot be returned, because there is no such descriptor.
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

    /// Writes the used elements from `position` on. The driver sees them after the next publish.
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

    /// Asks the driver for kicks from `position` on (when about to sleep), or asks for none (while
    /// polling).
    ///
    /// The caller must look for available buffers once more afterwards. The full barrier pairs with
    /// the driver's barrier between its index and its look at our word (§2.7.13.4.1).
    pub fn want_kicks(&self, wanted: bool, position: u64) {
        if self.event_idx {
            // Only the event counts. A driver that does not pass the event does not kick. The flags
            // must stay 0 (§2.7.10.1).
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
        // Release: the elements must be visible before the index (§2.7.8.2).
        self.used.store(IDX, to as u16, Ordering::Release);
    }

    #[inline(always)]
    fn wants_call(&self, from: u64, to: u64) -> bool {
        // Legacy drivers with NOTIFY_ON_EMPTY are called when the ring is empty, whatever their
        // event says.
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
            // `event >= from && event < to` looks right, but is wrong at the wrap.
            let event = ENTRIES + usize::from(self.size);
            let event = self.available.load(event, Ordering::Relaxed);
            let to = to as u16;
            to.wrapping_sub(event).wrapping_sub(1) < to.wrapping_sub(from as u16)
        } else {
            self.available.load(FLAGS, Ordering::Relaxed) & F_NO_INTERRUPT == 0
        }
    }
}
