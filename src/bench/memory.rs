//! The memory of a bench guest, and the places of its rings and buffers in it.
//!
//! One memfd, mapped once, at a guest physical address that differs from the address here, so that
//! a backend that confuses the two is found out. Rings come first, each on pages of its own; then
//! the buffers of each queue. A buffer's frame starts on a cache line, with the virtio-net header
//! in front of it as drivers have it, and buffers are an odd number of lines apart: at a power of
//! two they would all compete for a few sets of the first-level cache.

use std::io;

use crate::memory::{SharedMemory, Window};
use crate::virtio::driver::RingLayout;

/// Where guests' memory starts for the guest.
pub const GUEST_BASE: u64 = 0x4000_0000;
/// virtio_net_hdr of VIRTIO_F_VERSION_1 (virtio 1.2 §5.1.6.1).
pub const NET_HDR: usize = 12;

const LINE: usize = 64;
const PAGE: usize = 4096;

/// Buffers of one queue: `count` of them, `stride` bytes apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferArea {
    /// Offset of the first in the memory.
    pub offset: usize,
    /// Distance between two.
    pub stride: usize,
    /// Bytes of header and frame in each.
    pub capacity: usize,
    /// How many.
    pub count: usize,
}

impl BufferArea {
    fn new(offset: usize, capacity: usize, count: usize) -> Self {
        let lines = (LINE + capacity - NET_HDR).div_ceil(LINE) | 1;
        BufferArea {
            offset,
            stride: lines * LINE,
            capacity,
            count,
        }
    }

    fn len(&self) -> usize {
        self.stride * self.count
    }

    /// Offset of buffer `index`, at its header.
    #[inline(always)]
    pub fn at(&self, index: u32) -> usize {
        self.offset + index as usize * self.stride + LINE - NET_HDR
    }

    /// Bytes from a buffer's start to its last line's end.
    pub fn room(&self) -> usize {
        self.stride - LINE + NET_HDR
    }
}

/// One queue's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePlace {
    /// Offset of the ring.
    pub ring: usize,
    /// The buffers.
    pub buffers: BufferArea,
}

/// What a guest's memory has to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryNeeds {
    /// Queue pairs.
    pub queue_pairs: usize,
    /// Layout of each ring.
    pub ring: RingLayout,
    /// Bytes of a transmit buffer, header included.
    pub transmit_capacity: usize,
    /// Bytes of a receive buffer, header included.
    pub receive_capacity: usize,
}

/// A guest's memory, laid out.
#[derive(Debug)]
pub struct GuestRam {
    /// The memory itself.
    pub memory: SharedMemory,
    /// Receive queues.
    pub receive: Vec<QueuePlace>,
    /// Transmit queues.
    pub transmit: Vec<QueuePlace>,
}

impl GuestRam {
    /// Creates and touches the memory, so that no page fault falls into a measurement.
    pub fn new(needs: &MemoryNeeds) -> io::Result<Self> {
        let ring_len = needs.ring.len.next_multiple_of(PAGE);
        let mut next = 2 * needs.queue_pairs * ring_len;
        let mut rings = (0..).map(|n| n * ring_len);
        let mut places = |capacity: usize| -> Vec<QueuePlace> {
            (0..needs.queue_pairs)
                .zip(&mut rings)
                .map(|(_, ring)| {
                    let buffers = BufferArea::new(next, capacity, usize::from(needs.ring.size));
                    next += buffers.len();
                    QueuePlace { ring, buffers }
                })
                .collect()
        };
        let receive = places(needs.receive_capacity);
        let transmit = places(needs.transmit_capacity);
        // Whole 2 MiB: backends map with huge pages where they can.
        let len = next.next_multiple_of(2 << 20);
        let memory = SharedMemory::create(len, true)?;
        let ram = GuestRam {
            memory,
            receive,
            transmit,
        };
        let all = ram.window(0, len)?;
        for page in (0..len).step_by(PAGE) {
            all.write_bytes(page, &[0]);
        }
        Ok(ram)
    }

    /// A window, or an error where the layout is wrong.
    pub fn window(&self, offset: usize, len: usize) -> io::Result<Window<'_>> {
        self.memory
            .window(offset, len)
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_do_not_overlap_and_frames_start_on_a_line() {
        let needs = MemoryNeeds {
            queue_pairs: 2,
            ring: RingLayout::new(256, false),
            transmit_capacity: 76,
            receive_capacity: 1530,
        };
        let ram = GuestRam::new(&needs).unwrap();
        let mut ends: Vec<(usize, usize)> = ram
            .receive
            .iter()
            .chain(&ram.transmit)
            .flat_map(|place| {
                let buffers = place.buffers;
                [
                    (place.ring, place.ring + needs.ring.len),
                    (buffers.offset, buffers.offset + buffers.len()),
                ]
            })
            .collect();
        ends.sort_unstable();
        assert!(ends.windows(2).all(|pair| pair[0].1 <= pair[1].0));
        assert!(ends.iter().all(|end| end.1 <= ram.memory.len()));
        let buffers = ram.receive[1].buffers;
        assert_eq!((buffers.at(7) + NET_HDR) % LINE, 0);
        assert!(buffers.stride >= LINE - NET_HDR + 1530);
        assert_eq!(buffers.stride / LINE % 2, 1);
    }
}
