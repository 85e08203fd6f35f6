//! Frames on their way through the switch: header snapshot, payload windows, burst.
//!
//! The first [`HEAD_BYTES`] bytes of a frame are copied once into private memory. Decisions depend on that copy only, and
//! that copy is what is delivered; the payload behind it is copied later, once, straight from the sender's memory into the
//! receiver's. So a sender cannot pass a check with one source address and deliver another.

use std::ops::Range;

use arrayvec::ArrayVec;

use crate::memory::Window;
use crate::stats::DropReason;
use crate::virtio::NET_HDR_SIZE;
use crate::virtio::chain::MAX_CHAIN_WINDOWS;
use crate::wire::HEADER_LEN;

/// Bytes of a frame that are copied at take and decided upon.
pub const HEAD_BYTES: usize = 128;
/// Most frames handled together.
pub const BURST_FRAMES: usize = 64;
/// A burst is closed once it holds this many bytes.
pub const BURST_BYTES: u32 = 256 * 1024;
/// Longest frame taken from a guest, in bytes without the virtio-net header.
pub const MAX_FRAME: u32 = 65_535 + HEADER_LEN as u32;
/// Pieces of memory of one burst.
const BURST_WINDOWS: usize = 768;

/// Where `num_buffers` stands in the virtio-net header (virtio 1.2 §5.1.6).
const NUM_BUFFERS: usize = 10;

/// One frame of a burst.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// The receiver's virtio-net header and the frame's first bytes: one copy delivers both.
    head: [u8; NET_HDR_SIZE + HEAD_BYTES],
    /// Bytes of the frame.
    pub len: u32,
    /// Windows in the burst's arena, first and number: the whole chain, and once the head is loaded the
    /// payload behind it.
    windows: (u16, u16),
    /// Bytes of the sender's virtio-net header.
    header: u16,
    /// Number of the queue it came from, in the thread's plan.
    pub ingress: u16,
    /// Its chain's position in that queue.
    pub position: u64,
}

impl Frame {
    const EMPTY: Frame = {
        let mut head = [0; NET_HDR_SIZE + HEAD_BYTES];
        head[NUM_BUFFERS] = 1;
        Frame {
            head,
            len: 0,
            windows: (0, 0),
            header: NET_HDR_SIZE as u16,
            ingress: 0,
            position: 0,
        }
    };

    #[inline(always)]
    fn head_len(&self) -> usize {
        HEAD_BYTES.min(self.len as usize)
    }

    /// The private copy of the first bytes, at most [`HEAD_BYTES`].
    #[inline(always)]
    pub fn head(&self) -> &[u8] {
        &self.head[NET_HDR_SIZE..NET_HDR_SIZE + self.head_len()]
    }

    /// The virtio-net header for a receiver (`num_buffers` is 1) and the first bytes of the frame.
    #[inline(always)]
    pub fn with_header(&self) -> &[u8] {
        &self.head[..NET_HDR_SIZE + self.head_len()]
    }

    /// Ethernet addresses, destination first: what decides where the frame goes.
    #[inline(always)]
    pub fn addresses(&self) -> [u8; 12] {
        let mut addresses = [0; 12];
        addresses.copy_from_slice(&self.head[NET_HDR_SIZE..NET_HDR_SIZE + 12]);
        addresses
    }

    #[inline(always)]
    fn range(&self) -> Range<usize> {
        usize::from(self.windows.0)..usize::from(self.windows.0) + usize::from(self.windows.1)
    }
}

/// Where `num_buffers` stands in the header that [`Frame::with_header`] gives.
pub const NUM_BUFFERS_AT: usize = NUM_BUFFERS;

/// Frames handled together, gathered from one or several queues.
///
/// Taking is in two steps, so that the cache misses of a burst overlap: [`Burst::note`] for each chain (which asks for
/// the frame's first lines), then [`Burst::load_heads`] for all of them.
#[derive(Debug)]
pub struct Burst<'t> {
    frames: [Frame; BURST_FRAMES],
    count: usize,
    /// Buffers of the chains.
    windows: ArrayVec<Window<'t>, BURST_WINDOWS>,
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
            frames: [Frame::EMPTY; BURST_FRAMES],
            count: 0,
            windows: ArrayVec::new(),
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
            && self.windows.remaining_capacity() >= MAX_CHAIN_WINDOWS
            && self.bytes < BURST_BYTES
    }

    /// Bytes of the frames.
    #[inline(always)]
    pub fn bytes(&self) -> u32 {
        self.bytes
    }

    /// The frames, in the order in which they were taken.
    #[inline(always)]
    pub fn frames(&self) -> &[Frame] {
        &self.frames[..self.count]
    }

    /// The arena that a take appends its windows to.
    #[inline(always)]
    pub fn windows_mut(&mut self) -> &mut ArrayVec<Window<'t>, BURST_WINDOWS> {
        &mut self.windows
    }

    /// Windows taken so far: where the next chain's begin.
    #[inline(always)]
    pub fn mark(&self) -> usize {
        self.windows.len()
    }

    /// Forgets the windows from `mark` on: a chain that becomes no frame.
    #[inline(always)]
    pub fn forget(&mut self, mark: usize) {
        self.windows.truncate(mark);
    }

    /// The payload of a frame of this burst behind its head.
    #[inline(always)]
    pub fn payload(&self, frame: &Frame) -> &[Window<'t>] {
        &self.windows[frame.range()]
    }

    /// Notes the chain of `len` bytes whose windows begin at `mark`, and which begins with a header of `header`, as a
    /// frame; or says why not, and forgets it.
    #[inline(always)]
    pub fn note(
        &mut self,
        mark: usize,
        len: u32,
        header: usize,
        ingress: u16,
        position: u64,
    ) -> Result<(), DropReason> {
        let hdr = header as u32;
        if !(hdr + HEADER_LEN as u32..=hdr + MAX_FRAME).contains(&len) {
            self.windows.truncate(mark);
            return Err(match len {
                _ if len < hdr => DropReason::RxMalformedChain,
                _ if len > hdr + MAX_FRAME => DropReason::RxTooLong,
                _ => DropReason::RxShortFrame,
            });
        }
        // The sender's core has just written these lines: each would cost about 100 ns when needed, and a few
        // nanoseconds while others are on their way too.
        for window in &self.windows[mark..] {
            window.prefetch(0);
            window.prefetch(NET_HDR_SIZE + 63);
        }
        let frame = &mut self.frames[self.count];
        frame.len = len - hdr;
        frame.header = header as u16;
        frame.windows = (mark as u16, (self.windows.len() - mark) as u16);
        frame.ingress = ingress;
        frame.position = position;
        self.bytes += frame.len;
        self.count += 1;
        Ok(())
    }

    /// Copies the heads of all frames; once a burst, when every chain is noted.
    #[inline(always)]
    pub fn load_heads(&mut self) {
        let Burst {
            frames,
            windows,
            count,
            ..
        } = self;
        for frame in &mut frames[..*count] {
            let head_len = frame.head_len();
            let target = &mut frame.head[NET_HDR_SIZE..NET_HDR_SIZE + head_len];
            let first = usize::from(frame.windows.0);
            let end = first + usize::from(frame.windows.1);
            let header = usize::from(frame.header);
            let (at, bytes) = match windows[first] {
                whole if whole.len() >= header + head_len => {
                    whole.read_bytes(header, target);
                    (first, header + head_len)
                }
                _ => gather(&windows[first..end], header, first, target),
            };
            // What is left of the window that the head ended in, and those behind it, are the payload.
            let rest = windows[at]
                .sub(bytes, windows[at].len() - bytes)
                .unwrap_or(windows[at]);
            windows[at] = rest;
            let start = at + usize::from(rest.is_empty());
            frame.windows = (start as u16, (end - start) as u16);
        }
    }

    /// Copies a frame of another burst into this one; `false` if it does not fit.
    pub fn adopt(&mut self, from: &Burst<'t>, frame: &Frame) -> bool {
        let payload = from.payload(frame);
        if self.count == BURST_FRAMES || self.windows.remaining_capacity() < payload.len() {
            return false;
        }
        self.frames[self.count] = *frame;
        self.frames[self.count].windows.0 = self.windows.len() as u16;
        self.count += 1;
        self.windows.extend(payload.iter().copied());
        true
    }
}

/// Reads a head that is spread over several windows (a header in a buffer of its own, or pieces of one byte).
/// Returns the window in which it ended, counted from `first` on, and the bytes used of that one.
fn gather(
    windows: &[Window<'_>],
    header: usize,
    first: usize,
    target: &mut [u8],
) -> (usize, usize) {
    let (mut to_skip, mut filled) = (header, 0);
    for (at, window) in windows.iter().enumerate() {
        let start = to_skip.min(window.len());
        to_skip -= start;
        let bytes = (window.len() - start).min(target.len() - filled);
        window.read_bytes(start, &mut target[filled..filled + bytes]);
        filled += bytes;
        if filled == target.len() && to_skip == 0 {
            return (first + at, start + bytes);
        }
    }
    // The frame's length is the sum of its windows, so the loop has ended above.
    (
        first + windows.len() - 1,
        windows.last().map_or(0, Window::len),
    )
}
