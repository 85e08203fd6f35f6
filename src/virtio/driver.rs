//! Virtqueues from the *driver's* side: what a guest's virtio driver does with its rings.
//!
//! `pollux bench` sends and receives through these, and the tests of the device side use them as a
//! mock driver. A buffer is posted with a token of the caller's, published, and comes back with its
//! token and the number of bytes that the device wrote. One [`DriverRing`] serves one queue and one
//! thread.
//!
//! - Split rings follow virtio 1.2 §2.7, packed rings §2.8. Indices and free lists are private.
//!   What the device writes is only compared with them. So a device that returns what it was not
//!   given is found out ([`RingFault`]), and corrupts nothing here.
//! - Free descriptors (packed: buffer ids) are a first-in first-out list. Descriptors that are used
//!   in order come back in order. So descriptors are taken in ring order, as VIRTIO_F_IN_ORDER
//!   demands, without a second mechanism. Four consecutive descriptors share a cache line.
//! - Descriptors are written anew for each buffer, as real drivers do. A device must pay here for
//!   fetching descriptors as it would there.
//! - Nothing posted is visible before [`DriverRing::publish`], in packed rings too: the flags of
//!   the first descriptor are held back until then.

mod packed;
mod split;
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;

use arrayvec::ArrayVec;

use crate::memory::Window;
use crate::virtio::RingFeatures;

pub use packed::PackedRing;
pub use split::SplitRing;

/// VIRTQ_DESC_F_NEXT: the chain continues.
pub const DESC_NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE: the device writes into this buffer.
pub const DESC_WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT: the buffer is a table of descriptors.
pub const DESC_INDIRECT: u16 = 4;

/// Bytes of one descriptor, in either kind of ring.
pub const DESC_SIZE: usize = 16;

/// Bytes of a cache line. Each area of a ring begins on a line of its own, because the two sides
/// write to different areas.
const LINE: usize = 64;

/// One buffer of a chain: its place for the device, and the side that writes to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes to the buffer.
    pub writable: bool,
}

impl Buffer {
    /// A buffer that the device reads.
    pub fn readable(address: u64, len: u32) -> Self {
        Buffer {
            address,
            len,
            writable: false,
        }
    }

    /// A buffer that the device writes.
    pub fn writable(address: u64, len: u32) -> Self {
        Buffer {
            address,
            len,
            writable: true,
        }
    }

    fn flags(&self) -> u16 {
        if self.writable { DESC_WRITE } else { 0 }
    }
}

/// A chain that the device has finished with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The token that the chain was posted with.
    pub token: u32,
    /// Bytes that the device says it wrote. With VIRTIO_F_IN_ORDER a device may return several
    /// chains with one entry. Then only the length of the last chain means anything.
    pub len: u32,
}

/// An error that only a broken device makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// The device's index moved further than there were buffers.
    #[error("the device returned {returned} buffers where {outstanding} were outstanding")]
    TooMany {
        /// How far the index moved.
        returned: u16,
        /// Chains that the device had.
        outstanding: u16,
    },
    /// The device returned a buffer that it did not have.
    #[error("the device returned buffer {id}, which it did not have")]
    NotOutstanding {
        /// The identifier in the used entry.
        id: u32,
    },
}

/// Where the three areas of a ring lie, as offsets from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Entries.
    pub size: u16,
    /// Length of the descriptor table (split) or ring (packed), which is at offset 0.
    pub descriptors_len: usize,
    /// Available ring (split) or driver event suppression (packed).
    pub available: usize,
    /// Length of that.
    pub available_len: usize,
    /// Used ring (split) or device event suppression (packed).
    pub used: usize,
    /// Length of that.
    pub used_len: usize,
    /// Length of the whole, a multiple of the cache line.
    pub len: usize,
}

impl RingLayout {
    /// The layout of a ring of `size` entries.
    pub fn new(size: u16, packed: bool) -> Self {
        let entries = usize::from(size);
        let descriptors_len = DESC_SIZE * entries;
        // virtio 1.2 §2.7: flags, index, entries, and the event index; §2.8: two words of 16 bits.
        let (available_len, used_len) = if packed {
            (4, 4)
        } else {
            (6 + 2 * entries, 6 + 8 * entries)
        };
        let available = descriptors_len.next_multiple_of(LINE);
        let used = (available + available_len).next_multiple_of(LINE);
        RingLayout {
            size,
            descriptors_len,
            available,
            available_len,
            used,
            used_len,
            len: (used + used_len).next_multiple_of(LINE),
        }
    }
}

/// The three areas of a ring.
#[derive(Clone, Copy, Debug)]
pub struct RingAreas<'m> {
    /// Entries.
    pub size: u16,
    /// Descriptor table (split) or ring (packed).
    pub descriptors: Window<'m>,
    /// Available ring (split) or driver event suppression (packed).
    pub available: Window<'m>,
    /// Used ring (split) or device event suppression (packed).
    pub used: Window<'m>,
}

impl<'m> RingAreas<'m> {
    /// The areas of `layout` inside `memory`, zeroed; `None` where `memory` is too short.
    pub fn zeroed(memory: Window<'m>, layout: &RingLayout) -> Option<Self> {
        let all = memory.sub(0, layout.len)?;
        for offset in (0..layout.len).step_by(8) {
            all.store_u64(offset, 0, Ordering::Relaxed);
        }
        Self::of(all, layout)
    }

    /// The areas of `layout` inside `memory`, as they are; `None` where `memory` is too short.
    pub fn of(memory: Window<'m>, layout: &RingLayout) -> Option<Self> {
        let all = memory.sub(0, layout.len)?;
        Some(RingAreas {
            size: layout.size,
            descriptors: all.sub(0, layout.descriptors_len)?,
            available: all.sub(layout.available, layout.available_len)?,
            used: all.sub(layout.used, layout.used_len)?,
        })
    }
}

/// The driver's side of one virtqueue.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub enum DriverRing<'m> {
    /// virtio 1.2 §2.7.
    Split(SplitRing<'m>),
    /// virtio 1.2 §2.8.
    Packed(PackedRing<'m>),
}

/// Calls the same method of whichever ring it is.
macro_rules! either {
    ($ring:expr, $name:ident($($argument:expr),*)) => {
        match $ring {
            DriverRing::Split(ring) => ring.$name($($argument),*),
            DriverRing::Packed(ring) => ring.$name($($argument),*),
        }
    };
}

impl<'m> DriverRing<'m> {
    /// An empty ring in zeroed `areas`, of the kind that `features` say.
    ///
    /// # Panics
    /// Where a split ring's size is not a power of two, or any ring's size is 0 or above 32768.
    pub fn new(areas: RingAreas<'m>, features: RingFeatures) -> Self {
        if features.packed {
            DriverRing::Packed(PackedRing::new(areas, features))
        } else {
            DriverRing::Split(SplitRing::new(areas, features))
        }
    }

    /// Returns the number of descriptors that can be posted.
    #[inline(always)]
    pub fn free(&self) -> u16 {
        either!(self, free())
    }

    /// Returns the number of chains posted and not reaped yet, published or not.
    #[inline(always)]
    pub fn outstanding(&self) -> u16 {
        either!(self, outstanding())
    }

    /// Posts a chain of one buffer. Returns `false` if the ring is full.
    #[inline(always)]
    pub fn post_one(&mut self, buffer: Buffer, token: u32) -> bool {
        either!(self, post_one(buffer, token))
    }

    /// Posts chains of one buffer each, with their tokens, as long as the ring has room. Returns
    /// how many were posted. Cheaper than one at a time.
    #[inline(always)]
    pub fn post_burst(&mut self, chains: &[(Buffer, u32)]) -> usize {
        either!(self, post_burst(chains))
    }

    /// Posts a chain of `buffers`, readable ones first. Returns `false` if there are too few free
    /// descriptors.
    pub fn post(&mut self, buffers: &[Buffer], token: u32) -> bool {
        either!(self, post(buffers, token))
    }

    /// Posts a chain through the indirect table `table`, which the device finds at `address`.
    /// Returns `false` if the ring is full or the table too short for `buffers`.
    pub fn post_indirect(
        &mut self,
        table: &Window<'_>,
        address: u64,
        buffers: &[Buffer],
        token: u32,
    ) -> bool {
        either!(self, post_indirect(table, address, buffers, token))
    }

    /// Makes everything posted so far visible to the device.
    #[inline(always)]
    pub fn publish(&mut self) {
        either!(self, publish());
    }

    /// Whether the device wants a kick for what was published since the last time this was asked.
    #[inline(always)]
    pub fn needs_kick(&mut self) -> bool {
        either!(self, needs_kick())
    }

    /// Takes back the next chain that the device has finished with; `None` if there is none.
    #[inline(always)]
    pub fn reap(&mut self) -> Option<Used> {
        either!(self, reap())
    }

    /// Takes back chains that the device has finished with, until `burst` is full. Cheaper than one
    /// at a time.
    #[inline(always)]
    pub fn reap_burst<const N: usize>(&mut self, burst: &mut ArrayVec<Used, N>) {
        match self {
            DriverRing::Split(ring) => ring.reap_burst(burst),
            DriverRing::Packed(ring) => ring.reap_burst(burst),
        }
    }

    /// Returns what the device did wrong, or `None`. After a fault nothing is reaped any more.
    pub fn fault(&self) -> Option<RingFault> {
        either!(self, fault())
    }

    /// Asks the device not to call.
    pub fn suppress_calls(&mut self) {
        either!(self, suppress_calls());
    }

    /// Asks the device to call at the next used chain. Returns `true` if a chain is used already:
    /// no call may come for that chain.
    #[must_use]
    pub fn enable_calls(&mut self) -> bool {
        either!(self, enable_calls())
    }

    /// Returns what to tell a backend with SET_VRING_BASE at the start, and what a stop should
    /// answer once everything posted has been used.
    pub fn base(&self) -> u32 {
        either!(self, base())
    }
}

/// Whether moving an index from `old` to `new` passes the `event` index (virtio 1.2 §2.7.10).
///
/// Worked example: old 65534, new 2 (four entries: 65534, 65535, 0, 1). Event 0 asks for a
/// notification when entry 0 was added: 2 − 0 − 1 = 1 < 2 − 65534 = 4 (modulo 65536), so yes. Event
/// 2 has not been reached: 2 − 2 − 1 = 65535, so no. `old <= event && event < new` looks right, but
/// fails at the wrap.
#[inline(always)]
pub fn passes_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
