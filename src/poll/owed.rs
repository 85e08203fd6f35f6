//! Completions that must wait.
//!
//! A transmit chain goes back to its driver when its frame is *published*, not when it is
//! committed. If the process is killed between the two, the guest's next attachment replays the
//! frame instead of losing it. Usually everything is published when the burst ends. A chain waits
//! here if its frame stands behind another thread's open claim, or is held for a retry. All later
//! chains of its queue wait with it, since a queue completes in available order. The thread itself
//! goes on, from pass to pass; it adopts no other topology meanwhile.
//!
//! If the other thread has lost its CPU, the wait could last long, and what the senders have for
//! other receivers would wait too. So after [`HOLD_NS`] the chains are completed all the same, and
//! later ones at once until that receive queue moves (`completed_early`). The same happens to
//! chains for which the list of waits has no room. The price: frames of such chains are lost if the
//! process is killed at that moment.

use arrayvec::ArrayVec;

use crate::frame::BURST_FRAMES;
use crate::topology::Plan;
use crate::virtio::ReceiveQueue;

/// Longest wait for another thread's open claim, in nanoseconds: a hundred times what it takes to
/// copy the 64 KiB of one.
pub(super) const HOLD_NS: u64 = 1_000_000;
/// Entries for publication: at most two for each pair of a transmit queue and a receive queue that
/// stands still.
pub(super) const ROOM: usize = 192;
/// All of them: for retries as many more as a burst has frames.
const OWED: usize = ROOM + BURST_FRAMES;
/// Queues that stand still whose waits are remembered; beyond them a wait is made again.
const STALLED: usize = 8;

/// The chain of transmit queue `ingress` at `position`, which must not be completed yet.
#[derive(Clone, Copy, Debug)]
struct Entry<'t> {
    /// Number in the plan.
    ingress: u16,
    position: u64,
    wait: Wait<'t>,
    /// When its wait was first looked at, by the raw clock.
    since: Option<u64>,
}

/// What a chain waits for.
#[derive(Clone, Copy, Debug)]
enum Wait<'t> {
    /// This receive queue must be published up to here.
    Published(&'t ReceiveQueue, u64),
    /// The retry at the end of the pass.
    Retry,
}

impl Entry<'_> {
    fn is_published(&self) -> bool {
        matches!(self.wait, Wait::Published(queue, end) if queue.published() >= end)
    }

    fn is_retry(&self) -> bool {
        matches!(self.wait, Wait::Retry)
    }

    fn is_for(&self, queue: &ReceiveQueue) -> bool {
        matches!(self.wait, Wait::Published(other, _) if std::ptr::eq(other, queue))
    }
}

/// Chains of one thread that must not be completed yet.
#[derive(Debug, Default)]
pub(super) struct Owed<'t> {
    blocked: ArrayVec<Entry<'t>, OWED>,
    /// Chains are completed although their frames are not published.
    early: bool,
    /// Queues that were waited for in vain, and where they stood: as long as they stand there,
    /// nobody waits again. Otherwise senders to such a queue would stand still for a while again
    /// and again.
    stalled: ArrayVec<(&'t ReceiveQueue, u64), STALLED>,
}

impl<'t> Owed<'t> {
    /// Whether chains wait, or were completed early and nobody has been told.
    #[inline(always)]
    pub(super) fn any(&self) -> bool {
        !self.blocked.is_empty() || self.early
    }

    /// The chain at `position` waits until `queue` is published up to `end`, which is behind all
    /// earlier ends.
    pub(super) fn until_published(
        &mut self,
        ingress: u16,
        position: u64,
        queue: &'t ReceiveQueue,
        end: u64,
    ) {
        if self.is_stalled(queue) {
            return;
        }
        // One entry for a claim is enough, for its first position holds the later ones back; and
        // one for all claims but the oldest, of which that must not wait for those that come later.
        let mut count = 0;
        for entry in &mut self.blocked {
            if entry.ingress == ingress
                && let Wait::Published(other, to) = &mut entry.wait
                && std::ptr::eq(*other, queue)
            {
                count += 1;
                if *to == end || count == 2 {
                    *to = end;
                    entry.position = entry.position.min(position);
                    return;
                }
            }
        }
        if !self.has_room() {
            // What they held back is completed at the end of the pass: here frames of the burst are
            // not delivered yet.
            self.blocked.retain(|entry| !entry.is_published());
        }
        if self.has_room() {
            self.push(ingress, position, Wait::Published(queue, end));
        } else {
            self.early = true;
        }
    }

    /// For the publication of others' claims; retries always have room.
    fn has_room(&self) -> bool {
        self.blocked.remaining_capacity() > BURST_FRAMES
    }

    fn push(&mut self, ingress: u16, position: u64, wait: Wait<'t>) {
        let _ = self.blocked.try_push(Entry {
            ingress,
            position,
            wait,
            since: None,
        });
    }

    /// The chain at `position` waits for the end of the pass. A burst's worth of frames is held at
    /// most.
    pub(super) fn until_retry(&mut self, ingress: u16, position: u64) {
        self.push(ingress, position, Wait::Retry);
    }

    /// The retry was made.
    pub(super) fn retried(&mut self) {
        self.blocked.retain(|entry| !entry.is_retry());
    }

    /// Forgets what is published at time `now`, and gives up queues that somebody has waited for
    /// since a time that `is_late`. Returns whether chains are completed early.
    pub(super) fn release(&mut self, now: u64, is_late: impl Fn(u64) -> bool) -> bool {
        self.blocked.retain(|entry| !entry.is_published());
        let mut late = None;
        for entry in &mut self.blocked {
            if let Wait::Published(queue, _) = entry.wait
                && is_late(*entry.since.get_or_insert(now))
            {
                late = Some(queue);
            }
        }
        if let Some(queue) = late {
            self.give_up(queue);
        }
        std::mem::take(&mut self.early)
    }

    /// Gives up waiting for any other thread's claim.
    pub(super) fn give_up_all(&mut self) {
        while let Some(queue) = self.blocked.iter().find_map(|entry| match entry.wait {
            Wait::Published(queue, _) => Some(queue),
            Wait::Retry => None,
        }) {
            self.give_up(queue);
        }
    }

    /// Gives up waiting for `queue`, and notes where it stands.
    fn give_up(&mut self, queue: &'t ReceiveQueue) {
        self.blocked.retain(|entry| !entry.is_for(queue));
        self.stalled.retain(|(queue, at)| queue.published() == *at);
        let _ = self.stalled.try_push((queue, queue.published()));
        self.early = true;
    }

    fn is_stalled(&self, queue: &ReceiveQueue) -> bool {
        let same = |(other, at): &(&ReceiveQueue, u64)| {
            std::ptr::eq(*other, queue) && queue.published() == *at
        };
        self.stalled.iter().any(same)
    }

    /// Completes what may be completed of queue `ingress`; says whether anything was.
    #[inline(always)]
    pub(super) fn complete(&self, plan: &Plan, ingress: u16) -> bool {
        let queue = &plan.queues[usize::from(ingress)].queue;
        let mut end = queue.position();
        for entry in &self.blocked {
            if entry.ingress == ingress {
                end = end.min(entry.position);
            }
        }
        queue.complete(end)
    }
}
