//! What every step of a pass looks at, and where drops are counted.

use std::cell::RefCell;

use crate::frame::Burst;
use crate::memory::Faults;
use crate::stats::DropReason;
use crate::topology::{Egress, Ingress, Plan, Topology};

use super::deliver::Mask;
use super::recorder::{Lost, Recorder};

/// What every step of a pass looks at.
#[derive(Debug)]
pub(super) struct Context<'t> {
    /// The borrowed snapshot.
    pub(super) topology: &'t Topology,
    /// This thread's part of it.
    pub(super) plan: &'t Plan,
    /// Number of the thread.
    pub(super) thread: usize,
    /// The moment at the start; outdated from the start on if a sender was marked already.
    pub(super) faults: Faults,
    /// Whoever looks on.
    pub(super) recorder: Option<RefCell<Recorder<'t>>>,
}

impl<'t> Context<'t> {
    /// A queue of the plan.
    #[inline(always)]
    pub(super) fn ingress(&self, number: u16) -> &'t Ingress {
        &self.plan.queues[usize::from(number)]
    }

    /// Whether memory of this sender is gone. Its mark is far away: three places to look at, for
    /// every queue of every pass.
    #[inline(always)]
    pub(super) fn faulted(&self, ingress: &Ingress) -> bool {
        self.faults.is_outdated() && ingress.memory.faulted()
    }

    /// Counts a frame dropped at its ingress.
    #[cold]
    pub(super) fn drop_taken(&self, number: u16, reason: DropReason, lost: Lost<'_, '_>) {
        let ingress = self.ingress(number);
        ingress.shared.stats.thread(self.thread).dropped(reason, 1);
        if let Some(recorder) = &self.recorder {
            recorder.borrow_mut().lost(number, reason, lost);
        }
    }

    /// Counts frames dropped at their egress.
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
