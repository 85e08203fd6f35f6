//! Copies of frames that a poll thread makes in one pass and sends on in its next.

use super::lane::Content;
use super::record::Record;
use crate::switch::PortRef;

/// Bytes of copies of one pass: four times what a pass takes from one queue.
const COPY_BYTES: usize = 256 * 1024;
/// Copies of one pass.
const MOST_COPIES: usize = 4096;

/// A copy, by its place.
#[derive(Clone, Copy, Debug)]
struct Copy {
    start: u32,
    len: u32,
    port: PortRef,
}

/// Copies that wait for the next pass.
#[derive(Debug)]
pub struct Copies {
    bytes: Box<[u8]>,
    used: usize,
    copies: Vec<Copy>,
}

impl Copies {
    /// Room for a pass; all that will ever be used. `touch`: its thread exists, and is to take no page faults here.
    pub(super) fn new(touch: bool) -> Copies {
        let mut bytes = vec![0; COPY_BYTES];
        if touch {
            bytes.fill(1);
        }
        Copies {
            bytes: bytes.into(),
            used: 0,
            copies: Vec::with_capacity(MOST_COPIES),
        }
    }

    /// Copies what the record says of a frame; `false` if there is no room.
    pub(super) fn push(&mut self, record: &Record, content: &Content<'_, '_>) -> bool {
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

    /// Number of copies.
    pub fn len(&self) -> usize {
        self.copies.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// The bytes of a copy, and the port that it was made at.
    pub fn get(&self, number: usize) -> (&[u8], PortRef) {
        let Copy { start, len, port } = self.copies[number];
        (&self.bytes[start as usize..][..len as usize], port)
    }

    /// Forgets them.
    pub fn clear(&mut self) {
        self.copies.clear();
        self.used = 0;
    }
}
