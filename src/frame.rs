//! Frames on their way through the switch: header snapshot, payload windows, burst.
//!
//! The first [`HEAD_BYTES`] bytes of a frame are copied once into private memory. Decisions depend
//! on that copy only, and that copy is what is delivered. The payload behind it is copied later,
//! once, straight from the sender's memory into the receiver's. So a sender cannot pass a check
//! with one source address and deliver another.
//!
//! The sender's virtio-net header is not passed on. The receiver's header is made here.
//!
//! Frames are handled in *bursts*, gathered from several transmit queues of one thread. Each claim
//! in a receive queue has a price, however many frames it holds, so frames to one receiver should
//! share a claim.

use std::ops::Range;

use arrayvec::ArrayVec;

use crate::memory::{Pieces, Window};
use crate::stats::DropReason;
use crate::virtio::NET_HDR_SIZE;
use crate::virtio::chain::{MAX_CHAIN, Windows};
use crate::wire::HEADER_LEN;

/// Bytes of a frame that are copied when it is taken. Decisions depend on these bytes only.
pub const HEAD_BYTES: usize = 128;
/// Most frames of one burst.
pub const BURST_FRAMES: usize = 64;
/// A burst has no room any more once its frames have this many bytes.
pub const BURST_BYTES: u32 = 256 * 1024;
/// Longest frame taken from a guest, in bytes without the virtio-net header.
pub const MAX_FRAME: u32 = 65_535 + HEADER_LEN as u32;
/// A burst has no room any more once more than this many descriptors were read for its chains of
/// several buffers: 37 of the longest chains that Linux sends. Empty descriptors and unusable
/// chains count too, so a driver that posts only those ends its turn after some microseconds.
const BURST_PIECES: usize = 704;
/// Most pieces of memory of one burst: room for the longest chain remains as long as
/// [`BURST_PIECES`] is not exceeded.
const BURST_WINDOWS: usize = BURST_PIECES + MAX_CHAIN;
/// Most pieces of a frame whose first lines are prefetched when the frame is noted. Prefetching
/// more would push lines out of the cache before they are used.
const ASKED_PIECES: usize = 16;

/// Where `num_buffers` stands in the virtio-net header (virtio 1.2 §5.1.6).
const NUM_BUFFERS: usize = 10;

/// Returns the virtio-net header that a receiver finds in front of a frame in `buffers` buffers.
/// The legacy header is the beginning of this header.
#[inline(always)]
pub fn receive_header(buffers: u16) -> [u8; NET_HDR_SIZE] {
    let mut header = [0; NET_HDR_SIZE];
    header[NUM_BUFFERS..].copy_from_slice(&buffers.to_le_bytes());
    header
}

/// Writes `header` to the start of `buffer`, unless the same bytes are there already.
///
/// Drivers that use their buffers again leave the header as it was, often in a cache line of its
/// own (DPDK's driver: in front of the frame's line). If nothing is written, that line does not
/// have to move between the cores twice. A driver that changes the header at the same time gets
/// what it wrote.
#[inline(always)]
pub fn put_header<const N: usize>(buffer: &Window<'_>, header: &[u8; N]) {
    let mut found = [0; N];
    buffer.read_bytes(0, &mut found);
    if found != *header {
        buffer.write_bytes(0, header);
    }
}

/// Writes the beginning of `header` to the start of `buffer`, at most `room` bytes. Returns the
/// number of bytes written, and leaves the rest in `header`.
#[inline(always)]
pub fn put_header_part(buffer: &Window<'_>, header: &mut &[u8], room: usize) -> usize {
    let (part, left) = header.split_at(header.len().min(room));
    *header = left;
    if let Ok(whole) = <&[u8; NET_HDR_SIZE]>::try_from(part) {
        put_header(buffer, whole);
    } else {
        put_bytes(buffer, part);
    }
    part.len()
}

/// Writes a legacy header, or a part of a header that lies over several pieces of memory, byte by
/// byte.
#[inline(never)]
fn put_bytes(buffer: &Window<'_>, bytes: &[u8]) {
    for (at, byte) in bytes.iter().enumerate() {
        if let Some(place) = buffer.behind(at) {
            put_header(&place, &[*byte]);
        }
    }
}

/// One frame of a burst.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'t> {
    /// The frame's first bytes.
    head: [u8; HEAD_BYTES],
    /// Bytes of the frame.
    pub len: u32,
    /// Bytes of the sender's virtio-net header, which are skipped.
    header: u16,
    /// The chain's first buffer. Once the head is loaded: the rest of the buffer in which the head
    /// ended.
    first: Window<'t>,
    /// The buffers behind `first`, in the burst's arena: start and number. Most chains have none,
    /// and never touch the arena.
    more: (u16, u16),
    /// Number of the transmit queue that the frame came from, in the thread's plan.
    pub ingress: u16,
    /// Position of the frame's chain in the transmit queue.
    pub position: u64,
}

impl Frame<'_> {
    const EMPTY: Self = Frame {
        head: [0; HEAD_BYTES],
        len: 0,
        header: NET_HDR_SIZE as u16,
        first: Window::EMPTY,
        more: (0, 0),
        ingress: 0,
        position: 0,
    };

    #[inline(always)]
    fn head_len(&self) -> usize {
        HEAD_BYTES.min(self.len as usize)
    }

    /// Returns the private copy of the first bytes, at most [`HEAD_BYTES`].
    #[inline(always)]
    pub fn head(&self) -> &[u8] {
        &self.head[..self.head_len()]
    }

    /// Whether the frame has no bytes behind its head.
    #[inline(always)]
    pub fn is_all_head(&self) -> bool {
        self.len as usize <= HEAD_BYTES
    }

    /// Returns the Ethernet addresses, destination first. They decide where the frame goes.
    #[inline(always)]
    pub fn addresses(&self) -> [u8; 12] {
        let mut addresses = [0; 12];
        addresses.copy_from_slice(&self.head[..12]);
        addresses
    }

    #[inline(always)]
    fn more(&self) -> Range<usize> {
        usize::from(self.more.0)..usize::from(self.more.0) + usize::from(self.more.1)
    }
}

/// The chain that a frame comes from.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// Bytes of the virtio-net header in front of the frame.
    pub header: u16,
    /// Number of the transmit queue in the thread's plan.
    pub ingress: u16,
    /// Position of the frame's chain in the transmit queue.
    pub position: u64,
}

/// Frames handled together, gathered from one or several queues.
///
/// Taking has two steps, so that the cache misses of a burst overlap. [`Burst::note`] for each
/// chain prefetches the frame's first lines. Then [`Burst::load_heads`] copies the heads of all
/// frames.
#[derive(Debug)]
pub struct Burst<'t> {
    /// Entries beyond `count` are places to be used again. Each place is made when it is first
    /// needed, because all of them are 13 KiB, and a poll thread makes two bursts whenever it
    /// adopts a topology.
    frames: ArrayVec<Frame<'t>, BURST_FRAMES>,
    count: usize,
    /// The arena: buffers of chains that have several.
    windows: Windows<'t, BURST_WINDOWS>,
    bytes: u32,
}

impl Default for Burst<'_> {
    fn default() -> Self {
        Burst::new()
    }
}

impl<'t> Burst<'t> {
    /// An empty burst, to be reused.
    pub fn new() -> Self {
        Burst {
            frames: ArrayVec::new(),
            count: 0,
            windows: Windows::new(),
            bytes: 0,
        }
    }

    /// Forgets all frames and windows, and the number of descriptors read.
    #[inline(always)]
    pub fn clear(&mut self) {
        self.windows.clear();
        (self.count, self.bytes) = (0, 0);
    }

    /// Whether another chain of any legal form fits. Returns `false` after [`Burst::close`].
    #[inline(always)]
    pub fn has_room(&self) -> bool {
        self.count < BURST_FRAMES
            && self.windows.read() as usize <= BURST_PIECES
            && self.bytes < BURST_BYTES
    }

    /// Makes [`Burst::has_room`] return `false` until the burst is cleared. Overwrites the number
    /// of bytes: read [`Burst::bytes`] before.
    #[inline(always)]
    pub fn close(&mut self) {
        self.bytes |= BURST_BYTES;
    }

    /// Returns the sum of the frames' lengths, in bytes without headers.
    #[inline(always)]
    pub fn bytes(&self) -> u32 {
        self.bytes
    }

    /// Returns the frames, in the order in which they were taken.
    #[inline(always)]
    pub fn frames(&self) -> &[Frame<'t>] {
        &self.frames[..self.count]
    }

    /// Returns the arena, to which a take appends its windows.
    #[inline(always)]
    pub fn windows_mut(&mut self) -> &mut Windows<'t, BURST_WINDOWS> {
        &mut self.windows
    }

    /// Returns the number of windows in the arena: where the windows of the next chain begin.
    #[inline(always)]
    pub fn mark(&self) -> usize {
        self.windows.len()
    }

    /// Returns the payload of a frame of this burst: what follows its head.
    #[inline(always)]
    pub fn payload(&self, frame: &Frame<'t>) -> Pieces<'_, 't> {
        let more = match frame.more.1 {
            0 => &[],
            _ => &self.windows[frame.more()],
        };
        Pieces::new(frame.first, more)
    }

    /// Notes a chain of one buffer as a frame. Returns the drop reason if the chain is no frame.
    #[inline(always)]
    pub fn note(&mut self, buffer: Window<'t>, from: Origin) -> Result<(), DropReason> {
        let len = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
        self.add(buffer, (0, 0), len, from)
    }

    /// Notes the chain of `len` bytes, header included, whose buffers are in the arena from `mark`
    /// on. If the chain is no frame, returns the drop reason and removes the buffers from the
    /// arena.
    pub fn note_chain(&mut self, mark: usize, len: u32, from: Origin) -> Result<(), DropReason> {
        let noted = match self.windows.get(mark) {
            Some(first) => {
                let more = (self.windows.len() - mark - 1) as u16;
                self.add(*first, (mark as u16 + 1, more), len, from)
            }
            // All descriptors of the chain are empty.
            None => Err(DropReason::RxMalformedChain),
        };
        if noted.is_err() {
            self.windows.truncate(mark);
        }
        noted
    }

    #[inline(always)]
    fn add(
        &mut self,
        first: Window<'t>,
        more: (u16, u16),
        len: u32,
        from: Origin,
    ) -> Result<(), DropReason> {
        let header = u32::from(from.header);
        if !(header + HEADER_LEN as u32..=header + MAX_FRAME).contains(&len) {
            return Err(match len {
                _ if len < header => DropReason::RxMalformedChain,
                _ if len > header + MAX_FRAME => DropReason::RxTooLong,
                _ => DropReason::RxShortFrame,
            });
        }
        // The sender's core has just written these lines. Each line would cost about 100 ns when it
        // is needed, and a few nanoseconds while other lines are under way too. The line of the
        // sender's header is not prefetched, because nobody reads the header.
        let skip = usize::from(from.header);
        if more.1 == 0 || first.len() > skip {
            ask(&first, skip);
        }
        let frame = match self.frames.get_mut(self.count) {
            Some(place) => place,
            None => make_place(&mut self.frames),
        };
        frame.len = len - header;
        frame.header = from.header;
        (frame.first, frame.more) = (first, more);
        if more.1 != 0 {
            ask_more(frame, &self.windows[frame.more()]);
        }
        frame.ingress = from.ingress;
        frame.position = from.position;
        self.bytes += frame.len;
        self.count += 1;
        Ok(())
    }

    /// Copies the heads of all frames into private memory. To be called once a burst, when every
    /// chain is noted.
    #[inline(always)]
    pub fn load_heads(&mut self) {
        for frame in &mut self.frames[..self.count] {
            let head_len = frame.head_len();
            let target = &mut frame.head[..head_len];
            let header = usize::from(frame.header);
            let end = header + head_len;
            if let Some(rest) = frame.first.behind(end) {
                frame.first.read_bytes(header, target);
                frame.first = rest;
            } else {
                gather(frame, &self.windows);
            }
        }
    }

    /// Removes the frames from number `count` on, all of one queue, and their buffers from `mark`
    /// on.
    #[cold]
    pub fn cut(&mut self, count: usize, mark: usize) {
        let cut = &self.frames[count..self.count];
        self.bytes -= cut.iter().map(|frame| frame.len).sum::<u32>();
        self.count = count;
        self.windows.truncate(mark);
    }

    /// Keeps the frames for which `keep` returns `true`, in their order, and removes the others.
    /// The buffers of removed frames stay in the arena until the burst is cleared.
    #[cold]
    pub fn retain(&mut self, mut keep: impl FnMut(&Frame<'t>) -> bool) {
        let mut kept = 0;
        for number in 0..self.count {
            let frame = &self.frames[number];
            if !keep(frame) {
                self.bytes -= frame.len;
                continue;
            }
            // In most bursts every frame is kept, because the fault is somebody else's. Then
            // nothing is copied.
            if kept != number {
                self.frames[kept] = *frame;
            }
            kept += 1;
        }
        self.count = kept;
    }

    /// Copies a frame of another burst into this one. Returns `false` if the frame does not fit.
    pub fn adopt(&mut self, from: &Burst<'t>, frame: &Frame<'t>) -> bool {
        let start = self.windows.len();
        if self.count == BURST_FRAMES || !self.windows.extend(&from.windows[frame.more()]) {
            return false;
        }
        let place = match self.frames.get_mut(self.count) {
            Some(place) => place,
            None => make_place(&mut self.frames),
        };
        *place = *frame;
        place.more.0 = start as u16;
        self.count += 1;
        true
    }
}

/// Prefetches the first lines of a frame's bytes in `window`. The frame's bytes begin at `skip`,
/// which must be less than the window's length.
#[inline(always)]
fn ask(window: &Window<'_>, skip: usize) {
    window.prefetch(skip);
    window.prefetch((skip + 63).min(window.len() - 1));
}

/// Prefetches the first lines of the buffers behind the first one, at most [`ASKED_PIECES`].
#[inline(never)]
fn ask_more(frame: &Frame<'_>, more: &[Window<'_>]) {
    // The header may fill the first buffer, or several.
    let mut skip = usize::from(frame.header).saturating_sub(frame.first.len());
    for window in more.iter().take(ASKED_PIECES) {
        if window.len() > skip {
            ask(window, skip);
        }
        skip = skip.saturating_sub(window.len());
    }
}

/// Adds an empty place behind all others and returns it. There must be room.
#[cold]
#[inline(never)]
fn make_place<'f, 't>(frames: &'f mut ArrayVec<Frame<'t>, BURST_FRAMES>) -> &'f mut Frame<'t> {
    let last = frames.len();
    frames.push(Frame::EMPTY);
    &mut frames[last]
}

/// Copies a head that is spread over several windows: the header may have a buffer of its own, or
/// the pieces may have one byte each.
fn gather<'t>(frame: &mut Frame<'t>, windows: &[Window<'t>]) {
    let (mut to_skip, mut filled, head_len) = (usize::from(frame.header), 0, frame.head_len());
    let mut first = frame.first;
    // The frame's length is the sum of the lengths of its windows, so no window is missing.
    loop {
        let start = to_skip.min(first.len());
        to_skip -= start;
        let bytes = (first.len() - start).min(head_len - filled);
        first.read_bytes(start, &mut frame.head[filled..filled + bytes]);
        filled += bytes;
        frame.first = first.behind(start + bytes).unwrap_or(Window::EMPTY);
        if filled == head_len && to_skip == 0 {
            return;
        }
        let Some(next) = windows[frame.more()].first() else {
            return;
        };
        first = *next;
        frame.more = (frame.more.0 + 1, frame.more.1 - 1);
    }
}
