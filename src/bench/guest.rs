//! A guest's network card from inside: its queue pairs, sending and receiving.
//!
//! Buffers are set up once. To send is to stamp the next prefilled buffer with a sequence number
//! and its check word; to receive is to check a buffer and post it again. A burst of used buffers
//! is taken from the ring first and their lines are prefetched together, since each lies in another
//! core's cache: one after the other they would cost several times as much.

mod receive;
mod window;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use arrayvec::ArrayVec;
use vmm_sys_util::eventfd::EventFd;

pub use self::receive::Receive;
use self::window::{Budget, Outgoing};
use super::frame::{Checker, GUEST_BITS, MIN_SIZE};
use super::memory::{BufferArea, GUEST_BASE, GuestRam, NET_HDR, QueuePlace};
use super::plan::{FlowCounters, FlowSpec, Plan};
use super::tracker::Tracker;
use crate::memory::Window;
use crate::virtio::driver::{Buffer, DriverRing, RingAreas, RingFault, RingLayout, Used};

/// Most frames handled in one go.
pub const BURST: usize = 64;
/// Offset of num_buffers in the virtio-net header.
const NUM_BUFFERS: usize = 10;

/// What sending meets with, besides frames sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendCounts {
    /// Times that a window was refilled after half a second of silence.
    pub refills: u64,
    /// Frames that an open loop could not send in time for want of a free buffer.
    pub held_back: u64,
}

/// A queue's memory and ring.
#[derive(Debug)]
struct Port<'m> {
    ring: DriverRing<'m>,
    memory: Window<'m>,
    buffers: BufferArea,
    kick: &'m EventFd,
}

impl<'m> Port<'m> {
    fn new(
        ram: &'m GuestRam,
        plan: &Plan,
        place: &QueuePlace,
        kick: &'m EventFd,
    ) -> io::Result<Self> {
        let layout = RingLayout::new(plan.ring_size, plan.packed);
        let areas = RingAreas::zeroed(ram.window(place.ring, layout.len)?, &layout)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let mut ring = DriverRing::new(areas, plan.ring_features());
        ring.suppress_calls();
        Ok(Port {
            ring,
            memory: ram.window(0, ram.memory.len())?,
            buffers: place.buffers,
            kick,
        })
    }

    /// Header and frame of a buffer, up to its last line's end.
    fn window(&self, index: u32) -> Window<'m> {
        let at = self.buffers.at(index);
        match self.memory.sub(at, self.buffers.room()) {
            Some(window) => window,
            None => unreachable!("tokens are buffer numbers, and all buffers are in the memory"),
        }
    }

    /// The frame of a buffer, up to its last line's end.
    fn frame(&self, index: u32) -> Window<'m> {
        let window = self.window(index);
        window
            .sub(NET_HDR, window.len() - NET_HDR)
            .unwrap_or(window)
    }

    fn address(&self, index: u32) -> u64 {
        GUEST_BASE + self.buffers.at(index) as u64
    }

    #[inline(always)]
    fn publish(&mut self) {
        self.ring.publish();
        if self.ring.needs_kick() {
            self.signal();
        }
    }

    /// Kicks. A full eventfd (non-blocking) already says all there is to say.
    #[cold]
    fn signal(&self) {
        let _ = self.kick.write(1);
    }
}

/// A transmit buffer, looked up once: what is looked up for each frame is paid for with each frame.
#[derive(Debug)]
struct Outbound<'m> {
    /// Sequence number and check word.
    stamp: &'m [AtomicU64; 2],
    address: u64,
    /// Its flow's place among the queue's.
    flow: usize,
    /// Sums of the words that do not change, one for each phase.
    sums: Box<[u64]>,
}

/// A transmit queue.
#[derive(Debug)]
pub struct Transmit<'m> {
    port: Port<'m>,
    flows: Vec<Outgoing>,
    buffers: Vec<Outbound<'m>>,
    frame_len: u32,
    /// Free buffers, first in first out: `taken` and `returned` only grow.
    free: Vec<u32>,
    taken: usize,
    returned: usize,
    window: u64,
    /// What sending met with.
    pub counts: SendCounts,
}

impl<'m> Transmit<'m> {
    fn new(
        port: Port<'m>,
        plan: &Plan,
        checker: &Checker,
        flows: &[(u16, FlowSpec)],
    ) -> io::Result<Self> {
        let count = port.buffers.count;
        let mut buffers = Vec::new();
        for index in 0..count {
            let (number, at) = (index as u32, index % flows.len().max(1));
            port.window(number).write_bytes(0, &[0; NET_HDR]);
            let frame = port.frame(number);
            let sums = flows
                .get(at)
                .map(|(flow, spec)| prefill(checker, &frame, *flow, spec, number));
            buffers.push(Outbound {
                stamp: Checker::stamp_of(&frame).ok_or(io::ErrorKind::InvalidInput)?,
                address: port.address(number),
                flow: at,
                sums: sums.unwrap_or_default().into(),
            });
        }
        let outgoing = flows.iter().map(|(flow, _)| Outgoing {
            flow: *flow,
            next: 0,
            written_off: 0,
            blocked: None,
        });
        Ok(Transmit {
            flows: outgoing.collect(),
            buffers,
            frame_len: (NET_HDR + plan.size) as u32,
            free: (0..count.next_power_of_two() as u32).collect(),
            taken: 0,
            returned: count,
            window: plan.window() as u64,
            counts: SendCounts::default(),
            port,
        })
    }

    /// Takes back what has been sent.
    #[inline(always)]
    pub fn reclaim(&mut self) {
        let mask = self.free.len() - 1;
        let mut burst = ArrayVec::<Used, BURST>::new();
        loop {
            self.port.ring.reap_burst(&mut burst);
            for used in &burst {
                self.free[self.returned & mask] = used.token;
                self.returned += 1;
            }
            if !burst.is_full() {
                break;
            }
            burst.clear();
        }
    }

    /// Sends up to `limit` frames, as far as buffers are free and, where `windowed`, the flows'
    /// windows allow; returns how many.
    #[inline(always)]
    pub fn send(
        &mut self,
        checker: &Checker,
        counters: &[FlowCounters],
        limit: usize,
        windowed: bool,
        now_ns: u64,
    ) -> usize {
        self.reclaim();
        let limit = limit.min(self.returned - self.taken);
        if limit == 0 || self.flows.is_empty() {
            return 0;
        }
        let mask = self.free.len() - 1;
        let mut budget = Budget::default();
        let mut posts = ArrayVec::<(Buffer, u32), BURST>::new();
        for at in self.taken..self.taken + limit.min(BURST) {
            let number = self.free[at & mask];
            let buffer = &self.buffers[number as usize];
            let flow = &mut self.flows[buffer.flow];
            if windowed && !budget.take(buffer.flow, self.window, flow, counters, now_ns) {
                break;
            }
            checker.stamp(buffer.stamp, &buffer.sums, flow.next);
            flow.next += 1;
            posts.push((Buffer::readable(buffer.address, self.frame_len), number));
        }
        // The ring has a descriptor for each buffer.
        let sent = self.port.ring.post_burst(&posts);
        self.taken += sent;
        if sent != 0 {
            self.port.publish();
        }
        self.counts.refills += u64::from(budget.refilled);
        sent
    }

    /// Counts frames that an open loop gave up; a queue without flows has nothing to send.
    pub fn give_up(&mut self, frames: u64) {
        if !self.flows.is_empty() {
            self.counts.held_back += frames;
        }
    }

    /// Stores how much was sent, once sending has ended.
    pub fn show_sent(&self, counters: &[FlowCounters]) {
        for flow in &self.flows {
            let sent = &counters[usize::from(flow.flow)].sent;
            sent.store(flow.next, Ordering::Release);
        }
    }

    /// Sends a broadcast from which a switch learns where guest `source` is. Nothing else may be in
    /// flight.
    pub fn announce(&mut self, checker: &Checker, source: usize) {
        // A buffer of its own would be one too many for the ring; the last one is restored
        // afterwards.
        let number = self.port.buffers.count as u32 - 1;
        checker.announcement(&self.port.frame(number), source);
        let len = (NET_HDR + MIN_SIZE) as u32;
        let readable = Buffer::readable(self.port.address(number), len);
        self.port.ring.post_one(readable, number);
        self.port.publish();
    }

    /// Puts back the buffer that an announcement used; false while the backend still has it.
    pub fn announced(&mut self, checker: &Checker, specs: &[FlowSpec]) -> bool {
        let Some(used) = self.port.ring.reap() else {
            return false;
        };
        let buffer = &self.buffers[used.token as usize];
        if let Some(flow) = self.flows.get(buffer.flow) {
            let spec = &specs[usize::from(flow.flow)];
            let frame = self.port.frame(used.token);
            prefill(checker, &frame, flow.flow, spec, used.token);
        }
        true
    }
}

fn prefill(
    checker: &Checker,
    frame: &Window<'_>,
    flow: u16,
    spec: &FlowSpec,
    number: u32,
) -> Vec<u64> {
    // A source address for each queue: a switch that spreads flows by their addresses has something
    // to spread.
    let route = (
        spec.source | spec.queue << GUEST_BITS,
        spec.destination,
        flow,
    );
    checker.prefill(frame, route, u64::from(flow) << 16 | u64::from(number))
}

/// A guest: its queue pairs and its book.
#[derive(Debug)]
pub struct Guest<'m> {
    /// Its number.
    pub index: usize,
    /// Receive queues.
    pub receive: Vec<Receive<'m>>,
    /// Transmit queues.
    pub transmit: Vec<Transmit<'m>>,
    /// What it received.
    pub tracker: Tracker<'m>,
}

impl<'m> Guest<'m> {
    /// Builds the rings in `ram`, with all receive buffers posted, before the backend sees them.
    pub fn new(
        index: usize,
        ram: &'m GuestRam,
        kicks: &'m [EventFd],
        plan: &Plan,
        flows: &[FlowSpec],
        counters: &'m [FlowCounters],
        checker: &Checker,
    ) -> io::Result<Self> {
        let mut receive = Vec::new();
        let mut transmit = Vec::new();
        for (queue, kicks) in kicks.chunks_exact(2).enumerate() {
            let port = Port::new(ram, plan, &ram.receive[queue], &kicks[0])?;
            receive.push(Receive::new(port, plan.mergeable));
            let own: Vec<(u16, FlowSpec)> = (0..)
                .zip(flows.iter().copied())
                .filter(|(_, flow)| flow.source == index && flow.queue == queue)
                .collect();
            let port = Port::new(ram, plan, &ram.transmit[queue], &kicks[1])?;
            transmit.push(Transmit::new(port, plan, checker, &own)?);
        }
        Ok(Guest {
            index,
            receive,
            transmit,
            tracker: Tracker::new(index, flows, counters),
        })
    }

    /// What to tell the backend with SET_VRING_BASE for each ring: nothing has been used yet.
    pub fn start_base(plan: &Plan) -> u32 {
        if plan.packed { 0x8000_8000 } else { 0 }
    }

    /// Kicks all rings: many backends start a ring at its first kick.
    pub fn kick_all(&self) {
        self.receive.iter().for_each(|queue| queue.port.signal());
        self.transmit.iter().for_each(|queue| queue.port.signal());
    }

    /// Receives on all queues; returns how many frames came.
    #[inline(always)]
    pub fn receive(&mut self, checker: &Checker, now_ns: u64) -> usize {
        let tracker = &mut self.tracker;
        self.receive
            .iter_mut()
            .map(|queue| queue.receive(checker, tracker, now_ns))
            .sum()
    }

    /// The first thing that a ring found wrong with the device.
    pub fn fault(&self) -> Option<RingFault> {
        let receive = self.receive.iter().map(|queue| &queue.port);
        let transmit = self.transmit.iter().map(|queue| &queue.port);
        receive.chain(transmit).find_map(|port| port.ring.fault())
    }
}
