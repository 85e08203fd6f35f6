//! The way of frames to ports whose memory is slow to touch.
//!
//! Only the thread that serves such ports touches their memory. A poll thread that has frames for
//! such a port copies them, from their healthy sender, into a bounded buffer of its own. It
//! completes their chains at once, and is done with them. The thread of slow ports delivers from
//! the buffer. A frame that does not fit is a counted drop. A buffer is a queue, so frames of one
//! poll thread, and so of one sender, keep their order.
//!
//! A port that is no longer slow goes on receiving by this way from each poll thread until all that
//! the thread has sent to the port has arrived. So a frame that is delivered directly comes after
//! all earlier ones. Frames to other slow ports in the same buffer are not waited for.
//!
//! The ends of a buffer are taken as observers' pens are (`observe::pen`). A poll thread takes its
//! writing end when it adopts a topology. The thread of slow ports takes all the reading ends.

use rtrb::{Consumer, Producer, RingBuffer};

use crate::observe::pen::{Held, Place};
use crate::stats::{Counter, MAX_POLL_THREADS};
use crate::switch::{MAX_SLOTS, PortRef};
use crate::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a buffer: 700 frames of 1500 bytes. A poll thread that never waits fills a buffer in a
/// millisecond. A longer buffer would only let a slow guest occupy more memory.
const BYTES: usize = 1 << 20;
/// Bytes of the head in front of each frame: slot, generation and length.
pub const DETOUR_HEAD: usize = 10;

/// One poll thread's buffer.
#[derive(Debug)]
struct DetourQueue {
    writer: Place<Producer<u8>>,
    reader: Place<Consumer<u8>>,
    /// Number of frames written. Only the poll thread writes this counter.
    written: Counter,
    /// What `written` was with the last frame to each port, by slot of the port.
    last: Box<[Counter]>,
    /// Frames that have arrived or were dropped, by the thread of slow ports. Released behind each
    /// delivery: a thread that delivers by itself afterwards sees the ring as the delivery left it.
    done: AtomicU64,
}

/// The buffers of all poll threads that there can be. A buffer uses memory only as far as it was
/// written.
#[derive(Debug)]
pub struct Detour {
    queues: Box<[DetourQueue]>,
}

impl Default for Detour {
    fn default() -> Self {
        let queue = |_| {
            let (writer, reader) = RingBuffer::new(BYTES);
            DetourQueue {
                writer: Place::new(writer),
                reader: Place::new(reader),
                written: Counter::default(),
                last: (0..MAX_SLOTS).map(|_| Counter::default()).collect(),
                done: AtomicU64::new(0),
            }
        };
        Detour {
            queues: (0..MAX_POLL_THREADS).map(queue).collect(),
        }
    }
}

impl Detour {
    /// Takes the writing end of a poll thread, for this thread while it works with a topology.
    pub fn writer(&self, thread: usize) -> Held<'_, Producer<u8>> {
        self.queues[thread].writer.take()
    }

    /// Takes the reading ends by poll thread, for the thread of slow ports while it works with a
    /// topology.
    pub fn readers(&self) -> impl Iterator<Item = Held<'_, Consumer<u8>>> {
        self.queues.iter().map(|queue| queue.reader.take())
    }

    /// Counts a frame to a port that a poll thread is about to write. To be called before the frame
    /// is visible.
    pub fn wrote(&self, thread: usize, to: PortRef) {
        let queue = &self.queues[thread];
        queue.written.add(1);
        queue.last[usize::from(to.slot)].raise_to(queue.written.get());
    }

    /// Counts a frame of a poll thread that the thread of slow ports has delivered or dropped.
    pub fn is_done(&self, thread: usize) {
        let done = &self.queues[thread].done;
        done.store(done.load(Ordering::Relaxed) + 1, Ordering::Release);
    }

    /// Whether all that a poll thread sent to a port has arrived.
    pub fn has_arrived(&self, thread: usize, to: PortRef) -> bool {
        self.queues[thread].has_arrived(to)
    }

    /// Whether all that was sent to a port has arrived. For control: once every poll thread knows
    /// that the port returns, it stays so.
    pub fn have_all_arrived(&self, to: PortRef) -> bool {
        self.queues.iter().all(|queue| queue.has_arrived(to))
    }

    /// Whether nothing is under way to any port.
    pub fn is_empty(&self) -> bool {
        let mut queues = self.queues.iter();
        queues.all(|queue| queue.done() >= queue.written.get())
    }
}

impl DetourQueue {
    fn done(&self) -> u64 {
        self.done.load(Ordering::Acquire)
    }

    fn has_arrived(&self, to: PortRef) -> bool {
        self.done() >= self.last[usize::from(to.slot)].get()
    }
}

/// Returns the head of a frame of `len` bytes to a port.
pub fn head_of(to: PortRef, len: u32) -> [u8; DETOUR_HEAD] {
    let mut head = [0; DETOUR_HEAD];
    head[..2].copy_from_slice(&to.slot.to_le_bytes());
    head[2..6].copy_from_slice(&to.generation.to_le_bytes());
    head[6..].copy_from_slice(&len.to_le_bytes());
    head
}

/// Returns port and length of a head that [`head_of`] made.
pub fn read_head([a, b, c, d, e, f, len @ ..]: [u8; DETOUR_HEAD]) -> (PortRef, u32) {
    let to = PortRef {
        slot: u16::from_le_bytes([a, b]),
        generation: u32::from_le_bytes([c, d, e, f]),
    };
    (to, u32::from_le_bytes(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_says_port_and_length() {
        let to = PortRef {
            slot: 511,
            generation: 0x0102_0304,
        };
        assert_eq!(read_head(head_of(to, 65_549)), (to, 65_549));
    }

    #[test]
    fn a_port_does_not_wait_for_frames_to_another_one() {
        let port = |slot| PortRef {
            slot,
            generation: 1,
        };
        let (calm, slow) = (port(0), port(1));
        let detour = Detour::default();
        assert!(detour.is_empty() && detour.have_all_arrived(calm));
        detour.wrote(3, calm);
        detour.wrote(3, slow);
        detour.wrote(4, slow);
        assert!(!detour.has_arrived(3, calm) && detour.has_arrived(4, calm));
        assert!(!detour.have_all_arrived(calm));
        detour.is_done(3);
        assert!(detour.has_arrived(3, calm) && detour.have_all_arrived(calm));
        assert!(!detour.has_arrived(3, slow) && !detour.is_empty());
        detour.is_done(3);
        assert!(detour.has_arrived(3, slow) && !detour.have_all_arrived(slow));
        detour.is_done(4);
        assert!(detour.have_all_arrived(slow) && detour.is_empty());
    }

    #[test]
    fn an_end_that_is_taken_is_not_there_twice() {
        let detour = Detour::default();
        let writer = detour.writer(3);
        assert!(writer.pen.is_some());
        assert!(detour.writer(3).pen.is_none(), "it is taken");
    }
}
