//! Frames on their way through the switch: header snapshot, payload windows, burst.
//!
//! The first [`HEAD_BYTES`] bytes of a frame are copied once into private memory. Decisions depend
//! on that copy only, and that copy is what is delivered. The payload behind it is copied later,
//! once, straight from the sender's memory into the receiver's. So a sender cannot pass a check
//! with one source address and deliver another.
//!
//! The sender's virtio-net header is not passed on. The receiver's header is made here.
//!
//! Frames are handled in *bursts*, gathered from several transmit queues of one thread. The reason:
//! what delivery costs is claims, not frames.

use std::ops::Range;

use arrayvec::ArrayVec;

use crate::memory::{Pieces, Window};
use crate::stats::DropReason;
use crate::virtio::NET_HDR_SIZE;
use crate::virtio::chain::{MAX_CHAIN, Windows};
use crate::wire::HEADER_LEN;

/// Bytes of a frame that are copied at take and decided upon.
pub const HEAD_BYTES: usize = 128;
/// Most frames handled together.
pub const BURST_FRAMES: usize = 64;
/// A burst is closed once it holds this many bytes.
pub const BURST_BYTES: u32 = 256 * 1024;
/// Longest frame taken from a guest, in bytes without the virtio-net header.
pub const MAX_FRAME: u32 = 65_535 + HEADER_LEN as u32;
/// A burst is closed once so many descriptors were read for its chains of several, 37 of the
/// longest that Linux sends. Mostly these are pieces of frames. A driver that posts loops of empty
/// ones, or chains that cannot be used, gets no more for it: its turn is over after some
/// microseconds, and the next queue's comes.
const BURST_PIECES: usize = 704;
/// Pieces of memory of one burst: as many, and the longest chain.
const BURST_WINDOWS: usize = BURST_PIECES + MAX_CHAIN;
/// Pieces of a frame whose first lines are asked for when it is noted. Longer chains are not worth
/// their lines: they would push each other out.
const ASKED_PIECES: usize = 16;

/// Where `num_buffers` stands in the virtio-net header (virtio 1.2 §5.1.6).
const NUM_BUFFERS: usize = 10;

/// The virtio-net header that a receiver finds before a frame in so many buffers. The legacy one is
/// its beginning.
#[inline(always)]
pub fn receive_header(buffers: u16) -> [u8; NET_HDR_SIZE] {
    let mut header = [0; NET_HDR_SIZE];
    header[NUM_BUFFERS..].copy_from_slice(&buffers.to_le_bytes());
    header
}

/// Writes a header to the start of `buffer`, unless it stands there already.
///
/// Drivers that use their buffers again leave it as it was, often in a line of its own (DPDK's, in
/// front of the frame's): not to write what they will read saves that line two ways between the
/// cores, 7 % of the rate of 64-byte frames, more where the cores are far apart. The driver that
/// changes it while we look gets what it wrote.
#[inline(always)]
pub fn put_header<const N: usize>(buffer: &Window<'_>, header: &[u8; N]) {
    let mut found = [0; N];
    buffer.read_bytes(0, &mut found);
    if found != *header {
        buffer.write_bytes(0, header);
    }
}

/// Puts the beginning of `header` at the start of `buffer`, `room` bytes of it at most. Returns
/// how many bytes were put; `header` is what is left.
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

/// A legacy header, or a header over several pieces of memory.
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
    /// Bytes of the sender's virtio-net header.
    header: u16,
    /// The chain's first buffer; once the head is loaded, what the head left of the buffer that it
    /// ended in.
    first: Window<'t>,
    /// The buffers behind it, in the burst's arena: start and number. Most chains have none, and
    /// never come near the arena.
    more: (u16, u16),
    /// Number of the queue it came from, in the thread's plan.
    pub ingress: u16,
    /// Its chain's position in that queue.
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

    /// The private copy of the first bytes, at most [`HEAD_BYTES`].
    #[inline(always)]
    pub fn head(&self) -> &[u8] {
        &self.head[..self.head_len()]
    }

    /// Whether the frame has no bytes behind its head.
    #[inline(always)]
    pub fn is_all_head(&self) -> bool {
        self.len as usize <= HEAD_BYTES
    }

    /// Ethernet addresses, destination first: what decides where the frame goes.
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

/// Where a frame comes from.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// Bytes of the virtio-net header in front of it.
    pub header: u16,
    /// Number of its queue in the thread's plan.
    pub ingress: u16,
    /// Its chain's position in that queue.
    pub position: u64,
}

/// Frames handled together, gathered from one or several queues.
///
/// Taking is in two steps, so that the cache misses of a burst overlap: [`Burst::note`] for each
/// chain (which asks for the frame's first lines), then [`Burst::load_heads`] for all of them.
#[derive(Debug)]
pub struct Burst<'t> {
    /// Those beyond `count` are places to be used again. Each is made when it is first needed: all
    /// of them are 13 KiB, and a poll thread makes two bursts whenever it takes over a change, in 1
    /// of 2.3 µs then (6 of 16 where its cache is cold).
    frames: ArrayVec<Frame<'t>, BURST_FRAMES>,
    count: usize,
    /// Buffers of chains of several.
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

    /// Forgets all frames.
    #[inline(always)]
    pub fn clear(&mut self) {
        self.windows.clear();
        (self.count, self.bytes) = (0, 0);
    }

    /// Whether another chain of any legal form fits.
    #[inline(always)]
    pub fn has_room(&self) -> bool {
        self.count < BURST_FRAMES
            && self.windows.read() as usize <= BURST_PIECES
            && self.bytes < BURST_BYTES
    }

    /// Nothing more is to be taken: [`Burst::has_room`] says no until it is cleared. The bytes are
    /// counted before.
    #[inline(always)]
    pub fn close(&mut self) {
        self.bytes |= BURST_BYTES;
    }

    /// Bytes of the frames.
    #[inline(always)]
    pub fn bytes(&self) -> u32 {
        self.bytes
    }

    /// The frames, in the order in which they were taken.
    #[inline(always)]
    pub fn frames(&self) -> &[Frame<'t>] {
        &self.frames[..self.count]
    }

    /// The arena that a take appends its windows to.
    #[inline(always)]
    pub fn windows_mut(&mut self) -> &mut Windows<'t, BURST_WINDOWS> {
        &mut self.windows
    }

    /// Windows taken so far: where the next chain's begin.
    #[inline(always)]
    pub fn mark(&self) -> usize {
        self.windows.len()
    }

    /// What a frame of this burst has behind its head.
    #[inline(always)]
    pub fn payload(&self, frame: &Frame<'t>) -> Pieces<'_, 't> {
        let more = match frame.more.1 {
            0 => &[],
            _ => &self.windows[frame.more()],
        };
        Pieces::new(frame.first, more)
    }

    /// Notes a chain of one buffer as a frame; or says why it is none.
    #[inline(always)]
    pub fn note(&mut self, buffer: Window<'t>, from: Origin) -> Result<(), DropReason> {
        let len = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
        self.add(buffer, (0, 0), len, from)
    }

    /// Notes the chain of `len` bytes whose buffers are in the arena from `mark` on; or says why it
    /// is no frame, and forgets it.
    pub fn note_chain(&mut self, mark: usize, len: u32, from: Origin) -> Result<(), DropReason> {
        let noted = match self.windows.get(mark) {
            Some(first) => {
                let more = (self.windows.len() - mark - 1) as u16;
                self.add(*first, (mark as u16 + 1, more), len, from)
            }
            // Its descriptors are all empty.
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
        // The sender's core has just written these lines: each would cost about 100 ns when needed,
        // and a few nanoseconds while others are on their way too. Its header's is left alone, for
        // nobody reads it.
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

    /// Copies the heads of all frames; once a burst, when every chain is noted.
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

    /// Forgets the frames from number `count` on, all of one queue, and their buffers.
    #[cold]
    pub fn cut(&mut self, count: usize, mark: usize) {
        let cut = &self.frames[count..self.count];
        self.bytes -= cut.iter().map(|frame| frame.len).sum::<u32>();
        self.count = count;
        self.windows.truncate(mark);
    }

    /// Forgets all frames but those to `keep`, in their order. The buffers of the others stay until
    /// the burst is cleared.
    #[cold]
    pub fn retain(&mut self, mut keep: impl FnMut(&Frame<'t>) -> bool) {
        let mut kept = 0;
        for number in 0..self.count {
            let frame = &self.frames[number];
            if !keep(frame) {
                self.bytes -= frame.len;
                continue;
            }
            // Mostly all are kept: of a burst beside somebody else's fault.
            if kept != number {
                self.frames[kept] = *frame;
            }
            kept += 1;
        }
        self.count = kept;
    }

    /// Copies a frame of another burst into this one; `false` if it does not fit.
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

/// Asks for the first lines of a frame's bytes in `window`, which begin behind `skip` others. There
/// are some.
#[inline(always)]
fn ask(window: &Window<'_>, skip: usize) {
    window.prefetch(skip);
    window.prefetch((skip + 63).min(window.len() - 1));
}

/// The same for the buffers behind the first one.
#[inline(never)]
fn ask_more(frame: &Frame<'_>, more: &[Window<'_>]) {
    // A header in a buffer of its own, or in several.
    let mut skip = usize::from(frame.header).saturating_sub(frame.first.len());
    for window in more.iter().take(ASKED_PIECES) {
        if window.len() > skip {
            ask(window, skip);
        }
        skip = skip.saturating_sub(window.len());
    }
}

/// A place behind all others; there must be room.
#[cold]
#[inline(never)]
fn make_place<'f, 't>(frames: &'f mut ArrayVec<Frame<'t>, BURST_FRAMES>) -> &'f mut Frame<'t> {
    let last = frames.len();
    frames.push(Frame::EMPTY);
    &mut frames[last]
}

/// Reads a head that is spread over several windows (a header in a buffer of its own, or pieces of
/// one byte).
fn gather<'t>(frame: &mut Frame<'t>, windows: &[Window<'t>]) {
    let (mut to_skip, mut filled, head_len) = (usize::from(frame.header), 0, frame.head_len());
    let mut first = frame.first;
    // The frame's length is the sum of its windows, so none is missing.
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
