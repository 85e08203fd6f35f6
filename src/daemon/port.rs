//! A registered port as control knows it: socket, session, device.

use std::ffi::OsString;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use super::accept::SecondFrontend;
use super::closer::Unclosed;
use super::handover::Place;
use super::link::Link;
use super::pace::{Messages, Pace};
use super::report::Reports;
use super::slow::Slowness;
use super::socket::Listener;
use super::stations::Stations;
use crate::port::{Device, PortShared, Transmit};
use crate::topology::PortEntry;
use crate::vhost_user::{SessionStatus, Stopper};

/// How control reaches a port's frontend.
#[derive(Debug)]
pub(super) enum Door {
    /// Server mode: Pollux listens.
    Listening(Listener),
    /// Client mode: Pollux connects, next at this moment.
    Connecting(Instant),
}

/// A port's session.
#[derive(Debug)]
pub(super) struct SessionHandle {
    pub(super) link: Arc<Link>,
    pub(super) status: Arc<SessionStatus>,
    pub(super) stopper: Stopper,
    /// A duplicate of the session's socket, to see whether the frontend has hung up.
    pub(super) stream: UnixStream,
    pub(super) since: Instant,
    /// Why control ended the session. The session itself only sees its socket closed.
    pub(super) cut_off: Option<&'static str>,
}

/// The state of a port that control keeps.
#[derive(Debug)]
pub(super) struct PortRecord {
    pub(super) shared: Arc<PortShared>,
    /// The path of its socket in normal form, so that equal paths have equal bytes.
    pub(super) socket: OsString,
    pub(super) door: Door,
    /// Owner of each queue pair's transmit queue, by pair.
    pub(super) placement: Vec<Place>,
    /// Whether an operator has placed its queues.
    pub(super) placed_by_hand: bool,
    /// Set while its guest's memory is slow to touch.
    pub(super) slow: Option<Slowness>,
    /// Queue pairs offered to the next session.
    pub(super) queues: u16,
    pub(super) session: Option<SessionHandle>,
    /// A frontend that waits until the session of an earlier frontend has ended.
    pub(super) waiting: Option<UnixStream>,
    /// When the waiting frontend is refused, if the earlier one has not hung up by then.
    pub(super) doubt_until: Option<Instant>,
    /// Sockets of its frontends that wait to be closed.
    pub(super) unclosed: Unclosed,
    pub(super) device: Option<Arc<Device>>,
    /// Why the last session ended.
    pub(super) last_end: Option<String>,
    /// When to accept again without an event from the socket.
    pub(super) accept_at: Option<Instant>,
    pub(super) accepts: Pace,
    /// Limits the devices of its sessions that are published at once.
    pub(super) posts: Pace,
    /// Counts frontends refused while another one is connected.
    pub(super) second: Option<SecondFrontend>,
    /// Addresses that move to the port or away from it.
    pub(super) stations: Stations,
    /// Limits its lines in the log. Shared with its sessions.
    pub(super) reports: Reports,
    /// Limits the messages of its frontends. Shared with its sessions.
    pub(super) messages: Messages,
    /// What was last reported as broken, so that it is reported once.
    pub(super) reported_state: Option<String>,
}

impl PortRecord {
    /// Returns the part of the port that a topology needs.
    pub(super) fn entry(&self) -> PortEntry {
        PortEntry {
            shared: self.shared.clone(),
            device: self.device.clone(),
        }
    }

    /// Places the queue pairs from `first` on with the other pairs of a slow port. These pairs are
    /// new and nobody has owned them, so no hand-over is needed.
    pub(super) fn stay_slow(&mut self, first: usize) {
        if self.slow.is_some()
            && let Some(place) = self.placement.first().copied()
        {
            self.placement[first..].fill(Place::On(place.thread()));
        }
    }

    /// The running transmit queues, each with the number of its pair.
    pub(super) fn transmit_queues(&self) -> impl Iterator<Item = (u16, &Transmit)> {
        let pairs = self.device.iter().flat_map(|device| &device.pairs);
        let queues = (0_u16..).zip(pairs);
        queues.filter_map(|(pair, queues)| Some((pair, queues.transmit.as_ref()?)))
    }

    /// Whether `link` belongs to the current session.
    pub(super) fn is_session(&self, link: &Arc<Link>) -> bool {
        self.session
            .as_ref()
            .is_some_and(|session| Arc::ptr_eq(&session.link, link))
    }
}
