//! The driver's side of a split virtqueue (virtio 1.2 §2.7).

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use arrayvec::ArrayVec;

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
    /// Two words each: the address; length, flags and next.
    descriptors: &'m [[AtomicU64; 2]],
    /// The available ring, and the entries in it.
    available: Window<'m>,
    heads: &'m [AtomicU16],
    /// The used ring, and the elements in it: id and length.
    used: Window<'m>,
    elements: &'m [[AtomicU32; 2]],
    mask: u16,
    event_idx: bool,
    in_order: bool,
    /// Free descriptors, first in first out: `taken` and `returned` count without end.
    free: Vec<u16>,
    taken: u16,
    returned: u16,
    /// The rest of each chain of several descriptors.
    next: Vec<u16>,
    /// What each outstanding head was posted with, and how many descriptors its chain has (0: not
    /// outstanding).
    chains: Vec<(u32, u16)>,
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
    /// Where the size is not a power of two up to 32768, or the areas are not as [`RingLayout`] has
    /// them.
    ///
    /// [`RingLayout`]: super::RingLayout
    pub fn new(areas: RingAreas<'m>, features: RingFeatures) -> Self {
        let size = areas.size;
        assert!(
            size.is_power_of_two() && u32::from(size) <= MAX_RING_SIZE,
            "a split ring has a power of two of entries"
        );
        let entries = usize::from(size);
        let (Some(heads), Some(elements)) = (
            areas.available.sub(ENTRIES, 2 * entries),
            areas.used.sub(ENTRIES, 8 * entries),
        ) else {
            panic!("the areas hold as many entries as the ring");
        };
        SplitRing {
            descriptors: areas.descriptors.atomics().as_chunks().0,
            available: areas.available,
            heads: heads.atomics(),
            used: areas.used,
            elements: elements.atomics().as_chunks().0,
            mask: size - 1,
            event_idx: features.event_idx,
            in_order: features.in_order,
            free: (0..size).collect(),
            taken: 0,
            returned: size,
            next: vec![0; entries],
            chains: vec![(0, 0); entries],
            posted: 0,
            published: 0,
            kicked: 0,
            reaped: 0,
            visible: 0,
            fault: None,
        }
    }

    /// The same empty ring with both indices at `index`, as if that many chains had passed through
    /// it.
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
        self.returned.wrapping_sub(self.taken)
    }

    #[inline(always)]
    pub(super) fn outstanding(&self) -> u16 {
        self.posted.wrapping_sub(self.reaped)
    }

    pub(super) fn fault(&self) -> Option<RingFault> {
        self.fault
    }

    #[inline(always)]
    fn write_descriptor(&self, index: u16, buffer: &Buffer, flags: u16, next: u16) {
        let [address, rest] = &self.descriptors[usize::from(index)];
        address.store(buffer.address.to_le(), Ordering::Relaxed);
        let word = u64::from(buffer.len) | u64::from(flags) << 32 | u64::from(next) << 48;
        rest.store(word.to_le(), Ordering::Relaxed);
    }

    #[inline(always)]
    fn offer(&mut self, head: u16, descriptors: u16, token: u32) {
        self.chains[usize::from(head)] = (token, descriptors);
        let slot = usize::from(self.posted & self.mask);
        self.heads[slot].store(head.to_le(), Ordering::Relaxed);
        self.posted = self.posted.wrapping_add(1);
    }

    /// The oldest of the free descriptors, of which there must be one.
    #[inline(always)]
    fn take(&mut self) -> u16 {
        let index = self.free[usize::from(self.taken & self.mask)];
        self.taken = self.taken.wrapping_add(1);
        index
    }

    #[inline(always)]
    pub(super) fn post_one(&mut self, buffer: Buffer, token: u32) -> bool {
        self.post_single(buffer, buffer.flags(), token)
    }

    /// As one at a time; the counters stay in registers meanwhile.
    #[inline(always)]
    pub(super) fn post_burst(&mut self, posts: &[(Buffer, u32)]) -> usize {
        let (mask, room) = (self.mask, self.free());
        let (mut taken, mut posted) = (self.taken, self.posted);
        let (free, heads) = (self.free.as_slice(), self.heads);
        let (descriptors, chains) = (self.descriptors, self.chains.as_mut_slice());
        for lens in [free.len(), heads.len(), descriptors.len(), chains.len()] {
            assert!(usize::from(mask) < lens, "parts as long as the ring");
        }
        let count = posts.len().min(usize::from(room));
        for (buffer, token) in &posts[..count] {
            let head = free[usize::from(taken & mask)] & mask;
            let [address, rest] = &descriptors[usize::from(head)];
            address.store(buffer.address.to_le(), Ordering::Relaxed);
            let word = u64::from(buffer.len) | u64::from(buffer.flags()) << 32;
            rest.store(word.to_le(), Ordering::Relaxed);
            chains[usize::from(head)] = (*token, 1);
            heads[usize::from(posted & mask)].store(head.to_le(), Ordering::Relaxed);
            taken = taken.wrapping_add(1);
            posted = posted.wrapping_add(1);
        }
        (self.taken, self.posted) = (taken, posted);
        count
    }

    #[inline(always)]
    fn post_single(&mut self, buffer: Buffer, flags: u16, token: u32) -> bool {
        if self.free() == 0 {
            return false;
        }
        let head = self.take();
        self.write_descriptor(head, &buffer, flags, 0);
        self.offer(head, 1, token);
        true
    }

    pub(super) fn post(&mut self, buffers: &[Buffer], token: u32) -> bool {
        let Ok(count) = u16::try_from(buffers.len()) else {
            return false;
        };
        if count == 0 || count > self.free() {
            return false;
        }
        let head = self.take();
        let mut index = head;
        for (i, buffer) in buffers.iter().enumerate() {
            if i + 1 == buffers.len() {
                self.write_descriptor(index, buffer, buffer.flags(), 0);
            } else {
                let next = self.take();
                self.write_descriptor(index, buffer, buffer.flags() | DESC_NEXT, next);
                self.next[usize::from(index)] = next;
                index = next;
            }
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
        // The index must be visible before the device's wish is read, or both sides sleep on each
        // other (virtio 1.2 §2.7.13.4.1); pairs with the device's barrier between arming and
        // looking again.
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
        let [id, len] = &self.elements[usize::from(self.reaped & self.mask)];
        let id = if self.in_order {
            // Descriptors are then taken and returned in ring order.
            u32::from(self.returned & self.mask)
        } else {
            u32::from_le(id.load(Ordering::Relaxed))
        };
        let (token, descriptors) = match self.chains.get_mut(id as usize) {
            Some(chain) if chain.1 != 0 => std::mem::take(chain),
            _ => return self.fail(RingFault::NotOutstanding { id }),
        };
        self.give_back(id as u16, descriptors);
        self.reaped = self.reaped.wrapping_add(1);
        Some(Used {
            token,
            len: u32::from_le(len.load(Ordering::Relaxed)),
        })
    }

    /// As one at a time; the counters stay in registers as long as chains of one buffer come.
    #[inline(always)]
    pub(super) fn reap_burst<const N: usize>(&mut self, burst: &mut ArrayVec<Used, N>) {
        while !burst.is_full() && (self.reaped != self.visible || self.look()) {
            self.reap_singles(burst);
            if !burst.is_full() && self.reaped != self.visible {
                match self.reap() {
                    Some(used) => burst.push(used),
                    None => return,
                }
            }
        }
    }

    #[inline(always)]
    fn reap_singles<const N: usize>(&mut self, burst: &mut ArrayVec<Used, N>) {
        let mask = self.mask;
        let (mut reaped, mut returned) = (self.reaped, self.returned);
        let (free, elements) = (self.free.as_mut_slice(), self.elements);
        let chains = self.chains.as_mut_slice();
        for lens in [free.len(), elements.len(), chains.len()] {
            assert!(usize::from(mask) < lens, "parts as long as the ring");
        }
        while reaped != self.visible && !burst.is_full() {
            let [id, len] = &elements[usize::from(reaped & mask)];
            let id = if self.in_order {
                u32::from(returned & mask)
            } else {
                u32::from_le(id.load(Ordering::Relaxed))
            };
            let Some(chain) = chains.get_mut(id as usize).filter(|chain| chain.1 == 1) else {
                break;
            };
            chain.1 = 0;
            let len = u32::from_le(len.load(Ordering::Relaxed));
            burst.push(Used {
                token: chain.0,
                len,
            });
            free[usize::from(returned & mask)] = id as u16;
            returned = returned.wrapping_add(1);
            reaped = reaped.wrapping_add(1);
        }
        (self.reaped, self.returned) = (reaped, returned);
    }

    /// Reads the used index anew; whether something is there.
    #[inline(always)]
    fn look(&mut self) -> bool {
        if self.fault.is_some() {
            return false;
        }
        // Pairs with the device's release: the elements and the buffers were written before the
        // index.
        self.visible = self.used.load_u16(INDEX, Ordering::Acquire);
        let returned = self.visible.wrapping_sub(self.reaped);
        let outstanding = self.outstanding();
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
        let mut index = head;
        for left in (0..descriptors).rev() {
            self.free[usize::from(self.returned & self.mask)] = index;
            self.returned = self.returned.wrapping_add(1);
            if left != 0 {
                index = self.next[usize::from(index)];
            }
        }
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
        // Armed before looked at again; pairs with the device's barrier between its index and our
        // wish.
        fence(Ordering::SeqCst);
        self.used.load_u16(INDEX, Ordering::Acquire) != self.reaped
    }

    /// Writes the `used_event` field (virtio 1.2 §2.7.10): a call is wanted once used entry `index`
    /// is there.
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
