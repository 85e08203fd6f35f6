//! Claim, fill, commit, publish: how several threads deliver into one receive queue without a lock.
//!
//! ```text
//! claim    compare-and-swap the position p to p + n. The bounds are what the driver made
//!          available, and published + ring size. Chains are read before the swap, into private
//!          copies.
//! fill     copy the frames; write the used elements of positions p .. p + n
//! commit   tag[p] = (p + 1, n), with release ordering
//! publish  the thread that gets the token makes the unbroken run of committed claims visible: one
//!          store of used.idx, one look at the driver's event. A thread that does not get the token
//!          leaves, because the holder will see its tag.
//! ```
//!
//! This file holds the protocol's private atomics and nothing else, so that a model checker can run
//! it unchanged (`tests/models`). What the protocol needs of the ring in guest memory is the two
//! calls of [`Publish`].
//!
//! A *position* counts ring entries (split) or descriptors (packed) from the start of the ring, in
//! 64 bits. A position never wraps and never comes from guest memory. Every claim takes the
//! positions `[p, p + n)`, and those are the used positions too: DPDK's vectorised driver ignores
//! `used.id`, and QEMU resumes at `used.idx` after a crash, so used entries must stand in available
//! order. A claim becomes visible whole, so the driver never sees half of a frame in several
//! mergeable buffers.
//!
//! A lost claim and a full ring are ordinary, counted outcomes.
//!
//! The price: a thread that is descheduled between [`Claims::try_claim`] and the end of
//! [`Claims::try_publish`] delays what the driver of this queue sees. No thread loops until the
//! other one goes on. Before it adopts a new topology, a thread waits as long as one claim takes to
//! fill (`poll::owed` says what becomes of the senders' chains). So pin poll threads.
//!
//! Rejected simpler forms:
//! - A boolean per slot: a late reset wipes the next lap's flag. Hence tags with the position.
//! - Releasing the token with a store: a loser's claim can be missed. Hence the subtraction.
//! - One publish round: a thread that loses the token after the holder's last look would be
//!   forgotten. Hence `Again`.
//! - Looking for filled claims without knowing that there are any: the look takes the line of a tag
//!   away from the thread that is about to write it. Hence the count beside the token.

use crossbeam_utils::CachePadded;

use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

/// What the publisher does to the ring in guest memory. Called by the holder of the token only.
pub trait Publish {
    /// Makes the used entries of positions `[from, to)` visible to the driver, with release
    /// ordering: a driver that sees the entries must see the data (virtio 1.2 §2.7.8.2).
    fn publish(&self, from: u64, to: u64);

    /// Whether the driver asked to be called for any position in `[from, to)`, read after a full
    /// barrier (virtio 1.2 §2.7.7, §2.8.10).
    fn wants_call(&self, from: u64, to: u64) -> bool;
}

/// How a try to publish ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// Everything that was complete is visible, or another thread will make it visible. That thread
    /// holds the token, or its claim was open before the others and it has not counted its claim
    /// yet.
    Clean,
    /// Filled claims were left after the last round. Try again before the pass ends. Before
    /// sleeping or acknowledging a topology, try until `Clean`.
    Again,
}

/// Bit of `turn`: a thread holds the token.
const HELD: u64 = 1;
/// Added to `turn` for each filled claim.
const FILLED: u64 = 2;
/// Bits of a tag that hold the count. The other 48 hold the position plus one.
const COUNT_BITS: u32 = 16;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;

/// The private state of one receive queue between one start and the next stop.
///
/// A new object for every start: tags of an earlier start would publish buffers that nobody filled.
#[derive(Debug)]
pub struct Claims {
    /// Next position to claim.
    claim: CachePadded<AtomicU64>,
    /// Every position before this one is visible to the driver.
    published: CachePadded<AtomicU64>,
    /// Bit 0 is the token of the thread that publishes. The other bits count the claims that are
    /// filled and not visible yet.
    turn: CachePadded<AtomicU64>,
    /// The driver wants a call. Every thread that delivered takes the wish at the end of its pass.
    call_wanted: CachePadded<AtomicBool>,
    /// One tag per ring entry: (position + 1, count) of the claim that starts there, once the claim
    /// is filled.
    tags: Box<[AtomicU64]>,
}

impl Claims {
    /// Makes the state of a queue of `size` entries (1 to 32768) that starts at `position`.
    pub fn new(size: u16, position: u64) -> Self {
        Claims {
            claim: CachePadded::new(AtomicU64::new(position)),
            published: CachePadded::new(AtomicU64::new(position)),
            turn: CachePadded::new(AtomicU64::new(0)),
            call_wanted: CachePadded::new(AtomicBool::new(false)),
            tags: (0..size).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn size(&self) -> u64 {
        self.tags.len() as u64
    }

    #[inline(always)]
    fn tag(&self, position: u64) -> &AtomicU64 {
        // A mask for sizes that are a power of two. Other sizes need a division (packed rings may
        // have 320 entries), once a claim and once a published run, not once a frame.
        let size = self.size();
        let index = if size.is_power_of_two() {
            position & (size - 1)
        } else {
            position % size
        };
        &self.tags[index as usize]
    }

    /// Returns the position at which the next claim starts.
    ///
    /// Acquire: the available index, which is then compared with the position, must be read later.
    /// An older index beside a newer position would look like an impossible ring.
    #[inline(always)]
    pub fn next(&self) -> u64 {
        self.claim.load(Ordering::Acquire)
    }

    /// Returns the published position. Everything before it is visible to the driver.
    ///
    /// Acquire pairs with the release in `try_publish`.
    #[inline(always)]
    pub fn published(&self) -> u64 {
        self.published.load(Ordering::Acquire)
    }

    /// Returns how many positions from `p` on may be claimed without reaching, one lap later,
    /// positions that are not published yet.
    ///
    /// The driver's available index alone is not enough. A guest may raise the index without
    /// waiting for used entries. Then two open claims would share a tag, and the queue would get
    /// stuck. Acquire (in `published`) orders the publisher's reading of a tag before our writing
    /// of the tag one lap later.
    #[inline(always)]
    pub fn room(&self, p: u64) -> u64 {
        (self.published() + self.size()).saturating_sub(p)
    }

    /// Claims `[p, p + n)` if no thread has claimed anything since `p` was read. Returns whether it
    /// did.
    ///
    /// Release pairs with the acquire of `next`. It does not cover the frames, which the commit
    /// releases.
    #[inline(always)]
    pub fn try_claim(&self, p: u64, n: u16) -> bool {
        let (old, new) = (p, p + u64::from(n));
        self.claim
            .compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Declares the claim `[p, p + n)` filled. The release pairs with the publisher's acquire of
    /// the tag. [`Claims::try_publish`] must follow.
    #[inline(always)]
    pub fn commit(&self, p: u64, n: u16) {
        self.tag(p).store(tag_of(p, n), Ordering::Release);
        // Counted after the tag is written. So a holder that finds the count also finds the tag,
        // unless a claim before it is still open.
        self.turn.fetch_add(FILLED, Ordering::Release);
    }

    /// Makes filled claims visible, up to the first claim that is not filled. Does nothing if
    /// another thread holds the token.
    ///
    /// At most two rounds. With more, one thread could be kept publishing for the others for ever.
    #[inline(always)]
    pub fn try_publish(&self, ring: &impl Publish) -> Published {
        for _ in 0..2 {
            // A thread that does not get the token may leave. It has counted its claim before, so
            // the holder's release below finds the count, and through the count the tag.
            let turn = self.turn.fetch_or(HELD, Ordering::AcqRel);
            if turn & HELD != 0 {
                return Published::Clean;
            }
            let old = self.published.load(Ordering::Relaxed);
            let (end, claims) = self.filled_from(old, turn / FILLED);
            if end != old {
                ring.publish(old, end);
                self.published.store(end, Ordering::Release);
                // Full barrier between the used index and the driver's event word. The driver
                // stores its event, then looks at the index (virtio 1.2 §2.7.7.2). Without the
                // barrier both sides may miss each other.
                fence(Ordering::SeqCst);
                if ring.wants_call(old, end) {
                    // An RMW, so that the thread that takes the wish has acquired every publication
                    // before it, whichever publisher's write it finds. (A store would do, because
                    // all writes are made under the token, but the model checker cannot follow that
                    // argument.) The call itself costs far more.
                    self.call_wanted.swap(true, Ordering::AcqRel);
                }
            }
            let left = self.release(claims);
            // A claim that is counted, and not found filled here, is behind an open claim. The
            // thread of the open claim will find it.
            if left == 0 || self.filled_from(end, 1).1 == 0 {
                return Published::Clean;
            }
        }
        Published::Again
    }

    /// Gives the token back after `claims` claims have become visible. Returns how many counted
    /// claims are left.
    ///
    /// A claim may become visible before its own thread has counted it, in place of a later claim
    /// that is counted. The number of visible claims never exceeds the number of counted ones, so
    /// the count does not go below zero. That thread finds the later claim once it has counted its
    /// own.
    #[inline(always)]
    fn release(&self, claims: u64) -> u64 {
        self.turn
            .fetch_sub(claims * FILLED + HELD, Ordering::AcqRel)
            / FILLED
            - claims
    }

    /// Returns the end of the unbroken run of filled claims from `from` on, and the number of
    /// claims in it, at most `most`.
    #[inline(always)]
    fn filled_from(&self, from: u64, most: u64) -> (u64, u64) {
        let (mut end, mut claims) = (from, 0);
        while claims < most {
            let tag = self.tag(end).load(Ordering::Acquire);
            let count = tag & COUNT_MASK;
            if count == 0 || tag != tag_of(end, count as u16) {
                break;
            }
            end += count;
            claims += 1;
        }
        (end, claims)
    }

    /// Makes the next [`Claims::take_call_wanted`] return `true`, whatever the driver's event says.
    pub fn want_call(&self) {
        self.call_wanted.store(true, Ordering::Release);
    }

    /// Whether the driver is to be called now. The caller that gets `true` signals.
    ///
    /// The load before the swap keeps the line shared among threads while no driver wants a call.
    #[inline(always)]
    pub fn take_call_wanted(&self) -> bool {
        self.call_wanted.load(Ordering::Acquire) && self.call_wanted.swap(false, Ordering::AcqRel)
    }
}

#[inline(always)]
fn tag_of(position: u64, count: u16) -> u64 {
    // The position keeps its low 48 bits. Equal tags are 2^48 positions apart, a month at 100 Mpps,
    // and no thread stands still for so long.
    ((position + 1) << COUNT_BITS) | u64::from(count)
}
