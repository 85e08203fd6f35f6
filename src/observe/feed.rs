//! One poll thread's part of an observer: its counters, and a buffer that the poll thread writes
//! and another thread reads.

use std::ops::Add;

use rtrb::{Consumer, Producer, RingBuffer};

use super::mirror::Copies;
use super::pen::{Held, Place};
use super::record::{RECORD_HEAD, Record};
use super::{Kind, ObserverSpec};
use crate::config::MAX_PORTS;
use crate::memory::{Pieces, Window};
use crate::stats::Counter;

/// Bytes of a buffer: room for 40,000 frames of 64 bytes, which are 40 ms at a million frames a
/// second.
const RING_BYTES: usize = 4 << 20;

/// The bytes of a frame, at the places where they are now.
#[derive(Clone, Copy, Debug)]
pub struct Content<'a, 't> {
    /// The first bytes, a private copy.
    pub head: &'a [u8],
    /// The bytes after `head`, in the sender's memory.
    pub payload: Pieces<'a, 't>,
    /// Length of the frame in bytes. The bytes of a frame that was dropped unread are not
    /// available.
    pub len: u32,
}

impl Content<'_, '_> {
    /// Returns the number of bytes that are available.
    pub fn available(&self) -> usize {
        let payload = self.payload.iter().map(|window| window.len());
        self.head.len() + payload.sum::<usize>()
    }

    /// Hands out the first `len` bytes piece by piece: from private memory, or from the sender's.
    pub(super) fn pieces<S>(
        &self,
        sink: &mut S,
        len: usize,
        private: impl Fn(&mut S, &[u8]),
        shared: impl Fn(&mut S, &Window<'_>),
    ) {
        let head = len.min(self.head.len());
        private(sink, &self.head[..head]);
        let mut left = len - head;
        if left == 0 {
            return;
        }
        for window in self.payload.iter() {
            let bytes = left.min(window.len());
            if let Some(piece) = window.sub(0, bytes).filter(|piece| !piece.is_empty()) {
                shared(sink, &piece);
            }
            left -= bytes;
        }
    }
}

/// The writing end of a feed. The feed's poll thread has the pen while it works with a topology.
#[derive(Debug)]
pub enum Pen {
    /// Another thread reads the records.
    Ring(Producer<u8>),
    /// The poll thread itself sends the copies, in its next pass.
    Mirror(Copies),
}

/// What an observer has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames that the observer kept.
    pub captured: u64,
    /// Frames that did not fit into the buffer, or for whose copy a mirror's destination had no
    /// room.
    pub missed: u64,
    /// Frames that the filter refused.
    pub filtered: u64,
}

impl Add for Counts {
    type Output = Counts;

    fn add(self, other: Counts) -> Counts {
        Counts {
            captured: self.captured + other.captured,
            missed: self.missed + other.missed,
            filtered: self.filtered + other.filtered,
        }
    }
}

/// One poll thread's part of an observer.
pub struct Feed {
    pen: Place<Pen>,
    /// Whether several records belong to one frame. Then only the frame's first record is counted.
    follows: bool,
    /// Frames that were kept. For a mirror: copies that were delivered.
    pub captured: Counter,
    /// Frames that the filter refused.
    pub filtered: Counter,
    /// Frames that were not kept for lack of room, by the port's slot.
    missed: Box<[Counter]>,
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Feed({:?})", self.counts())
    }
}

impl Feed {
    pub(super) fn ring(spec: &ObserverSpec, prefault: bool) -> (Feed, Consumer<u8>) {
        let (mut producer, mut consumer) = RingBuffer::new(RING_BYTES);
        if prefault && let Ok(chunk) = producer.write_chunk(RING_BYTES) {
            chunk.commit_all();
            if let Ok(chunk) = consumer.read_chunk(RING_BYTES) {
                chunk.commit_all();
            }
        }
        (Feed::with(spec, Pen::Ring(producer)), consumer)
    }

    pub(super) fn mirror(spec: &ObserverSpec, prefault: bool) -> Feed {
        Feed::with(spec, Pen::Mirror(Copies::new(prefault)))
    }

    fn with(spec: &ObserverSpec, pen: Pen) -> Feed {
        let slots = match &spec.ports {
            // A trace follows frames to any port.
            Some(ports) if spec.kind != Kind::Trace => {
                let highest = ports.iter().map(|port| usize::from(port.slot) + 1).max();
                highest.unwrap_or(0)
            }
            _ => MAX_PORTS,
        };
        Feed {
            pen: Place::new(pen),
            follows: spec.kind == Kind::Trace,
            captured: Counter::default(),
            filtered: Counter::default(),
            missed: (0..slots).map(|_| Counter::default()).collect(),
        }
    }

    /// Takes the pen. Only for the feed's poll thread, while it works with a topology.
    pub fn take(&self) -> Held<'_, Pen> {
        self.pen.take()
    }

    /// Makes the pages of the buffer, before the feed's poll thread begins: it is to take no page
    /// faults here, which would look like those of the guest whose frame it writes (`poll::watch`).
    pub fn prefault(&self) {
        match self.take().pen.as_deref_mut() {
            // Making a chunk clears all of it, and so touches its pages. Without a commit the
            // reader never sees it.
            Some(Pen::Ring(producer)) => drop(producer.write_chunk(producer.slots())),
            Some(Pen::Mirror(copies)) => copies.prefault(),
            None => {}
        }
    }

    /// Counts a frame of the port in `slot` that was not kept for lack of room.
    pub fn miss(&self, slot: u16) {
        if let Some(missed) = self.missed.get(usize::from(slot)) {
            missed.add(1);
        }
    }

    pub(super) fn missed_at(&self, slot: u16) -> u64 {
        self.missed.get(usize::from(slot)).map_or(0, Counter::get)
    }

    pub(super) fn counts(&self) -> Counts {
        Counts {
            captured: self.captured.get(),
            missed: self.missed.iter().map(Counter::get).sum(),
            filtered: self.filtered.get(),
        }
    }

    /// Writes a record of a frame: `extra`, then as much of the frame as its head says. Counts the
    /// frame as kept, or as missed if there was no room.
    pub fn write(&self, pen: &mut Pen, record: &Record, extra: &[u8], content: &Content<'_, '_>) {
        let kept = match pen {
            Pen::Ring(producer) => write_ring(producer, record, extra, content),
            // A copy is counted when it is delivered.
            Pen::Mirror(copies) => {
                if !copies.push(record, content) {
                    self.miss(record.port.slot);
                }
                return;
            }
        };
        if kept {
            self.captured
                .add(u64::from(!self.follows || record.begins()));
        } else {
            self.miss(record.port.slot);
        }
    }
}

fn write_ring(
    producer: &mut Producer<u8>,
    record: &Record,
    extra: &[u8],
    content: &Content<'_, '_>,
) -> bool {
    let len = record.captured as usize - extra.len();
    let head = record.encode();
    match extra {
        [] => write_whole(producer, [&head], content, len),
        _ => write_whole(producer, [&head, extra], content, len),
    }
}

/// Writes `heads` and the first `len` bytes of a frame. Returns false, and writes nothing, if there
/// is no room for all of them.
#[inline]
pub fn write_whole<const N: usize>(
    producer: &mut Producer<u8>,
    heads: [&[u8]; N],
    content: &Content<'_, '_>,
    len: usize,
) -> bool {
    if producer.slots() < heads.iter().map(|head| head.len()).sum::<usize>() + len {
        return false;
    }
    // There is room for all bytes, so no push fails. The reader waits until the whole record is
    // there.
    let push = |producer: &mut Producer<u8>, bytes: &[u8]| {
        let _ = producer.push_entire_slice(bytes);
    };
    heads.iter().for_each(|head| push(producer, head));
    content.pieces(producer, len, push, |producer, window| {
        let Ok(mut chunk) = producer.write_chunk(window.len()) else {
            return;
        };
        let (first, second) = chunk.as_mut_slices();
        window.read_bytes(0, first);
        window.read_bytes(first.len(), second);
        chunk.commit_all();
    });
    true
}

/// The reading ends of an observer's feeds.
#[derive(Debug)]
pub struct Reader {
    /// Each with the head of the record that is next in it, if that was looked at already.
    feeds: Vec<(Consumer<u8>, Option<Record>)>,
}

impl Reader {
    pub(super) fn new(consumers: Vec<Consumer<u8>>) -> Reader {
        let feeds = consumers.into_iter().map(|consumer| (consumer, None));
        Reader {
            feeds: feeds.collect(),
        }
    }

    /// Takes the oldest record of all feeds. Returns the number of its poll thread and its head.
    /// `bytes` is set to the bytes after the head.
    pub fn next(&mut self, bytes: &mut Vec<u8>) -> Option<(usize, Record)> {
        let mut oldest: Option<(usize, Record)> = None;
        for (thread, (consumer, head)) in self.feeds.iter_mut().enumerate() {
            if head.is_none() {
                *head = peek(consumer);
            }
            if let Some(record) = head
                && oldest.is_none_or(|(_, other)| record.time < other.time)
            {
                oldest = Some((thread, *record));
            }
        }
        let (thread, record) = oldest?;
        let (consumer, head) = &mut self.feeds[thread];
        let len = RECORD_HEAD + record.captured as usize;
        // The record may be incomplete, because its writer is still writing it.
        let chunk = consumer.read_chunk(len).ok()?;
        let (first, second) = chunk.as_slices();
        bytes.clear();
        bytes.extend_from_slice(first);
        bytes.extend_from_slice(second);
        bytes.drain(..RECORD_HEAD);
        chunk.commit_all();
        *head = None;
        Some((thread, record))
    }
}

fn peek(consumer: &mut Consumer<u8>) -> Option<Record> {
    let chunk = consumer.read_chunk(RECORD_HEAD).ok()?;
    let (first, second) = chunk.as_slices();
    let mut head = [0; RECORD_HEAD];
    head[..first.len()].copy_from_slice(first);
    head[first.len()..].copy_from_slice(second);
    // The chunk is not committed, so the head stays in the buffer.
    Some(Record::decode(&head))
}
