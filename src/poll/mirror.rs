//! Copies that mirrors have made in one pass are sent to their destinations before the next pass.
//!
//! Copies wait for the next pass because a mirror of a flood must not hold up the frames that it
//! copies. If the thread leaves the topology first, the copies are sent then.
//!
//! A copy takes the usual way into a receive queue, but it has no sender. Nothing is learned from a
//! copy, no chain waits for it, it has no share of a ring that is short, and there is no retry. If
//! there is no room, the mirror has missed a frame; no port has dropped one.

use crate::frame::{put_header_part, receive_header};
use crate::observe::{Feed, Kind, Pen};
use crate::stats::DropReason;
use crate::switch::PortRef;
use crate::topology::{Egress, EgressQueue};
use crate::virtio::Claim;

use super::deliver::BARREN_CLAIMS;
use super::egress::{Delivery, reason_of};

impl<'t> Delivery<'t, '_> {
    /// Delivers what mirrors have copied in the last pass. Returns whether there was anything.
    #[inline(always)]
    pub(super) fn replay(&mut self) -> bool {
        match &self.context.recorder {
            None => false,
            Some(recorder) => {
                let mirrors = recorder.borrow().mirrors();
                mirrors != 0 && self.replay_all(mirrors)
            }
        }
    }

    #[cold]
    fn replay_all(&mut self, mut mirrors: u32) -> bool {
        let mut any = false;
        while mirrors != 0 {
            let number = mirrors.trailing_zeros() as usize;
            mirrors &= mirrors - 1;
            any |= self.replay_one(number);
        }
        any
    }

    fn replay_one(&mut self, number: usize) -> bool {
        let topology = self.context.topology;
        let Some((observers, recorder)) = topology
            .observers
            .as_ref()
            .zip(self.context.recorder.as_ref())
        else {
            return false;
        };
        let observer = &observers.all[number];
        let Kind::Mirror(to) = observer.spec.kind else {
            return false;
        };
        // Out of its place while copies are delivered: captures of the destination write meanwhile.
        let mut pen = recorder.borrow_mut().pen(number).take();
        let mut any = false;
        if let Some(Pen::Mirror(copies)) = pen.as_deref_mut() {
            any = !copies.is_empty();
            let feed = observer.feed(self.context.thread);
            for copy in 0..copies.len() {
                let (bytes, from) = copies.get(copy);
                self.send_copy(bytes, from, to, feed);
            }
            copies.clear();
        }
        if let Some(recorder) = &self.context.recorder {
            *recorder.borrow_mut().pen(number) = pen;
        }
        any
    }

    fn send_copy(&mut self, bytes: &[u8], from: PortRef, to: PortRef, feed: &Feed) {
        let port = self.context.topology.port(to.slot);
        let port = port.filter(|port| port.reference == to);
        let delivered = port.is_some_and(|port| self.put_copy(bytes, port));
        if delivered {
            feed.captured.add(1);
        } else {
            feed.miss(from.slot);
        }
    }

    /// Delivers one copy. Returns `false` if there is no room for it, or if this thread must not
    /// touch its destination's memory.
    fn put_copy(&mut self, bytes: &[u8], port: &'t Egress) -> bool {
        let watched = self.tools.watch.is_alarmed();
        if self.tools.watch.avoids(&port.shared.pages) {
            return false;
        }
        if watched {
            self.tools.watch.begin(port.into());
        }
        let delivered = self.put_to(bytes, port, None);
        if watched {
            self.tools.watch.charge(port.into(), self.tools.stats);
        }
        if let (Ok((_, queue)), Some(recorder)) = (&delivered, &self.context.recorder) {
            recorder.borrow_mut().mirrored(bytes, port, queue.pair);
        }
        delivered.is_ok()
    }

    /// Delivers a frame from private memory. Returns the position that the receive queue must
    /// publish for its driver to see the frame, or the drop reason.
    pub(super) fn put(
        &mut self,
        bytes: &[u8],
        port: &'t Egress,
        queue: &'t EgressQueue,
        sender: Option<u16>,
    ) -> Result<u64, DropReason> {
        self.make_room(1);
        let ring = &*queue.queue;
        if !ring.is_short() {
            return self.put_leaving(bytes, port, queue, 0);
        }
        let put = self.put_leaving(bytes, port, queue, ring.kept());
        match (put, sender) {
            // Within its share of what is kept back, as in `Target::deliver_share`.
            (Err(DropReason::EgressRingFull), Some(slot)) if ring.credit(slot) > 0 => {
                let end = self.put_leaving(bytes, port, queue, 0)?;
                ring.draw(slot, self.claim.span());
                Ok(end)
            }
            (put, _) => put,
        }
    }

    /// Delivers a frame from private memory if `leave` buffers stay free.
    fn put_leaving(
        &mut self,
        bytes: &[u8],
        port: &'t Egress,
        queue: &'t EgressQueue,
        leave: u64,
    ) -> Result<u64, DropReason> {
        let ring = &*queue.queue;
        let counters = port.shared.stats.thread(self.context.thread);
        for _ in 0..BARREN_CLAIMS {
            let claim = &mut self.claim;
            let lengths = std::iter::once(bytes.len() as u32);
            ring.claim_leaving(lengths, leave, claim)
                .map_err(reason_of)?;
            let filled = claim.frames() > 0;
            if filled {
                fill(claim, bytes);
            }
            if claim.bad_buffers() > 0 {
                counters.bad_buffers.add(u64::from(claim.bad_buffers()));
                let unusable = u64::from(claim.unusable_buffers());
                counters.unusable_buffers.add(unusable);
            }
            let end = claim.end();
            self.touched.note(port, queue, ring.commit(claim));
            if !filled {
                continue;
            }
            let memory = port.memory.as_ref();
            if memory.is_some_and(|memory| memory.faulted()) {
                return Err(DropReason::EgressMemoryFault);
            }
            counters.tx_frames.add(1);
            counters.tx_bytes.add(bytes.len() as u64);
            return Ok(end);
        }
        Err(DropReason::EgressRingFull)
    }
}

/// Copies header and frame into the buffers of the claim's only frame.
fn fill(claim: &Claim<'_>, bytes: &[u8]) {
    let header = receive_header(claim.buffers(0));
    let (mut header, mut rest) = (&header[..claim.header()], bytes);
    claim.each_piece(0, |window, room| {
        let filled = put_header_part(&window, &mut header, room);
        let (now, then) = rest.split_at(rest.len().min(room - filled));
        window.write_bytes(filled, now);
        rest = then;
    });
}
