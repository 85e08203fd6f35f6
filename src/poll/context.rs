//! What every step of a pass reads, and where drops are counted.

use std::cell::RefCell;

use crate::frame::Burst;
use crate::memory::Faults;
use crate::stats::DropReason;
use crate::topology::{Egress, Ingress, Plan, Topology};

use super::deliver::Mask;
use super::recorder::{Lost, Recorder};

/// What every step of a pass reads.
#[derive(Debug)]
pub(super) struct Context<'t> {
    /// The borrowed snapshot.
    pub(super) topology: &'t Topology,
    /// This thread's part of the topology.
    pub(super) plan: &'t Plan,
    /// Number of the thread.
    pub(super) thread: usize,
    /// The state of the fault counter when the thread adopted the topology. Outdated at once if
    /// memory of a sender had faulted before.
    pub(super) faults: Faults,
    /// The thread's pens of observers; `None` without observers.
    pub(super) recorder: Option<RefCell<Recorder<'t>>>,
}

impl<'t> Context<'t> {
    /// Returns queue `number` of the plan.
    #[inline(always)]
    pub(super) fn ingress(&self, number: u16) -> &'t Ingress {
        &self.plan.queues[usize::from(number)]
    }

    /// Whether memory of this sender is gone. The shared counter is tested first, because the
    /// sender's mark is three pointers away, and this is tested for every queue of every pass.
    #[inline(always)]
    pub(super) fn faulted(&self, ingress: &Ingress) -> bool {
        self.faults.is_outdated() && ingress.memory.faulted()
    }

    /// Counts a frame that is dropped at its ingress, and shows it to observers.
    #[cold]
    pub(super) fn drop_taken(&self, number: u16, reason: DropReason, lost: Lost<'_, '_>) {
        let ingress = self.ingress(number);
        ingress.shared.stats.thread(self.thread).dropped(reason, 1);
        if let Some(recorder) = &self.recorder {
            recorder.borrow_mut().lost(number, reason, lost);
        }
    }

    /// Counts the frames `mask`, which are dropped at their egress, and shows them to observers.
    #[cold]
    pub(super) fn drop_egress(
        &self,
        (port, pair): (&Egress, Option<u16>),
        reason: DropReason,
        burst: &Burst<'_>,
        mask: Mask,
    ) {
        let count = u64::from(mask.count_ones());
        if count == 0 {
            return;
        }
        port.shared.stats.thread(self.thread).dropped(reason, count);
        if let Some(recorder) = &self.recorder {
            let to = (port.reference, pair);
            recorder.borrow_mut().refused(burst, to, reason, mask);
        }
    }
}
