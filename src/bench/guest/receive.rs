//! Receiving: every frame is checked where it lies, and its buffers are posted again.

use std::sync::atomic::Ordering;

use arrayvec::ArrayVec;

use super::super::frame::{Checker, Words};
use super::super::memory::NET_HDR;
use super::super::tracker::{Run, Tracker};
use super::{BURST, NUM_BUFFERS, Port};
use crate::memory::Window;
use crate::virtio::driver::{Buffer, Used};

/// A receive buffer, looked up once.
#[derive(Debug)]
struct Inbound<'m> {
    /// Header and frame.
    window: Window<'m>,
    frame: Words<'m>,
    address: u64,
}

/// A receive queue.
#[derive(Debug)]
pub struct Receive<'m> {
    pub(super) port: Port<'m>,
    buffers: Vec<Inbound<'m>>,
    mergeable: bool,
    /// Buffers of a frame that has not come in whole yet.
    pieces: Vec<Used>,
    needed: usize,
    windows: Vec<(Window<'m>, usize)>,
}

impl<'m> Receive<'m> {
    pub(super) fn new(port: Port<'m>, mergeable: bool) -> Self {
        let count = port.buffers.count;
        let buffer = |number| Inbound {
            window: port.window(number),
            frame: port.frame(number).atomics(),
            address: port.address(number),
        };
        let mut receive = Receive {
            buffers: (0..count as u32).map(buffer).collect(),
            port,
            mergeable,
            pieces: Vec::with_capacity(count),
            needed: 0,
            windows: Vec::with_capacity(count),
        };
        (0..count as u32).for_each(|number| receive.post(number));
        receive.port.ring.publish();
        receive
    }

    #[inline(always)]
    fn post(&mut self, number: u32) {
        let address = self.buffers[number as usize].address;
        let buffer = Buffer::writable(address, self.port.buffers.capacity as u32);
        self.port.ring.post_one(buffer, number);
    }

    /// Receives and checks what is there, up to a burst; returns how many frames came.
    #[inline(always)]
    pub fn receive(&mut self, checker: &Checker, tracker: &mut Tracker<'_>, now_ns: u64) -> usize {
        let mut burst = ArrayVec::<Used, BURST>::new();
        self.port.ring.reap_burst(&mut burst);
        self.accept(&burst, checker, tracker, now_ns)
    }

    /// Receives from one buffer at most. For callers that must not be busy for a whole burst of
    /// long frames.
    pub fn receive_one(
        &mut self,
        checker: &Checker,
        tracker: &mut Tracker<'_>,
        now_ns: u64,
    ) -> usize {
        let used = self.port.ring.reap();
        self.accept(used.as_slice(), checker, tracker, now_ns)
    }

    #[inline(always)]
    fn accept(
        &mut self,
        burst: &[Used],
        checker: &Checker,
        tracker: &mut Tracker<'_>,
        now_ns: u64,
    ) -> usize {
        if burst.is_empty() {
            return 0;
        }
        for used in burst {
            let window = &self.buffers[used.token as usize].window;
            if self.mergeable {
                window.prefetch(0);
            }
            window.prefetch(NET_HDR);
        }
        let frames = if self.mergeable {
            self.take_mergeable(burst, checker, tracker)
        } else {
            self.take(burst, checker, tracker);
            burst.len()
        };
        self.port.publish();
        tracker.settle();
        tracker.arrived(now_ns);
        frames
    }

    /// Checks frames of one buffer each, and posts the buffers again.
    #[inline(always)]
    fn take(&mut self, burst: &[Used], checker: &Checker, tracker: &mut Tracker<'_>) {
        let capacity = self.port.buffers.capacity as u32;
        let mut posts = ArrayVec::<(Buffer, u32), BURST>::new();
        let mut run = Run::default();
        for used in burst {
            let buffer = &self.buffers[used.token as usize];
            // A length beyond the buffer is not the frames' either.
            let len = (used.len as usize).saturating_sub(NET_HDR);
            tracker.book(&mut run, checker.verify(buffer.frame, len));
            posts.push((Buffer::writable(buffer.address, capacity), used.token));
        }
        tracker.end_run(&mut run);
        self.port.ring.post_burst(&posts);
    }

    /// Checks buffers of frames that may have several buffers. Returns how many frames are complete
    /// now.
    #[inline(always)]
    fn take_mergeable(
        &mut self,
        burst: &[Used],
        checker: &Checker,
        tracker: &mut Tracker<'_>,
    ) -> usize {
        let mut frames = 0;
        let mut rest = burst;
        while let Some(used) = rest.first() {
            let single = |used: &&Used| {
                let header = &self.buffers[used.token as usize].window;
                self.needed_with(header) == 1
            };
            let singles = rest.iter().take_while(single).count();
            if singles > 0 {
                self.take(&rest[..singles], checker, tracker);
                frames += singles;
            } else {
                frames += usize::from(self.collect(*used, checker, tracker));
            }
            rest = &rest[singles.max(1)..];
        }
        frames
    }

    /// Buffers of the frame that the one with this header is part of.
    #[inline(always)]
    fn needed_with(&self, header: &Window<'_>) -> usize {
        if self.needed != 0 {
            return self.needed;
        }
        usize::from(header.load_u16(NUM_BUFFERS, Ordering::Relaxed)).max(1)
    }

    /// Adds a buffer to the frame that is being collected. Returns whether the frame is complete
    /// now.
    fn collect(&mut self, used: Used, checker: &Checker, tracker: &mut Tracker<'_>) -> bool {
        self.needed = self.needed_with(&self.buffers[used.token as usize].window);
        self.pieces.push(used);
        let impossible = self.pieces.len() == self.port.buffers.count;
        if self.pieces.len() < self.needed && !impossible {
            return false;
        }
        self.windows.clear();
        for (i, piece) in self.pieces.iter().enumerate() {
            let skip = if i == 0 { NET_HDR } else { 0 };
            let len = (piece.len as usize).min(self.port.buffers.capacity);
            let len = len.saturating_sub(skip);
            if let Some(part) = self.buffers[piece.token as usize].window.sub(skip, len) {
                self.windows.push((part, len));
            }
        }
        let mut run = Run::default();
        tracker.book(&mut run, checker.verify_pieces(&self.windows));
        tracker.end_run(&mut run);
        self.needed = 0;
        for i in 0..self.pieces.len() {
            self.post(self.pieces[i].token);
        }
        self.pieces.clear();
        true
    }
}
