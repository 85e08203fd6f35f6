//! Delivery of a burst's frames into one receive queue: claim, fill, commit, publish.
//!
//! Claims are made as late as possible, after decision and lengths, because an open claim of a descheduled thread
//! delays what that queue's driver sees: at most 32 frames or 64 KiB, one open claim a thread.

use crate::frame::{Burst, Frame, NUM_BUFFERS_AT};
use crate::memory::Window;
use crate::stats::{DropReason, PortCounters};
use crate::topology::{Egress, EgressQueue};
use crate::virtio::{Claim, NET_HDR_SIZE, NoClaim};

use super::egress::{Context, Touched};
use super::owed::Owed;

/// Claims that held nothing but unusable buffers, in a row, before the queue counts as full.
const BARREN_CLAIMS: u32 = 4;

/// The frames of a burst by their numbers.
pub(super) type Mask = u64;

/// The numbers in a mask, ascending.
#[inline(always)]
fn numbers(mut mask: Mask) -> impl Iterator<Item = usize> + Clone {
    std::iter::from_fn(move || {
        let number = mask.trailing_zeros() as usize;
        mask &= mask.wrapping_sub(1);
        (number < Mask::BITS as usize).then_some(number)
    })
}

/// What could not be delivered, and why.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left {
    /// The frames.
    pub(super) mask: Mask,
    /// Full, contended or broken.
    pub(super) reason: NoClaim,
}

/// Delivers the frames `mask` of `burst`, in order, into `queue` of `egress`.
#[inline(always)]
#[allow(
    clippy::too_many_arguments,
    reason = "the fields of `Delivery` that are free while a burst is borrowed"
)]
pub(super) fn deliver<'t>(
    context: &Context<'t>,
    claim: &mut Claim<'t>,
    touched: &mut Touched<'t>,
    owed: &mut Owed<'t>,
    burst: &Burst<'t>,
    egress: &'t Egress,
    queue: &'t EgressQueue,
    mut mask: Mask,
) -> Left {
    let counters = egress.shared.stats.thread(context.thread);
    let frames = burst.frames();
    let mut barren = 0;
    let mut reason = NoClaim::Full;
    while mask != 0 {
        let lengths = numbers(mask).map(|number| frames[number].len);
        match queue.queue.claim(lengths, claim) {
            Ok(()) => {}
            Err(NoClaim::TooLong) => {
                counters.dropped(DropReason::EgressTooLong, 1);
                mask &= mask - 1;
                continue;
            }
            Err(other) => {
                reason = other;
                break;
            }
        }
        let done = fill(context, burst, egress, claim, mask, counters);
        touched.note(queue, queue.queue.commit(claim));
        if claim.bad_buffers() > 0 {
            counters.bad_buffers.add(u64::from(claim.bad_buffers()));
        }
        if queue.queue.published() < claim.end() {
            for number in numbers(mask & done) {
                let frame = &frames[number];
                owed.until_published(frame.ingress, frame.position, &queue.queue, claim.end());
            }
        }
        mask &= !done;
        barren = if claim.frames() == 0 { barren + 1 } else { 0 };
        if barren == BARREN_CLAIMS {
            break;
        }
    }
    Left { mask, reason }
}

/// Copies frames into an open claim; returns which.
#[inline(always)]
fn fill<'t>(
    context: &Context<'t>,
    burst: &Burst<'t>,
    egress: &Egress,
    claim: &mut Claim<'t>,
    mask: Mask,
    counters: &PortCounters,
) -> Mask {
    let frames = burst.frames();
    let (mut done, mut bytes): (Mask, u64) = (0, 0);
    for (index, number) in numbers(mask).take(claim.frames()).enumerate() {
        let frame = &frames[number];
        done |= 1 << number;
        match claim.whole(index, NET_HDR_SIZE + frame.len as usize) {
            Some(target) => fill_whole(&target, frame, burst.payload(frame)),
            None => fill_pieces(claim, index, frame, burst.payload(frame)),
        }
        bytes += u64::from(frame.len);
        // The sender's pages may have gone while we copied (its file was truncated): what arrived is not its frame.
        if context.ingress(frame.ingress).memory.faulted() {
            claim.blank(index);
        }
    }
    let count = u64::from(done.count_ones());
    if egress
        .memory
        .as_ref()
        .is_some_and(|memory| memory.faulted())
    {
        counters.dropped(DropReason::EgressMemoryFault, count);
    } else {
        counters.tx_frames.add(count);
        counters.tx_bytes.add(bytes);
    }
    done
}

/// The usual case: the buffer is one piece of memory that holds header and frame.
#[inline(always)]
fn fill_whole(target: &Window<'_>, frame: &Frame, payload: &[Window<'_>]) {
    let head = frame.with_header();
    target.write_bytes(0, head);
    let mut at = head.len();
    for piece in payload {
        let len = piece.len();
        // `target` was cut to the frame's length, which is the sum of head and payload.
        if let Some(place) = target.sub(at, len) {
            place.copy_from(piece, len);
        }
        at += len;
    }
}

/// A buffer of several pieces, or a frame over several buffers.
fn fill_pieces(claim: &Claim<'_>, index: usize, frame: &Frame, payload: &[Window<'_>]) {
    let mut header = [0_u8; NET_HDR_SIZE];
    header[NUM_BUFFERS_AT..NUM_BUFFERS_AT + 2].copy_from_slice(&claim.buffers(index).to_le_bytes());
    let head = frame.head();
    let mut sources = payload.iter().copied();
    let mut source: Option<Window<'_>> = None;
    let mut at = 0;
    for (target, room) in claim.pieces(index) {
        let mut filled = 0;
        while filled < room {
            let left = room - filled;
            let private: &[u8] = if at < NET_HDR_SIZE {
                &header[at..]
            } else {
                head.get(at - NET_HDR_SIZE..).unwrap_or_default()
            };
            let bytes = if private.is_empty() {
                let Some(from) = source
                    .filter(|rest| !rest.is_empty())
                    .or_else(|| sources.next())
                else {
                    return;
                };
                let bytes = from.len().min(left);
                if let Some(place) = target.sub(filled, bytes) {
                    place.copy_from(&from, bytes);
                }
                source = from.sub(bytes, from.len() - bytes);
                bytes
            } else {
                let bytes = private.len().min(left);
                target.write_bytes(filled, &private[..bytes]);
                bytes
            };
            filled += bytes;
            at += bytes;
        }
    }
}
