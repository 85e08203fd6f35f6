//! A backend that only copies. It moves frames from one guest's transmit ring to another guest's
//! receive ring, on the caller's thread and in the guests' memory.
//!
//! It serves to measure the client, and to test the client without a socket. It trusts the driver
//! completely, expects one descriptor in each chain as the client posts them, and must not be
//! mistaken for a device.

use std::sync::atomic::Ordering;

use super::memory::{GUEST_BASE, NET_HDR};
use crate::memory::Window;
use crate::virtio::driver::{DESC_SIZE, RingAreas};

/// VIRTQ_DESC_F_AVAIL and VIRTQ_DESC_F_USED.
const AVAIL: u64 = 1 << 7;
const USED: u64 = 1 << 15;
/// VIRTQ_USED_F_NO_NOTIFY, the first word of a split ring's used area, and
/// RING_EVENT_FLAGS_DISABLE, the second word of a packed ring's.
const NO_KICKS: u16 = 1;
const EVENT_FLAGS: usize = 2;
/// Offset of the index and of the first entry in a split ring's areas.
const INDEX: usize = 2;
const ENTRIES: usize = 4;

/// A chain of one descriptor.
#[derive(Clone, Copy, Debug)]
struct Taken {
    id: u16,
    offset: usize,
    len: usize,
}

/// The device's side of one ring.
#[derive(Debug)]
pub struct NullRing<'m> {
    areas: RingAreas<'m>,
    packed: bool,
    /// Next entry to take and to give back, counted without end.
    taken: usize,
    given: usize,
    /// The available index as last read.
    visible: u16,
}

impl<'m> NullRing<'m> {
    /// The device of a new ring, which polls and wants no kicks.
    pub fn new(areas: RingAreas<'m>, packed: bool) -> Self {
        let at = if packed { EVENT_FLAGS } else { 0 };
        areas.used.store_u16(at, NO_KICKS, Ordering::Relaxed);
        NullRing {
            areas,
            packed,
            taken: 0,
            given: 0,
            visible: 0,
        }
    }

    fn entry(&self, count: usize) -> (usize, bool) {
        let size = usize::from(self.areas.size);
        (count % size, (count / size).is_multiple_of(2))
    }

    fn descriptor(&self, index: usize, id: u16, rest: u64) -> Taken {
        let address = self
            .areas
            .descriptors
            .load_u64(index * DESC_SIZE, Ordering::Relaxed);
        Taken {
            id,
            offset: (address - GUEST_BASE) as usize,
            len: rest as u32 as usize,
        }
    }

    /// Returns how many chains can be taken, up to `most`.
    fn available(&mut self, most: usize) -> usize {
        if !self.packed {
            // Pairs with the driver's release in `publish`.
            self.visible = self.areas.available.load_u16(INDEX, Ordering::Acquire);
            return most.min(usize::from(self.visible.wrapping_sub(self.taken as u16)));
        }
        (0..most)
            .take_while(|n| {
                let (index, first_lap) = self.entry(self.taken + n);
                let rest = self.rest(index);
                (rest >> 48 & AVAIL != 0) == first_lap && (rest >> 48 & USED != 0) != first_lap
            })
            .count()
    }

    fn rest(&self, index: usize) -> u64 {
        // For packed rings: pairs with the driver's release of the flags.
        self.areas
            .descriptors
            .load_u64(index * DESC_SIZE + 8, Ordering::Acquire)
    }

    fn take(&mut self) -> Taken {
        let (index, _) = self.entry(self.taken);
        self.taken += 1;
        if self.packed {
            let rest = self.rest(index);
            return self.descriptor(index, (rest >> 32) as u16, rest);
        }
        let head = self
            .areas
            .available
            .load_u16(ENTRIES + 2 * index, Ordering::Relaxed);
        let rest = self.rest(usize::from(head));
        self.descriptor(usize::from(head), head, rest)
    }

    fn give_back(&mut self, id: u16, len: usize) {
        let (index, first_lap) = self.entry(self.given);
        self.given += 1;
        if self.packed {
            let flags = if first_lap { AVAIL | USED } else { 0 };
            let rest = len as u64 | u64::from(id) << 32 | flags << 48;
            let at = index * DESC_SIZE + 8;
            // Pairs with the driver's acquire of the flags.
            self.areas
                .descriptors
                .store_u64(at, rest, Ordering::Release);
            return;
        }
        let at = ENTRIES + 8 * index;
        let used = &self.areas.used;
        used.store_u32(at, u32::from(id), Ordering::Relaxed);
        used.store_u32(at + 4, len as u32, Ordering::Relaxed);
    }

    fn publish(&self) {
        if !self.packed {
            // Pairs with the driver's acquire in `reap`.
            let used = &self.areas.used;
            used.store_u16(INDEX, self.given as u16, Ordering::Release);
        }
    }
}

/// One direction: a transmit ring, a receive ring, and the memory each is in.
#[derive(Debug)]
pub struct NullPeer<'m> {
    /// Where frames come from.
    pub from: (NullRing<'m>, Window<'m>),
    /// Where they go to.
    pub to: (NullRing<'m>, Window<'m>),
}

impl NullPeer<'_> {
    /// Moves up to `most` frames; returns how many. Frames that find no room wait.
    pub fn step(&mut self, most: usize) -> usize {
        let ready = self.from.0.available(most);
        let mut moved = 0;
        while moved < ready && self.move_one() {
            moved += 1;
        }
        self.from.0.publish();
        self.to.0.publish();
        moved
    }

    fn move_one(&mut self) -> bool {
        let frame = self.from.0.take();
        let room = self.to.0.available(frame.len.div_ceil(MIN_BUFFER));
        let mut done = NET_HDR;
        let mut first = None;
        let mut buffers = 0u16;
        while done < frame.len {
            if usize::from(buffers) == room {
                // Taken back as a whole: nothing has been given back yet when the first buffer is
                // missing.
                assert!(buffers == 0, "frames need a window that fits the ring");
                self.from.0.taken -= 1;
                return false;
            }
            let buffer = self.to.0.take();
            let skip = if first.is_none() { NET_HDR } else { 0 };
            let part = (buffer.len - skip).min(frame.len - done);
            self.copy(frame.offset + done, buffer.offset + skip, part);
            first.get_or_insert(buffer.offset);
            self.to.0.give_back(buffer.id, part + skip);
            done += part;
            buffers += 1;
        }
        if let Some(offset) = first {
            let mut header = [0; NET_HDR];
            header[10..].copy_from_slice(&buffers.to_le_bytes());
            self.to.1.write_bytes(offset, &header);
        }
        self.from.0.give_back(frame.id, 0);
        true
    }

    fn copy(&self, from: usize, to: usize, len: usize) {
        if let (Some(source), Some(target)) = (self.from.1.sub(from, len), self.to.1.sub(to, len)) {
            target.copy_from(&source, len);
        }
    }
}

/// Receive buffers have at least this many bytes.
const MIN_BUFFER: usize = 1024;
