//! The driver's side of a packed virtqueue (virtio 1.2 §2.8).

use std::sync::atomic::{AtomicU64, Ordering, fence};

use arrayvec::ArrayVec;

use super::{
    Buffer, DESC_INDIRECT, DESC_NEXT, DESC_SIZE, RingAreas, RingFault, Used, passes_event,
};
use crate::memory::Window;
use crate::virtio::{MAX_RING_SIZE, RingFeatures};

/// VIRTQ_DESC_F_AVAIL.
pub(super) const AVAIL: u16 = 1 << 7;
/// VIRTQ_DESC_F_USED.
pub(super) const USED: u16 = 1 << 15;

/// RING_EVENT_FLAGS_*: the second word of an event suppression area.
const EVENTS_ON: u16 = 0;
const EVENTS_OFF: u16 = 1;
const EVENTS_AT: u16 = 2;
/// Offset of the flags in an event suppression area; the descriptor's index and lap are at 0.
const EVENT_FLAGS: usize = 2;
/// The lap bit in a 16-bit position.
const LAP: u16 = 1 << 15;

/// A place in the ring, and the wrap counter of its lap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    index: u16,
    wrap: bool,
}

impl Position {
    #[inline(always)]
    fn advance(&mut self, by: u16, size: u16) {
        self.index += by;
        if self.index >= size {
            self.index -= size;
            self.wrap = !self.wrap;
        }
    }

    /// As the event suppression areas and SET_VRING_BASE write it.
    #[inline(always)]
    fn to_bits(self) -> u16 {
        self.index | if self.wrap { LAP } else { 0 }
    }

    /// The flags that make a descriptor here available.
    #[inline(always)]
    fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }
}

/// What a buffer id stands for while the device has it.
#[derive(Clone, Copy, Debug, Default)]
struct Chain {
    token: u32,
    /// Ring entries the chain takes.
    descriptors: u16,
    outstanding: bool,
}

/// A packed virtqueue, owned by its driver.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct PackedRing<'m> {
    /// Two words each: the address; length, id and flags, which change hands.
    ring: &'m [[AtomicU64; 2]],
    driver_event: Window<'m>,
    device_event: Window<'m>,
    size: u16,
    event_idx: bool,
    in_order: bool,
    /// Next entry to write, next entry to reap.
    next: Position,
    reaped: Position,
    free: u16,
    /// Free buffer ids, first in first out, in a power of two of places: `taken` and `returned`
    /// count without end.
    ids: Vec<u16>,
    taken: u16,
    returned: u16,
    chains: Vec<Chain>,
    /// With VIRTIO_F_IN_ORDER ids come back in turn: the oldest, and the last one of the batch that
    /// is being handed out with the length that the device wrote.
    oldest: u16,
    batch: Option<(u16, u32)>,
    /// The first unpublished descriptor: its place and second half.
    held: Option<(u16, u64)>,
    /// Entries published since the last look whether a kick is due.
    unkicked: u16,
    posted: u16,
    fault: Option<RingFault>,
}

impl<'m> PackedRing<'m> {
    /// An empty ring in zeroed `areas`.
    ///
    /// # Panics
    /// Where the size is 0 or above 32768.
    pub fn new(areas: RingAreas<'m>, features: RingFeatures) -> Self {
        let size = areas.size;
        assert!(
            size != 0 && u32::from(size) <= MAX_RING_SIZE,
            "a packed ring has 1 to 32768 entries"
        );
        let start = Position {
            index: 0,
            wrap: true,
        };
        PackedRing {
            ring: areas.descriptors.atomics().as_chunks().0,
            driver_event: areas.available,
            device_event: areas.used,
            size,
            event_idx: features.event_idx,
            in_order: features.in_order,
            next: start,
            reaped: start,
            free: size,
            ids: (0..size.next_power_of_two()).collect(),
            taken: 0,
            returned: size,
            chains: vec![Chain::default(); usize::from(size)],
            oldest: 0,
            batch: None,
            held: None,
            unkicked: 0,
            posted: 0,
            fault: None,
        }
    }

    #[inline(always)]
    pub(super) fn free(&self) -> u16 {
        self.free
    }

    #[inline(always)]
    pub(super) fn outstanding(&self) -> u16 {
        self.size - self.returned.wrapping_sub(self.taken)
    }

    pub(super) fn fault(&self) -> Option<RingFault> {
        self.fault
    }

    #[inline(always)]
    fn rest(len: u32, id: u16, flags: u16) -> u64 {
        u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48
    }

    /// Takes a free id for a chain of `descriptors` entries.
    #[inline(always)]
    fn take_id(&mut self, descriptors: u16, token: u32) -> u16 {
        let mask = self.ids.len() as u16 - 1;
        let id = self.ids[usize::from(self.taken & mask)];
        self.taken = self.taken.wrapping_add(1);
        self.chains[usize::from(id)] = Chain {
            token,
            descriptors,
            outstanding: true,
        };
        self.free -= descriptors;
        self.posted += descriptors;
        id
    }

    /// Writes the second half of a chain's first descriptor, which makes the chain available; the
    /// first one after a publication is held back, and hides all those behind it.
    #[inline(always)]
    fn offer(&mut self, index: u16, rest: u64) {
        if self.held.is_none() {
            self.held = Some((index, rest));
        } else {
            // Pairs with the device's acquire load of the flags (virtio 1.2 §2.8.21.1): the rest of
            // the chain is written before.
            self.ring[usize::from(index)][1].store(rest.to_le(), Ordering::Release);
        }
    }

    #[inline(always)]
    fn write_address(&self, index: u16, buffer: &Buffer) {
        self.ring[usize::from(index)][0].store(buffer.address.to_le(), Ordering::Relaxed);
    }

    /// Flags, id and length of the next entry to reap, if the device has used it.
    #[inline(always)]
    fn used(&self) -> Option<u64> {
        let rest = &self.ring[usize::from(self.reaped.index)][1];
        // Pairs with the device's release of the flags: id, length and buffer were written before.
        let rest = u64::from_le(rest.load(Ordering::Acquire));
        let flags = (rest >> 48) as u16;
        let both = if self.reaped.wrap { AVAIL | USED } else { 0 };
        (flags & (AVAIL | USED) == both && self.outstanding() != 0).then_some(rest)
    }

    #[inline(always)]
    pub(super) fn post_one(&mut self, buffer: Buffer, token: u32) -> bool {
        self.post_single(buffer, buffer.flags(), token)
    }

    /// As one at a time; the counters stay in registers meanwhile.
    #[inline(always)]
    pub(super) fn post_burst(&mut self, posts: &[(Buffer, u32)]) -> usize {
        let (size, room, mut place) = (self.size, self.free, self.next);
        let (mut taken, mut held) = (self.taken, self.held);
        let (ids, ring, chains) = (self.ids.as_slice(), self.ring, self.chains.as_mut_slice());
        let mask = ids.len() as u16 - 1;
        assert!(chains.len() == usize::from(size) && ring.len() >= usize::from(size));
        let count = posts.len().min(usize::from(room));
        for (buffer, token) in &posts[..count] {
            let id = ids[usize::from(taken & mask)];
            chains[usize::from(id)] = Chain {
                token: *token,
                descriptors: 1,
                outstanding: true,
            };
            let [address, second] = &ring[usize::from(place.index)];
            address.store(buffer.address.to_le(), Ordering::Relaxed);
            let rest = Self::rest(buffer.len, id, buffer.flags() | place.available());
            // As in `offer`.
            if held.is_none() {
                held = Some((place.index, rest));
            } else {
                second.store(rest.to_le(), Ordering::Release);
            }
            place.advance(1, size);
            taken = taken.wrapping_add(1);
        }
        (self.taken, self.held, self.next) = (taken, held, place);
        self.free -= count as u16;
        self.posted += count as u16;
        count
    }

    #[inline(always)]
    fn post_single(&mut self, buffer: Buffer, flags: u16, token: u32) -> bool {
        if self.free == 0 {
            return false;
        }
        let id = self.take_id(1, token);
        let place = self.next;
        self.write_address(place.index, &buffer);
        self.offer(
            place.index,
            Self::rest(buffer.len, id, flags | place.available()),
        );
        self.next.advance(1, self.size);
        true
    }

    pub(super) fn post(&mut self, buffers: &[Buffer], token: u32) -> bool {
        let Ok(count) = u16::try_from(buffers.len()) else {
            return false;
        };
        if count == 0 || count > self.free {
            return false;
        }
        let id = self.take_id(count, token);
        let head = self.next;
        let mut first = 0;
        for (i, buffer) in buffers.iter().enumerate() {
            let more = if i + 1 < buffers.len() { DESC_NEXT } else { 0 };
            let flags = buffer.flags() | more | self.next.available();
            let rest = Self::rest(buffer.len, id, flags);
            self.write_address(self.next.index, buffer);
            if i == 0 {
                first = rest;
            } else {
                let second = &self.ring[usize::from(self.next.index)][1];
                second.store(rest.to_le(), Ordering::Relaxed);
            }
            self.next.advance(1, self.size);
        }
        self.offer(head.index, first);
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
            // virtio 1.2 §2.8.8: in a table only VIRTQ_DESC_F_WRITE is valid.
            let rest = Self::rest(buffer.len, 0, buffer.flags());
            table.store_u64(i * DESC_SIZE, buffer.address, Ordering::Relaxed);
            table.store_u64(i * DESC_SIZE + 8, rest, Ordering::Relaxed);
        }
        let whole = Buffer::readable(address, len as u32);
        self.post_single(whole, DESC_INDIRECT, token)
    }

    #[inline(always)]
    pub(super) fn publish(&mut self) {
        if let Some((index, rest)) = self.held.take() {
            // Pairs with the device's acquire load of the flags, as in `offer`.
            self.ring[usize::from(index)][1].store(rest.to_le(), Ordering::Release);
            self.unkicked = self
                .unkicked
                .saturating_add(std::mem::take(&mut self.posted));
        }
    }

    #[inline(always)]
    pub(super) fn needs_kick(&mut self) -> bool {
        let moved = std::mem::take(&mut self.unkicked);
        if moved == 0 {
            return false;
        }
        // The flags must be visible before the device's wish is read (virtio 1.2 §2.8.21.3.1);
        // pairs with the device's barrier between arming and looking again.
        fence(Ordering::SeqCst);
        let word = self.device_event.load_u32(0, Ordering::Relaxed);
        let (at, flags) = (word as u16, (word >> 16) as u16);
        if flags != EVENTS_AT || !self.event_idx {
            return flags != EVENTS_OFF;
        }
        // `held` is never part of `moved`, so the end of what was published is where a chain
        // begins.
        let new = self.published();
        let mut event = at & !LAP;
        if (at & LAP != 0) != new.wrap {
            event = event.wrapping_sub(self.size);
        }
        passes_event(event, new.index, new.index.wrapping_sub(moved))
    }

    /// Where the next publication begins.
    fn published(&self) -> Position {
        let mut position = self.next;
        if self.posted > position.index {
            position.index += self.size;
            position.wrap = !position.wrap;
        }
        position.index -= self.posted;
        position
    }

    #[inline(always)]
    pub(super) fn reap(&mut self) -> Option<Used> {
        if let Some((last, len)) = self.batch {
            return self.reap_batch(last, len);
        }
        let rest = self.used()?;
        let (len, id) = (rest as u32, (rest >> 32) as u16);
        if self.fault.is_some() || id >= self.size || !self.chains[usize::from(id)].outstanding {
            return self.fail(id);
        }
        if self.in_order {
            self.batch = Some((id, len));
            return self.reap_batch(id, len);
        }
        Some(self.retire(id, len))
    }

    /// As one at a time; the counters stay in registers as long as chains of one buffer come, not
    /// in batches.
    #[inline(always)]
    pub(super) fn reap_burst<const N: usize>(&mut self, burst: &mut ArrayVec<Used, N>) {
        if !self.in_order && self.fault.is_none() {
            self.reap_singles(burst);
        }
        while !burst.is_full()
            && let Some(used) = self.reap()
        {
            burst.push(used);
        }
    }

    #[inline(always)]
    fn reap_singles<const N: usize>(&mut self, burst: &mut ArrayVec<Used, N>) {
        let (size, mut place, mut left) = (self.size, self.reaped, self.outstanding());
        let (mut returned, mut count) = (self.returned, 0);
        let (ids, ring) = (self.ids.as_mut_slice(), self.ring);
        let chains = self.chains.as_mut_slice();
        let mask = ids.len() as u16 - 1;
        assert!(ring.len() >= usize::from(size));
        while left != 0 && !burst.is_full() {
            // As in `used`.
            let rest = u64::from_le(ring[usize::from(place.index)][1].load(Ordering::Acquire));
            let both = if place.wrap { AVAIL | USED } else { 0 };
            if (rest >> 48) as u16 & (AVAIL | USED) != both {
                break;
            }
            let id = (rest >> 32) as u16;
            let chain = chains.get_mut(usize::from(id));
            let Some(chain) = chain.filter(|chain| chain.outstanding && chain.descriptors == 1)
            else {
                break;
            };
            chain.outstanding = false;
            burst.push(Used {
                token: chain.token,
                len: rest as u32,
            });
            ids[usize::from(returned & mask)] = id;
            returned = returned.wrapping_add(1);
            place.advance(1, size);
            left -= 1;
            count += 1;
        }
        (self.reaped, self.returned) = (place, returned);
        self.free += count;
    }

    /// virtio 1.2 §2.8.9: with VIRTIO_F_IN_ORDER one used descriptor may stand for a whole batch,
    /// and carries the id of its last buffer.
    #[inline(always)]
    fn reap_batch(&mut self, last: u16, len: u32) -> Option<Used> {
        let id = self.oldest;
        self.oldest = self.next_id_in_order(id);
        if id == last {
            self.batch = None;
        }
        Some(self.retire(id, len))
    }

    #[inline(always)]
    fn next_id_in_order(&self, id: u16) -> u16 {
        if id + 1 == self.size { 0 } else { id + 1 }
    }

    #[inline(always)]
    fn retire(&mut self, id: u16, len: u32) -> Used {
        let Chain {
            token, descriptors, ..
        } = std::mem::take(&mut self.chains[usize::from(id)]);
        let mask = self.ids.len() as u16 - 1;
        self.ids[usize::from(self.returned & mask)] = id;
        self.returned = self.returned.wrapping_add(1);
        self.free += descriptors;
        self.reaped.advance(descriptors, self.size);
        Used { token, len }
    }

    #[cold]
    fn fail(&mut self, id: u16) -> Option<Used> {
        self.fault
            .get_or_insert(RingFault::NotOutstanding { id: u32::from(id) });
        None
    }

    pub(super) fn suppress_calls(&mut self) {
        self.driver_event
            .store_u16(EVENT_FLAGS, EVENTS_OFF, Ordering::Relaxed);
    }

    pub(super) fn enable_calls(&mut self) -> bool {
        if self.event_idx {
            self.call_at(self.reaped);
        } else {
            self.driver_event
                .store_u16(EVENT_FLAGS, EVENTS_ON, Ordering::Relaxed);
        }
        // Armed before looked at again; pairs with the device's barrier between its flags and our
        // wish.
        fence(Ordering::SeqCst);
        self.batch.is_some() || self.used().is_some()
    }

    /// Asks for a call once the entry `ahead` of the next one to reap has been used.
    pub fn call_after(&mut self, ahead: u16) {
        let mut place = self.reaped;
        place.advance(ahead % self.size, self.size);
        self.call_at(place);
    }

    fn call_at(&mut self, place: Position) {
        let word = u32::from(place.to_bits()) | u32::from(EVENTS_AT) << 16;
        self.driver_event.store_u32(0, word, Ordering::Relaxed);
    }

    pub(super) fn base(&self) -> u32 {
        let bits = u32::from(self.published().to_bits());
        bits | bits << 16
    }
}
