//! The packed virtqueue of virtio 1.2 §2.8 as simply as it can be written: both sides, one step
//! after the other.
//!
//! An independent reading of the specification. It shares no arithmetic with `src/virtio`: a place
//! in the ring is a slot and a wrap counter that move one descriptor at a time, never a position
//! that is divided, and whether a notification is due is answered by looking at every place of the
//! run.

#![allow(
    dead_code,
    reason = "several test programs include this, each uses a part"
)]

use std::sync::atomic::{Ordering, fence};

use pollux::memory::Window;
use pollux::virtio::driver::RingAreas;

use crate::guest::Piece;

/// VIRTQ_DESC_F_NEXT.
pub(crate) const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub(crate) const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub(crate) const INDIRECT: u16 = 4;
/// VIRTQ_DESC_F_AVAIL.
pub(crate) const AVAIL: u16 = 1 << 7;
/// VIRTQ_DESC_F_USED.
pub(crate) const USED: u16 = 1 << 15;

/// RING_EVENT_FLAGS_*.
pub(crate) const EVENT_ENABLE: u16 = 0;
pub(crate) const EVENT_DISABLE: u16 = 1;
pub(crate) const EVENT_DESC: u16 = 2;

/// A descriptor's place: where, and in a lap of which wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) slot: u16,
    pub(crate) wrap: bool,
}

impl Place {
    pub(crate) const FIRST: Place = Place {
        slot: 0,
        wrap: true,
    };

    pub(crate) fn after(mut self, steps: u16, size: u16) -> Place {
        for _ in 0..steps {
            self.slot += 1;
            if self.slot == size {
                self.slot = 0;
                self.wrap = !self.wrap;
            }
        }
        self
    }

    /// As event words and SET_VRING_BASE have it.
    pub(crate) fn word(self) -> u16 {
        self.slot | if self.wrap { 1 << 15 } else { 0 }
    }
}

/// A descriptor of the ring or of an indirect table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) id: u16,
    pub(crate) flags: u16,
}

impl Desc {
    fn read(table: &Window<'_>, index: u16) -> Desc {
        let mut raw = [0; 16];
        table.read_bytes(usize::from(index) * 16, &mut raw);
        Desc {
            addr: u64::from_le_bytes(raw[0..8].try_into().unwrap()),
            len: u32::from_le_bytes(raw[8..12].try_into().unwrap()),
            id: u16::from_le_bytes(raw[12..14].try_into().unwrap()),
            flags: u16::from_le_bytes(raw[14..16].try_into().unwrap()),
        }
    }

    /// Everything but the flags, then, released, the flags.
    fn write(self, table: &Window<'_>, index: u16) {
        let at = usize::from(index) * 16;
        table.write_bytes(at, &self.addr.to_le_bytes());
        table.write_bytes(at + 8, &self.len.to_le_bytes());
        table.write_bytes(at + 12, &self.id.to_le_bytes());
        table.store_u16(at + 14, self.flags, Ordering::Release);
    }
}

fn flags_at(ring: &Window<'_>, slot: u16) -> u16 {
    ring.load_u16(usize::from(slot) * 16 + 14, Ordering::Acquire)
}

fn available_flags(wrap: bool) -> u16 {
    if wrap { AVAIL } else { USED }
}

/// A used element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) id: u16,
    pub(crate) len: u32,
    pub(crate) written: bool,
}

/// The driver.
pub(crate) struct Driver<'m> {
    areas: RingAreas<'m>,
    next: Place,
    used: Place,
    free: u16,
    /// By id: descriptors of the chain that the device has.
    spans: Vec<Option<u16>>,
}

impl<'m> Driver<'m> {
    pub(crate) fn new(areas: RingAreas<'m>, start: Place) -> Self {
        Driver {
            areas,
            next: start,
            used: start,
            free: areas.size,
            spans: vec![None; usize::from(areas.size)],
        }
    }

    pub(crate) fn free(&self) -> u16 {
        self.free
    }

    pub(crate) fn free_ids(&self) -> Vec<u16> {
        (0..self.areas.size)
            .filter(|&id| self.spans[usize::from(id)].is_none())
            .collect()
    }

    /// Where the next descriptor goes.
    pub(crate) fn next(&self) -> Place {
        self.next
    }

    /// Writes one descriptor as it is, whatever sense it makes.
    pub(crate) fn write_raw(&self, slot: u16, desc: Desc) {
        desc.write(&self.areas.descriptors, slot);
    }

    /// Makes a chain available: the head's flags last (§2.8.21).
    pub(crate) fn post(&mut self, id: u16, pieces: &[Piece]) {
        let count = pieces.len() as u16;
        assert!(count <= self.free && self.spans[usize::from(id)].is_none());
        let first = self.next;
        for step in (0..count).rev() {
            let piece = pieces[usize::from(step)];
            let place = first.after(step, self.areas.size);
            let more = if step + 1 < count { NEXT } else { 0 };
            // §2.8.6: only the last id counts; the others are garbage here.
            let id = if step + 1 < count { 0xdead } else { id };
            let flags = piece.flags | more | available_flags(place.wrap);
            let (addr, len) = (piece.addr, piece.len);
            self.write_raw(
                place.slot,
                Desc {
                    addr,
                    len,
                    id,
                    flags,
                },
            );
        }
        self.next = first.after(count, self.areas.size);
        self.free -= count;
        self.spans[usize::from(id)] = Some(count);
    }

    /// Takes the next used element; the device must have had it.
    pub(crate) fn reap(&mut self) -> Option<Element> {
        if !self.sees_used() {
            return None;
        }
        let desc = Desc::read(&self.areas.descriptors, self.used.slot);
        let span = self.spans[usize::from(desc.id)]
            .take()
            .unwrap_or_else(|| panic!("id {} came back twice", desc.id));
        self.used = self.used.after(span, self.areas.size);
        self.free += span;
        Some(Element {
            id: desc.id,
            len: desc.len,
            written: desc.flags & WRITE != 0,
        })
    }

    fn sees_used(&self) -> bool {
        if self.free == self.areas.size {
            return false;
        }
        let flags = flags_at(&self.areas.descriptors, self.used.slot);
        (flags & AVAIL != 0) == self.used.wrap && (flags & USED != 0) == self.used.wrap
    }

    /// Writes the driver's event suppression area: word before flags.
    pub(crate) fn set_event(&self, word: u16, flags: u16) {
        let event = &self.areas.available;
        event.store_u32(
            0,
            u32::from(word) | u32::from(flags) << 16,
            Ordering::Release,
        );
    }

    /// Asks for a call at the next used element, and says whether there is one already.
    pub(crate) fn arm(&self, event_idx: bool) -> bool {
        let flags = if event_idx { EVENT_DESC } else { EVENT_ENABLE };
        self.set_event(self.used.word(), flags);
        fence(Ordering::SeqCst);
        self.sees_used()
    }

    /// The next place to reap.
    pub(crate) fn used(&self) -> Place {
        self.used
    }
}

/// A chain as the device took it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) id: u16,
    pub(crate) span: u16,
    /// Address and length of its buffers, those of an indirect table included.
    pub(crate) buffers: Vec<(u64, u32)>,
}

/// The device.
pub(crate) struct Device<'m> {
    areas: RingAreas<'m>,
    next: Place,
    used: Place,
}

impl<'m> Device<'m> {
    pub(crate) fn new(areas: RingAreas<'m>, start: Place) -> Self {
        Device {
            areas,
            next: start,
            used: start,
        }
    }

    pub(crate) fn has_available(&self) -> bool {
        let head = flags_at(&self.areas.descriptors, self.next.slot);
        (head & AVAIL != 0) == self.next.wrap && (head & USED != 0) != self.next.wrap
    }

    /// The next place to take.
    pub(crate) fn next(&self) -> Place {
        self.next
    }

    /// Takes the next available chain of a well-behaved driver; `memory` is the guest's.
    pub(crate) fn pop(&mut self, memory: impl Fn(u64, u32) -> Window<'m>) -> Option<Chain> {
        let ring = &self.areas.descriptors;
        if !self.has_available() {
            return None;
        }
        let mut buffers = Vec::new();
        for span in 1..=self.areas.size {
            let desc = Desc::read(ring, self.next.slot);
            self.next = self.next.after(1, self.areas.size);
            if desc.flags & INDIRECT != 0 {
                let table = memory(desc.addr, desc.len);
                let entries = (desc.len / 16) as u16;
                buffers.extend((0..entries).map(|index| {
                    let entry = Desc::read(&table, index);
                    (entry.addr, entry.len)
                }));
            } else {
                buffers.push((desc.addr, desc.len));
            }
            if desc.flags & NEXT == 0 {
                let id = desc.id;
                return Some(Chain { id, span, buffers });
            }
        }
        panic!("a chain without an end");
    }

    /// Returns chains (id, span, length) in this order; says whether the driver wants a call for
    /// one of them.
    pub(crate) fn complete(&mut self, chains: &[(u16, u16, u32)], event_idx: bool) -> bool {
        let old = self.used;
        let mut moved = 0;
        for &(id, span, len) in chains {
            let addr = Desc::read(&self.areas.descriptors, self.used.slot).addr;
            let mut flags = if self.used.wrap { AVAIL | USED } else { 0 };
            if len > 0 {
                flags |= WRITE;
            }
            let element = Desc {
                addr,
                len,
                id,
                flags,
            };
            element.write(&self.areas.descriptors, self.used.slot);
            self.used = self.used.after(span, self.areas.size);
            moved += span;
        }
        wants_call(&self.areas, old, moved, event_idx)
    }
}

/// §2.8.10: whether the driver asked to be called for one of `moved` descriptors from `from` on.
pub(crate) fn wants_call(areas: &RingAreas<'_>, from: Place, moved: u16, event_idx: bool) -> bool {
    let event = areas.available.load_u32(0, Ordering::Acquire);
    let (word, flags) = (event as u16, (event >> 16) as u16);
    match flags {
        EVENT_DISABLE => false,
        EVENT_DESC if event_idx => {
            let mut place = from;
            (0..moved).any(|_| {
                let here = place.word() == word;
                place = place.after(1, areas.size);
                here
            })
        }
        _ => true,
    }
}
