//! One thread's open claim: which frames of a burst got which buffers of a receiveq.

use arrayvec::ArrayVec;

use super::chain::{MAX_CHAIN, Windows};
use super::receiveq::MIN_FRAME;
use super::{Head, NET_HDR_SIZE};
use crate::memory::Window;

/// Most frames of one claim. Few, because a claim is open while its frames are copied.
pub const CLAIM_FRAMES: usize = 32;
/// Most buffers of one claim. A frame that needs more is too long for the queue.
const CLAIM_HEADS: usize = 128;
/// A claim is closed once more than this many descriptors were read, unless its first frame alone
/// needs more.
pub(super) const CLAIM_PIECES: usize = 128;
/// Most pieces of memory of one claim: [`CLAIM_PIECES`] and the longest chain.
const CLAIM_WINDOWS: usize = CLAIM_PIECES + MAX_CHAIN;

/// A buffer of an open claim.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClaimedHead<'m> {
    /// The buffer's first piece of memory.
    pub(super) first: Window<'m>,
    /// The buffer's other pieces, in `Claim::windows`: start and number. Most buffers have none.
    pub(super) more: (u16, u16),
    pub(super) head: Head,
    /// Bytes of header and frame that go into the buffer; 0 for a buffer that is returned unused.
    pub(super) written: u32,
}

/// One thread's open claim. A thread has at most one.
#[derive(Debug)]
pub struct Claim<'m> {
    pub(super) position: u64,
    pub(super) span: u16,
    /// Bytes of the virtio-net header before each frame.
    pub(super) header: usize,
    pub(super) heads: ArrayVec<ClaimedHead<'m>, CLAIM_HEADS>,
    /// Pieces of buffers that have several.
    pub(super) windows: Windows<'m, CLAIM_WINDOWS>,
    /// Number of buffers that go back unused.
    pub(super) bad: u16,
    /// Number of buffers in `bad` that lie in guest memory which cannot be used.
    pub(super) unusable: u16,
    /// The buffers of each frame, in order: number of the first in `heads`, and how many.
    pub(super) frames: ArrayVec<(u16, u16), CLAIM_FRAMES>,
}

impl<'m> Claim<'m> {
    /// Returns an empty claim, to be reused.
    pub fn new() -> Self {
        Claim {
            position: 0,
            span: 0,
            header: NET_HDR_SIZE,
            bad: 0,
            unusable: 0,
            heads: ArrayVec::new(),
            windows: Windows::new(),
            frames: ArrayVec::new(),
        }
    }

    pub(super) fn clear(&mut self) {
        self.span = 0;
        self.bad = 0;
        self.unusable = 0;
        self.heads.clear();
        self.windows.clear();
        self.frames.clear();
    }

    /// Returns the number of frames that got buffers.
    #[inline(always)]
    pub fn frames(&self) -> usize {
        self.frames.len()
    }

    /// Returns the number of buffers that go back unused, because they cannot be used or hold too
    /// little.
    #[inline(always)]
    pub fn bad_buffers(&self) -> u16 {
        self.bad
    }

    /// Returns the number of unused buffers that lie in guest memory which cannot be used.
    #[inline(always)]
    pub fn unusable_buffers(&self) -> u16 {
        self.unusable
    }

    /// Whether more descriptors were read for the claim than a claim usually needs.
    pub fn is_costly(&self) -> bool {
        self.windows.read() as usize > CLAIM_PIECES
    }

    /// Returns the number of positions claimed.
    #[inline(always)]
    pub fn span(&self) -> u64 {
        u64::from(self.span)
    }

    /// Returns the end of the claimed positions. The claim is visible once
    /// `ReceiveQueue::published` reaches this position.
    pub fn end(&self) -> u64 {
        self.position + u64::from(self.span)
    }

    /// Bytes of the virtio-net header before each frame.
    #[inline(always)]
    pub fn header(&self) -> usize {
        self.header
    }

    /// Returns the number of buffers of frame `index` (`num_buffers` of its header).
    #[inline(always)]
    pub fn buffers(&self, index: usize) -> u16 {
        self.frames[index].1
    }

    /// Calls `piece` with the windows of frame `index` in order, each with the number of bytes that
    /// go there.
    ///
    /// Not an iterator: the compiler made more instructions of an iterator over buffers and their
    /// windows.
    #[inline(always)]
    pub fn each_piece(&self, index: usize, mut piece: impl FnMut(Window<'m>, usize)) {
        let (first, count) = self.frames[index];
        for head in &self.heads[usize::from(first)..][..usize::from(count)] {
            let written = head.written as usize;
            let bytes = written.min(head.first.len());
            if bytes > 0 {
                piece(head.first, bytes);
            }
            if bytes < written {
                self.later_pieces(head, written - bytes, &mut piece);
            }
        }
    }

    /// Calls `piece` with the windows of a buffer behind its first one, for `left` bytes.
    #[inline(never)]
    fn later_pieces(
        &self,
        head: &ClaimedHead<'m>,
        mut left: usize,
        piece: &mut impl FnMut(Window<'m>, usize),
    ) {
        let (start, count) = head.more;
        for window in &self.windows[usize::from(start)..][..usize::from(count)] {
            let bytes = left.min(window.len());
            if bytes > 0 {
                piece(*window, bytes);
            }
            left -= bytes;
        }
    }

    /// Returns the window that holds all `len` bytes of frame `index`, header included. Usually
    /// there is one; `None` if the frame has several buffers or its buffer has several pieces.
    #[inline(always)]
    pub fn whole(&self, index: usize, len: usize) -> Option<Window<'m>> {
        let (first, count) = self.frames[index];
        let head = &self.heads[usize::from(first)];
        if count != 1 {
            return None;
        }
        head.first.sub(0, len)
    }

    /// Blanks frame `index` after a memory fault of its sender. What follows the header becomes
    /// zero, and each of the frame's buffers shrinks to header and 60 bytes. Length 0 would make
    /// DPDK's vectorised driver compute a length of 65,524.
    #[cold]
    pub fn blank(&mut self, index: usize) {
        let (first, count) = self.frames[index];
        for head in &mut self.heads[usize::from(first)..usize::from(first) + usize::from(count)] {
            head.written = head.written.min((self.header + MIN_FRAME) as u32);
        }
        let zeros = [0_u8; NET_HDR_SIZE + MIN_FRAME];
        let mut header = self.header;
        self.each_piece(index, |window, bytes| {
            let keep = header.min(bytes);
            header -= keep;
            window.write_bytes(keep, &zeros[..bytes - keep]);
        });
    }
}

impl Default for Claim<'_> {
    fn default() -> Self {
        Claim::new()
    }
}
