//! The recorder writes records of frames for the observers of a topology.
//!
//! A pass without observers finds `None` in its context, and does nothing of this. The cost is one
//! test a burst, one a claim and one at each drop. A frame carries nothing for observers. With
//! observers, each step shows its frames here: entered, decided, delivered, dropped. Everything is
//! written into buffers of the thread's own, and nothing here waits.

use std::cell::RefCell;

use arrayvec::ArrayVec;

use crate::config::MAX_OBSERVERS;
use crate::frame::{Burst, Frame};
use crate::memory::Pieces;
use crate::observe::pen::Held;
use crate::observe::trace::Decided;
use crate::observe::{Content, Observers, Pen, Record, What};
use crate::stats::{Direction, DropReason};
use crate::switch::PortRef;
use crate::switch::forward::Decision;
use crate::topology::{Egress, Ingress, Plan, Topology};

use super::deliver::{Mask, numbers};

/// A frame that is dropped at its ingress.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lost<'a, 't> {
    /// The frame was not read. `len` is its length, as far as that was counted.
    Unread { position: u64, len: u32 },
    /// The frame is in this burst.
    Read(&'a Burst<'t>, &'a Frame<'t>),
}

/// A poll thread's pens while it works with one topology.
#[derive(Debug)]
pub(super) struct Recorder<'t> {
    observers: &'t Observers,
    plan: &'t Plan,
    flood: &'t [u16],
    thread: usize,
    /// The pens by number of the observer.
    pens: ArrayVec<Held<'t, Pen>, MAX_OBSERVERS>,
    clock: quanta::Clock,
}

impl<'t> Recorder<'t> {
    /// Takes the thread's pens, if there are observers.
    pub(super) fn new(
        topology: &'t Topology,
        thread: usize,
        clock: &quanta::Clock,
    ) -> Option<RefCell<Recorder<'t>>> {
        let observers = topology.observers.as_ref()?;
        let pens = observers.all.iter();
        Some(RefCell::new(Recorder {
            observers,
            plan: &topology.plans[thread],
            flood: &topology.flood,
            thread,
            pens: pens.map(|observer| observer.feed(thread).take()).collect(),
            clock: clock.clone(),
        }))
    }

    /// Whether an observer traces decisions.
    pub(super) fn traces(&self) -> bool {
        self.observers.traces
    }

    fn ingress(&self, number: u16) -> &'t Ingress {
        &self.plan.queues[usize::from(number)]
    }

    /// Shows the frames of a burst, which have entered the switch.
    #[cold]
    pub(super) fn received(&mut self, burst: &Burst<'_>) {
        let time = self.clock.raw();
        for frame in burst.frames() {
            let ingress = self.ingress(frame.ingress);
            let wanted = self.observers.interest(ingress.reference.slot).rx;
            if wanted != 0 {
                let record = record(time, What::Received, ingress.reference, Some(ingress.pair));
                self.write(wanted, of(record, frame), &[], &content(burst, frame));
            }
        }
    }

    /// Shows what was decided about a frame.
    #[cold]
    pub(super) fn decided(&mut self, burst: &Burst<'t>, frame: &Frame<'t>, decision: &Decision) {
        let ingress = self.ingress(frame.ingress);
        let wanted = self.observers.interest(ingress.reference.slot).trace;
        if wanted == 0 {
            return;
        }
        let time = self.clock.raw();
        let record = record(time, What::Decided, ingress.reference, Some(ingress.pair));
        // A flood goes to all ports that can receive, except the sender's. The slots are in
        // ascending order.
        let own = self.flood.binary_search(&ingress.reference.slot).is_ok();
        let decided = Decided::new(decision, self.flood.len() - usize::from(own));
        let content = content(burst, frame);
        self.write(wanted, of(record, frame), &decided.encode(), &content);
    }

    /// Shows the frames `mask` of a burst, which were copied into a port's receive queue.
    #[cold]
    pub(super) fn delivered(&mut self, burst: &Burst<'_>, to: &Egress, pair: u16, mask: Mask) {
        let time = self.clock.raw();
        let tx = self.observers.interest(to.reference.slot).tx;
        for number in numbers(mask) {
            let frame = &burst.frames()[number];
            let wanted = tx | self.trace_of(frame);
            if wanted != 0 {
                let record = record(time, What::Delivered, to.reference, Some(pair));
                self.write(wanted, of(record, frame), &[], &content(burst, frame));
            }
        }
    }

    /// Shows a frame that was delivered from private memory, to captures of its destination. It is
    /// neither mirrored again nor traced.
    #[cold]
    pub(super) fn mirrored(&mut self, bytes: &[u8], to: &Egress, pair: u16) {
        let wanted = self.observers.interest(to.reference.slot).tx & !self.observers.mirrors;
        let content = Content {
            head: bytes,
            payload: Pieces::NONE,
            len: bytes.len() as u32,
        };
        let time = self.clock.raw();
        let record = record(time, What::Delivered, to.reference, Some(pair));
        self.write(wanted, record, &[], &content);
    }

    /// Shows a frame that was dropped at its ingress.
    #[cold]
    pub(super) fn lost(&mut self, number: u16, reason: DropReason, lost: Lost<'_, '_>) {
        let ingress = self.ingress(number);
        let interest = self.observers.interest(ingress.reference.slot);
        let wanted = interest.rx_drops | interest.trace;
        let time = self.clock.raw();
        let what = What::Dropped(reason);
        let record = record(time, what, ingress.reference, Some(ingress.pair));
        match lost {
            Lost::Read(burst, frame) => {
                self.write(wanted, of(record, frame), &[], &content(burst, frame));
            }
            Lost::Unread { position, len } => {
                let content = Content {
                    head: &[],
                    payload: Pieces::NONE,
                    len,
                };
                let frame = (number, position as u32);
                self.write(wanted, Record { frame, ..record }, &[], &content);
            }
        }
    }

    /// Shows the frames `mask` of a burst, which a port did not get.
    #[cold]
    pub(super) fn refused(
        &mut self,
        burst: &Burst<'_>,
        (to, pair): (PortRef, Option<u16>),
        reason: DropReason,
        mask: Mask,
    ) {
        debug_assert_eq!(reason.direction(), Direction::Tx);
        let time = self.clock.raw();
        let drops = self.observers.interest(to.slot).tx_drops;
        for number in numbers(mask) {
            let frame = &burst.frames()[number];
            let wanted = drops | self.trace_of(frame);
            let record = record(time, What::Dropped(reason), to, pair);
            self.write(wanted, of(record, frame), &[], &content(burst, frame));
        }
    }

    fn trace_of(&self, frame: &Frame<'_>) -> u32 {
        let from = self.ingress(frame.ingress).reference.slot;
        self.observers.interest(from).trace
    }

    /// Writes a frame for each observer of `wanted` whose filter it passes.
    fn write(&mut self, mut wanted: u32, record: Record, extra: &[u8], content: &Content<'_, '_>) {
        while wanted != 0 {
            let number = wanted.trailing_zeros() as usize;
            wanted &= wanted - 1;
            let observer = &self.observers.all[number];
            let feed = observer.feed(self.thread);
            let spec = &observer.spec;
            if !spec.filter.accepts(content.head, content.len) {
                feed.filtered.add(1);
                continue;
            }
            let captured = content.available().min(spec.snaplen as usize) + extra.len();
            let record = Record {
                captured: captured as u32,
                len: content.len,
                ..record
            };
            match &mut self.pens[number].pen {
                Some(pen) => feed.write(pen, &record, extra, content),
                None => feed.miss(record.port.slot),
            }
        }
    }

    /// Returns the numbers of the mirrors, as bits.
    pub(super) fn mirrors(&self) -> u32 {
        self.observers.mirrors
    }

    /// Returns the place of an observer's pen. A pen that is taken out must be put back.
    pub(super) fn pen(&mut self, number: usize) -> &mut Option<Box<Pen>> {
        &mut self.pens[number].pen
    }
}

fn record(time: u64, what: What, port: PortRef, queue: Option<u16>) -> Record {
    Record {
        time,
        len: 0,
        captured: 0,
        port,
        queue,
        what,
        frame: (0, 0),
    }
}

/// Returns `record` with the identity of a frame.
fn of(record: Record, frame: &Frame<'_>) -> Record {
    Record {
        frame: (frame.ingress, frame.position as u32),
        ..record
    }
}

fn content<'a, 't>(burst: &'a Burst<'t>, frame: &'a Frame<'t>) -> Content<'a, 't> {
    Content {
        head: frame.head(),
        payload: burst.payload(frame),
        len: frame.len,
    }
}
