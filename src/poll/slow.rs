//! Passes of a thread that is alarmed, and of the thread that serves ports whose memory is slow to
//! touch.
//!
//! In both, a burst holds frames of one transmit queue only, and the cost of reading them is
//! charged to that queue's port (see `watch`).
//!
//! The thread of slow ports may block in their memory for any time, but never while it holds
//! something that others need, such as an open claim. So it copies each frame whole into private
//! memory before it claims anything in a healthy receiver's queue. It takes few frames at a time,
//! and one queue of each port in a pass. Between them it looks whether its topology is out of date.
//! Slow ports share among each other what this thread can do.

use arrayvec::ArrayVec;

use super::deliver::{Mask, numbers};
use super::egress::Delivery;
use super::pass::Pass;
use super::recorder::Lost;
use super::watch::Payer;
use crate::frame::{BURST_FRAMES, Burst, Frame};
use crate::stats::DropReason;
use crate::topology::{Egress, Ingress};

/// Most frames that the thread of slow ports takes from a queue at once.
const FEW: usize = 8;
/// Most ports that the thread of slow ports takes from in one pass.
const PORTS: usize = 64;

impl<'t> Pass<'t, '_> {
    /// Runs a pass like [`Pass::run`], with every step timed.
    #[cold]
    #[inline(never)]
    pub(super) fn run_watched(&mut self, now_s: u32, current: impl Fn() -> bool) -> bool {
        self.watch().pass();
        let queues = &self.context().plan.queues;
        let count = queues.len();
        let mut worked = self.delivery.replay();
        for turn in 0..count {
            let number = (self.first + turn) % count;
            let ingress = &queues[number];
            if self.watch().avoids(&ingress.shared.pages) {
                continue;
            }
            if !self.read(ingress, number as u16, BURST_FRAMES, now_s) {
                continue;
            }
            worked = true;
            self.forward_loaded(now_s);
            self.complete_watched(ingress);
            if !current() || self.delivery.is_spent() {
                self.first = number;
                break;
            }
        }
        if worked {
            self.first = if self.first + 1 < count {
                self.first + 1
            } else {
                0
            };
        }
        if worked || self.delivery.is_behind() {
            self.delivery.settle();
        }
        worked
    }

    /// Runs a pass of the thread of slow ports: one queue of each port.
    #[cold]
    #[inline(never)]
    pub(super) fn run_slow(&mut self, now_s: u32, current: impl Fn() -> bool) -> bool {
        self.watch().pass();
        let queues = &self.context().plan.queues;
        let count = queues.len();
        let mut worked = self.delivery.replay();
        worked |= self.delivery.arrive(&current);
        let mut served: ArrayVec<u16, PORTS> = ArrayVec::new();
        for turn in 0..count {
            if !current() || served.is_full() {
                break;
            }
            let number = (self.first + turn) % count;
            let ingress = &queues[number];
            if served.contains(&ingress.reference.slot)
                || !self.read(ingress, number as u16, FEW, now_s)
            {
                continue;
            }
            served.push(ingress.reference.slot);
            self.forward_loaded(now_s);
            self.complete_watched(ingress);
        }
        self.first = if self.first + 1 < count {
            self.first + 1
        } else {
            0
        };
        worked |= !served.is_empty();
        if worked || self.delivery.is_behind() {
            self.delivery.settle();
        }
        worked
    }

    /// Takes up to `most` frames of a queue, touches all of them, and loads their heads. All of
    /// that is charged to the queue's port. Returns whether there were any.
    pub(super) fn read(
        &mut self,
        ingress: &'t Ingress,
        number: u16,
        most: usize,
        now_s: u32,
    ) -> bool {
        let (payer, stats) = (Payer::from(ingress), self.delivery.tools.stats);
        self.watch().begin(payer);
        let taken = self.take(ingress, number, most, now_s);
        let mut avoided = self.watch().charge(payer, stats);
        if !taken {
            return false;
        }
        if !self.watch().is_slow() {
            avoided = avoided || self.touch(payer);
        }
        if avoided {
            self.lose((0, 0), DropReason::RxMemorySlow);
        } else {
            self.burst.load_heads();
            self.watch().charge(payer, stats);
        }
        true
    }

    /// Touches the memory of the burst's frames page by page, until their port's budget is used up.
    /// Returns whether it is.
    fn touch(&mut self, payer: Payer<'_>) -> bool {
        let (burst, stats) = (&self.burst, self.delivery.tools.stats);
        let watch = &mut *self.delivery.tools.watch;
        let mut avoided = false;
        for window in burst
            .frames()
            .iter()
            .flat_map(|frame| burst.payload(frame).iter())
        {
            window.touch_to_read(|| {
                avoided = avoided || watch.charge_so_far(payer, stats);
                !avoided
            });
        }
        avoided || watch.charge(payer, stats)
    }

    /// Completes the chains of the burst's queue, as far as their frames are published, and clears
    /// the burst. Charged to the queue's port.
    pub(super) fn complete_watched(&mut self, ingress: &Ingress) {
        self.watch().begin(ingress.into());
        for number in self.sources.drain(..) {
            self.delivery.complete(number);
        }
        self.burst.clear();
        let stats = self.delivery.tools.stats;
        self.watch().charge(ingress.into(), stats);
    }
}

impl<'t> Delivery<'t, '_> {
    /// Delivers the frames `mask` to one port while steps are timed. The receiver pays for touching
    /// its memory.
    #[cold]
    #[inline(never)]
    pub(super) fn send_watched(&mut self, burst: &Burst<'t>, port: &'t Egress, mask: Mask) {
        let plan = self.context.plan;
        let senders = numbers(mask).map(|number| {
            let ingress = burst.frames()[number].ingress;
            Payer::from(&plan.queues[usize::from(ingress)])
        });
        let watch = &mut *self.tools.watch;
        if port.queues.is_empty() && !watch.is_slow() {
            return self.send_elsewhere(burst, port, mask);
        }
        if watch.avoids(&port.shared.pages) {
            let reason = DropReason::EgressMemorySlow;
            return self.context.drop_egress((port, None), reason, burst, mask);
        }
        let suspect =
            watch.is_suspect(port.into()) || senders.clone().any(|sender| watch.is_suspect(sender));
        if suspect || watch.is_slow() {
            return self.send_private(burst, port, mask);
        }
        self.tools.watch.begin(port.into());
        self.spread(burst, port, mask);
        let stats = self.tools.stats;
        self.tools.watch.charge_copies(port.into(), senders, stats);
    }

    /// Delivers the frames `mask` to one port, each from a private copy. So the sender pays for
    /// reading, and the receiver pays for writing.
    fn send_private(&mut self, burst: &Burst<'t>, port: &'t Egress, mask: Mask) {
        let stats = self.tools.stats;
        let mut bytes = std::mem::take(self.tools.private);
        for number in numbers(mask) {
            let frame = &burst.frames()[number];
            let ingress = self.context.ingress(frame.ingress);
            self.tools.watch.begin(ingress.into());
            bytes.clear();
            bytes.extend_from_slice(frame.head());
            for window in burst.payload(frame).iter() {
                let start = bytes.len();
                bytes.resize(start + window.len(), 0);
                window.read_bytes(0, &mut bytes[start..]);
            }
            self.tools.watch.charge(ingress.into(), stats);
            if ingress.memory.faulted() {
                let lost = Lost::Read(burst, frame);
                let reason = DropReason::RxMemoryFault;
                self.context.drop_taken(frame.ingress, reason, lost);
                continue;
            }
            self.tools.watch.begin(port.into());
            self.put_private(&bytes, (burst, number), port);
            self.tools.watch.charge(port.into(), stats);
        }
        *self.tools.private = bytes;
    }

    /// Delivers the private copy of frame `number` to one port.
    fn put_private(
        &mut self,
        bytes: &[u8],
        (burst, number): (&Burst<'t>, usize),
        port: &'t Egress,
    ) {
        let mask = 1 << number;
        let frame: &Frame<'t> = &burst.frames()[number];
        let sender = self.context.ingress(frame.ingress).reference.slot;
        match self.put_to(bytes, port, Some(sender)) {
            Ok((end, queue)) => {
                if let Some(recorder) = &self.context.recorder {
                    recorder
                        .borrow_mut()
                        .delivered(burst, port, queue.pair, mask);
                }
                if queue.queue.published() < end {
                    let owed = &mut self.owed;
                    owed.until_published(frame.ingress, frame.position, &queue.queue, end);
                }
            }
            Err(reason) => {
                let to = (port, None);
                self.context.drop_egress(to, reason, burst, mask);
            }
        }
    }
}
