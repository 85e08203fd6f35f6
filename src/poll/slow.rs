//! Passes of a thread that is alarmed, and of the thread that serves ports whose memory is slow to
//! touch.
//!
//! What they have in common: each transmit queue's frames are a burst of their own, and what it
//! costs to read them is charged to its port (see `watch`).
//!
//! The thread of slow ports may wait as long as these make it wait, but not while others wait for
//! it. So it copies each frame whole into private memory before it claims anything in a healthy
//! receiver's queue (an open claim holds up what everybody delivers there), takes few frames at a
//! time, one queue of each port in a pass, and looks whether its topology is out of date between
//! them. Slow ports among each other share what this thread can do.

use arrayvec::ArrayVec;

use super::egress::{EVERYWHERE, NOWHERE};
use super::pass::Pass;
use super::tap::Lost;
use crate::frame::{BURST_FRAMES, Frame};
use crate::stats::DropReason;
use crate::sys::pages::PageGuard;
use crate::topology::{Egress, Ingress};

/// Frames that the thread of slow ports takes from a queue at once.
const FEW: usize = 8;
/// Ports that it takes from in one pass.
const PORTS: usize = 64;

impl<'t> Pass<'t, '_> {
    /// The same as [`Pass::run`], with every step timed.
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

    /// A pass of the thread of slow ports.
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
            self.bounce(now_s);
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

    /// Takes up to `most` frames of a queue, and touches all of them, at its port's expense.
    /// Returns whether there were any.
    fn read(&mut self, ingress: &'t Ingress, number: u16, most: usize, now_s: u32) -> bool {
        let (pages, stats) = (&ingress.shared.pages, self.delivery.tools.stats);
        self.watch().begin();
        let taken = self.take(ingress, number, most, now_s);
        let mut avoided = self.watch().charge(pages, stats);
        if !taken {
            return false;
        }
        if !self.watch().is_slow() {
            avoided = avoided || self.touch(pages);
        }
        if avoided {
            self.lose((0, 0), DropReason::RxMemorySlow);
        } else {
            self.burst.load_heads();
            self.watch().charge(pages, stats);
        }
        true
    }

    /// Touches what the frames of the burst lie in, page by page: as many as cost no more than
    /// their port's budget. Returns whether they cost more.
    fn touch(&mut self, pages: &PageGuard) -> bool {
        let (burst, stats) = (&self.burst, self.delivery.tools.stats);
        let watch = &mut *self.delivery.tools.watch;
        let mut avoided = false;
        for window in burst
            .frames()
            .iter()
            .flat_map(|frame| burst.payload(frame).iter())
        {
            window.touch_to_read(|| {
                avoided = avoided || watch.charge_so_far(pages, stats);
                !avoided
            });
        }
        avoided || watch.charge(pages, stats)
    }

    /// The chains of the burst's queue go back, as far as they may, at its port's expense.
    fn complete_watched(&mut self, ingress: &Ingress) {
        self.watch().begin();
        for number in self.sources.drain(..) {
            self.delivery.complete(number);
        }
        self.burst.clear();
        let stats = self.delivery.tools.stats;
        self.watch().charge(&ingress.shared.pages, stats);
    }

    /// Decides and delivers the burst frame by frame, each from a private copy.
    fn bounce(&mut self, now_s: u32) {
        if self.burst.frames().is_empty() {
            return;
        }
        let mut egress = [NOWHERE; BURST_FRAMES];
        if self.context().faults.is_outdated() && !self.lose_faulted() {
            return;
        }
        match &self.context().tap {
            None => self.decide::<false>(&mut egress, now_s),
            Some(_) => self.decide_watched(&mut egress, now_s),
        };
        let mut bytes = std::mem::take(&mut self.private);
        for (number, to) in egress
            .into_iter()
            .take(self.burst.frames().len())
            .enumerate()
        {
            if to == NOWHERE {
                continue;
            }
            let frame = self.burst.frames()[number];
            self.watch().begin();
            bytes.clear();
            bytes.extend_from_slice(frame.head());
            for window in self.burst.payload(&frame).iter() {
                let start = bytes.len();
                bytes.resize(start + window.len(), 0);
                window.read_bytes(0, &mut bytes[start..]);
            }
            let ingress = self.context().ingress(frame.ingress);
            let stats = self.delivery.tools.stats;
            self.watch().charge(&ingress.shared.pages, stats);
            if ingress.memory.faulted() {
                let lost = Lost::Read(&self.burst, &frame);
                let reason = DropReason::RxMemoryFault;
                self.context().drop_taken(frame.ingress, reason, lost);
            } else if to == EVERYWHERE {
                self.flood_bounced(&bytes, number, &frame);
            } else if let Some(port) = self.context().topology.port(to) {
                self.put_bounced(&bytes, number, &frame, port);
            }
        }
        self.private = bytes;
    }

    fn flood_bounced(&mut self, bytes: &[u8], number: usize, frame: &Frame<'t>) {
        let topology = self.context().topology;
        let own = self.context().ingress(frame.ingress).reference.slot;
        let mut any = false;
        for slot in topology.flood.iter().filter(|slot| **slot != own) {
            if let Some(port) = topology.port(*slot) {
                any = true;
                self.put_bounced(bytes, number, frame, port);
            }
        }
        if !any {
            let lost = Lost::Read(&self.burst, frame);
            let reason = DropReason::NoDestination;
            self.context().drop_taken(frame.ingress, reason, lost);
        }
    }

    /// Delivers a frame's private copy to one port.
    fn put_bounced(&mut self, bytes: &[u8], number: usize, frame: &Frame<'t>, port: &'t Egress) {
        self.watch().begin();
        let mask = 1 << number;
        match self.delivery.put_to(bytes, port) {
            Ok((end, pair)) => {
                if let Some(tap) = &self.context().tap {
                    tap.borrow_mut().delivered(&self.burst, port, pair, mask);
                }
                let mut queues = port.receive_queues().iter();
                let behind = |queue: &&crate::topology::EgressQueue| {
                    queue.pair == pair && queue.queue.published() < end
                };
                if let Some(queue) = queues.find(behind) {
                    let owed = &mut self.delivery.owed;
                    owed.until_published(frame.ingress, frame.position, &queue.queue, end);
                }
            }
            Err(reason) => {
                let to = (port, None);
                self.context().drop_egress(to, reason, &self.burst, mask);
            }
        }
        let stats = self.delivery.tools.stats;
        self.watch().charge(&port.shared.pages, stats);
    }
}
