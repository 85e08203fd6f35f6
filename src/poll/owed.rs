//! Completions that must wait.
//!
//! A transmit chain goes back to its driver when its frame is *published*, not merely committed: if the process is
//! killed in between, the guest's next attachment replays the frame instead of losing it. Usually everything is published when the
//! burst ends. Where another thread's open claim stands in front, or the frame is held for a retry, the chain and all later
//! ones of its queue wait here (a queue completes in available order), from pass to pass: the thread itself goes on.
//!
//! Behind a thread that has lost its processor they would wait for as long as that takes, and what their senders have for
//! others would wait with them. So where nothing moves for [`HOLD_NS`], they are completed all the same.

use arrayvec::ArrayVec;

use crate::frame::BURST_FRAMES;
use crate::topology::Plan;
use crate::virtio::ReceiveQueue;

/// Longest wait for another thread's open claim, in nanoseconds: a hundred times what it takes to copy the 64 KiB of one.
pub(super) const HOLD_NS: u64 = 1_000_000;
/// Entries: for a retry one a frame at most, for publication at most two a transmit queue and receive queue.
const OWED: usize = 256;
/// Queues that stand still whose waits are remembered; beyond them a wait is made again.
const STALLED: usize = 8;

/// The chain of transmit queue `ingress` at `position`, which must not be completed yet.
#[derive(Clone, Copy, Debug)]
struct Entry<'t> {
    /// Number in the plan.
    ingress: u16,
    position: u64,
    wait: Wait<'t>,
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
}

/// Chains of one thread that must not be completed yet.
#[derive(Debug, Default)]
pub(super) struct Owed<'t> {
    /// Oldest first.
    blocked: ArrayVec<Entry<'t>, OWED>,
    /// When the oldest of those that wait for publication became that, by the raw clock.
    since: Option<u64>,
    /// Chains found no place here, and were completed early.
    left_out: bool,
    /// Queues that were waited for in vain, and where they stood: as long as they stand there, nobody waits again.
    /// Otherwise senders to such a queue would stand still for a while again and again.
    stalled: ArrayVec<(&'t ReceiveQueue, u64), STALLED>,
}

impl<'t> Owed<'t> {
    /// Whether chains wait.
    #[inline(always)]
    pub(super) fn any(&self) -> bool {
        !self.blocked.is_empty() || self.left_out
    }

    /// The transmit queues with chains that wait, by their numbers in the plan.
    pub(super) fn queues(&self) -> ArrayVec<u16, OWED> {
        let mut queues = ArrayVec::new();
        for entry in &self.blocked {
            if !queues.contains(&entry.ingress) {
                queues.push(entry.ingress);
            }
        }
        queues
    }

    /// The chain at `position` waits until `queue` is published up to `end`, which is behind all earlier ends.
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
        // One entry for a claim is enough, for its first position holds the later ones back; and one for all claims but the
        // oldest, of which that must not wait for those that come later.
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
        // Retries always have room.
        if self.blocked.remaining_capacity() > BURST_FRAMES {
            self.blocked.push(Entry {
                ingress,
                position,
                wait: Wait::Published(queue, end),
            });
        } else {
            self.left_out = true;
        }
    }

    /// The chain at `position` waits for the end of the pass.
    pub(super) fn until_retry(&mut self, ingress: u16, position: u64) {
        let wait = Wait::Retry;
        // A burst's worth of frames is held at most, and so much room is left for them.
        let _ = self.blocked.try_push(Entry {
            ingress,
            position,
            wait,
        });
    }

    /// The retry was made.
    pub(super) fn retried(&mut self) {
        self.blocked.retain(|entry| !entry.is_retry());
    }

    /// Forgets what is published at time `now`, and everything where the oldest has been that for so long that it
    /// `is_late`. Returns whether chains are completed early.
    pub(super) fn release(&mut self, now: u64, is_late: impl Fn(u64) -> bool) -> bool {
        let before = self.oldest();
        self.blocked.retain(|entry| !entry.is_published());
        let oldest = self.oldest();
        let same = self.since.filter(|_| oldest == before);
        self.since = oldest.map(|_| same.unwrap_or(now));
        if self.since.is_some_and(is_late) {
            self.give_up();
        }
        std::mem::take(&mut self.left_out)
    }

    /// Gives up waiting for other threads' claims, and notes where those queues stand.
    pub(super) fn give_up(&mut self) {
        self.stalled.retain(|(queue, at)| queue.published() == *at);
        for entry in &self.blocked {
            if let Wait::Published(queue, _) = entry.wait
                && !self.is_stalled(queue)
            {
                let _ = self.stalled.try_push((queue, queue.published()));
            }
        }
        self.blocked.retain(|entry| entry.is_retry());
        (self.since, self.left_out) = (None, true);
    }

    fn oldest(&self) -> Option<(u16, u64)> {
        let oldest = self.blocked.iter().find(|entry| !entry.is_retry());
        oldest.map(|entry| (entry.ingress, entry.position))
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
