//! Delivery of a burst's frames into one receive queue: claim, fill, commit, publish.
//!
//! An open claim of a descheduled thread delays what that queue's driver sees. So claims are made
//! late, after decision and lengths. A claim is small: at most 32 frames or 64 KiB. A thread has at
//! most one open claim.
//!
//! A ring that is short of buffers is delivered to sender by sender, each within its share
//! (`virtio::share`).

use arrayvec::ArrayVec;

use crate::frame::{BURST_FRAMES, Burst, Frame, put_header, put_header_part, receive_header};
use crate::memory::{Pieces, Window};
use crate::stats::{DropReason, PortCounters};
use crate::topology::{Egress, EgressQueue};
use crate::virtio::{Claim, LEGACY_NET_HDR_SIZE, NET_HDR_SIZE, NoClaim};

use super::context::Context;
use super::egress::Touched;
use super::owed::Owed;

/// Copies of at least so many bytes prefetch the lines of their destination.
const LONG_COPY: usize = 512;
/// So many claims in a row that held only unusable buffers count as a full queue.
pub(super) const BARREN_CLAIMS: u32 = 4;

/// A set of frames of a burst: one bit per frame number.
pub(super) type Mask = u64;

/// Returns the numbers in a mask, in ascending order.
#[inline(always)]
pub(super) fn numbers(mut mask: Mask) -> impl Iterator<Item = usize> + Clone {
    std::iter::from_fn(move || {
        let number = mask.trailing_zeros() as usize;
        mask &= mask.wrapping_sub(1);
        (number < Mask::BITS as usize).then_some(number)
    })
}

/// The frames that could not be delivered, and why.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left {
    /// The frames that are left.
    pub(super) mask: Mask,
    /// The frames in `mask` for which another try at the end of the pass may help.
    pub(super) hold: Mask,
    /// Why the frames are left: full, contended or broken.
    pub(super) reason: NoClaim,
}

/// Delivery of one burst's frames into one receive queue.
#[derive(Debug)]
pub(super) struct Target<'a, 't> {
    pub(super) context: &'a Context<'t>,
    pub(super) claim: &'a mut Claim<'t>,
    pub(super) touched: &'a mut Touched<'t>,
    pub(super) owed: &'a mut Owed<'t>,
    pub(super) burst: &'a Burst<'t>,
    pub(super) egress: &'t Egress,
    pub(super) queue: &'t EgressQueue,
}

impl<'t> Target<'_, 't> {
    /// Delivers the frames `mask`, the frames of each sender in order. Returns the frames that are
    /// left.
    #[inline(always)]
    pub(super) fn deliver(&mut self, mask: Mask) -> Left {
        let queue = &*self.queue.queue;
        if queue.is_short() {
            return self.deliver_shares(mask);
        }
        let (left, _) = self.deliver_leaving(mask, 0);
        if left.mask != 0 && left.reason == NoClaim::Full {
            queue.refused();
        }
        left
    }

    /// Delivers while the ring is short: sender by sender, each within its share of the buffers
    /// that are kept back.
    #[cold]
    fn deliver_shares(&mut self, mask: Mask) -> Left {
        let source = |number: usize| {
            let ingress = self.burst.frames()[number].ingress;
            self.context.ingress(ingress).reference.slot
        };
        let mut groups: ArrayVec<(u16, Mask), BURST_FRAMES> = ArrayVec::new();
        for number in numbers(mask) {
            let slot = source(number);
            match groups.iter_mut().find(|(other, _)| *other == slot) {
                Some((_, group)) => *group |= 1 << number,
                None => groups.push((slot, 1 << number)),
            }
        }
        let mut all = Left {
            mask: 0,
            hold: 0,
            reason: NoClaim::Full,
        };
        for (slot, group) in groups {
            let left = self.deliver_share(slot, group);
            all.mask |= left.mask;
            all.hold |= left.hold;
            if left.mask != 0 {
                all.reason = left.reason;
            }
        }
        all
    }

    fn deliver_share(&mut self, source: u16, mask: Mask) -> Left {
        let queue = &*self.queue.queue;
        let (left, _) = self.deliver_leaving(mask, queue.kept());
        if left.mask == 0 || left.reason != NoClaim::Full {
            return left;
        }
        let credit = usize::try_from(queue.credit(source)).unwrap_or(usize::MAX);
        let first = numbers(left.mask)
            .take(credit)
            .fold(0, |first: Mask, number| first | 1 << number);
        let (within, drawn) = self.deliver_leaving(first, 0);
        queue.draw(source, drawn);
        let mask = within.mask | (left.mask & !first);
        if mask != 0 && within.reason == NoClaim::Full {
            queue.refused();
        }
        Left {
            mask,
            // Beyond its share a sender is refused without a retry: a retry would take the buffers
            // that others need.
            hold: within.hold,
            reason: within.reason,
        }
    }

    /// Delivers as long as `leave` buffers stay free. Returns the frames that are left, and how
    /// many positions were used.
    #[inline(always)]
    fn deliver_leaving(&mut self, mut mask: Mask, leave: u64) -> (Left, u64) {
        let counters = self.egress.shared.stats.thread(self.context.thread);
        let queue = &self.queue.queue;
        let frames = self.burst.frames();
        let (mut barren, mut used) = (0, 0);
        let mut reason = NoClaim::Full;
        while mask != 0 {
            let lengths = numbers(mask).map(|number| frames[number].len);
            match queue.claim_leaving(lengths, leave, self.claim) {
                Ok(()) => {}
                Err(NoClaim::TooLong) => {
                    let to = (self.egress, Some(self.queue.pair));
                    // A buffer of many pieces is read once a burst, not once a frame, so all frames
                    // are dropped.
                    let dropped = match self.claim.is_costly() {
                        true => mask,
                        false => mask & mask.wrapping_neg(),
                    };
                    let reason = DropReason::EgressTooLong;
                    self.context.drop_egress(to, reason, self.burst, dropped);
                    mask &= !dropped;
                    continue;
                }
                Err(other) => {
                    reason = other;
                    break;
                }
            }
            let claim = &mut *self.claim;
            let to = (self.egress, self.queue.pair);
            let done = fill(self.context, self.burst, to, claim, mask, counters);
            self.touched
                .note(self.egress, self.queue, queue.commit(claim));
            used += claim.span();
            if claim.bad_buffers() > 0 {
                counters.bad_buffers.add(u64::from(claim.bad_buffers()));
                let unusable = u64::from(claim.unusable_buffers());
                counters.unusable_buffers.add(unusable);
            }
            if queue.published() < claim.end() {
                for number in numbers(mask & done) {
                    let frame = &frames[number];
                    self.owed
                        .until_published(frame.ingress, frame.position, queue, claim.end());
                }
            }
            mask &= !done;
            barren = if claim.frames() == 0 { barren + 1 } else { 0 };
            if barren == BARREN_CLAIMS {
                break;
            }
        }
        // A driver that has posted nothing since the last retry failed does not do so within this
        // pass.
        let worth = mask != 0 && reason != NoClaim::Broken && queue.is_worth_a_retry();
        let hold = if worth { mask } else { 0 };
        (Left { mask, hold, reason }, used)
    }
}

/// Copies frames into an open claim. Returns the frames that got buffers.
#[inline(always)]
fn fill<'t>(
    context: &Context<'t>,
    burst: &Burst<'t>,
    (egress, pair): (&Egress, u16),
    claim: &mut Claim<'t>,
    mask: Mask,
    counters: &PortCounters,
) -> Mask {
    let (mut done, mut bytes): (Mask, u64) = (0, 0);
    let header = claim.header();
    let frames = burst.frames();
    for (index, number) in numbers(mask).take(claim.frames()).enumerate() {
        let frame = &frames[number];
        done |= 1 << number;
        match claim.whole(index, header + frame.len as usize) {
            Some(target) => fill_whole(&target, header, frame, burst),
            None => fill_pieces(claim, index, frame, burst.payload(frame)),
        }
        bytes += u64::from(frame.len);
    }
    if context.faults.is_outdated() {
        blank_faulted(context, burst, claim, done);
    }
    let count = u64::from(done.count_ones());
    if egress
        .memory
        .as_ref()
        .is_some_and(|memory| memory.faulted())
    {
        let reason = DropReason::EgressMemoryFault;
        context.drop_egress((egress, Some(pair)), reason, burst, done);
    } else {
        if let Some(recorder) = &context.recorder {
            recorder.borrow_mut().delivered(burst, egress, pair, done);
        }
        counters.tx_frames.add(count);
        counters.tx_bytes.add(bytes);
    }
    done
}

/// Blanks the frames of senders whose pages have gone while their frames were copied (see
/// `lose_faulted`): zeros may have been copied in place of the frame.
#[cold]
fn blank_faulted(context: &Context<'_>, burst: &Burst<'_>, claim: &mut Claim<'_>, done: Mask) {
    for (index, number) in numbers(done).enumerate() {
        let ingress = context.ingress(burst.frames()[number].ingress);
        if ingress.memory.faulted() {
            claim.blank(index);
        }
    }
}

/// Copies a frame in the usual case: the buffer is one piece of memory that holds header and frame.
#[inline(always)]
fn fill_whole<'t>(target: &Window<'_>, header: usize, frame: &Frame<'t>, burst: &Burst<'t>) {
    // Two calls, so that the compiler knows the length: each comparison is of two words.
    if header == NET_HDR_SIZE {
        put_header(target, &receive_header(1));
    } else {
        put_header(target, &[0; LEGACY_NET_HDR_SIZE]);
    }
    target.write_bytes(header, frame.head());
    if frame.is_all_head() {
        return;
    }
    let mut at = header + frame.head().len();
    for piece in burst.payload(frame).iter() {
        let len = piece.len();
        // `target` was cut to the frame's length, which is the sum of head and payload.
        if let Some(place) = target.sub(at, len) {
            copy(&place, &piece);
        }
        at += len;
    }
}

/// Bytes of a long copy that are prefetched at once. Further lines would be evicted, or not there
/// yet, when they are needed.
const ASKED: usize = 4096;

/// Fills `place` from the start of `source`, which must be at least as long.
#[inline(always)]
fn copy(place: &Window<'_>, source: &Window<'_>) {
    if place.len() > ASKED {
        return copy_in_pieces(place, source);
    }
    if place.len() >= LONG_COPY {
        // The receiver's core has most of these lines, and a store that waits for one holds up
        // those behind it. Prefetching keeps as many requests open as the processor can have.
        place.prefetch_write_all();
    }
    place.copy_from(source, place.len());
}

#[inline(never)]
fn copy_in_pieces(place: &Window<'_>, source: &Window<'_>) {
    for at in (0..place.len()).step_by(ASKED) {
        let len = ASKED.min(place.len() - at);
        if let (Some(place), Some(source)) = (place.sub(at, len), source.sub(at, len)) {
            copy(&place, &source);
        }
    }
}

/// Copies a frame into a buffer of several pieces, or into several buffers.
fn fill_pieces(claim: &Claim<'_>, index: usize, frame: &Frame<'_>, payload: Pieces<'_, '_>) {
    let header = receive_header(claim.buffers(index));
    let (mut header, mut head) = (&header[..claim.header()], frame.head());
    let mut private = header.len() + head.len();
    let mut sources = payload.iter();
    let mut source = sources.next().unwrap_or(Window::EMPTY);
    claim.each_piece(index, |target, room| {
        let mut filled = 0;
        if private > 0 {
            filled = put_header_part(&target, &mut header, room);
            let (now, later) = head.split_at(head.len().min(room - filled));
            target.write_bytes(filled, now);
            head = later;
            filled += now.len();
            private -= filled;
        }
        while filled < room {
            let bytes = source.len().min(room - filled);
            let rest = source.behind(bytes).unwrap_or(Window::EMPTY);
            if let Some(place) = target.sub(filled, bytes) {
                copy(&place, &source);
            }
            filled += bytes;
            source = rest;
            if rest.is_empty() {
                let Some(next) = sources.next() else { return };
                source = next;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SharedMemory;

    #[test]
    fn copies_of_any_length_and_place_are_whole_and_nothing_beside_them_is_written() {
        const LEN: usize = 65_535;
        let [from, to] = [(); 2].map(|()| SharedMemory::create(2 * LEN, false).unwrap());
        let pattern: Vec<u8> = (0..2 * LEN).map(|at| (at % 251) as u8 | 1).collect();
        from.window(0, pattern.len())
            .unwrap()
            .write_bytes(0, &pattern);
        for len in [
            1,
            LONG_COPY - 1,
            LONG_COPY,
            ASKED,
            ASKED + 1,
            2 * ASKED,
            9018,
            LEN,
        ] {
            for (start, source) in [(0, 0), (52, 1), (63, 64), (4095, 77)] {
                let all = to.window(0, 2 * LEN).unwrap();
                all.write_bytes(0, &vec![0; 2 * LEN]);
                copy(
                    &to.window(start, len).unwrap(),
                    &from.window(source, len + 5).unwrap(),
                );
                let mut found = vec![0; 2 * LEN];
                all.read_bytes(0, &mut found);
                assert!(
                    found[start..start + len] == pattern[source..source + len],
                    "{len} at {start}"
                );
                let beside = found[..start].iter().chain(&found[start + len..]);
                assert!(
                    beside.copied().all(|byte| byte == 0),
                    "beside {len} at {start}"
                );
            }
        }
    }
}
