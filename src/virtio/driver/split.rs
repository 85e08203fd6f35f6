//! The driver's side of a split virtqueue (virtio 1.2 §2.7).

use std::sync::atomic::{Ordering, fence};

use super::{
    Buffer, DESC_INDIRECT, DESC_NEXT, DESC_SIZE, RingAreas, RingFault, Used, passes_event,
};
use crate::memory::Window;
use crate::virtio::{MAX_RING_SIZE, RingFeatures};

/// Offset of the flags in the available and in the used ring.
const FLAGS: usize = 0;
/// Offset of the index in the available and in the used ring.
const INDEX: usize = 2;
/// Offset of the first entry in the available and in the used ring.
const ENTRIES: usize = 4;
/// VIRTQ_AVAIL_F_NO_INTERRUPT and VIRTQ_USED_F_NO_NOTIFY have the same value.
const NO_NOTIFICATION: u16 = 1;

/// A split virtqueue, owned by its driver.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct SplitRing<'m> {
    descriptors: Window<'m>,
    available: Window<'m>,
    used: Window<'m>,
    mask: u16,
    event_idx: bool,
    in_order: bool,
    /// Free descriptors: a list through `next`, taken at its head, given back at its tail.
    first_free: u16,
    last_free: u16,
    free: u16,
    next: Vec<u16>,
    /// What each outstanding head was posted with, and how many descriptors its chain has (0: not
    /// outstanding).
    chains: Vec<(u32, u16)>,
    outstanding: u16,
    /// Oldest outstanding head, for VIRTIO_F_IN_ORDER.
    oldest: u16,
    /// Our own available index: posted, published, and at the last look whether a kick is due.
    posted: u16,
    published: u16,
    kicked: u16,
    /// The next used entry to take, and the index as last read.
    reaped: u16,
    visible: u16,
    fault: Option<RingFault>,
}

impl<'m> SplitRing<'m> {
    /// An empty ring in zeroed `areas`.
    ///
    /// # Panics
    /// Where the size is not a power of two up to 32768.
    pub fn new(areas: RingAreas<'m>, features: RingFeatures) -> Self {
        let size = areas.size;
        assert!(
            size.is_power_of_two() && u32::from(size) <= MAX_RING_SIZE,
            "a split ring has a power of two of entries"
        );
        SplitRing {
            descriptors: areas.descriptors,
            available: areas.available,
            used: areas.used,
            mask: size - 1,
            event_idx: features.event_idx,
            in_order: features.in_order,
            first_free: 0,
            last_free: size - 1,
            free: size,
            next: (0..size).map(|i| (i + 1) & (size - 1)).collect(),
            chains: vec![(0, 0); usize::from(size)],
            outstanding: 0,
            oldest: 0,
            posted: 0,
            published: 0,
            kicked: 0,
            reaped: 0,
            visible: 0,
            fault: None,
        }
    }

    /// The same empty ring with both indices at `index`, as if that many chains had passed through it.
    #[must_use]
    pub fn starting_at(mut self, index: u16) -> Self {
        self.available.store_u16(INDEX, index, Ordering::Relaxed);
        self.used.store_u16(INDEX, index, Ordering::Relaxed);
        self.posted = index;
        self.published = index;
        self.kicked = index;
        self.reaped = index;
        self.visible = index;
        self
    }

    #[inline(always)]
    pub(super) fn free(&self) -> u16 {
        self.free
    }

    #[inline(always)]
    pub(super) fn outstanding(&self) -> u16 {
        self.outstanding
    }

    pub(super) fn fault(&self) -> Option<RingFault> {
        self.fault
    }

    #[inline(always)]
    fn write_descriptor(&self, index: u16, buffer: &Buffer, flags: u16, next: u16) {
        let at = usize::from(index) * DESC_SIZE;
        self.descriptors
            .store_u64(at, buffer.address, Ordering::Relaxed);
        let rest = u64::from(buffer.len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.descriptors.store_u64(at + 8, rest, Ordering::Relaxed);
    }

    #[inline(always)]
    fn offer(&mut self, head: u16, descriptors: u16, token: u32) {
        self.chains[usize::from(head)] = (token, descriptors);
        let slot = usize::from(self.posted & self.mask);
        self.available
            .store_u16(ENTRIES + 2 * slot, head, Ordering::Relaxed);
        self.posted = self.posted.wrapping_add(1);
        self.free -= descriptors;
        self.outstanding += 1;
    }

    #[inline(always)]
    pub(super) fn post_one(&mut self, buffer: Buffer, token: u32) -> bool {
        self.post_single(buffer, buffer.flags(), token)
    }

    #[inline(always)]
    fn post_single(&mut self, buffer: Buffer, flags: u16, token: u32) -> bool {
        if self.free == 0 {
            return false;
        }
        let head = self.first_free;
        self.first_free = self.next[usize::from(head)];
        self.write_descriptor(head, &buffer, flags, 0);
        self.offer(head, 1, token);
        true
    }

    pub(super) fn post(&mut self, buffers: &[Buffer], token: u32) -> bool {
        let Ok(count) = u16::try_from(buffers.len()) else {
            return false;
        };
        if count == 0 || count > self.free {
            return false;
        }
        let head = self.first_free;
        for (i, buffer) in buffers.iter().enumerate() {
            let index = self.first_free;
            let next = self.next[usize::from(index)];
            let more = if i + 1 < buffers.len() { DESC_NEXT } else { 0 };
            self.write_descriptor(index, buffer, buffer.flags() | more, next);
            self.first_free = next;
        }
        self.offer(head, count, token);
        true
    }

    pub(super) fn post_indirect(
        &mut self,
        table: &Window<'_>,
        address: u64,
        buffers: &[Buffer],
        token: u32,
    ) -> bool {
        let len = buffers.len() * DESC_SIZE;
        if buffers.is_empty() || len > table.len() {
            return false;
        }
        for (i, buffer) in buffers.iter().enumerate() {
            let more = if i + 1 < buffers.len() { DESC_NEXT } else { 0 };
            let at = i * DESC_SIZE;
            let rest = u64::from(buffer.len)
                | u64::from(buffer.flags() | more) << 32
                | (i as u64 + 1) << 48;
            table.store_u64(at, buffer.address, Ordering::Relaxed);
            table.store_u64(at + 8, rest, Ordering::Relaxed);
        }
        let whole = Buffer::readable(address, len as u32);
        self.post_single(whole, DESC_INDIRECT, token)
    }

    #[inline(always)]
    pub(super) fn publish(&mut self) {
        // Pairs with the device's acquire load of the index: descriptors and entries come before it
        // (virtio 1.2 §2.7.13.3).
        self.available
            .store_u16(INDEX, self.posted, Ordering::Release);
        self.published = self.posted;
    }

    #[inline(always)]
    pub(super) fn needs_kick(&mut self) -> bool {
        let (old, new) = (self.kicked, self.published);
        if old == new {
            return false;
        }
        self.kicked = new;
        // The index must be visible before the device's wish is read, or both sides sleep on each other
        // (virtio 1.2 §2.7.13.4.1); pairs with the device's barrier between arming and looking again.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = ENTRIES + 8 * (usize::from(self.mask) + 1);
            passes_event(self.used.load_u16(at, Ordering::Relaxed), new, old)
        } else {
            self.used.load_u16(FLAGS, Ordering::Relaxed) & NO_NOTIFICATION == 0
        }
    }

    #[inline(always)]
    pub(super) fn reap(&mut self) -> Option<Used> {
        if self.reaped == self.visible && !self.look() {
            return None;
        }
        let at = ENTRIES + 8 * usize::from(self.reaped & self.mask);
        let element = (
            self.used.load_u32(at, Ordering::Relaxed),
            self.used.load_u32(at + 4, Ordering::Relaxed),
        );
        let id = if self.in_order {
            u32::from(self.oldest)
        } else {
            element.0
        };
        if id > u32::from(self.mask) || self.chains[id as usize].1 == 0 {
            return self.fail(RingFault::NotOutstanding { id });
        }
        let (token, descriptors) = std::mem::take(&mut self.chains[id as usize]);
        self.give_back(id as u16, descriptors);
        self.reaped = self.reaped.wrapping_add(1);
        Some(Used {
            token,
            len: element.1,
        })
    }

    /// Reads the used index anew; whether something is there.
    #[inline(always)]
    fn look(&mut self) -> bool {
        if self.fault.is_some() {
            return false;
        }
        // Pairs with the device's release: the elements and the buffers were written before the index.
        self.visible = self.used.load_u16(INDEX, Ordering::Acquire);
        let returned = self.visible.wrapping_sub(self.reaped);
        let outstanding = self.outstanding;
        if returned > outstanding {
            self.fail(RingFault::TooMany {
                returned,
                outstanding,
            });
            return false;
        }
        returned != 0
    }

    #[cold]
    fn fail(&mut self, fault: RingFault) -> Option<Used> {
        self.fault = Some(fault);
        self.visible = self.reaped;
        None
    }

    #[inline(always)]
    fn give_back(&mut self, head: u16, descriptors: u16) {
        // With none free, `first_free` is the stale head of an empty list and must become this chain.
        if self.free == 0 {
            self.first_free = head;
        } else {
            self.next[usize::from(self.last_free)] = head;
        }
        let mut last = head;
        for _ in 1..descriptors {
            last = self.next[usize::from(last)];
        }
        self.last_free = last;
        self.free += descriptors;
        self.outstanding -= 1;
        self.oldest = self.oldest.wrapping_add(descriptors) & self.mask;
    }

    pub(super) fn suppress_calls(&mut self) {
        if self.event_idx {
            // An event index just behind us is passed only after 65535 more entries.
            self.set_used_event(self.reaped.wrapping_sub(1));
        } else {
            self.available
                .store_u16(FLAGS, NO_NOTIFICATION, Ordering::Relaxed);
        }
    }

    pub(super) fn enable_calls(&mut self) -> bool {
        if self.event_idx {
            self.set_used_event(self.reaped);
        } else {
            self.available.store_u16(FLAGS, 0, Ordering::Relaxed);
        }
        // Armed before looked at again; pairs with the device's barrier between its index and our wish.
        fence(Ordering::SeqCst);
        self.used.load_u16(INDEX, Ordering::Acquire) != self.reaped
    }

    /// Writes the `used_event` field (virtio 1.2 §2.7.10): a call is wanted once used entry `index` is there.
    pub fn set_used_event(&mut self, index: u16) {
        let at = ENTRIES + 2 * (usize::from(self.mask) + 1);
        self.available.store_u16(at, index, Ordering::Relaxed);
    }

    /// Index of the next used entry to reap.
    pub fn next_used(&self) -> u16 {
        self.reaped
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.published)
    }
}
