//! Copies of frames for mirrors: a poll thread makes them in one pass and sends them in its next
//! pass.

use super::feed::Content;
use super::record::Record;
use crate::switch::PortRef;

/// Most bytes of copies in one pass: four times what a pass takes from one queue.
const COPY_BYTES: usize = 256 * 1024;
/// Most copies in one pass.
const MOST_COPIES: usize = 4096;
/// Most frames of one pass that are remembered. Further frames may be copied twice. The table has
/// twice as many places, so that a search is short.
const MOST_FRAMES: usize = 2 * MOST_COPIES;
const PLACES: usize = 2 * MOST_FRAMES;

/// The place of a copy in the buffer, and the port at which it was made.
#[derive(Clone, Copy, Debug)]
struct Copy {
    start: u32,
    len: u32,
    port: PortRef,
}

/// The frames that were seen in one pass, by their names in records.
#[derive(Debug)]
struct Met {
    /// Hash table of numbers of entries in `frames`, from 1 on; 0: no entry.
    places: Box<[u16]>,
    /// The frames, each with its place in the table.
    frames: Vec<((u16, u32), u16)>,
}

impl Met {
    fn new() -> Met {
        Met {
            places: vec![0; PLACES].into(),
            frames: Vec::with_capacity(MOST_FRAMES),
        }
    }

    /// Notes a frame. Returns false if the frame was noted already.
    fn note(&mut self, frame: (u16, u32)) -> bool {
        if self.frames.len() == MOST_FRAMES {
            return true;
        }
        // The hash is the upper bits of a product with an odd number near 2^64 divided by the
        // golden ratio. So neighbouring names lie far apart.
        let name = u64::from(frame.0) << 32 | u64::from(frame.1);
        let hash = name.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut place = (hash >> (u64::BITS - PLACES.ilog2())) as usize;
        while let Some(number) = usize::from(self.places[place]).checked_sub(1) {
            if self.frames[number].0 == frame {
                return false;
            }
            place = (place + 1) % PLACES;
        }
        self.frames.push((frame, place as u16));
        self.places[place] = self.frames.len() as u16;
        true
    }

    fn clear(&mut self) {
        for (_, place) in self.frames.drain(..) {
            self.places[usize::from(place)] = 0;
        }
    }
}

/// Copies that wait for the next pass.
///
/// A frame is copied once for each mirror, where it is first seen in the pass. The frame may enter
/// through one of the mirror's ports and leave through others. Whoever looks at the copies sees it
/// once.
#[derive(Debug)]
pub struct Copies {
    bytes: Box<[u8]>,
    used: usize,
    copies: Vec<Copy>,
    met: Met,
}

impl Copies {
    /// Makes room for the copies of one pass; nothing is allocated later. `prefault`: the poll
    /// thread exists already, and must take no page faults here.
    pub(super) fn new(prefault: bool) -> Copies {
        let mut copies = Copies {
            bytes: vec![0; COPY_BYTES].into(),
            used: 0,
            copies: Vec::with_capacity(MOST_COPIES),
            met: Met::new(),
        };
        if prefault {
            copies.prefault();
        }
        copies
    }

    /// Makes the pages that copies will be in.
    pub(super) fn prefault(&mut self) {
        self.bytes[self.used..].fill(1);
    }

    /// Copies as much of a frame as the record says, unless the frame was noted already. Returns
    /// false if there is no room.
    pub(super) fn push(&mut self, record: &Record, content: &Content<'_, '_>) -> bool {
        if !self.met.note(record.frame) {
            return true;
        }
        let len = record.captured as usize;
        if self.copies.len() == MOST_COPIES || self.bytes.len() - self.used < len {
            return false;
        }
        let mut target = &mut self.bytes[self.used..self.used + len];
        content.pieces(
            &mut target,
            len,
            |target, bytes| {
                let (first, rest) = std::mem::take(target).split_at_mut(bytes.len());
                first.copy_from_slice(bytes);
                *target = rest;
            },
            |target, window| {
                let (first, rest) = std::mem::take(target).split_at_mut(window.len());
                window.read_bytes(0, first);
                *target = rest;
            },
        );
        self.copies.push(Copy {
            start: self.used as u32,
            len: record.captured,
            port: record.port,
        });
        self.used += len;
        true
    }

    /// Returns the number of copies.
    pub fn len(&self) -> usize {
        self.copies.len()
    }

    /// Whether there is no copy.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// Returns the bytes of a copy, and the port at which it was made.
    pub fn get(&self, number: usize) -> (&[u8], PortRef) {
        let Copy { start, len, port } = self.copies[number];
        (&self.bytes[start as usize..][..len as usize], port)
    }

    /// Forgets all copies.
    pub fn clear(&mut self) {
        self.copies.clear();
        self.met.clear();
        self.used = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_met_once_a_pass_however_many_there_are() {
        let mut met = Met::new();
        let frames = |queue: u16| (0..MOST_FRAMES as u32 / 2).map(move |at| (queue, at * 256));
        for _ in 0..3 {
            for frame in frames(0).chain(frames(300)) {
                assert!(met.note(frame), "{frame:?}");
            }
            // Room for one, or nothing would be looked for.
            let (_, place) = met.frames.pop().unwrap();
            met.places[usize::from(place)] = 0;
            for frame in frames(0) {
                assert!(!met.note(frame), "{frame:?}");
            }
            met.clear();
            assert!(met.places.iter().all(|place| *place == 0));
        }
    }

    #[test]
    fn what_is_too_much_to_be_told_apart_is_copied() {
        let mut met = Met::new();
        assert!((0..MOST_FRAMES as u32).all(|at| met.note((0, at))));
        assert!(met.note((0, 0)));
    }
}
