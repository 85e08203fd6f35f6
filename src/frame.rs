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
#[derive(Clone, Debug)]
pub struct Frame {
    /// The receiver's virtio-net header and the frame's first bytes: one copy delivers both.
    head: [u8; NET_HDR_SIZE + HEAD_BYTES],
    /// Bytes of the frame.
    pub len: u32,
    /// Windows of the payload behind the head, in the burst's arena.
    payload: (u16, u16),
    /// Number of the queue it came from, in the thread's plan.
    pub ingress: u16,
    /// Its chain's position in that queue.
    pub position: u64,
}

impl Frame {
    fn head_len(&self) -> usize {
        HEAD_BYTES.min(self.len as usize)
    }

    /// The private copy of the first bytes, at most [`HEAD_BYTES`].
    #[inline(always)]
    pub fn head(&self) -> &[u8] {
        &self.head[NET_HDR_SIZE..NET_HDR_SIZE + self.head_len()]
    }

    /// The virtio-net header for a receiver and the first bytes of the frame.
    #[inline(always)]
    pub fn with_header(&self) -> &[u8] {
        &self.head[..NET_HDR_SIZE + self.head_len()]
    }

    #[inline(always)]
    fn payload(&self) -> Range<usize> {
        usize::from(self.payload.0)..usize::from(self.payload.0) + usize::from(self.payload.1)
    }
}

/// The `num_buffers` field of a header copied by [`Frame::with_header`] is 1; this is where another number goes.
pub fn num_buffers_at() -> usize {
    NUM_BUFFERS
}

/// Frames handled together, gathered from one or several queues.
#[derive(Debug)]
pub struct Burst<'t> {
    frames: ArrayVec<Frame, BURST_FRAMES>,
    /// Payloads. While a chain is taken, its windows are appended here.
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
            frames: ArrayVec::new(),
            windows: ArrayVec::new(),
            bytes: 0,
        }
    }

    /// Forgets all frames.
    #[inline(always)]
    pub fn clear(&mut self) {
        self.frames.clear();
        self.windows.clear();
        self.bytes = 0;
    }

    /// Whether another chain of any legal form fits.
    #[inline(always)]
    pub fn has_room(&self) -> bool {
        !self.frames.is_full()
            && self.windows.remaining_capacity() >= MAX_CHAIN_WINDOWS
            && self.bytes < BURST_BYTES
    }

    /// The frames, in the order in which they were taken.
    #[inline(always)]
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// The arena that a take appends its windows to.
    #[inline(always)]
    pub fn windows_mut(&mut self) -> &mut ArrayVec<Window<'t>, BURST_WINDOWS> {
        &mut self.windows
    }

    /// Forgets the windows from `mark` on: a chain that becomes no frame.
    #[inline(always)]
    pub fn forget(&mut self, mark: usize) {
        self.windows.truncate(mark);
    }

    /// Windows taken so far: where the next chain's begin.
    #[inline(always)]
    pub fn mark(&self) -> usize {
        self.windows.len()
    }

    /// The payload of a frame of this burst behind its head.
    #[inline(always)]
    pub fn payload(&self, frame: &Frame) -> &[Window<'t>] {
        &self.windows[frame.payload()]
    }

    /// Turns the chain of `len` bytes whose windows begin at `mark` into a frame; or says why not, and forgets it.
    #[inline(always)]
    pub fn admit(
        &mut self,
        mark: usize,
        len: u32,
        ingress: u16,
        position: u64,
    ) -> Result<(), DropReason> {
        let Some(frame_len) = len.checked_sub(NET_HDR_SIZE as u32) else {
            self.windows.truncate(mark);
            return Err(DropReason::RxMalformedChain);
        };
        if frame_len < HEADER_LEN as u32 || frame_len > MAX_FRAME {
            self.windows.truncate(mark);
            let long = frame_len > MAX_FRAME;
            return Err(if long {
                DropReason::RxTooLong
            } else {
                DropReason::RxShortFrame
            });
        }
        let mut frame = Frame {
            head: [0; NET_HDR_SIZE + HEAD_BYTES],
            len: frame_len,
            payload: (mark as u16, 0),
            ingress,
            position,
        };
        frame.head[NUM_BUFFERS] = 1;
        let head_len = frame.head_len();
        let target = &mut frame.head[NET_HDR_SIZE..NET_HDR_SIZE + head_len];
        let first = self.windows[mark];
        if first.len() >= NET_HDR_SIZE + head_len {
            first.read_bytes(NET_HDR_SIZE, target);
            self.skip(mark, mark, NET_HDR_SIZE + head_len);
        } else {
            self.gather(mark, target);
        }
        frame.payload.1 = (self.windows.len() - mark) as u16;
        self.bytes += frame_len;
        self.frames.push(frame);
        Ok(())
    }

    /// Keeps from window `at` on, without its first `bytes`, as the windows from `mark` on.
    #[inline(always)]
    fn skip(&mut self, mark: usize, at: usize, bytes: usize) {
        let mut keep = at;
        if let Some(rest) = self.windows[at].sub(bytes, self.windows[at].len() - bytes) {
            self.windows[at] = rest;
            keep += usize::from(rest.is_empty());
        }
        if keep > mark {
            self.windows.drain(mark..keep);
        }
    }

    /// Reads a head that is spread over several windows (a header in a buffer of its own, or pieces of one byte).
    fn gather(&mut self, mark: usize, target: &mut [u8]) {
        let (mut to_skip, mut filled) = (NET_HDR_SIZE, 0);
        for at in mark..self.windows.len() {
            let window = self.windows[at];
            let start = to_skip.min(window.len());
            to_skip -= start;
            let bytes = (window.len() - start).min(target.len() - filled);
            window.read_bytes(start, &mut target[filled..filled + bytes]);
            filled += bytes;
            if filled == target.len() {
                return self.skip(mark, at, start + bytes);
            }
        }
        // The caller's length is the sum of the windows, so the loop always ends above.
        self.windows.truncate(mark);
    }

    /// Copies a frame of another burst into this one; `false` if it does not fit.
    pub fn adopt(&mut self, from: &Burst<'t>, frame: &Frame) -> bool {
        let payload = from.payload(frame);
        if self.frames.is_full() || self.windows.remaining_capacity() < payload.len() {
            return false;
        }
        let mut copy = frame.clone();
        copy.payload.0 = self.windows.len() as u16;
        self.windows.extend(payload.iter().copied());
        self.frames.push(copy);
        true
    }
}
