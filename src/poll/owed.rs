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

/// Longest wait for another thread's open claim, in nanoseconds: a hundred times the time to copy
/// the 64 KiB of a claim.
pub(super) const HOLD_NS: u64 = 1_000_000;
/// Most entries that wait for a publication. A transmit queue has at most two for each receive
/// queue that stands still.
pub(super) const ROOM: usize = 192;
/// Most entries: beside [`ROOM`], one for each frame of a burst that may wait for a retry.
const OWED: usize = ROOM + BURST_FRAMES;
/// Most receive queues that are remembered because they stand still. For further ones threads wait
/// again.
const STALLED: usize = 8;

/// The chain of transmit queue `ingress` at `position`, which must not be completed yet.
#[derive(Clone, Copy, Debug)]
struct Entry<'t> {
    /// Number of the transmit queue in the plan.
    ingress: u16,
    position: u64,
    wait: Wait<'t>,
    /// When the entry was first looked at, by the raw clock; `None` before.
    since: Option<u64>,
}

/// What a chain waits for.
#[derive(Clone, Copy, Debug)]
enum Wait<'t> {
    /// The receive queue must be published up to this position.
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
    /// Whether chains are completed although their frames are not published.
    early: bool,
    /// Receive queues that were waited for in vain, and their published positions then. Nobody
    /// waits for such a queue again until it moves. Otherwise its senders would stand still for a
    /// while again and again.
    stalled: ArrayVec<(&'t ReceiveQueue, u64), STALLED>,
}

impl<'t> Owed<'t> {
    /// Whether chains wait, or were completed early and [`Owed::release`] has not said so yet.
    #[inline(always)]
    pub(super) fn any(&self) -> bool {
        !self.blocked.is_empty() || self.early
    }

    /// Makes the chain at `position` wait until `queue` is published up to `end`. `end` must not be
    /// before earlier ends of the queue.
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
        // One entry for a claim is enough, because its first position holds back the later ones. A
        // queue pair has two entries at most: one for the oldest claim, which must not wait for
        // later ones, and one for all the others.
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
            // Entries that are published make room. What they held back is completed at the end of
            // the pass: frames of this burst are not delivered yet.
            self.blocked.retain(|entry| !entry.is_published());
        }
        if self.has_room() {
            self.push(ingress, position, Wait::Published(queue, end));
        } else {
            self.early = true;
        }
    }

    /// Whether there is room for an entry that waits for a publication. The room for retries is
    /// kept free.
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

    /// Makes the chain at `position` wait for the retry at the end of the pass. At most
    /// [`BURST_FRAMES`] frames wait.
    pub(super) fn until_retry(&mut self, ingress: u16, position: u64) {
        self.push(ingress, position, Wait::Retry);
    }

    /// Removes the entries that wait for the retry, which is about to be made.
    pub(super) fn retried(&mut self) {
        self.blocked.retain(|entry| !entry.is_retry());
    }

    /// Removes entries that are published, and gives up a queue that was waited for since a time
    /// that `is_late`. `now` is the raw clock. Returns whether chains are completed early.
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

    /// Gives up waiting for all other threads' claims.
    pub(super) fn give_up_all(&mut self) {
        while let Some(queue) = self.blocked.iter().find_map(|entry| match entry.wait {
            Wait::Published(queue, _) => Some(queue),
            Wait::Retry => None,
        }) {
            self.give_up(queue);
        }
    }

    /// Gives up waiting for `queue`, and remembers its published position.
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

    /// Completes the chains of transmit queue `ingress` up to the first that must wait. Returns
    /// whether there were any.
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
