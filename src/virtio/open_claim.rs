//! One thread's open claim: which frames of a burst got which buffers of a receiveq.

use arrayvec::ArrayVec;

use super::chain::{MAX_CHAIN, Windows};
use super::receiveq::MIN_FRAME;
use super::{Head, NET_HDR_SIZE};
use crate::memory::Window;

/// Most frames of one claim: a claim is open while its frames are copied.
pub const CLAIM_FRAMES: usize = 32;
/// Most buffers of one claim; a frame that needs more is too long for this queue.
const CLAIM_HEADS: usize = 128;
/// Descriptors read after which a claim is closed, unless its first frame alone needs more.
pub(super) const CLAIM_PIECES: usize = 128;
/// Most pieces of memory of one claim: as many, and the longest chain.
const CLAIM_WINDOWS: usize = CLAIM_PIECES + MAX_CHAIN;

/// A buffer of an open claim.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClaimedHead<'m> {
    /// Its first piece of memory.
    pub(super) first: Window<'m>,
    /// The others, in `Claim::windows`: start and number. Most buffers have none.
    pub(super) more: (u16, u16),
    pub(super) head: Head,
    /// Bytes that the frame puts here; 0 for a buffer returned unused.
    pub(super) written: u32,
}

/// One thread's open claim; a thread has at most one.
#[derive(Debug)]
pub struct Claim<'m> {
    pub(super) position: u64,
    pub(super) span: u16,
    /// Bytes of the header before each frame.
    pub(super) header: usize,
    pub(super) heads: ArrayVec<ClaimedHead<'m>, CLAIM_HEADS>,
    /// Pieces of buffers of several.
    pub(super) windows: Windows<'m, CLAIM_WINDOWS>,
    /// Heads that go back unused.
    pub(super) bad: u16,
    /// Those of them that are in guest memory which cannot be used.
    pub(super) unusable: u16,
    /// Heads of each frame, in order: first and number.
    pub(super) frames: ArrayVec<(u16, u16), CLAIM_FRAMES>,
}

impl<'m> Claim<'m> {
    /// An empty claim, to be reused.
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

    /// Number of frames that got buffers.
    #[inline(always)]
    pub fn frames(&self) -> usize {
        self.frames.len()
    }

    /// Number of buffers that go back unused, because no frame fits them.
    #[inline(always)]
    pub fn bad_buffers(&self) -> u16 {
        self.bad
    }

    /// Number of those among them that are in guest memory which cannot be used.
    #[inline(always)]
    pub fn unusable_buffers(&self) -> u16 {
        self.unusable
    }

    /// Whether more descriptors were read for it than a claim usually has.
    pub fn is_costly(&self) -> bool {
        self.windows.read() as usize > CLAIM_PIECES
    }

    /// Number of positions claimed.
    #[inline(always)]
    pub fn span(&self) -> u64 {
        u64::from(self.span)
    }

    /// End of the claimed positions: published once `ReceiveQueue::published` reaches it.
    pub fn end(&self) -> u64 {
        self.position + u64::from(self.span)
    }

    /// Bytes of the virtio-net header before each frame.
    #[inline(always)]
    pub fn header(&self) -> usize {
        self.header
    }

    /// Number of buffers of frame `index` (`num_buffers` of its header).
    #[inline(always)]
    pub fn buffers(&self, index: usize) -> u16 {
        self.frames[index].1
    }

    /// Hands over the windows of frame `index` in order, each with the bytes that go there.
    ///
    /// Not an iterator: one through buffers and their windows is taken apart for each of them (965
    /// instructions in place of 916 for 1500 bytes in two buffers).
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

    /// The windows of a buffer behind its first one.
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

    /// The single window that holds all of frame `index`, in the usual case that there is one.
    #[inline(always)]
    pub fn whole(&self, index: usize, len: usize) -> Option<Window<'m>> {
        let (first, count) = self.frames[index];
        let head = &self.heads[usize::from(first)];
        if count != 1 {
            return None;
        }
        head.first.sub(0, len)
    }

    /// After a memory fault of the sender: what follows the header of frame `index` becomes zero,
    /// and each of its buffers shrinks to header and 60 bytes. Length 0 instead would make DPDK's
    /// vectorised driver compute 65,524.
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
