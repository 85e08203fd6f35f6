//! Operations on ports, on the control thread.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events};
use rustix::process::{Resource, getrlimit};

use super::closer::{Leftover, Unclosed};
use super::control::{Control, LISTENER};
use super::observers::PORT_REMOVED;
use super::pace::{Pace, messages};
use super::port::{Door, PortRecord};
use super::report::reports;
use super::socket::Listener;
use super::stations::Stations;
use super::views;
use crate::api::types::{EventKind, PortPatch, PortView};
use crate::api::{ControlError, What};
use crate::config::{MAX_PORTS, PortSpec, SocketMode, count};
use crate::port::PortShared;
use crate::vhost_user;

/// Frontends accepted on one port: this many at once, then one every `ACCEPT_EVERY`.
const ACCEPTS: u32 = 50;
const ACCEPT_EVERY: Duration = Duration::from_millis(5);
/// Devices of one port that are published as they come: this many at once, then one every
/// `POST_EVERY`. A start of a well-behaved frontend needs some dozens.
const POSTS: u32 = 256;
const POST_EVERY: Duration = Duration::from_millis(5);

/// Descriptors of a port with a frontend, without rings: two of the port, four of the session.
const PORT_DESCRIPTORS: u64 = 6;
/// Descriptors of a queue pair: a kick and a call for each of two rings, twice while they are
/// replaced.
const PAIR_DESCRIPTORS: u64 = 8;

/// Returns a path in normal form, without extra slashes and the like. Two such paths are equal if
/// their bytes are equal.
fn plain(path: &Path) -> OsString {
    path.components().collect::<PathBuf>().into_os_string()
}

impl Control {
    pub(super) fn add_port(
        &mut self,
        spec: PortSpec,
        may_exist: bool,
        ops: &mut EventOps,
    ) -> Result<PortView, ControlError> {
        spec.validate()?;
        let fdb = self.registry.fdb.clone();
        if let Some(record) = self.registry.find(&spec.name) {
            if may_exist && record.shared.spec == spec {
                return Ok(views::port(record, &fdb));
            }
            return Err(ControlError::Conflict {
                text: format!("port {:?} exists already", spec.name),
            });
        }
        let socket = plain(&spec.socket);
        if let Some(other) = self
            .registry
            .ports
            .iter()
            .find(|port| port.socket == socket)
        {
            return Err(ControlError::Conflict {
                text: format!(
                    "{:?} is the socket of port {:?}",
                    spec.socket,
                    other.shared.name()
                ),
            });
        }
        let unknown = |number: &&u32| {
            !self
                .registry
                .polls
                .staying()
                .any(|at| at == **number as usize)
        };
        if let Some(number) = spec.poll.iter().find(unknown) {
            return Err(ControlError::NotFound {
                what: What::PollThread(*number),
            });
        }
        if self.registry.ports.len() >= MAX_PORTS {
            return Err(ControlError::Conflict {
                text: format!("{MAX_PORTS} ports are the most there can be"),
            });
        }
        let door = match spec.mode {
            SocketMode::Server => Door::Listening(Listener::bind(&spec)?),
            SocketMode::Client => Door::Connecting(Instant::now()),
        };
        self.build_port(spec, door, ops)
    }

    fn build_port(
        &mut self,
        spec: PortSpec,
        door: Door,
        ops: &mut EventOps,
    ) -> Result<PortView, ControlError> {
        let reference = self.registry.free_slot();
        let queues = spec.queues;
        let no_descriptor = |error: std::io::Error| ControlError::Internal(error.to_string());
        let shared = PortShared::new(spec, reference).map_err(no_descriptor)?;
        if let Door::Listening(listener) = &door {
            let data = LISTENER + u32::from(reference.slot);
            // Edge-triggered: a frontend that cannot be accepted now must not keep the loop awake.
            let events = Events::with_data(listener, data, EventSet::IN | EventSet::EDGE_TRIGGERED);
            ops.add(events)
                .map_err(|error| ControlError::Internal(error.to_string()))?;
        }
        let now = Instant::now();
        let record = PortRecord {
            socket: plain(&shared.spec.socket),
            shared: shared.clone(),
            door,
            placement: self.registry.place(&shared.spec.poll, None, queues),
            placed_by_hand: false,
            slow: None,
            queues,
            session: None,
            waiting: None,
            doubt_until: None,
            unclosed: Unclosed::default(),
            device: None,
            last_end: None,
            accept_at: None,
            accepts: Pace::new(ACCEPTS, ACCEPT_EVERY, now),
            posts: Pace::new(POSTS, POST_EVERY, now),
            second: None,
            stations: Stations::new(now),
            reports: reports(now),
            messages: messages(now),
            reported_state: None,
        };
        let view = views::port(&record, &self.registry.fdb);
        self.registry.register(record);
        self.look_at_descriptors();
        let text = format!(
            "port added on {:?}, mode {}",
            shared.spec.socket, shared.spec.mode
        );
        self.report.port(&shared, EventKind::PortAdded, text);
        Ok(view)
    }

    /// Warns once if the ports may use more descriptors than the process may open. The warning
    /// comes before a frontend must be refused.
    fn look_at_descriptors(&mut self) {
        let pairs = |record: &PortRecord| u64::from(record.queues) * PAIR_DESCRIPTORS;
        let ports = self.registry.ports.iter();
        let wanted: u64 = ports.map(|port| PORT_DESCRIPTORS + pairs(port)).sum();
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        if wanted > limit && !std::mem::replace(&mut self.short_of_descriptors, true) {
            tracing::warn!(
                "with all queues in use the ports take {wanted} descriptors, and the limit is {limit} (LimitNOFILE=, \
                 ulimit -Hn): frontends beyond it will have to wait"
            );
        }
    }

    pub(super) fn remove_port(
        &mut self,
        name: &str,
        ops: &mut EventOps,
    ) -> Result<Leftover, ControlError> {
        let (record, observers) = self
            .registry
            .unregister(name)
            .ok_or_else(|| ControlError::no_port(name))?;
        if let Door::Listening(listener) = &record.door {
            // Removed from epoll before the descriptor closes. A later event would carry the data
            // of a slot that may belong to another port by then.
            let data = LISTENER + u32::from(record.shared.reference.slot);
            let _ = ops.remove(Events::with_data(listener, data, EventSet::IN));
        }
        if let Some(session) = &record.session {
            session.stopper.stop();
            let text = format!("{}; its frontend is disconnected", vhost_user::Gone);
            self.report
                .port(&record.shared, EventKind::SessionDisconnected, text);
        } else if let Some(records) = self.ring_records(name) {
            // No guest is connected that could continue at the recorded position if the port is
            // added again.
            records.forget_all();
        }
        self.report
            .port(&record.shared, EventKind::PortRemoved, "port removed");
        for observer in &observers {
            self.report_end(observer, PORT_REMOVED);
        }
        Ok(self.sockets(record))
    }

    /// Returns the sockets in which frontends of a removed port may still wait. The socket file is
    /// gone, so no more frontends come.
    pub(super) fn sockets(&self, record: PortRecord) -> Leftover {
        let mut sockets: Vec<OwnedFd> = Vec::new();
        if let Door::Listening(listener) = record.door {
            // Frontends that were not accepted yet would see the hang-up only when the listener is
            // closed, which may take long. So they are accepted here, up to the room of the closer.
            let waiting = listener.end().take(self.closer.room());
            sockets.extend(waiting.map(OwnedFd::from));
            sockets.push(listener.into_socket().into());
        }
        sockets.extend(record.waiting.map(OwnedFd::from));
        (sockets, record.unclosed)
    }

    /// Hangs up on all of these sockets now. The closer closes them later.
    pub(super) fn close_sockets(&self, (sockets, unclosed): Leftover) {
        for socket in sockets {
            self.closer.close(socket, &unclosed);
        }
    }

    pub(super) fn set_port(
        &mut self,
        name: &str,
        patch: &PortPatch,
    ) -> Result<PortView, ControlError> {
        let (report, fdb) = (self.report.clone(), self.registry.fdb.clone());
        let pinned = match self.registry.find(name) {
            None => return Err(ControlError::no_port(name)),
            Some(record) => record.shared.spec.poll.clone(),
        };
        let queues = patch.queues;
        let placed = queues.map(|queues| self.registry.place(&pinned, None, queues));
        let record = self
            .registry
            .find(name)
            .ok_or_else(|| ControlError::no_port(name))?;
        if let Some(queues) = queues {
            let spec = PortSpec {
                queues,
                ..record.shared.spec.clone()
            };
            spec.validate()?;
            record.queues = queues;
            if let Some(placed) = placed {
                // A running session keeps the threads of its existing pairs.
                let keep = record.placement.len().min(placed.len());
                record.placement.extend_from_slice(&placed[keep..]);
                record.stay_slow(keep);
            }
            let pairs = count(queues.into(), "queue pair");
            let text = format!("from the next session on {pairs} on offer");
            report.port(&record.shared, EventKind::PortChanged, text);
        }
        Ok(views::port(record, &fdb))
    }
}
