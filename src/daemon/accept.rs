//! Frontends that connect: accepted at a pace, each served by a thread of its own.

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

/// Frontends accepted on one port in one turn: a storm of connections delays nobody else's commands
/// for long.
const ACCEPTS: u32 = 8;
/// Time after which a frontend that could not be accepted is tried again.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// How long a frontend waits for one that still looks connected. A VMM that starts a program has
/// for a moment two processes with its sockets, and if it ends then and comes again its predecessor
/// has not hung up yet.
const DOUBT: Duration = Duration::from_millis(100);
/// Why one that waited is let go.
const SECOND: &str = "a second frontend was refused: one is connected already";
/// Without another attempt for so long, a second frontend has given up.
const GIVEN_UP: Duration = Duration::from_secs(60);

/// Frontends that were refused beside a connected one, as long as they go on trying.
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
    /// Counts a second frontend that is refused; the first of a row is told of, for a VMM tries ten
    /// times a second.
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

    /// The row has ended; says how long it was.
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
    /// Accepts where it was put off; returns when the next one is due.
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

    /// Frontends that connected to a port's socket.
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
            // It would be refused, and refusing takes long at the moment: it waits outside.
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
                // Its predecessor is gone and being cleaned up, or may be about to: it waits. A
                // newer one takes its place, and one that crowds another out is told of at once: as
                // long as they come, no doubt ends.
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

    /// Refuses the frontends that waited while another one is still connected; returns when the
    /// next one is due.
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
                    // It says so itself, to whoever has called it.
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

    /// A session's thread ends: its memory and rings are let go, the next frontend may come.
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

    /// Once a second: second frontends that have not come again have given up.
    pub(super) fn end_second_frontends(&mut self, now: Instant) {
        for record in &mut self.registry.ports {
            let over = |second: &SecondFrontend| now - second.last >= GIVEN_UP;
            if record.second.as_ref().is_some_and(over) {
                record.end_second(&self.report);
            }
        }
    }

    /// Starts the thread that converses with a frontend.
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
                // The last descriptor of the socket.
                drop(stopper);
                self.closer.close(probe, &record.unclosed);
                let text = format!("a session cannot have {error}");
                self.report.paced(port, &reports, refused, text);
            }
        }
    }
}

/// Starts the thread of a session.
fn spawn(
    stream: UnixStream,
    options: SessionOptions,
    link: Arc<Link>,
    status: Arc<SessionStatus>,
) -> io::Result<JoinHandle<()>> {
    thread::spawn(format!("session-{}", link.port.name()), move || {
        let sink = Arc::new(Sink(link.clone()));
        // However the thread ends: a port whose session is forgotten would take no other frontend.
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

/// Tells control why a session ended, when its thread does.
struct Farewell(Arc<Link>, String);

impl Drop for Farewell {
    fn drop(&mut self) {
        self.0.ended(std::mem::take(&mut self.1));
    }
}
