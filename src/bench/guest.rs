//! A guest's network card from inside: its queue pairs, sending and receiving.
//!
//! Buffers are set up once. To send is to stamp the next prefilled buffer with a sequence number and its
//! check word; to receive is to check a buffer and post it again. A burst of used buffers is taken from the
//! ring first and their lines are prefetched together, since each lies in another core's cache: one after the
//! other they would cost several times as much.

mod window;

use std::io;
use std::sync::atomic::Ordering;

use arrayvec::ArrayVec;
use vmm_sys_util::eventfd::EventFd;

use self::window::{Budget, Outgoing};
use super::frame::{self, Checker, MIN_SIZE};
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

    /// Header and frame of a buffer.
    #[inline(always)]
    fn window(&self, index: u32) -> Window<'m> {
        let at = self.buffers.at(index);
        match self.memory.sub(at, self.buffers.capacity) {
            Some(window) => window,
            None => unreachable!("tokens are buffer numbers, and all buffers are in the memory"),
        }
    }

    #[inline(always)]
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

/// A transmit queue.
#[derive(Debug)]
pub struct Transmit<'m> {
    port: Port<'m>,
    flows: Vec<Outgoing>,
    /// Sums of each buffer's constant words, `phases` for each.
    sums: Vec<u64>,
    /// Each buffer's flow: a table, since a division takes longer than all the rest.
    flow_of: Vec<u16>,
    phases: usize,
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
    fn new(port: Port<'m>, plan: &Plan, checker: &Checker, flows: &[(u16, FlowSpec)]) -> Self {
        let count = port.buffers.count;
        let mut sums = Vec::new();
        for index in 0..count {
            let buffer = port.window(index as u32);
            buffer.write_bytes(0, &[0; NET_HDR]);
            let Some((flow, spec)) = flows.get(index % flows.len().max(1)) else {
                continue;
            };
            let route = (spec.source, spec.destination, *flow);
            let salt = (u64::from(*flow) << 16) | index as u64;
            if let Some(frame) = buffer.sub(NET_HDR, plan.size) {
                sums.extend(checker.prefill(&frame, route, salt));
            }
        }
        let outgoing = flows.iter().map(|(flow, _)| Outgoing {
            flow: *flow,
            next: 0,
            written_off: 0,
            blocked: None,
        });
        Transmit {
            flows: outgoing.collect(),
            flow_of: (0..count)
                .map(|i| (i % flows.len().max(1)) as u16)
                .collect(),
            sums,
            phases: checker.phases(),
            frame_len: (NET_HDR + plan.size) as u32,
            free: (0..count.next_power_of_two() as u32).collect(),
            taken: 0,
            returned: count,
            window: plan.window() as u64,
            counts: SendCounts::default(),
            port,
        }
    }

    /// Takes back what has been sent.
    #[inline(always)]
    pub fn reclaim(&mut self) {
        let mask = self.free.len() - 1;
        while let Some(used) = self.port.ring.reap() {
            self.free[self.returned & mask] = used.token;
            self.returned += 1;
        }
    }

    /// Sends up to `limit` frames, as far as buffers are free and, where `windowed`, the flows' windows
    /// allow; returns how many.
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
        let mut sent = 0;
        while sent < limit {
            let slot = self.free[self.taken & mask];
            let at = usize::from(self.flow_of[slot as usize]);
            if windowed && !budget.take(at, self.window, &mut self.flows[at], counters, now_ns) {
                break;
            }
            let flow = &mut self.flows[at];
            let buffer = self.port.window(slot);
            let sums = &self.sums[slot as usize * self.phases..][..self.phases];
            let frame = buffer.sub(NET_HDR, checker.size());
            frame.iter().for_each(|f| checker.stamp(f, sums, flow.next));
            flow.next += 1;
            self.taken += 1;
            sent += 1;
            let readable = Buffer::readable(self.port.address(slot), self.frame_len);
            self.port.ring.post_one(readable, slot);
        }
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

    /// Sends a broadcast from which a switch learns where guest `source` is. Nothing else may be in flight.
    pub fn announce(&mut self, source: usize) {
        // A buffer of its own would be one too many for the ring; the last one is restored afterwards.
        let slot = self.port.buffers.count as u32 - 1;
        let buffer = self.port.window(slot);
        if let Some(frame) = buffer.sub(NET_HDR, MIN_SIZE) {
            frame::announcement(&frame, source);
        }
        let len = (NET_HDR + MIN_SIZE) as u32;
        let address = self.port.address(slot);
        self.port
            .ring
            .post_one(Buffer::readable(address, len), slot);
        self.port.publish();
    }

    /// Puts back the buffer that an announcement used; false while the backend still has it.
    pub fn announced(&mut self, plan: &Plan, checker: &Checker, specs: &[FlowSpec]) -> bool {
        let Some(used) = self.port.ring.reap() else {
            return false;
        };
        if let (Some(flow), Some(frame)) = (
            self.flows
                .get(usize::from(self.flow_of[used.token as usize])),
            self.port.window(used.token).sub(NET_HDR, plan.size),
        ) {
            let spec = specs[usize::from(flow.flow)];
            let route = (spec.source, spec.destination, flow.flow);
            let salt = (u64::from(flow.flow) << 16) | u64::from(used.token);
            checker.prefill(&frame, route, salt);
        }
        true
    }
}

/// A receive queue.
#[derive(Debug)]
pub struct Receive<'m> {
    port: Port<'m>,
    mergeable: bool,
    /// Buffers of a frame that has not come in whole yet.
    pieces: Vec<Used>,
    needed: usize,
    windows: Vec<(Window<'m>, usize)>,
}

impl<'m> Receive<'m> {
    fn new(port: Port<'m>, mergeable: bool) -> Self {
        let count = port.buffers.count;
        let mut receive = Receive {
            port,
            mergeable,
            pieces: Vec::with_capacity(count),
            needed: 0,
            windows: Vec::with_capacity(count),
        };
        (0..count as u32).for_each(|index| receive.post(index));
        receive.port.ring.publish();
        receive
    }

    #[inline(always)]
    fn post(&mut self, index: u32) {
        let capacity = self.port.buffers.capacity as u32;
        let buffer = Buffer::writable(self.port.address(index), capacity);
        self.port.ring.post_one(buffer, index);
    }

    /// Receives and checks what is there, up to a burst; returns how many frames came.
    #[inline(always)]
    pub fn receive(&mut self, checker: &Checker, tracker: &mut Tracker<'_>, now_ns: u64) -> usize {
        let mut burst = ArrayVec::<Used, BURST>::new();
        while !burst.is_full() {
            let Some(used) = self.port.ring.reap() else {
                break;
            };
            let frame = self.port.window(used.token);
            if self.mergeable {
                frame.prefetch(0);
            }
            frame.prefetch(NET_HDR);
            burst.push(used);
        }
        if burst.is_empty() {
            return 0;
        }
        let mut frames = 0;
        for used in &burst {
            if self.mergeable && self.needed_with(used) != 1 {
                frames += usize::from(self.collect(*used, checker, tracker));
                continue;
            }
            let buffer = self.port.window(used.token);
            let len = (used.len as usize).min(buffer.len());
            if let Some(frame) = buffer.sub(NET_HDR, len.saturating_sub(NET_HDR)) {
                tracker.book(checker.verify(&frame, frame.len()));
            }
            frames += 1;
            self.post(used.token);
        }
        self.port.publish();
        tracker.settle();
        tracker.arrived(now_ns);
        frames
    }

    /// Buffers of the frame that `used` is part of.
    #[inline(always)]
    fn needed_with(&self, used: &Used) -> usize {
        if self.needed != 0 {
            return self.needed;
        }
        let header = self.port.window(used.token);
        let mut count = [0; 2];
        header.read_bytes(NUM_BUFFERS, &mut count);
        usize::from(u16::from_le_bytes(count)).max(1)
    }

    /// Adds a buffer to the frame that is being collected; whether it is whole now.
    fn collect(&mut self, used: Used, checker: &Checker, tracker: &mut Tracker<'_>) -> bool {
        self.needed = self.needed_with(&used);
        self.pieces.push(used);
        let impossible = self.pieces.len() == self.port.buffers.count;
        if self.pieces.len() < self.needed && !impossible {
            return false;
        }
        self.windows.clear();
        for (i, piece) in self.pieces.iter().enumerate() {
            let skip = if i == 0 { NET_HDR } else { 0 };
            let buffer = self.port.window(piece.token);
            let len = (piece.len as usize).min(buffer.len()).saturating_sub(skip);
            if let Some(part) = buffer.sub(skip, len) {
                self.windows.push((part, len));
            }
        }
        tracker.book(checker.verify_pieces(&self.windows));
        self.needed = 0;
        for i in 0..self.pieces.len() {
            self.post(self.pieces[i].token);
        }
        self.pieces.clear();
        true
    }
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
            transmit.push(Transmit::new(port, plan, checker, &own));
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
