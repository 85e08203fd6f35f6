//! Frames to ports whose memory is slow to touch: see `topology::detour`.

use arrayvec::ArrayVec;
use rtrb::{Consumer, Producer};

use super::deliver::{Mask, numbers};
use super::egress::Delivery;
use super::steer::scale;
use super::watch::Payer;
use crate::frame::{Burst, MAX_FRAME};
use crate::observe::pen::Held;
use crate::observe::{Content, write_whole};
use crate::stats::{DropReason, MAX_POLL_THREADS};
use crate::switch::PortRef;
use crate::sys::pages::Pace;
use crate::topology::detour::{DETOUR_HEAD, Detour, head_of, read_head};
use crate::topology::{Egress, EgressQueue, Topology};
use crate::wire::flow_hash;

/// Most frames of one poll thread that are delivered in one pass. Then the other poll threads have
/// their turn.
const TURN: usize = 32;

/// A thread's ends of the detour, while it works with one topology.
#[derive(Debug)]
pub(super) struct Detoured<'t> {
    detour: &'t Detour,
    writer: Held<'t, Producer<u8>>,
    /// Reading ends by poll thread, in the thread of slow ports; empty in other threads.
    readers: ArrayVec<Held<'t, Consumer<u8>>, MAX_POLL_THREADS>,
    /// Private copy of the frame that is being delivered.
    frame: Vec<u8>,
}

impl<'t> Detoured<'t> {
    pub(super) fn new(topology: &'t Topology, thread: usize, is_slow: bool) -> Option<Self> {
        let detour = topology.detour.as_deref()?;
        let readers = is_slow.then(|| detour.readers());
        Some(Detoured {
            detour,
            writer: detour.writer(thread),
            readers: readers.into_iter().flatten().collect(),
            frame: Vec::new(),
        })
    }

    /// Copies the frames `mask` into this thread's buffer, addressed to a port. Returns the frames
    /// that fitted.
    fn write(&mut self, burst: &Burst<'_>, to: PortRef, mask: Mask, thread: usize) -> Mask {
        let Some(writer) = self.writer.pen.as_deref_mut() else {
            return 0;
        };
        let mut written = 0;
        for number in numbers(mask) {
            let frame = &burst.frames()[number];
            let content = Content {
                head: frame.head(),
                payload: burst.payload(frame),
                len: frame.len,
            };
            let len = DETOUR_HEAD + frame.len as usize;
            if writer.slots() < len {
                continue;
            }
            // Counted before the frame is visible. Otherwise the frame could be taken for one that
            // has arrived. There is room, because only this thread writes.
            self.detour.wrote(thread, to);
            let head = head_of(to, frame.len);
            if write_whole(writer, [&head], &content, frame.len as usize) {
                written |= 1 << number;
            }
        }
        written
    }
}

impl<'t> Delivery<'t, '_> {
    /// Sends frames to a port that has no receive queue for this thread: the port is not ready, or
    /// its memory is slow to touch.
    #[cold]
    #[inline(never)]
    pub(super) fn send_elsewhere(&mut self, burst: &Burst<'t>, port: &'t Egress, mask: Mask) {
        let (to, thread) = ((port, None), self.context.thread);
        if port.slow_queues.is_empty() {
            let reason = DropReason::EgressNotReady;
            return self.context.drop_egress(to, reason, burst, mask);
        }
        // All frames of an alarmed thread's burst are of one queue, so one sender pays.
        let sender = burst.frames()[mask.trailing_zeros() as usize].ingress;
        let sender = Payer::from(self.context.ingress(sender));
        let watched = self.tools.watch.is_alarmed();
        let own = self.detour.as_mut();
        let arrived = |own: &Detoured<'_>| own.detour.has_arrived(thread, port.reference);
        if port.pace == Pace::Returning && own.as_deref().is_some_and(arrived) {
            self.tools.watch.begin(port.into());
            self.spread(burst, port, mask);
            if watched {
                let senders = std::iter::once(sender);
                let stats = self.tools.stats;
                self.tools.watch.charge_copies(port.into(), senders, stats);
            }
            return;
        }
        if watched {
            self.tools.watch.begin(sender);
        }
        let written = own.map_or(0, |own| own.write(burst, port.reference, mask, thread));
        if watched {
            self.tools.watch.charge(sender, self.tools.stats);
        }
        let reason = DropReason::EgressMemorySlow;
        self.context.drop_egress(to, reason, burst, mask & !written);
    }

    /// Delivers what other threads have sent to slow ports: at most [`TURN`] frames of each thread,
    /// as long as `current` returns `true`. Returns whether there were any.
    pub(super) fn arrive(&mut self, current: &impl Fn() -> bool) -> bool {
        let Some(mut own) = self.detour.take() else {
            return false;
        };
        own.frame.reserve_exact(MAX_FRAME as usize);
        let mut any = false;
        for thread in 0..own.readers.len() {
            for _ in 0..TURN {
                if !current() || !self.arrive_one(&mut own, thread) {
                    break;
                }
                any = true;
            }
        }
        self.detour = Some(own);
        any
    }

    fn arrive_one(&mut self, own: &mut Detoured<'t>, thread: usize) -> bool {
        let Some(reader) = &mut own.readers[thread].pen else {
            return false;
        };
        let mut head = [0; DETOUR_HEAD];
        let Ok(chunk) = reader.read_chunk(DETOUR_HEAD) else {
            return false;
        };
        let (first, second) = chunk.as_slices();
        head[..first.len()].copy_from_slice(first);
        head[first.len()..].copy_from_slice(second);
        let (to, len) = read_head(head);
        // The writer may still be writing the rest of the frame.
        let Ok(chunk) = reader.read_chunk(DETOUR_HEAD + len as usize) else {
            return false;
        };
        let (first, second) = chunk.as_slices();
        own.frame.clear();
        own.frame.extend_from_slice(first);
        own.frame.extend_from_slice(second);
        self.put_late(&own.frame[DETOUR_HEAD..], to);
        // After the delivery: a thread that finds its buffer empty may deliver by itself.
        chunk.commit_all();
        own.detour.is_done(thread);
        true
    }

    /// Delivers a frame from a buffer, unless its port has gone meanwhile.
    fn put_late(&mut self, bytes: &[u8], to: PortRef) {
        let port = self.context.topology.port(to.slot);
        let Some(port) = port.filter(|port| port.reference == to) else {
            return;
        };
        self.tools.watch.begin(port.into());
        let counters = port.shared.stats.thread(self.context.thread);
        match self.put_to(bytes, port, None) {
            Ok((_, queue)) => {
                if let Some(recorder) = &self.context.recorder {
                    recorder.borrow_mut().mirrored(bytes, port, queue.pair);
                }
            }
            Err(reason) => counters.dropped(reason, 1),
        }
        self.tools.watch.charge(port.into(), self.tools.stats);
    }

    /// Delivers a frame from private memory into the receive queue of its flow. Returns that queue,
    /// and the position that must be published for the driver to see the frame.
    pub(super) fn put_to(
        &mut self,
        bytes: &[u8],
        port: &'t Egress,
        sender: Option<u16>,
    ) -> Result<(u64, &'t EgressQueue), DropReason> {
        let queues = port.receive_queues();
        let queue = queues.get(scale(flow_hash(bytes), queues.len()));
        let queue = queue.ok_or(DropReason::EgressNotReady)?;
        Ok((self.put(bytes, port, queue, sender)?, queue))
    }
}
