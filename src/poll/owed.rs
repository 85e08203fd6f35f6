//! Completions that must wait.
//!
//! A transmit chain goes back to its driver when its frame is *published*, not merely committed: if the process is
//! killed in between, the guest's next attachment replays the frame instead of losing it. Usually everything is published when the
//! burst ends. Where another thread's open claim stands in front, or the frame is held for a retry, the chain and all later
//! ones of its queue wait here (a queue completes in available order).

use arrayvec::ArrayVec;

use crate::frame::BURST_FRAMES;
use crate::topology::Plan;
use crate::virtio::ReceiveQueue;

/// Entries before the oldest must be waited for.
const OWED: usize = 256;
/// Queues that stand still whose waits are remembered; beyond them a wait is made again.
const STALLED: usize = 8;

/// What a chain waits for.
#[derive(Clone, Copy, Debug)]
enum Wait<'t> {
    /// This receive queue must be published up to here.
    Published(&'t ReceiveQueue, u64),
    /// The retry at the end of the pass.
    Retry,
}

/// Chains of one thread that must not be completed yet.
#[derive(Debug, Default)]
pub(super) struct Owed<'t> {
    /// Queue in the plan, position, reason.
    blocked: ArrayVec<(u16, u64, Wait<'t>), OWED>,
    /// Queues that were waited for in vain, and where they stood: as long as they stand there, nobody waits again.
    /// Otherwise every pass that delivers into such a queue would wait, and with it the frames to all others.
    stalled: ArrayVec<(&'t ReceiveQueue, u64), STALLED>,
    /// Whether anything waited since the last `clear`.
    used: bool,
}

impl<'t> Owed<'t> {
    /// Whether anything waited since the last [`Owed::clear`]: completions may have been held back.
    #[inline(always)]
    pub(super) fn used(&self) -> bool {
        self.used
    }

    /// Whether the entries of another delivery fit: at most one a frame.
    pub(super) fn has_room(&self) -> bool {
        self.blocked.remaining_capacity() >= BURST_FRAMES
    }

    /// The chain at `position` waits until `queue` is published up to `end`.
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
        self.used = true;
        // One entry a queue and claim is enough: the first position holds the later ones back.
        let same = |(at, _, wait): &(u16, u64, Wait<'_>)| {
            *at == ingress
                && matches!(wait, Wait::Published(other, to) if std::ptr::eq(*other, queue) && *to == end)
        };
        if !self.blocked.last().is_some_and(same) {
            // Room was made before the burst (`has_room`); without any the entry is left out and the chain completes
            // early, which only matters if the process is killed this instant.
            let _ = self
                .blocked
                .try_push((ingress, position, Wait::Published(queue, end)));
        }
    }

    /// The chain at `position` waits for the end of the pass.
    pub(super) fn until_retry(&mut self, ingress: u16, position: u64) {
        self.used = true;
        let _ = self.blocked.try_push((ingress, position, Wait::Retry));
    }

    /// The retry was made.
    pub(super) fn retried(&mut self) {
        self.blocked
            .retain(|(_, _, wait)| !matches!(wait, Wait::Retry));
    }

    /// Forgets what is published by now; says whether nothing waits for that any more.
    pub(super) fn all_published(&mut self) -> bool {
        let mut left = false;
        self.blocked.retain(|(_, _, wait)| match wait {
            Wait::Published(queue, end) => {
                let waits = queue.published() < *end;
                left |= waits;
                waits
            }
            Wait::Retry => true,
        });
        !left
    }

    /// Gives up waiting for other threads' claims, and notes where those queues stand.
    pub(super) fn forget_published(&mut self) {
        self.stalled.retain(|(queue, at)| queue.published() == *at);
        for (_, _, wait) in &self.blocked {
            if let Wait::Published(queue, _) = wait
                && !self.is_stalled(queue)
            {
                let _ = self.stalled.try_push((queue, queue.published()));
            }
        }
        self.blocked
            .retain(|(_, _, wait)| matches!(wait, Wait::Retry));
    }

    fn is_stalled(&self, queue: &ReceiveQueue) -> bool {
        let same = |(other, at): &(&ReceiveQueue, u64)| {
            std::ptr::eq(*other, queue) && queue.published() == *at
        };
        self.stalled.iter().any(same)
    }

    /// Everything is completed.
    pub(super) fn clear(&mut self) {
        self.blocked.clear();
        self.used = false;
    }

    /// Completes what may be completed of queue `ingress`; says whether anything was.
    #[inline(always)]
    pub(super) fn complete(&self, plan: &Plan, ingress: u16) -> bool {
        let queue = &plan.queues[usize::from(ingress)].queue;
        let mut end = queue.position();
        for (at, position, _) in &self.blocked {
            if *at == ingress {
                end = end.min(*position);
            }
        }
        queue.complete(end)
    }
}
