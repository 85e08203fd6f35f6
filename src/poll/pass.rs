//! One topology's passes: take, decide, deliver, complete, notify.
//!
//! A [`Pass`] lives as long as its thread borrows one topology. Nothing of it survives:
//! [`Pass::settle`] makes retries, publishes, completes and notifies. So at an acknowledgement no
//! claim is open and no chain is owed.
//!
//! Taking reads the available index once a queue and burst, with one acquire load. Each descriptor
//! is read once into a local copy and checked against the memory map. A malformed chain goes back
//! with length 0 in its turn and is counted. An impossible ring is not read again until its next
//! start.
//!
//! A queue gives at most a burst's worth of frames, or [`QUEUE_BYTES`], a pass; then the thread's
//! other queues have their turn. The next pass starts one queue further on.

use arrayvec::ArrayVec;

use crate::frame::{BURST_BYTES, BURST_FRAMES, Burst, Origin};
use crate::stats::DropReason;
use crate::switch::forward::{Found, FrameHead, Verdict, decide};
use crate::topology::{Ingress, Topology};
use crate::virtio::Taken;
use crate::virtio::chain::ChainError;
use crate::wire::EthernetFrame;

use super::context::Context;
use super::egress::{Delivery, EVERYWHERE, NOWHERE, Tools};
use super::recorder::Lost;
use super::watch::Watch;

/// A queue with at least so many frames gets a burst of its own, whose reading is timed: see
/// `watch`.
const MANY: usize = 32;
/// Bytes after which no more is taken from a queue in one pass: about 10 µs of copying.
const QUEUE_BYTES: u32 = 64 * 1024;

/// How many queues ahead a queue's available index is prefetched.
const AVAILABLE_AHEAD: usize = 6;
/// How many queues ahead a queue's next chain is prefetched. The index has arrived by then.
const NEXT_AHEAD: usize = 3;

/// The state of a thread's work with one topology.
#[derive(Debug)]
pub(super) struct Pass<'t, 'p> {
    pub(super) burst: Burst<'t>,
    /// Numbers of the queues that the burst's frames are from.
    pub(super) sources: ArrayVec<u16, BURST_FRAMES>,
    pub(super) delivery: Delivery<'t, 'p>,
    /// Number of the queue at which the next pass starts.
    pub(super) first: usize,
}

impl<'t, 'p> Pass<'t, 'p> {
    pub(super) fn new(topology: &'t Topology, thread: usize, tools: Tools<'p>) -> Self {
        Pass {
            burst: Burst::new(),
            sources: ArrayVec::new(),
            delivery: Delivery::new(topology, thread, tools),
            first: 0,
        }
    }

    pub(super) fn watch(&mut self) -> &mut Watch {
        self.delivery.tools.watch
    }

    pub(super) fn context(&self) -> &Context<'t> {
        &self.delivery.context
    }

    /// Runs one turn over all queues of the plan. Returns whether there was work. Stops early when
    /// `current` returns `false`: the topology is out of date.
    #[inline(always)]
    pub(super) fn run(&mut self, now_s: u32, current: impl Fn() -> bool) -> bool {
        let queues = &self.context().plan.queues;
        let count = queues.len();
        let mut worked = self.delivery.replay();
        for turn in 0..count {
            let at = self.first + turn;
            let number = if at < count { at } else { at - count };
            self.ask_ahead(turn);
            worked |= self.take(&queues[number], number as u16, BURST_FRAMES, now_s);
            if !self.burst.has_room() {
                self.forward(now_s);
                if !current() || self.delivery.is_spent() {
                    // The increment below makes the next pass begin behind this queue.
                    self.first = number;
                    break;
                }
            }
        }
        if worked {
            self.forward(now_s);
            self.first = if self.first + 1 < count {
                self.first + 1
            } else {
                0
            };
            self.delivery.settle();
        } else if self.delivery.is_behind() {
            // Claims could not be published yet, or chains wait for others' claims. Without new
            // frames, only this call looks at them.
            self.delivery.settle();
        }
        worked
    }

    /// Prefetches lines of the queues that come soon. Each line is in the cache of a guest's core,
    /// about 100 ns away. Waiting for one line after the other would be most of the cost of many
    /// queues with a frame each.
    #[inline(always)]
    fn ask_ahead(&self, turn: usize) {
        let queues = &self.context().plan.queues;
        let count = queues.len();
        let ahead = |by: usize| {
            let at = self.first + turn + by;
            &queues[if at < count { at } else { at - count }].queue
        };
        if turn + AVAILABLE_AHEAD < count {
            ahead(AVAILABLE_AHEAD).prefetch_available();
        }
        if turn + NEXT_AHEAD < count {
            ahead(NEXT_AHEAD).prefetch_next();
        }
    }

    /// Takes what one queue has into the burst, until the burst has `most` frames or the queue's
    /// bytes are enough. Returns whether any chain was taken.
    #[inline(always)]
    pub(super) fn take(
        &mut self,
        ingress: &'t Ingress,
        number: u16,
        most: usize,
        now_s: u32,
    ) -> bool {
        let queue = &*ingress.queue;
        let (start, end) = (queue.position(), queue.available_to());
        // The session of a sender whose memory has faulted is about to end.
        if start == end || self.context().faulted(ingress) {
            return false;
        }
        if !self.sources.is_empty() && queue.surely_holds(MANY as u64, end) {
            self.forward_others(now_s);
        }
        let (count, mark, before) = (
            self.burst.frames().len(),
            self.burst.mark(),
            self.burst.bytes(),
        );
        let enough = BURST_BYTES.min(before + QUEUE_BYTES);
        let mut from = Origin {
            header: queue.header() as u16,
            ingress: number,
            position: start,
        };
        for _ in count..most {
            from.position = queue.position();
            if let Some(buffer) = queue.take_single(end) {
                if let Err(reason) = self.burst.note(buffer, from) {
                    self.refuse(from, reason, buffer.len() as u32);
                }
            } else if from.position >= end || !self.take_chain(ingress, end, from) {
                break;
            }
            if self.burst.bytes() >= enough {
                break;
            }
        }
        if queue.position() == start {
            return false;
        }
        if !ingress.enabled {
            self.lose((count, mark), DropReason::RxDisabledQueue);
        }
        let frames = self.burst.frames().len() - count;
        if frames == 0 {
            // Only dropped chains were taken, and no burst will complete them.
            self.delivery.complete(number);
        } else {
            self.sources.push(number);
            let counters = ingress.shared.stats.thread(self.context().thread);
            counters.rx_frames.add(frames as u64);
            counters
                .rx_bytes
                .add(u64::from(self.burst.bytes() - before));
            if frames >= MANY && count == 0 {
                self.burst.close();
            }
        }
        true
    }

    /// Takes a chain that is not one usable buffer. Returns `false` if nothing more is to be taken:
    /// no chain is available, there is no room, or the sender's memory has gone. Descriptors of
    /// such memory read as zeros, and each further hole would cost a fault.
    #[inline(never)]
    fn take_chain(&mut self, ingress: &'t Ingress, end: u64, from: Origin) -> bool {
        if !self.burst.has_room() {
            return false;
        }
        let mark = self.burst.mark();
        let (reason, len) = match ingress.queue.take(end, self.burst.windows_mut()) {
            Taken::Nothing => return false,
            Taken::Malformed(ChainError::Unusable(_)) => (DropReason::RxMemoryUnusable, 0),
            Taken::Malformed(_) => (DropReason::RxMalformedChain, 0),
            Taken::Chain { len } => match self.burst.note_chain(mark, len, from) {
                Ok(()) => return !self.context().faulted(ingress),
                Err(reason) => (reason, len),
            },
        };
        self.refuse(from, reason, len);
        !self.context().faulted(ingress)
    }

    /// Counts a chain of `len` bytes that becomes no frame, under `reason`.
    #[cold]
    fn refuse(&self, from: Origin, reason: DropReason, len: u32) {
        let len = len.saturating_sub(from.header.into());
        let position = from.position;
        let lost = Lost::Unread { position, len };
        self.context().drop_taken(from.ingress, reason, lost);
    }

    /// Drops the frames of the burst from number `count` on, whose buffers in the arena begin at
    /// `mark`.
    #[cold]
    pub(super) fn lose(&mut self, (count, mark): (usize, usize), reason: DropReason) {
        for frame in &self.burst.frames()[count..] {
            let (position, len) = (frame.position, frame.len);
            let lost = Lost::Unread { position, len };
            self.context().drop_taken(frame.ingress, reason, lost);
        }
        self.burst.cut(count, mark);
    }

    /// Drops the frames of senders whose pages have gone while descriptors and heads were read (a
    /// truncated file, a full file system). Zeros were read in their place. Returns whether other
    /// frames are left.
    #[cold]
    #[inline(never)]
    pub(super) fn lose_faulted(&mut self) -> bool {
        let context = &self.delivery.context;
        self.burst.retain(|frame| {
            let faulted = context.faulted(context.ingress(frame.ingress));
            if faulted {
                let (position, len) = (frame.position, frame.len);
                let lost = Lost::Unread { position, len };
                context.drop_taken(frame.ingress, DropReason::RxMemoryFault, lost);
            }
            !faulted
        });
        !self.burst.frames().is_empty()
    }

    /// Decides and delivers the burst, and completes the chains whose frames are published.
    #[inline(always)]
    fn forward(&mut self, now_s: u32) {
        if self.burst.frames().is_empty() {
            // Resets the count of descriptors, which chains without a frame have used up.
            self.burst.clear();
            return;
        }
        if self.burst.frames().len() >= MANY && self.sources.len() == 1 {
            self.load_timed();
        } else {
            self.burst.load_heads();
        }
        self.forward_loaded(now_s);
        for number in self.sources.drain(..) {
            self.delivery.complete(number);
        }
        self.burst.clear();
    }

    /// Forwards the burst, so that a queue with many frames gets a burst of its own.
    #[inline(never)]
    fn forward_others(&mut self, now_s: u32) {
        self.forward(now_s);
    }

    /// Copies the heads of a burst of one queue, and charges its port for a wait. The first wait
    /// for a page of a thread that is not alarmed is mostly here.
    #[inline(never)]
    fn load_timed(&mut self) {
        let ingress = self.context().ingress(self.sources[0]);
        self.watch().begin_unalarmed();
        self.burst.load_heads();
        let stats = self.delivery.tools.stats;
        if self.watch().charge_wait(ingress.into(), stats) {
            self.lose((0, 0), DropReason::RxMemorySlow);
        }
    }

    /// Decides and delivers the burst, whose heads are loaded.
    #[inline(always)]
    pub(super) fn forward_loaded(&mut self, now_s: u32) {
        if self.burst.frames().is_empty() {
            return;
        }
        if !self.context().faults.is_outdated() || self.lose_faulted() {
            let mut egress = [NOWHERE; BURST_FRAMES];
            let flooding = match &self.context().recorder {
                None => self.decide::<false>(&mut egress, now_s),
                Some(_) => self.decide_watched(&mut egress, now_s),
            };
            self.delivery.dispatch(&self.burst, &egress, flooding);
        }
    }

    /// As [`Pass::decide`], and shows the burst to observers.
    #[cold]
    #[inline(never)]
    pub(super) fn decide_watched(&self, egress: &mut [u16; BURST_FRAMES], now_s: u32) -> bool {
        let Some(recorder) = &self.context().recorder else {
            return false;
        };
        recorder.borrow_mut().received(&self.burst);
        if recorder.borrow().traces() {
            self.decide::<true>(egress, now_s)
        } else {
            self.decide::<false>(egress, now_s)
        }
    }

    /// Fills in each frame's egress slot. Returns whether any frame is to be flooded. `TRACED`: an
    /// observer wants to know why.
    #[inline(always)]
    pub(super) fn decide<const TRACED: bool>(
        &self,
        egress: &mut [u16; BURST_FRAMES],
        now_s: u32,
    ) -> bool {
        let context = self.context();
        let generation = |slot| {
            context
                .topology
                .port(slot)
                .map(|port| port.reference.generation)
        };
        let fdb = &*context.topology.fdb;
        let mut flooding = false;
        // Frames of one flow follow each other, so the decision for the last frame is kept: its
        // addresses and ingress, and its egress.
        let (mut last, mut found) = (None, Found::default());
        for (frame, egress) in self.burst.frames().iter().zip(egress) {
            let key = (frame.addresses(), frame.ingress);
            if let Some((same, known)) = last
                && same == key
                && !TRACED
            {
                *egress = known;
                continue;
            }
            let Some(ethernet) = EthernetFrame::parse(frame.head()) else {
                continue;
            };
            let head = FrameHead {
                dst: ethernet.dst(),
                src: ethernet.src(),
                len: frame.len,
            };
            let reference = context.ingress(frame.ingress).reference;
            let decision = decide(&head, reference, fdb, &mut found, &generation, now_s);
            if TRACED && let Some(recorder) = &context.recorder {
                recorder.borrow_mut().decided(&self.burst, frame, &decision);
            }
            match decision.verdict {
                Verdict::Unicast(slot) => *egress = slot,
                Verdict::Flood => {
                    *egress = EVERYWHERE;
                    flooding = true;
                }
                Verdict::Drop(reason) => {
                    let lost = Lost::Read(&self.burst, frame);
                    context.drop_taken(frame.ingress, reason, lost);
                    // Drops are not kept, because each drop is counted and shown.
                    continue;
                }
            }
            last = Some((key, *egress));
        }
        let stats = self.delivery.tools.stats;
        stats.bursts.add(1);
        stats.frames.add(self.burst.frames().len() as u64);
        flooding
    }

    /// Whether chains wait for other threads' claims after a pass.
    #[inline(always)]
    pub(super) fn owes(&self) -> bool {
        self.delivery.owes()
    }

    /// Settles without taking anything. Returns whether no chain waits any longer.
    pub(super) fn settle_owed(&mut self) -> bool {
        self.delivery.settle();
        !self.owes()
    }

    /// Settles until nothing of ours waits to be published. To be called before sleeping and before
    /// acknowledging.
    pub(super) fn settle(&mut self) {
        // Sends what the last pass has mirrored, because the next topology may have no such mirror.
        self.delivery.replay();
        self.delivery.settle_wholly();
    }

    /// Asks every driver of the plan for kicks. Returns whether the thread may sleep.
    pub(super) fn arm(&mut self) -> bool {
        let mut quiet = true;
        // All queues, even after one had work, because `disarm` undoes all.
        self.each_queue(|ingress, avoided| {
            // A port that is avoided is about to leave this thread. A driver that never kicks
            // (SET_VRING_KICK without a descriptor) must be polled.
            quiet &= !avoided && ingress.queue.arm() && ingress.kick.is_some();
        });
        quiet
    }

    /// Asks every driver of the plan for no more kicks: undoes [`Pass::arm`].
    pub(super) fn disarm(&mut self) {
        self.each_queue(|ingress, avoided| {
            if !avoided {
                ingress.queue.disarm();
            }
        });
    }

    /// Calls `work` with each queue of the plan, and with whether the queue's port is avoided.
    /// Writing to a ring is charged to the ring's port.
    fn each_queue(&mut self, mut work: impl FnMut(&Ingress, bool)) {
        let stats = self.delivery.tools.stats;
        let watched = self.watch().is_alarmed();
        for ingress in &self.context().plan.queues {
            if !watched {
                work(ingress, false);
                continue;
            }
            let avoided = self.watch().avoids(&ingress.shared.pages);
            self.watch().begin(ingress.into());
            work(ingress, avoided);
            self.watch().charge(ingress.into(), stats);
        }
    }
}
