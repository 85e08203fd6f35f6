//! From verdicts to receive queues: grouping by egress, retries, completions, calls. A frame that
//! finds no buffer gets one retry at the end of the pass, with its sender's later frames behind it.
//! If the retry fails, the frame is dropped and counted. So the sender's ring always drains.

use arrayvec::ArrayVec;

use crate::frame::{BURST_FRAMES, Burst, MAX_FRAME};
use crate::memory::Faults;
use crate::stats::{DropReason, ThreadStats};
use crate::sys::aio::Caller;
use crate::sys::call::CallFd;
use crate::topology::{Egress, EgressQueue, Topology};
use crate::virtio::claim::Published;
use crate::virtio::{Claim, FullBarrier, NoClaim};

use super::context::Context;
use super::deliver::{Left, Mask, Target, numbers};
use super::detour::Detoured;
use super::notify::{CALLS, signal};
use super::owed::Owed;
use super::recorder::{Lost, Recorder};
use super::steer::{matching, steer};
use super::watch::{Payer, Watch};

/// More copies than this end a pass: calls are made. A flood to 500 ports is 500 copies.
const PASS_COPIES: u32 = 4096;
/// Most receive queues delivered to before their calls are made.
pub(super) const TOUCHED: usize = 128;
/// Most transmit queues completed before their calls are made.
const COMPLETED: usize = 128;
/// In place of a slot: the frame is dropped.
pub(super) const NOWHERE: u16 = u16::MAX;
/// In place of a slot: the frame is flooded.
pub(super) const EVERYWHERE: u16 = u16::MAX - 1;

/// A thread's own tools, which it uses with every topology.
#[derive(Debug)]
pub(super) struct Tools<'p> {
    pub(super) caller: &'p mut Caller,
    pub(super) stats: &'p ThreadStats,
    pub(super) clock: &'p quanta::Clock,
    /// Longest wait of a chain for another thread's open claim, in nanoseconds.
    pub(super) hold_ns: u64,
    pub(super) watch: &'p mut Watch,
    /// Room for a private copy of a frame, made once because a poll thread does not allocate.
    pub(super) private: &'p mut Vec<u8>,
}

/// Returns room for a private copy of the longest frame. The pages are touched here: a page fault
/// in them would later be taken for a fault in guest memory.
pub(super) fn private_frame() -> Vec<u8> {
    let mut room = vec![u8::MAX; MAX_FRAME as usize];
    room.clear();
    room
}

/// A receive queue delivered to since calls were last made.
#[derive(Debug)]
struct Delivered<'t> {
    port: &'t Egress,
    queue: &'t EgressQueue,
    /// Whether publishing is to be tried again.
    again: bool,
}

/// Receive queues delivered to since calls were last made.
#[derive(Debug, Default)]
pub(super) struct Touched<'t>(ArrayVec<Delivered<'t>, TOUCHED>);

impl<'t> Touched<'t> {
    /// Notes that frames were delivered into `queue` of `port`.
    #[inline(always)]
    pub(super) fn note(&mut self, port: &'t Egress, queue: &'t EgressQueue, published: Published) {
        let again = published == Published::Again;
        let mut known = self.0.iter_mut();
        match known.find(|known| std::ptr::eq(known.queue, queue)) {
            Some(known) => known.again = again,
            // Room was made before the delivery (`Delivery::make_room`).
            None => {
                let _ = self.0.try_push(Delivered { port, queue, again });
            }
        }
    }

    /// Tries again to publish where that is left over. Returns whether anything is left still.
    fn publish(&mut self) -> bool {
        self.0.iter_mut().fold(false, |left, known| {
            known.again = known.again && known.queue.queue.publish() == Published::Again;
            left || known.again
        })
    }
}

/// The delivering half of a pass.
#[derive(Debug)]
pub(super) struct Delivery<'t, 'p> {
    pub(super) context: Context<'t>,
    pub(super) tools: Tools<'p>,
    pub(super) owed: Owed<'t>,
    /// The thread's only claim, not open between deliveries.
    pub(super) claim: Claim<'t>,
    pub(super) touched: Touched<'t>,
    /// Transmit queues with chains completed since calls were last made, by number.
    completed: ArrayVec<u16, COMPLETED>,
    /// Frames kept for the retry at the end of the pass.
    held: Burst<'t>,
    /// Slot of the egress port of each held frame.
    held_for: ArrayVec<u16, BURST_FRAMES>,
    /// The thread's ends of the way to ports whose memory is slow; `None` without such ports.
    pub(super) detour: Option<Detoured<'t>>,
    copies: u32,
    /// Whether the pass has made [`PASS_COPIES`].
    spent: bool,
}

impl<'t, 'p> Delivery<'t, 'p> {
    pub(super) fn new(topology: &'t Topology, thread: usize, tools: Tools<'p>) -> Self {
        let plan = &topology.plans[thread];
        let faults = Faults::now();
        let faulted = plan.queues.iter().any(|queue| queue.memory.faulted());
        let is_slow = tools.watch.is_slow();
        Delivery {
            context: Context {
                topology,
                plan,
                thread,
                faults: if faulted { faults.outdated() } else { faults },
                recorder: Recorder::new(topology, thread, tools.clock),
            },
            tools,
            owed: Owed::default(),
            claim: Claim::new(),
            touched: Touched::default(),
            completed: ArrayVec::new(),
            held: Burst::new(),
            held_for: ArrayVec::new(),
            detour: Detoured::new(topology, thread, is_slow),
            copies: 0,
            spent: false,
        }
    }

    /// Delivers the burst, port by port and in order. `egress` has the slot of each frame.
    #[inline(always)]
    pub(super) fn dispatch(
        &mut self,
        burst: &Burst<'t>,
        egress: &[u16; BURST_FRAMES],
        flooding: bool,
    ) {
        let all = Mask::MAX >> (BURST_FRAMES - burst.frames().len());
        let mut left = all & !matching(egress, NOWHERE);
        if flooding {
            left = self.flood(burst, egress, left);
        }
        while left != 0 {
            let slot = egress[left.trailing_zeros() as usize];
            let mask = matching(egress, slot);
            left &= !mask;
            self.send(burst, slot, mask);
        }
    }

    /// Delivers flooded frames to every port but their own, together with the frames for that port
    /// alone. So a flow whose address was learned within the burst keeps its order. Returns the
    /// frames for ports that are not in the flood list.
    fn flood(&mut self, burst: &Burst<'t>, egress: &[u16; BURST_FRAMES], all: Mask) -> Mask {
        let flood = matching(egress, EVERYWHERE);
        let (mut left, mut homeless) = (all & !flood, flood);
        for slot in &self.context.topology.flood {
            let mut own = 0;
            for (number, frame) in burst.frames().iter().enumerate() {
                let from = self.context.ingress(frame.ingress).reference.slot;
                own |= Mask::from(from == *slot) << number;
            }
            let alone = matching(egress, *slot);
            homeless &= own;
            left &= !alone;
            self.send(burst, *slot, (flood & !own) | alone);
        }
        while homeless != 0 {
            let frame = &burst.frames()[homeless.trailing_zeros() as usize];
            let lost = Lost::Read(burst, frame);
            let reason = DropReason::NoDestination;
            self.context.drop_taken(frame.ingress, reason, lost);
            homeless &= homeless - 1;
        }
        left
    }

    /// Delivers the frames `mask` to one port, or holds them for the retry.
    #[inline(always)]
    fn send(&mut self, burst: &Burst<'t>, slot: u16, mask: Mask) {
        let Some(port) = self.context.topology.port(slot).filter(|_| mask != 0) else {
            return;
        };
        if self.tools.watch.is_alarmed() {
            return self.send_watched(burst, port, mask);
        }
        match &*port.queues {
            [] => self.send_elsewhere(burst, port, mask),
            [queue] => self.send_to(burst, port, queue, mask),
            _ => self.spread(burst, port, mask),
        }
    }

    /// Delivers to a port of several receive queues. The hash of its flow chooses each frame's
    /// queue.
    #[inline(never)]
    pub(super) fn spread(&mut self, burst: &Burst<'t>, port: &'t Egress, mask: Mask) {
        for (queue, mask) in steer(port, burst, mask) {
            self.send_to(burst, port, queue, mask);
        }
    }

    /// Delivers the frames `mask` to one receive queue, or holds them for the retry.
    #[inline(always)]
    fn send_to(&mut self, burst: &Burst<'t>, port: &'t Egress, queue: &'t EgressQueue, mask: Mask) {
        let slot = port.reference.slot;
        self.make_room(mask.count_ones());
        let behind = if self.held_for.is_empty() {
            0
        } else {
            self.behind_held(burst, slot, mask)
        };
        let Delivery {
            context,
            claim,
            touched,
            owed,
            ..
        } = self;
        let mut target = Target {
            context,
            claim,
            touched,
            owed,
            burst,
            egress: port,
            queue,
        };
        let mut left = target.deliver(mask & !behind);
        if left.mask | behind != 0 {
            // While the ring is short, a sender beyond its share gets no retry.
            left.hold |= if queue.queue.is_short() { 0 } else { behind };
            left.mask |= behind;
            self.hold(burst, (port, queue.pair), left);
        }
    }

    /// Returns the frames that would overtake a held one: of the same queue, to the same port.
    #[cold]
    fn behind_held(&self, burst: &Burst<'t>, slot: u16, mask: Mask) -> Mask {
        let held = self.held.frames().iter().zip(&self.held_for);
        let same = held.filter(|(_, held_for)| **held_for == slot);
        let behind = |number: &usize| {
            let ingress = burst.frames()[*number].ingress;
            same.clone().any(|(frame, _)| frame.ingress == ingress)
        };
        numbers(mask)
            .filter(behind)
            .fold(0, |mask, number| mask | 1 << number)
    }

    /// Whether something of ours waits to be published, or chains wait to be completed.
    #[inline(always)]
    pub(super) fn is_behind(&self) -> bool {
        !self.touched.0.is_empty() || self.owes()
    }

    /// Whether chains wait. At the end of a pass they wait for other threads' claims.
    #[inline(always)]
    pub(super) fn owes(&self) -> bool {
        self.owed.any()
    }

    /// Whether the pass is to end, because other queues wait for their turn and drivers for calls.
    #[inline(always)]
    pub(super) fn is_spent(&self) -> bool {
        self.spent
    }

    /// Makes room for a delivery of `copies` frames: after many, publishes and calls.
    #[inline(always)]
    pub(super) fn make_room(&mut self, copies: u32) {
        self.copies += copies;
        if self.copies > PASS_COPIES || self.touched.0.is_full() {
            self.spent |= self.copies > PASS_COPIES;
            self.copies = 0;
            while self.touched.publish() {}
            self.notify();
        }
    }

    /// Keeps the frames `left.hold` for the retry, and drops the others and those without room.
    #[cold]
    fn hold(&mut self, burst: &Burst<'t>, (port, pair): (&Egress, u16), left: Left) {
        let mut mask = left.hold;
        while mask != 0 {
            let frame = &burst.frames()[mask.trailing_zeros() as usize];
            if !self.held.adopt(burst, frame) {
                break;
            }
            self.held_for.push(port.reference.slot);
            self.owed.until_retry(frame.ingress, frame.position);
            mask &= mask - 1;
        }
        let dropped = mask | (left.mask & !left.hold);
        let (to, reason) = ((port, Some(pair)), reason_of(left.reason));
        self.context.drop_egress(to, reason, burst, dropped);
    }

    /// Completes the chains of a queue, as far as their frames are published.
    #[inline(always)]
    pub(super) fn complete(&mut self, number: u16) {
        if self.owed.complete(self.context.plan, number) && self.completed.try_push(number).is_err()
        {
            self.notify();
            self.completed.push(number);
        }
    }

    /// Ends a pass: retries, publishes, completes, notifies.
    #[inline(always)]
    pub(super) fn settle(&mut self) {
        (self.copies, self.spent) = (0, false);
        if self.owes() {
            self.settle_owed();
        }
        self.touched.publish();
        self.notify();
    }

    /// Settles until nothing of ours waits, and stops waiting for others. To be called before
    /// sleeping and before acknowledging.
    pub(super) fn settle_wholly(&mut self) {
        self.settle();
        while self.touched.publish() {}
        if self.owes() {
            self.owed.give_up_all();
            self.complete_released();
        }
        self.notify();
    }

    /// Retries, and completes chains that need not wait any longer.
    #[cold]
    fn settle_owed(&mut self) {
        self.retry();
        self.touched.publish();
        self.complete_released();
    }

    /// Completes chains that need not wait any longer, or have waited too long.
    fn complete_released(&mut self) {
        let clock = self.tools.clock;
        let now = clock.raw();
        let is_late = |since| clock.delta_as_nanos(since, now) > self.tools.hold_ns;
        if self.owed.release(now, is_late) {
            self.tools.stats.completed_early.add(1);
        }
        let watched = self.tools.watch.is_alarmed();
        // All queues, because it is not recorded which waits have ended.
        for (number, ingress) in self.context.plan.queues.iter().enumerate() {
            if watched {
                self.tools.watch.begin(ingress.into());
            }
            self.complete(number as u16);
            if watched {
                self.tools.watch.charge(ingress.into(), self.tools.stats);
            }
        }
    }

    /// Makes the pass's one retry for frames that found no buffer. Frames that find none again are
    /// dropped.
    fn retry(&mut self) {
        let slots = std::mem::take(&mut self.held_for);
        self.owed.retried();
        let mut left = if slots.is_empty() {
            0
        } else {
            Mask::MAX >> (BURST_FRAMES - slots.len())
        };
        while left != 0 {
            let slot = slots[left.trailing_zeros() as usize];
            let same = slots.iter().enumerate().filter(|(_, at)| **at == slot);
            let mask = same.fold(0, |mask: Mask, (number, _)| mask | 1 << number);
            left &= !mask;
            let Some(port) = self.context.topology.port(slot) else {
                continue;
            };
            if self.tools.watch.avoids(&port.shared.pages) {
                let (to, reason) = ((port, None), DropReason::EgressMemorySlow);
                self.context.drop_egress(to, reason, &self.held, mask);
                continue;
            }
            for (queue, mask) in steer(port, &self.held, mask) {
                self.retry_in(port, queue, mask);
            }
        }
        self.held.clear();
    }

    /// Makes the retry in one receive queue.
    fn retry_in(&mut self, port: &'t Egress, queue: &'t EgressQueue, mask: Mask) {
        self.make_room(mask.count_ones());
        let Delivery {
            context,
            claim,
            touched,
            owed,
            held,
            ..
        } = self;
        let mut target = Target {
            context,
            claim,
            touched,
            owed,
            burst: held,
            egress: port,
            queue,
        };
        let watched = self.tools.watch.is_alarmed();
        if watched {
            self.tools.watch.begin(port.into());
        }
        let rest = target.deliver(mask);
        if watched {
            let frames = numbers(mask).map(|number| held.frames()[number].ingress);
            let senders = frames.map(|ingress| Payer::from(context.ingress(ingress)));
            let stats = self.tools.stats;
            self.tools.watch.charge_copies(port.into(), senders, stats);
        }
        if rest.mask != 0 {
            queue.queue.retry_failed();
        }
        let (to, reason) = ((port, Some(queue.pair)), reason_of(rest.reason));
        self.context.drop_egress(to, reason, &self.held, rest.mask);
    }

    /// Signals every driver that asked for it: one system call for usual passes, none while drivers
    /// poll.
    #[inline(always)]
    fn notify(&mut self) {
        let mut calls: ArrayVec<&'t CallFd, CALLS> = ArrayVec::new();
        let (watch, stats) = (&mut *self.tools.watch, self.tools.stats);
        let watched = watch.is_alarmed();
        // The wish is taken only if there is a call descriptor, because one may come later.
        for Delivered { port, queue, .. } in &self.touched.0 {
            if watched {
                watch.begin((*port).into());
            }
            if let Some(call) = &queue.call
                && queue.queue.take_call_wanted()
            {
                calls.push(call);
            }
            if watched {
                watch.charge((*port).into(), stats);
            }
        }
        self.touched.0.retain(|known| known.again);
        if !self.completed.is_empty() {
            let barrier = FullBarrier::new();
            for number in std::mem::take(&mut self.completed) {
                let ingress = self.context.ingress(number);
                if watched {
                    self.tools.watch.begin(ingress.into());
                }
                if let Some(call) = &ingress.call
                    && ingress.queue.take_call_wanted(&barrier)
                {
                    if calls.is_full() {
                        signal(&mut self.tools, &calls);
                        calls.clear();
                    }
                    calls.push(call);
                }
                if watched {
                    self.tools.watch.charge(ingress.into(), stats);
                }
            }
        }
        if !calls.is_empty() {
            signal(&mut self.tools, &calls);
        }
    }
}

/// Returns the drop reason of a claim that failed for good.
pub(super) fn reason_of(reason: NoClaim) -> DropReason {
    match reason {
        NoClaim::Full => DropReason::EgressRingFull,
        NoClaim::Contended => DropReason::EgressContended,
        NoClaim::TooLong => DropReason::EgressTooLong,
        NoClaim::Broken => DropReason::EgressRingBroken,
    }
}
