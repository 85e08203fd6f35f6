//! Accepts frontends at a limited rate and starts a session thread for each.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::closer::Unclosed;
use super::control::{Control, RECONNECT};
use super::link::{Link, Sink};
use super::port::{Door, PortRecord, SessionHandle};
use super::report::Report;
use super::socket::{hung_up, is_api_client};
use crate::api::types::{self as api, EventKind};
use crate::port::PortShared;
use crate::sys::thread;
use crate::vhost_user::{self, SessionEnd, SessionOptions, SessionStatus, Stopper};

/// Most frontends accepted on one port in one turn of the control loop. The limit keeps a storm of
/// connections from delaying the commands of others for long.
const ACCEPTS: u32 = 8;
/// Time until the next attempt, after a frontend could not be accepted.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// How long a new frontend waits while an earlier frontend still looks connected. A VMM that starts
/// a program briefly has two processes with its sockets. If the VMM ends at that moment and comes
/// back, the old connection has not hung up yet.
const DOUBT: Duration = Duration::from_millis(100);
/// Reported when a new frontend is refused after that wait.
const SECOND: &str = "a second frontend was refused: one is connected already";
/// A second frontend that makes no attempt for this long has given up.
const GIVEN_UP: Duration = Duration::from_secs(60);

/// Counts the frontends refused while another one is connected, until the attempts stop.
#[derive(Debug)]
pub(super) struct SecondFrontend {
    refused: u64,
    since: Instant,
    last: Instant,
}

impl SecondFrontend {
    pub(super) fn view(&self, now: Instant) -> api::SecondFrontend {
        let seconds = |since| now.saturating_duration_since(since).as_secs_f64();
        api::SecondFrontend {
            refused: self.refused,
            since_seconds: seconds(self.since),
            last_seconds: seconds(self.last),
        }
    }
}

impl PortRecord {
    /// Counts a refused second frontend. Only the first refusal of a series is reported, because a
    /// VMM tries ten times a second.
    fn refuse_second(&mut self, report: &Report, now: Instant) {
        if let Some(second) = &mut self.second {
            second.refused += 1;
            second.last = now;
            return;
        }
        self.second = Some(SecondFrontend {
            refused: 1,
            since: now,
            last: now,
        });
        report.paced(
            &self.shared,
            &self.reports,
            EventKind::SessionRefused,
            SECOND,
        );
    }

    /// Ends the series of refusals, and reports its length if it had more than one.
    fn end_second(&mut self, report: &Report) {
        let Some(second) = self.second.take().filter(|second| second.refused > 1) else {
            return;
        };
        let text = format!(
            "a second frontend was refused {} times in {:.0} s",
            second.refused,
            (second.last - second.since).as_secs_f64()
        );
        report.paced(&self.shared, &self.reports, EventKind::SessionRefused, text);
    }
}

impl Control {
    /// Accepts on the ports whose accept was deferred. Returns when the next deferred accept is
    /// due.
    pub(super) fn accept_due(&mut self, now: Instant) -> Option<Instant> {
        let due = |record: &PortRecord| record.accept_at.is_some_and(|at| at <= now);
        let ports = self.registry.ports.iter().filter(|record| due(record));
        let slots: Vec<u16> = ports.map(|record| record.shared.reference.slot).collect();
        for slot in slots {
            self.accept(slot);
        }
        let ports = self.registry.ports.iter();
        ports.filter_map(|record| record.accept_at).min()
    }

    /// Accepts the frontends that have connected to a port's socket, up to the port's limits.
    pub(super) fn accept(&mut self, slot: u16) {
        let now = Instant::now();
        for turn in 0.. {
            let mut records = self.registry.ports.iter_mut();
            let Some(record) = records.find(|port| port.shared.reference.slot == slot) else {
                return;
            };
            let Door::Listening(listener) = &record.door else {
                return;
            };
            record.accept_at = None;
            if turn == ACCEPTS {
                record.accept_at = Some(now);
                return;
            }
            if !record.accepts.admits(now) {
                record.accept_at = Some(record.accepts.next());
                return;
            }
            // This frontend would have to be refused, and the closer has no room for another socket
            // now. It stays in the socket's backlog.
            if record.session.is_some() && !self.closer.has_room(&record.unclosed) {
                record.accept_at = Some(now + ACCEPT_AGAIN);
                return;
            }
            let stream = match listener.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(error) => {
                    record.accept_at = Some(now + ACCEPT_AGAIN);
                    let text = format!("a frontend waits, it cannot be accepted: {error}");
                    let (kind, reports) = (EventKind::SessionRefused, &record.reports);
                    return self.report.paced(&record.shared, reports, kind, text);
                }
            };
            match &record.session {
                None => {
                    let port = record.shared.clone();
                    self.start_session(&port, stream);
                }
                // The earlier frontend may be gone and its session still be ending, so the new
                // frontend waits. An even newer frontend replaces the one that waits. That refusal
                // is counted here, because each new arrival extends `doubt_until`.
                Some(session) => {
                    record.doubt_until = Some(now + DOUBT);
                    if let Some(crowded_out) = record.waiting.replace(stream) {
                        self.closer.close(crowded_out, &record.unclosed);
                        if !hung_up(&session.stream) {
                            record.refuse_second(&self.report, now);
                        }
                    }
                }
            }
        }
    }

    /// Refuses the frontends that waited while another one stayed connected. Returns when the next
    /// decision is due.
    pub(super) fn refuse_due(&mut self, now: Instant) -> Option<Instant> {
        let mut next: Option<Instant> = None;
        for record in &mut self.registry.ports {
            let Some(until) = record.doubt_until else {
                continue;
            };
            let gone = |session: &SessionHandle| hung_up(&session.stream);
            if record.waiting.is_none() || record.session.as_ref().is_none_or(gone) {
                record.doubt_until = None;
            } else if until <= now {
                record.doubt_until = None;
                if let Some(stream) = record.waiting.take() {
                    let is_frontend = !is_api_client(&stream);
                    self.closer.close(stream, &record.unclosed);
                    // The API client reports the mistake to its own caller, so no event is needed.
                    if !is_frontend {
                        continue;
                    }
                }
                record.refuse_second(&self.report, now);
            } else {
                next = Some(next.map_or(until, |next| next.min(until)));
            }
        }
        next
    }

    /// Handles the end of a session's thread: drops the device, and starts a session for the
    /// frontend that waits, if any.
    pub(super) fn session_ended(&mut self, link: &Arc<Link>, reason: String) {
        let Some(record) = self.registry.find_registration(&link.port) else {
            return;
        };
        if !record.is_session(link) {
            return;
        }
        let cut_off = record.session.take().and_then(|session| session.cut_off);
        let reason = cut_off.map_or(reason, str::to_string);
        record.last_end = Some(reason.clone());
        record.end_second(&self.report);
        let reports = record.reports.clone();
        if record.device.take().is_some() {
            self.registry.touch();
        }
        self.registry.forget(link.port.reference);
        self.report
            .paced(&link.port, &reports, EventKind::SessionDisconnected, reason);
        let Some(record) = self.registry.find_registration(&link.port) else {
            return;
        };
        if let Door::Connecting(at) = &mut record.door {
            *at = Instant::now() + RECONNECT;
        }
        if let Some(stream) = record.waiting.take() {
            let port = record.shared.clone();
            self.start_session(&port, stream);
        }
    }

    /// Once a second: ends the series of refusals of second frontends that have given up.
    pub(super) fn end_second_frontends(&mut self, now: Instant) {
        for record in &mut self.registry.ports {
            let over = |second: &SecondFrontend| now - second.last >= GIVEN_UP;
            if record.second.as_ref().is_some_and(over) {
                record.end_second(&self.report);
            }
        }
    }

    /// Starts the session thread of a frontend. If that fails, closes the stream and reports the
    /// reason.
    pub(super) fn start_session(&mut self, port: &Arc<PortShared>, stream: UnixStream) {
        let acknowledgements = self.registry.acknowledgements.clone();
        let records = self.ring_records(port.name());
        let Some(record) = self.registry.find_registration(port) else {
            return self.closer.close(stream, &Unclosed::default());
        };
        let reports = record.reports.clone();
        let refused = EventKind::SessionRefused;
        let (Ok(stopper), Ok(probe)) = (Stopper::new(&stream), stream.try_clone()) else {
            self.closer.close(stream, &record.unclosed);
            let text = "no descriptor left for a session";
            return self.report.paced(port, &reports, refused, text);
        };
        let link = Link::new(
            port.clone(),
            self.sender.clone(),
            self.wake.clone(),
            acknowledgements,
            (self.report.clone(), reports.clone()),
            record.messages.clone(),
        );
        let status = SessionStatus::new();
        let mut options = SessionOptions::new(record.queues);
        if record.shared.spec.ring_reset {
            options.features |= vhost_user::RING_RESET;
        }
        options.records = records;
        match spawn(stream, options, link.clone(), status.clone()) {
            Ok(thread) => {
                let since = Instant::now();
                record.reported_state = None;
                record.session = Some(SessionHandle {
                    link,
                    status,
                    stopper,
                    stream: probe,
                    since,
                    cut_off: None,
                });
                self.sessions.push(thread);
                let connected = EventKind::SessionConnected;
                self.report
                    .paced(port, &reports, connected, "frontend connected");
            }
            Err(error) => {
                // `probe` must hold the last descriptor of the socket, so that the closer closes
                // it.
                drop(stopper);
                self.closer.close(probe, &record.unclosed);
                let text = format!("a session cannot have {error}");
                self.report.paced(port, &reports, refused, text);
            }
        }
    }
}

/// Starts the thread of a session. The thread runs the vhost-user conversation and then reports its
/// end.
fn spawn(
    stream: UnixStream,
    options: SessionOptions,
    link: Arc<Link>,
    status: Arc<SessionStatus>,
) -> io::Result<JoinHandle<()>> {
    thread::spawn(format!("session-{}", link.port.name()), move || {
        let sink = Arc::new(Sink(link.clone()));
        // Reports the end even after a panic. Without a report the port would never accept another
        // frontend.
        let mut end = Farewell(link, "the session failed; this is a bug".to_string());
        let ended = vhost_user::serve(stream, options, sink, status);
        end.1 = match ended {
            SessionEnd::AskedForQueues { .. } => {
                let name = end.0.port.name();
                format!("{ended}; if it needs more: pollux port set {name} queues=N")
            }
            _ => ended.to_string(),
        };
    })
}

/// Tells control why a session ended. Its drop sends the message, so a panic sends it too.
struct Farewell(Arc<Link>, String);

impl Drop for Farewell {
    fn drop(&mut self) {
        self.0.ended(std::mem::take(&mut self.1));
    }
}
