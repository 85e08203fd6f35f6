//! A receiveq: buffers that the driver made available, claimed by any poll thread at any time.
//!
//! The protocol is `claim.rs`; here the protocol meets the ring. A [`Claim`] is one thread's open
//! claim: which frames of a burst got which buffers. Its buffers were read before the swap that won
//! the positions, once, into private copies. A lost swap discards the copies.
//!
//! A lost claim and a full ring are ordinary outcomes. A claim that contradicts the ring's own
//! state (an available index that is impossibly far ahead) marks the ring broken, once.

use super::chain::{ChainError, Direction, MAX_CHAIN, Windows};
use super::claim::{Claims, Published};
use super::open_claim::{CLAIM_PIECES, Claim, ClaimedHead};
use super::share::Shares;
use super::{Broken, BrokenMark, Ring, RingSetup, SetupError};
use crate::memory::Window;

/// Most bytes of one claim, unless one frame alone is longer.
pub const CLAIM_BYTES: u32 = 64 * 1024;
/// A buffer must hold the header and so many bytes of a frame, or it goes back unused. A useless
/// buffer that stays would block a queue without mergeable buffers for ever.
pub(super) const MIN_FRAME: usize = 60;
/// Bytes of the longest frame with its header, rounded up to whole pages.
const LONGEST: u32 = 68 * 1024;
/// Most pages of receive buffers that are touched in advance: 16 MiB, about a ring of 256 buffers
/// for the longest frames.
const TOUCHED_PAGES: usize = 4096;
/// Tries before a claim counts as lost.
const CLAIM_TRIES: usize = 4;

/// Why no frame could be claimed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoClaim {
    /// The driver has too few buffers available.
    Full,
    /// Other threads were faster in each of `CLAIM_TRIES` tries. Harmless.
    Contended,
    /// The first frame is longer than the next buffer (not mergeable), or needs more buffers than a
    /// claim or the ring has.
    TooLong,
    /// The ring is broken.
    Broken,
}

/// A started receiveq.
#[derive(Debug)]
pub struct ReceiveQueue {
    pub(super) ring: Ring,
    pub(super) claims: Claims,
    pub(super) shares: Shares,
    size: u16,
    mergeable: bool,
    header: usize,
    broken: BrokenMark,
}

impl ReceiveQueue {
    /// Starts the ring. The driver is called once, because it may sleep on work finished before a
    /// restart.
    pub fn start(setup: &RingSetup) -> Result<Self, SetupError> {
        let (ring, position) = Ring::start(setup)?;
        // No kicks: the switch looks for receive buffers when it has a frame.
        ring.want_kicks(false, position);
        let claims = Claims::new(setup.size, position);
        claims.want_call();
        Ok(ReceiveQueue {
            ring,
            claims,
            shares: Shares::new(setup.size, setup.features.packed),
            size: setup.size,
            mergeable: setup.features.mergeable,
            header: setup.features.header(),
            broken: BrokenMark::default(),
        })
    }

    /// Claims buffers for as many frames, from the first on, as buffers and limits allow. `lengths`
    /// are in bytes, without header.
    ///
    /// On `Ok`, `claim` holds at least one frame, or at least one buffer that is to be returned
    /// unused.
    #[inline(always)]
    pub fn claim<'m>(
        &'m self,
        lengths: impl Iterator<Item = u32> + Clone,
        claim: &mut Claim<'m>,
    ) -> Result<(), NoClaim> {
        self.claim_leaving(lengths, 0, claim)
    }

    /// As [`ReceiveQueue::claim`], but leaves the last `leave` available buffers alone.
    #[inline(always)]
    pub fn claim_leaving<'m>(
        &'m self,
        lengths: impl Iterator<Item = u32> + Clone,
        leave: u64,
        claim: &mut Claim<'m>,
    ) -> Result<(), NoClaim> {
        // A claim of no positions would have a tag of count 0, which is no tag.
        debug_assert!(lengths.clone().next().is_some(), "a claim is for frames");
        for _ in 0..CLAIM_TRIES {
            #[cfg(test)]
            super::park::claims();
            if self.broken.is_set() {
                return Err(NoClaim::Broken);
            }
            let position = self.claims.next();
            match self.plan(position, lengths.clone(), leave, claim) {
                Ok(None) => {}
                Ok(Some(reason)) if claim.span == 0 => {
                    // In a packed ring, positions that another thread has claimed and published
                    // since `position` was read are no longer available. That says nothing about
                    // later positions.
                    if self.claims.next() == position {
                        return Err(reason);
                    }
                    continue;
                }
                Ok(Some(_)) => {}
                Err(broken) => {
                    // A thread that was descheduled after reading `position` finds the index of an
                    // honest ring too far ahead.
                    if self.claims.next() == position {
                        self.broken.set(broken);
                        return Err(NoClaim::Broken);
                    }
                    continue;
                }
            }
            #[cfg(test)]
            super::park::planned();
            if self.claims.try_claim(position, claim.span) {
                #[cfg(test)]
                super::park::at(super::park::Point::Claimed);
                return Ok(());
            }
        }
        Err(NoClaim::Contended)
    }

    /// Reads buffers from `position` on for the frames. Returns why it stopped before the last
    /// frame, if it did.
    #[inline(always)]
    fn plan<'m>(
        &'m self,
        position: u64,
        lengths: impl Iterator<Item = u32>,
        leave: u64,
        claim: &mut Claim<'m>,
    ) -> Result<Option<NoClaim>, Broken> {
        claim.clear();
        (claim.position, claim.header) = (position, self.header);
        let available = self.ring.available_to(position)?;
        let room = self.claims.room(position).min(u64::from(self.size));
        let end = available.min(position + room);
        if available != u64::MAX {
            self.shares.see(end - position);
        }
        let end = if leave > 0 {
            let free = self.ring.free_to(position, end);
            self.shares.see(free - position);
            free.saturating_sub(leave).max(position)
        } else {
            end
        };
        let mut bytes = 0;
        // After a frame that needed several buffers the next one mostly does, too. A try with one
        // buffer would read its descriptor in vain.
        let mut single = true;
        for len in lengths {
            if claim.frames.is_full() || (bytes > 0 && bytes + len > CLAIM_BYTES) {
                return Ok(None);
            }
            bytes += len;
            let len = len + self.header as u32;
            if single && self.plan_single(len, end, claim) {
                continue;
            }
            if let Some(reason) = self.plan_frame(len, end, claim)? {
                return Ok(Some(reason));
            }
            single = claim.frames.last().is_none_or(|(_, buffers)| *buffers == 1);
        }
        Ok(None)
    }

    /// Reads a buffer for a frame of `len` bytes, header included. Returns whether one buffer of
    /// one piece holds the frame, which is the usual case.
    #[inline(always)]
    fn plan_single<'m>(&'m self, len: u32, end: u64, claim: &mut Claim<'m>) -> bool {
        let position = claim.position + u64::from(claim.span);
        if position >= end {
            return false;
        }
        let first = claim.heads.len() as u16;
        let placed = self.add_single(position, (len, len), true, claim).is_some();
        if placed {
            claim.frames.push((first, 1));
        }
        placed
    }

    /// Adds the buffer at `position` to the claim for `left` bytes of a frame, if the buffer is one
    /// piece and holds at least `least` bytes. The `first` buffer of a frame gets the header.
    /// Returns the number of bytes for the buffer.
    #[inline(always)]
    fn add_single<'m>(
        &'m self,
        position: u64,
        (left, least): (u32, u32),
        first: bool,
        claim: &mut Claim<'m>,
    ) -> Option<u32> {
        let (head, buffer) = self.ring.single(position, Direction::Write)?;
        if buffer.len() < (least as usize).max(self.header + MIN_FRAME) {
            return None;
        }
        let written = left.min(buffer.len() as u32);
        let claimed = ClaimedHead {
            first: buffer,
            more: (0, 0),
            head,
            written,
        };
        claim.heads.try_push(claimed).ok()?;
        prefetch(
            &buffer,
            if first { self.header } else { 0 },
            written as usize,
        );
        claim.span += head.span;
        Some(written)
    }

    /// Reads buffers for one frame of `len` bytes, header included. Returns why there are none, if
    /// so.
    #[inline(never)]
    fn plan_frame<'m>(
        &'m self,
        len: u32,
        end: u64,
        claim: &mut Claim<'m>,
    ) -> Result<Option<NoClaim>, Broken> {
        let (first, windows, span) = (claim.heads.len(), claim.windows.len(), claim.span);
        let least = if self.mergeable { 0 } else { len };
        // The frame is too long only if it fills a claim alone. The claim then has room for the
        // longest chain.
        let (enough, full) = match first {
            0 => (CLAIM_PIECES + MAX_CHAIN, NoClaim::TooLong),
            _ => (CLAIM_PIECES, NoClaim::Full),
        };
        let mut left = len;
        while left > 0 {
            let position = claim.position + u64::from(claim.span);
            let reason = if claim.windows.read() as usize > enough || claim.heads.is_full() {
                full
            } else if position >= end {
                // The whole ring is too little, so no driver can ever provide enough.
                let whole_ring = u32::from(claim.span - span) >= u32::from(self.size);
                if whole_ring {
                    NoClaim::TooLong
                } else {
                    NoClaim::Full
                }
            } else if let Some(bytes) = self.add_single(position, (left, least), left == len, claim)
            {
                left -= bytes;
                continue;
            } else {
                let header = if left == len { self.header } else { 0 };
                match self.add_buffer(position, end, (left, header), claim)? {
                    Added::Bytes(bytes) => {
                        left -= bytes;
                        continue;
                    }
                    Added::Returned => {
                        // A malformed chain is never inside a frame. The buffers before it, read
                        // for this frame, are returned unused too.
                        self.give_up_heads(first, claim);
                        return self.restart_frame(len, end, claim);
                    }
                    Added::TooSmall => NoClaim::TooLong,
                    Added::NoRoom => full,
                    Added::Nothing => NoClaim::Full,
                }
            };
            claim.heads.truncate(first);
            claim.windows.truncate(windows);
            claim.span = span;
            return Ok(Some(reason));
        }
        let count = (claim.heads.len() - first) as u16;
        claim.frames.push((first as u16, count));
        Ok(None)
    }

    #[cold]
    fn restart_frame<'m>(
        &'m self,
        len: u32,
        end: u64,
        claim: &mut Claim<'m>,
    ) -> Result<Option<NoClaim>, Broken> {
        // Bounded: every turn used at least one position, and the buffers of a claim are limited.
        self.plan_frame(len, end, claim)
    }

    fn give_up_heads(&self, first: usize, claim: &mut Claim<'_>) {
        for head in &mut claim.heads[first..] {
            head.written = 0;
            claim.bad += 1;
        }
    }

    /// Adds the buffer at `position` to the claim for `left` bytes of a frame. `header` of these
    /// bytes are the virtio-net header.
    #[inline(always)]
    fn add_buffer<'m>(
        &'m self,
        position: u64,
        end: u64,
        (left, header): (u32, usize),
        claim: &mut Claim<'m>,
    ) -> Result<Added, Broken> {
        let first = claim.windows.len();
        // At least as many bytes as make a buffer usable. The walk stops at `wanted` bytes: with
        // fewer, a good chain would look too short.
        let least = (self.header + MIN_FRAME) as u32;
        let wanted = left.max(least);
        let chain =
            match self
                .ring
                .read_chain(position, Direction::Write, wanted, &mut claim.windows)?
            {
                Some(chain) => chain,
                None => return Ok(Added::Nothing),
            };
        if position + u64::from(chain.head.span) > end {
            claim.windows.truncate(first);
            return Ok(Added::Nothing);
        }
        let bytes = match chain.len {
            Err(ChainError::NoRoom) => return Ok(Added::NoRoom),
            // Without mergeable buffers a frame must fit into one buffer (virtio 1.2 §5.1.6.4).
            Ok(len) if len < left && !self.mergeable && len >= least => {
                claim.windows.truncate(first);
                return Ok(Added::TooSmall);
            }
            Ok(len) if len >= least => len.min(left),
            Err(ChainError::Unusable(_)) => {
                claim.unusable += 1;
                0
            }
            _ => 0,
        };
        let more = claim.windows.len().saturating_sub(first + 1);
        let piece = claim.windows.get(first).copied();
        let piece = piece.unwrap_or(Window::EMPTY);
        prefetch_pieces(&claim.windows[first..], header, bytes as usize);
        claim.span += chain.head.span;
        claim.heads.push(ClaimedHead {
            first: piece,
            more: (first as u16 + 1, more as u16),
            head: chain.head,
            written: bytes,
        });
        Ok(if bytes == 0 {
            Added::Returned
        } else {
            Added::Bytes(bytes)
        })
    }

    /// Touches the pages of the available buffers, up to `TOUCHED_PAGES`, without changing them.
    /// Returns whether any buffer was available.
    ///
    /// The first write to a page of a mapping is a page fault, about 2 µs. In a ring that has just
    /// started, a poll thread would take one for nearly every frame, while all its guests wait. The
    /// caller is a thread that may wait.
    pub fn touch_buffers(&self) -> bool {
        let position = self.claims.next();
        let (mut at, end) = (position, self.end_of_free());
        let mut windows: Windows<'_, MAX_CHAIN> = Windows::new();
        let mut pages = 0;
        while at < end && pages < TOUCHED_PAGES {
            windows.clear();
            // Whoever delivers into the ring finds what is wrong with it.
            let Ok(Some(chain)) = self
                .ring
                .read_chain(at, Direction::Write, LONGEST, &mut windows)
            else {
                break;
            };
            // Counts chains too, because all descriptors of a chain may be empty.
            pages += 1;
            let mut left = LONGEST as usize;
            for window in windows.iter() {
                let len = window.len().min(left);
                left -= len;
                pages += window.sub(0, len).map_or(0, |part| part.touch());
            }
            at += u64::from(chain.head.span);
        }
        at > position
    }

    /// Writes the claim's used elements, declares it filled, and tries to publish.
    #[inline(always)]
    pub fn commit(&self, claim: &Claim<'_>) -> Published {
        #[cfg(test)]
        super::park::at(super::park::Point::Filled);
        let used = claim.heads.iter().map(|head| (head.head, head.written));
        self.ring.write_used(claim.position, used);
        self.claims.commit(claim.position, claim.span);
        self.publish()
    }

    /// Tries to make filled claims visible.
    #[inline(always)]
    pub fn publish(&self) -> Published {
        #[cfg(test)]
        return self
            .claims
            .try_publish(&super::park::Watched::new(&self.ring));
        #[cfg(not(test))]
        self.claims.try_publish(&self.ring)
    }

    /// Returns the published position. Everything before it is visible to the driver.
    #[inline(always)]
    pub fn published(&self) -> u64 {
        self.claims.published()
    }

    /// Whether the driver is to be called now. The caller that gets `true` signals.
    #[inline(always)]
    pub fn take_call_wanted(&self) -> bool {
        self.claims.take_call_wanted()
    }

    /// Whether a buffer is available. Returns `true` for an impossible ring.
    pub fn has_available(&self) -> bool {
        self.ring.has_available(self.claims.next()).unwrap_or(true)
    }

    /// See [`Ring::is_blank`].
    pub fn is_blank(&self) -> bool {
        self.ring.is_blank()
    }

    /// Returns why the ring is broken, or `None`.
    pub fn broken(&self) -> Option<Broken> {
        self.broken.get()
    }

    /// Returns the number of entries of the ring.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Returns the answer to GET_VRING_BASE, once every poll thread has let go of the queue.
    pub fn base(&self) -> u32 {
        self.ring.base(self.published())
    }
}

/// Prefetches the first lines of a buffer. Its first `written` bytes will be written, of which
/// `header` are the header. The receiver's core has read these lines last.
///
/// Prefetched for reading, each line would be requested again by the store. The header's own line
/// is mostly not written (`frame::put_header`), so it is prefetched for reading, and last: if the
/// frame shares it, it was already prefetched for writing.
#[inline(always)]
fn prefetch(buffer: &Window<'_>, header: usize, written: usize) {
    buffer.prefetch_write(header);
    buffer.prefetch_write((header + 63).min(written - 1));
    // Without a header this line is under way already.
    buffer.prefetch(0);
}

/// As [`prefetch`], for a buffer of several pieces. Where the header fills the first piece, the
/// frame begins in the second: both are prefetched.
#[inline(never)]
fn prefetch_pieces(pieces: &[Window<'_>], mut header: usize, mut written: usize) {
    for piece in pieces.iter().take(2) {
        let len = piece.len().min(written);
        if len == 0 {
            return;
        }
        if header < len {
            prefetch(piece, header, len);
        } else {
            piece.prefetch(0);
        }
        header = header.saturating_sub(len);
        written -= len;
    }
}

/// What became of one buffer.
enum Added {
    /// The buffer takes this many bytes of the frame.
    Bytes(u32),
    /// The buffer cannot be used and goes back with length 0.
    Returned,
    /// Without mergeable buffers: the buffer is shorter than the frame. It stays in the ring.
    TooSmall,
    /// The claim has no room for the buffer's pieces. The buffer stays in the ring.
    NoRoom,
    /// The buffer is not available after all.
    Nothing,
}
