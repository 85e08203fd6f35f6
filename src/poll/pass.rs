//! One topology's passes: take, decide, deliver, complete, notify.
//!
//! A [`Pass`] lives as long as its thread borrows one topology. Nothing of it survives: [`Pass::settle`] makes retries,
//! publishes, completes and notifies, so that at an acknowledgement no claim is open and no chain is owed.

use crate::frame::{BURST_FRAMES, Burst, Frame};
use crate::stats::DropReason;
use crate::switch::forward::{FrameHead, Verdict, decide};
use crate::topology::{Ingress, Topology};
use crate::virtio::Taken;
use crate::wire::EthernetFrame;

use super::context::Context;
use super::egress::{Delivery, EVERYWHERE, NOWHERE, Tools};
use super::tap::Lost;

/// Frames taken from one queue in one pass; a queue that has more waits for the thread's other queues.
const QUEUE_FRAMES: usize = BURST_FRAMES;
/// Bytes taken from one queue in one pass, if not one frame alone is longer: about 10 µs of copying.
const QUEUE_BYTES: u32 = 64 * 1024;

/// Queues between asking for a queue's available index and looking at it.
const AVAILABLE_AHEAD: usize = 6;
/// Queues between asking for a queue's next chain and taking it: the index has come by then.
const NEXT_AHEAD: usize = 3;

/// Everything that a thread does with one topology.
#[derive(Debug)]
pub(super) struct Pass<'t, 'p> {
    burst: Burst<'t>,
    delivery: Delivery<'t, 'p>,
    /// Where the next pass starts in the plan.
    first: usize,
}

impl<'t, 'p> Pass<'t, 'p> {
    pub(super) fn new(topology: &'t Topology, thread: usize, tools: Tools<'p>) -> Self {
        Pass {
            burst: Burst::new(),
            delivery: Delivery::new(topology, thread, tools),
            first: 0,
        }
    }

    fn context(&self) -> &Context<'t> {
        &self.delivery.context
    }

    /// Makes the one call that every ring start owes its driver.
    pub(super) fn call_started(&mut self) {
        self.delivery.call_started();
    }

    /// One turn over all queues of the plan. Returns whether there was work; stops early when `current` says that the
    /// topology is out of date.
    #[inline(always)]
    pub(super) fn run(&mut self, now_s: u32, current: impl Fn() -> bool) -> bool {
        let queues = &self.context().plan.queues;
        let count = queues.len();
        let mut worked = self.delivery.replay();
        for turn in 0..count {
            let at = self.first + turn;
            let number = if at < count { at } else { at - count };
            self.ask_ahead(turn);
            worked |= self.take(&queues[number], number as u16);
            if !self.burst.has_room() {
                self.forward(now_s);
                if !current() || self.delivery.is_spent() {
                    // The next pass begins behind this queue.
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
            // Claims that could not be made visible yet: nothing else may come that would.
            self.delivery.settle();
        }
        worked
    }

    /// Asks for lines of the queues that come soon. Each line is in the cache of a guest's core, about 100 ns away: waiting
    /// for one after the other is most of what many queues with a frame each would cost.
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

    /// Takes what there is in one queue, into the burst.
    #[inline(always)]
    fn take(&mut self, ingress: &'t Ingress, number: u16) -> bool {
        // Its session is about to be cut off.
        if ingress.memory.faulted() {
            return false;
        }
        let queue = &*ingress.queue;
        let end = queue.available_to();
        let mut taken = 0;
        let enough = self.burst.bytes() + QUEUE_BYTES;
        while taken < QUEUE_FRAMES && self.burst.bytes() < enough && self.burst.has_room() {
            let (mark, position) = (self.burst.mark(), queue.position());
            let found = queue.take(end, self.burst.windows_mut());
            // The pages may have gone while we read them (the file was truncated): zeros came instead.
            let faulted = ingress.memory.faulted();
            let admitted = match found {
                Taken::Nothing => break,
                Taken::Malformed(_) => Err(DropReason::RxMalformedChain),
                Taken::Chain { .. } if faulted => {
                    self.burst.forget(mark);
                    Err(DropReason::RxMemoryFault)
                }
                Taken::Chain { .. } if !ingress.enabled => {
                    self.burst.forget(mark);
                    Err(DropReason::RxDisabledQueue)
                }
                Taken::Chain { len } => {
                    self.burst.note(mark, len, queue.header(), number, position)
                }
            };
            taken += 1;
            if let Err(reason) = admitted {
                let len = match found {
                    Taken::Chain { len } => len.saturating_sub(queue.header() as u32),
                    _ => 0,
                };
                let lost = Lost::Unread { position, len };
                self.context().drop_taken(number, reason, lost);
            }
            if faulted {
                break;
            }
        }
        let last = self.burst.frames().last();
        if taken > 0 && last.is_none_or(|frame| frame.ingress != number) {
            // Nothing but drops: no burst will complete them.
            self.delivery.owed.complete(self.context().plan, number);
        }
        taken > 0
    }

    /// Decides and delivers the burst, and completes what is published.
    #[inline(always)]
    fn forward(&mut self, now_s: u32) {
        if self.burst.frames().is_empty() {
            self.burst.clear();
            return;
        }
        self.burst.load_heads();
        let mut egress = [NOWHERE; BURST_FRAMES];
        let flooding = match &self.context().tap {
            None => self.decide::<false>(&mut egress, now_s),
            Some(_) => self.decide_watched(&mut egress, now_s),
        };
        self.delivery.dispatch(&self.burst, &egress, flooding);
        self.delivery.complete_burst(&self.burst);
        self.burst.clear();
    }

    /// The same with observers.
    #[cold]
    #[inline(never)]
    fn decide_watched(&self, egress: &mut [u16; BURST_FRAMES], now_s: u32) -> bool {
        let Some(tap) = &self.context().tap else {
            return false;
        };
        tap.borrow_mut().received(&self.burst);
        if tap.borrow().traces() {
            self.decide::<true>(egress, now_s)
        } else {
            self.decide::<false>(egress, now_s)
        }
    }

    /// Fills in each frame's egress slot; returns whether any is to be flooded. `TRACED`: somebody wants to know why.
    #[inline(always)]
    fn decide<const TRACED: bool>(&self, egress: &mut [u16; BURST_FRAMES], now_s: u32) -> bool {
        let context = self.context();
        let generation = |slot| {
            context
                .topology
                .port(slot)
                .map(|port| port.reference.generation)
        };
        let fdb = &*context.topology.fdb;
        let (mut flooding, mut counted) = (false, Counted::default());
        // Frames of one flow follow each other: addresses, ingress and verdict of the last frame.
        let mut last = None;
        for (frame, egress) in self.burst.frames().iter().zip(egress) {
            let ingress = context.ingress(frame.ingress);
            counted.add(frame, context);
            let key = (frame.addresses(), frame.ingress);
            let verdict = match last {
                Some((same, verdict)) if same == key && !TRACED => verdict,
                _ => {
                    let Some(ethernet) = EthernetFrame::parse(frame.head()) else {
                        continue;
                    };
                    let head = FrameHead {
                        dst: ethernet.dst(),
                        src: ethernet.src(),
                        len: frame.len,
                    };
                    let decision = decide(&head, ingress.reference, fdb, &generation, now_s);
                    if TRACED && let Some(tap) = &context.tap {
                        tap.borrow_mut().decided(&self.burst, frame, &decision);
                    }
                    decision.verdict
                }
            };
            last = Some((key, verdict));
            match verdict {
                Verdict::Unicast(slot) => *egress = slot,
                Verdict::Flood => {
                    *egress = EVERYWHERE;
                    flooding = true;
                }
                Verdict::Drop(reason) => {
                    let lost = Lost::Read(&self.burst, frame);
                    context.drop_taken(frame.ingress, reason, lost);
                }
            }
        }
        counted.flush(context);
        let stats = self.delivery.tools.stats;
        stats.bursts.add(1);
        stats.frames.add(self.burst.frames().len() as u64);
        flooding
    }

    /// Repeats until nothing of ours waits to be published: before sleeping and before acknowledging.
    pub(super) fn settle(&mut self) {
        // What the last pass has mirrored: its next one may be of a topology without the mirror.
        self.delivery.replay();
        self.delivery.settle_wholly();
    }

    /// Asks every driver of the plan for kicks; says whether the thread may sleep.
    pub(super) fn arm(&self) -> bool {
        let mut quiet = true;
        for ingress in &self.context().plan.queues {
            // All of them, also after one had work: `disarm` undoes all.
            // A driver that never kicks (SET_VRING_KICK without a descriptor) must be polled.
            quiet &= ingress.queue.arm() && ingress.kick.is_some();
        }
        quiet
    }

    /// Takes [`Pass::arm`] back.
    pub(super) fn disarm(&self) {
        for ingress in &self.context().plan.queues {
            ingress.queue.disarm();
        }
    }
}

/// Counts a burst's frames in registers, one store a port and run of frames.
#[derive(Default)]
struct Counted {
    ingress: u16,
    frames: u64,
    bytes: u64,
}

impl Counted {
    #[inline(always)]
    fn add(&mut self, frame: &Frame, context: &Context<'_>) {
        if frame.ingress != self.ingress {
            self.flush(context);
            self.ingress = frame.ingress;
        }
        self.frames += 1;
        self.bytes += u64::from(frame.len);
    }

    #[inline(always)]
    fn flush(&mut self, context: &Context<'_>) {
        if self.frames > 0 {
            let ingress = context.ingress(self.ingress);
            let counters = ingress.shared.stats.thread(context.thread);
            counters.rx_frames.add(self.frames);
            counters.rx_bytes.add(self.bytes);
            (self.frames, self.bytes) = (0, 0);
        }
    }
}
