//! The way of frames to ports whose memory is slow to touch.
//!
//! Only the thread that serves such ports touches their memory. A poll thread that has frames for
//! such a port copies them, from their healthy sender, into a bounded buffer of its own. It
//! completes their chains at once, and is done with them. The thread of slow ports delivers from
//! the buffer. A frame that does not fit is a counted drop. A buffer is a queue, so frames of one
//! poll thread, and so of one sender, keep their order.
//!
//! A port that is no longer slow goes on receiving by this way from each poll thread until that
//! thread finds its buffer empty. So a frame that comes directly is behind all that came before.
//! All slow ports share a thread's buffer, so a port comes back only once the frames to the others
//! have a pause.
//!
//! The ends of a buffer are taken as observers' pens are (`observe::pen`). A poll thread takes its
//! writing end when it adopts a topology. The thread of slow ports takes all the reading ends.

use rtrb::{Consumer, Producer, RingBuffer};

use crate::observe::pen::{Held, Place};
use crate::stats::{Counter, MAX_POLL_THREADS};
use crate::switch::PortRef;

/// Bytes of a buffer: 700 frames of 1500 bytes. A poll thread that waits for nobody fills it in a
/// millisecond. A longer buffer would only let a slow guest occupy more memory.
const BYTES: usize = 1 << 20;
/// Bytes in front of each frame.
pub const DETOUR_HEAD: usize = 10;

/// One poll thread's buffer.
#[derive(Debug)]
struct Lane {
    writer: Place<Producer<u8>>,
    reader: Place<Consumer<u8>>,
    /// Frames written, by the poll thread.
    written: Counter,
    /// Frames that have arrived or were dropped, by the thread of slow ports.
    done: Counter,
}

/// The buffers of all poll threads that there can be. Memory is used as far as they are.
#[derive(Debug)]
pub struct Detour {
    lanes: Box<[Lane]>,
}

impl Default for Detour {
    fn default() -> Self {
        let lane = |_| {
            let (writer, reader) = RingBuffer::new(BYTES);
            Lane {
                writer: Place::new(writer),
                reader: Place::new(reader),
                written: Counter::default(),
                done: Counter::default(),
            }
        };
        Detour {
            lanes: (0..MAX_POLL_THREADS).map(lane).collect(),
        }
    }
}

impl Detour {
    /// The writing end of a poll thread, for that one while it works with a topology.
    pub fn writer(&self, thread: usize) -> Held<'_, Producer<u8>> {
        self.lanes[thread].writer.take()
    }

    /// The reading ends by poll thread, for the thread of slow ports while it works with a
    /// topology.
    pub fn readers(&self) -> impl Iterator<Item = Held<'_, Consumer<u8>>> {
        self.lanes.iter().map(|lane| lane.reader.take())
    }

    /// A poll thread writes a frame: called before the frame can be seen.
    pub fn wrote(&self, thread: usize) {
        self.lanes[thread].written.add(1);
    }

    /// The thread of slow ports is done with a frame of a poll thread.
    pub fn is_done(&self, thread: usize) {
        self.lanes[thread].done.add(1);
    }

    /// Whether nothing is under way. For control: once every poll thread knows that ports return,
    /// it stays so for them.
    pub fn is_empty(&self) -> bool {
        let mut lanes = self.lanes.iter();
        lanes.all(|lane| lane.done.get() >= lane.written.get())
    }
}

/// Whether everything that was written there is done.
pub fn is_drained(writer: &Producer<u8>) -> bool {
    writer.slots() == BYTES
}

/// What stands in front of a frame of so many bytes to a port.
pub fn head_of(to: PortRef, len: u32) -> [u8; DETOUR_HEAD] {
    let mut head = [0; DETOUR_HEAD];
    head[..2].copy_from_slice(&to.slot.to_le_bytes());
    head[2..6].copy_from_slice(&to.generation.to_le_bytes());
    head[6..].copy_from_slice(&len.to_le_bytes());
    head
}

/// The reverse.
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
    fn a_buffer_is_drained_when_its_reader_has_let_go() {
        let detour = Detour::default();
        let mut writer = detour.writer(3);
        let writer = writer.pen.as_deref_mut().unwrap();
        assert!(is_drained(writer) && detour.is_empty());
        writer.push_entire_slice(&[1, 2, 3]).unwrap();
        detour.wrote(3);
        assert!(!is_drained(writer) && !detour.is_empty());
        let mut reader = detour.readers().nth(3).unwrap();
        let chunk = reader.pen.as_deref_mut().unwrap().read_chunk(3).unwrap();
        assert!(!is_drained(writer));
        chunk.commit_all();
        detour.is_done(3);
        assert!(is_drained(writer) && detour.is_empty());
        assert!(detour.writer(3).pen.is_none(), "it is taken");
    }
}
