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
//! [`Claims::try_publish`] delays what this one queue's driver sees. No thread waits for it, but
//! for the time that one claim takes to fill, before a new topology is adopted (`poll::owed` says
//! what becomes of the senders' chains). Nobody loops. So pin poll threads.
//!
//! Rejected simpler forms:
//! - A boolean per slot: a late reset wipes the next lap's flag. Hence tags with the position.
//! - Releasing the token with a store: a loser's claim can be missed. Hence the subtraction.
//! - One publish round: whoever loses the token after the last look would be forgotten. Hence
//!   `Again`.
//! - Looking for filled claims without knowing that there are any: the look takes the line of a tag
//!   from the thread that is about to write it. Hence the count beside the token.

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
    /// Everything that was complete is visible, or another thread will make it so: the token's
    /// holder, or one whose claim stood open before the others and that has still to count it.
    Clean,
    /// Work was still visible after the last round: try again before the pass ends, and until clean
    /// before sleeping or acknowledging a topology.
    Again,
}

/// In `turn`: somebody has the token.
const HELD: u64 = 1;
/// In `turn`: one filled claim.
const FILLED: u64 = 2;
/// Bits of a tag that hold the count; the other 48 hold the position plus one.
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
    /// Bit 0 is the token: taken by whoever publishes. The rest counts the claims that are filled
    /// and not visible yet.
    turn: CachePadded<AtomicU64>,
    /// The driver wants a call; swapped by every thread that delivered, at the end of its pass.
    call_wanted: CachePadded<AtomicBool>,
    /// One tag an entry: (position + 1, count) of the claim that starts there, once it is filled.
    tags: Box<[AtomicU64]>,
}

impl Claims {
    /// A queue of `size` entries (1 to 32768) that starts at `position`.
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
        // A mask for sizes that are a power of two; a division otherwise (packed rings may have 320
        // entries), once a claim and once a published run, not once a frame.
        let size = self.size();
        let index = if size.is_power_of_two() {
            position & (size - 1)
        } else {
            position % size
        };
        &self.tags[index as usize]
    }

    /// The position that the next claim would start at.
    ///
    /// Acquire, so that the available index which is then compared with it is read later: an older
    /// index beside a newer position would look like an impossible ring.
    #[inline(always)]
    pub fn next(&self) -> u64 {
        self.claim.load(Ordering::Acquire)
    }

    /// Everything before this position is visible to the driver.
    ///
    /// Acquire pairs with the release in `try_publish`.
    #[inline(always)]
    pub fn published(&self) -> u64 {
        self.published.load(Ordering::Acquire)
    }

    /// How many positions from `p` on may be claimed without lapping what is not published yet.
    ///
    /// The driver's available index alone is not enough: a guest may raise it without waiting for
    /// used entries, two open claims would share a tag, and the queue would stick. Acquire (in
    /// `published`) orders the publisher's reading of a tag before our writing of it one lap later.
    #[inline(always)]
    pub fn room(&self, p: u64) -> u64 {
        (self.published() + self.size()).saturating_sub(p)
    }

    /// Takes `[p, p + n)` if nobody took anything since `p` was read.
    ///
    /// Release pairs with the acquire of `next`; what we write is released by the commit.
    #[inline(always)]
    pub fn try_claim(&self, p: u64, n: u16) -> bool {
        let (old, new) = (p, p + u64::from(n));
        self.claim
            .compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Declares the claim `[p, p + n)` filled. The release pairs with the publisher's acquire of
    /// the tag. To be followed by [`Claims::try_publish`].
    #[inline(always)]
    pub fn commit(&self, p: u64, n: u16) {
        self.tag(p).store(tag_of(p, n), Ordering::Release);
        // Behind the tag: whoever has counted the claim finds it, unless another one before it is
        // still open.
        self.turn.fetch_add(FILLED, Ordering::Release);
    }

    /// Makes every filled claim visible that nothing unfilled stands before, unless another thread
    /// is at it.
    ///
    /// At most two rounds: with more, one thread could be kept publishing for the others for ever.
    #[inline(always)]
    pub fn try_publish(&self, ring: &impl Publish) -> Published {
        for _ in 0..2 {
            // A loser may leave: it has counted its claim before this, so the holder's release
            // below finds the count, and by it the tag.
            let turn = self.turn.fetch_or(HELD, Ordering::AcqRel);
            if turn & HELD != 0 {
                return Published::Clean;
            }
            let old = self.published.load(Ordering::Relaxed);
            let (end, claims) = self.filled_from(old, turn / FILLED);
            if end != old {
                ring.publish(old, end);
                self.published.store(end, Ordering::Release);
                // Full barrier between the used index and the driver's event word: the driver
                // stores its event, then looks at the index (virtio 1.2 §2.7.7.2); without the
                // barrier both sides may miss the other.
                fence(Ordering::Release);
                if ring.wants_call(old, end) {
                    // An RMW, so that whoever takes the wish has acquired every publication before
                    // it, whichever publisher's write it finds. (A store would do, as all are made
                    // under the token, but only by an argument that the model checker cannot
                    // follow.) The call itself costs far more.
                    self.call_wanted.swap(true, Ordering::AcqRel);
                }
            }
            let left = self.release(claims);
            // What is counted and not filled here stands behind an open claim, whose thread will
            // find it.
            if left == 0 || self.filled_from(end, 1).1 == 0 {
                return Published::Clean;
            }
        }
        Published::Again
    }

    /// Gives the token back after `claims` claims have become visible; returns how many are left.
    ///
    /// A claim may become visible before its own thread has counted it, in place of one behind it
    /// that is counted: no more than were counted ever do, so this does not go below zero, and that
    /// thread looks after the other one when it has counted.
    #[inline(always)]
    fn release(&self, claims: u64) -> u64 {
        self.turn
            .fetch_sub(claims * FILLED + HELD, Ordering::AcqRel)
            / FILLED
            - claims
    }

    /// The end of the unbroken run of at most so many filled claims from `from` on, and how many
    /// they are.
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

    /// Asks for a call whatever the driver's event says.
    pub fn want_call(&self) {
        self.call_wanted.store(true, Ordering::Release);
    }

    /// Whether the driver is to be called now; the caller that gets `true` signals.
    ///
    /// The load first keeps the line shared among threads while nobody wants a call.
    #[inline(always)]
    pub fn take_call_wanted(&self) -> bool {
        self.call_wanted.load(Ordering::Acquire) && self.call_wanted.swap(false, Ordering::AcqRel)
    }
}

#[inline(always)]
fn tag_of(position: u64, count: u16) -> u64 {
    // The position keeps its low 48 bits: equal tags are 2^48 positions apart, a month at 100 Mpps,
    // and no thread stands still across a whole lap of them.
    ((position + 1) << COUNT_BITS) | u64::from(count)
}
