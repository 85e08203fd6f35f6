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
    /// The same socket, to see whether the frontend has hung up.
    pub(super) stream: UnixStream,
    pub(super) since: Instant,
    /// Why control ended it; the session itself only sees its socket closed.
    pub(super) cut_off: Option<&'static str>,
}

/// Everything control keeps of a port.
#[derive(Debug)]
pub(super) struct PortRecord {
    pub(super) shared: Arc<PortShared>,
    /// The path of its socket, in the one form that equal paths have.
    pub(super) socket: OsString,
    pub(super) door: Door,
    /// Poll thread by queue pair.
    pub(super) placement: Vec<Place>,
    /// The operator has placed its queues.
    pub(super) placed_by_hand: bool,
    /// Its guest's memory is slow to touch.
    pub(super) slow: Option<Slowness>,
    /// Queue pairs that the next session is offered.
    pub(super) queues: u16,
    pub(super) session: Option<SessionHandle>,
    /// A frontend that came while its predecessor is being cleaned up.
    pub(super) waiting: Option<UnixStream>,
    /// When that is refused, if its predecessor has not hung up by then.
    pub(super) doubt_until: Option<Instant>,
    /// Sockets of its frontends that wait to be closed.
    pub(super) unclosed: Unclosed,
    pub(super) device: Option<Arc<Device>>,
    /// Why the last session ended.
    pub(super) last_end: Option<String>,
    /// When to look for more frontends, besides when one comes.
    pub(super) accept_at: Option<Instant>,
    pub(super) accepts: Pace,
    /// Devices of its sessions that are published at once.
    pub(super) posts: Pace,
    /// Frontends that come while another one is connected.
    pub(super) second: Option<SecondFrontend>,
    /// Addresses that move to it and away.
    pub(super) stations: Stations,
    /// Lines in the log, shared with its sessions.
    pub(super) reports: Reports,
    /// Messages of its frontends, shared with its sessions.
    pub(super) messages: Messages,
    /// What was last reported as broken, so that it is reported once.
    pub(super) reported_state: Option<String>,
}

impl PortRecord {
    /// The port as a topology needs it.
    pub(super) fn entry(&self) -> PortEntry {
        PortEntry {
            shared: self.shared.clone(),
            device: self.device.clone(),
        }
    }

    /// The queue pairs from `first` on were placed anew: those of a slow port go where its others
    /// are, or will be. Nobody has owned them yet, so nobody has to let go.
    pub(super) fn stay_slow(&mut self, first: usize) {
        if self.slow.is_some()
            && let Some(place) = self.placement.first().copied()
        {
            self.placement[first..].fill(Place::On(place.thread()));
        }
    }

    /// The transmit queues that run, each with its pair.
    pub(super) fn transmit_queues(&self) -> impl Iterator<Item = (u16, &Transmit)> {
        let pairs = self.device.iter().flat_map(|device| &device.pairs);
        let queues = (0_u16..).zip(pairs);
        queues.filter_map(|(pair, queues)| Some((pair, queues.transmit.as_ref()?)))
    }

    /// Whether `link` is the current session's.
    pub(super) fn is_session(&self, link: &Arc<Link>) -> bool {
        self.session
            .as_ref()
            .is_some_and(|session| Arc::ptr_eq(&session.link, link))
    }
}
