//! The controlq: which ring it is, and what its driver commands.
//!
//! QEMU, cloud-hypervisor and DPDK answer commands themselves and hand no controlq over. crosvm and
//! libkrun hand it over. With MQ the controlq is the ring after all pairs that the guest knows of,
//! and the frontend never says how many these are. So the controlq is taken to be the last ring
//! that the frontend has set up, if its index is even. (If the index is odd, the last ring is a
//! transmitq.)
//!
//! While a frontend sets up one ring after the other, each receiveq looks like the controlq for a
//! moment. So the controlq starts with its first command. A receive buffer is not a command.

use std::sync::Arc;

use super::DeviceState;
use crate::memory::Window;
use crate::sys::eventfd::KickFd;
use crate::vhost_user::Gone;
use crate::vhost_user::command::{Change, ERR, OK, read};
use crate::vhost_user::event::{RingName, SessionEvent};
use crate::vhost_user::options::{Controlq, controlq, ring_features};
use crate::vhost_user::ring::{Refusal, Running, first_base};
use crate::virtio::ControlQueue;
use crate::virtio::chain::Windows;

/// Most pieces of memory of one command. Linux' longest command has four.
const PIECES: usize = 64;
/// Most bytes of one command that are read: enough for a table of more than a thousand addresses. A
/// longer command fails.
const BYTES: usize = 8192;

impl DeviceState {
    /// Finds out again which ring is the controlq. To be called after each change that may matter.
    pub(super) fn find_controlq(&mut self) {
        self.controlq_changed = true;
        let found = match self.features.and_then(controlq) {
            None => None,
            Some(Controlq::Third) => Some(2),
            Some(Controlq::Last) => {
                let told = |ring: &super::Vring| ring.is_told();
                let last = self.rings.iter().rposition(told);
                last.filter(|at| *at >= 2 && at.is_multiple_of(2))
            }
        };
        if found == self.controlq {
            return;
        }
        if let Some(ring) = self.controlq.and_then(|at| self.rings.get_mut(at)) {
            let name = ring.name;
            // No poll thread uses this ring, so there is nothing to wait for.
            if let Some(running) = ring.running.take() {
                let base = running.base();
                ring.base = Some(base);
                self.event(SessionEvent::RingStopped { ring: name, base });
            }
        }
        for (at, ring) in self.rings.iter_mut().enumerate() {
            ring.name = match found == Some(at) {
                true => RingName::controlq(ring.name.index),
                false => RingName::new(ring.name.index),
            };
        }
        self.controlq = found;
        self.pairs_in_use = None;
    }

    /// Whether the driver wants frames in this receiveq (virtio 1.2 §5.1.6.5.5): only once it has
    /// commanded so many pairs. The command is unknown if the controlq was not handed over, or was
    /// in use before the switch was started. Then every enabled queue gets frames.
    pub(super) fn is_in_use(&self, ring: RingName) -> bool {
        let pairs = self.pairs_in_use.filter(|_| self.controlq.is_some());
        !ring.is_receiveq() || pairs.is_none_or(|pairs| ring.pair() < pairs)
    }

    /// Returns the controlq's kick descriptor, if it has one. The outer `None`: there is no
    /// controlq, or SET_VRING_KICK has not come for it.
    pub(in crate::vhost_user) fn controlq_kick(&self) -> Option<Option<Arc<KickFd>>> {
        let ring = self.rings.get(self.controlq?)?;
        ring.kicked.then(|| ring.kick.clone())
    }

    /// Whether commands may have become readable by a message since the last call.
    pub(in crate::vhost_user) fn take_controlq_changed(&mut self) -> bool {
        std::mem::take(&mut self.controlq_changed)
    }

    /// Answers at most `most` commands. Returns whether there may be more.
    pub(in crate::vhost_user) fn serve_controlq(&mut self, most: usize) -> Result<bool, Gone> {
        let Some(at) = self.controlq.filter(|at| self.rings[*at].kicked) else {
            return Ok(false);
        };
        let was_running = self.rings[at].running.is_some();
        let Some(queue) = self.open_controlq(at) else {
            return Ok(false);
        };
        let mut served = was_running;
        for _ in 0..most {
            let mut windows: Windows<'_, PIECES> = Windows::new();
            let Some(command) = queue.take(&mut windows) else {
                if queue.arm() {
                    return Ok(self.pause_controlq(at, served));
                }
                continue;
            };
            let sure = self.features.and_then(controlq) == Some(Controlq::Third);
            if command.is_room && !sure && !served {
                return Ok(self.pause_controlq(at, served));
            }
            if !std::mem::replace(&mut served, true) {
                self.controlq_started(at, &queue);
            }
            let answered = match command.asked.map(|asked| windows.split_at(asked)) {
                Some((asked, [room, ..])) => {
                    let answer = self.obey(&copied(asked))?;
                    room.write_bytes(0, &[answer]);
                    1
                }
                _ => 0,
            };
            if queue.complete(command, answered) {
                self.rings[at].call.iter().for_each(|call| call.owe());
            }
        }
        Ok(true)
    }

    /// Returns the controlq, and starts it first if it does not run; `None` if it cannot start.
    fn open_controlq(&mut self, at: usize) -> Option<Arc<ControlQueue>> {
        let pairs = self.options.pairs();
        let ring = &mut self.rings[at];
        if ring.running.is_none() {
            let setup = ring.setup(self.features, &self.memory, pairs);
            match setup.and_then(|setup| ring.start(&setup)) {
                Ok(base) => self.controlq_opened(base),
                Err(reason) => {
                    self.refuse(at, reason);
                    return None;
                }
            }
        }
        match &self.rings[at].running {
            Some(Running::Control(queue)) => Some(Arc::clone(queue)),
            _ => None,
        }
    }

    /// The controlq runs from `base` on. A driver that has commanded nothing yet uses the first
    /// pair only.
    fn controlq_opened(&mut self, base: u32) {
        let packed = self.features.is_some_and(|f| ring_features(f).packed);
        let commanded = match self.features.and_then(controlq) {
            Some(Controlq::Last) if base == first_base(packed) => Some(1),
            _ => self.pairs_in_use,
        };
        if self.pairs_in_use != commanded {
            self.pairs_in_use = commanded;
            self.post();
            self.refresh();
        }
    }

    fn controlq_started(&mut self, at: usize, queue: &ControlQueue) {
        let ring = &mut self.rings[at];
        ring.refusal = None;
        let started = SessionEvent::RingStarted {
            ring: ring.name,
            size: queue.size(),
            packed: self.features.is_some_and(|f| ring_features(f).packed),
            base: queue.base(),
        };
        self.event(started);
        self.refresh();
    }

    /// The ring has no more commands. A ring that never had a command may be no controlq, and is
    /// let go.
    fn pause_controlq(&mut self, at: usize, served: bool) -> bool {
        if !served {
            self.rings[at].running = None;
            self.rings[at].refusal = Some(Refusal::NoCommand);
        }
        false
    }

    fn obey(&mut self, command: &[u8]) -> Result<u8, Gone> {
        let pairs = self.controlq.map_or(1, |at| at / 2);
        let pairs = u16::try_from(pairs).unwrap_or(u16::MAX);
        let pairs = pairs.min(self.options.pairs());
        match read(command, self.features.unwrap_or(0), pairs) {
            None => Ok(ERR),
            Some(Change::None) => Ok(OK),
            Some(Change::Pairs(pairs)) => {
                if self.pairs_in_use.replace(pairs) != Some(pairs) {
                    // The answer comes after all poll threads have acknowledged the new number:
                    // from then on no frame goes to a later pair (§5.1.6.5.5.2).
                    self.settle()?;
                    self.refresh();
                }
                Ok(OK)
            }
        }
    }
}

/// Returns a private copy of a command. A command that is too long is cut off, and fails because of
/// its length.
fn copied(pieces: &[Window<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in pieces {
        let (at, room) = (bytes.len(), BYTES - bytes.len());
        bytes.resize(at + piece.len().min(room), 0);
        if let Some(piece) = piece.sub(0, bytes.len() - at) {
            piece.read_bytes(0, &mut bytes[at..]);
        }
    }
    bytes
}
