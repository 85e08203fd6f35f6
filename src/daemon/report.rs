//! One line in the log and one event on the API for everything that happens.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::pace::Pace;
use crate::api::EventHub;
use crate::api::types::{Event, EventKind};
use crate::config::count;
use crate::port::PortShared;
use crate::vhost_user::SessionEvent;

/// Lines about one port that may come at once, whatever its frontends do, and how often then. A
/// start of 256 rings says everything.
const LINES: u32 = 700;
const LINE_EVERY: Duration = Duration::from_millis(250);

/// How much may still be said of a port.
pub(super) type Reports = Arc<Mutex<Pace>>;

/// For a new port.
pub(super) fn reports(now: Instant) -> Reports {
    Arc::new(Mutex::new(Pace::new(LINES, LINE_EVERY, now)))
}

/// Whether everything of this kind is a warning.
fn warns(kind: EventKind) -> bool {
    matches!(
        kind,
        EventKind::RingBroken | EventKind::SessionRefused | EventKind::MemorySlow
    )
}

/// Where events go.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) hub: EventHub,
}

impl Report {
    /// Something that happened to a port.
    pub(super) fn port(&self, port: &PortShared, kind: EventKind, message: impl Into<String>) {
        self.port_as(port, (kind, warns(kind)), message.into());
    }

    /// The same; whether it is a warning.
    fn port_as(&self, port: &PortShared, (kind, warns): (EventKind, bool), message: String) {
        if warns {
            tracing::warn!(port = port.name(), "{message}");
        } else {
            tracing::info!(port = port.name(), "{message}");
        }
        let event = Event::new(SystemTime::now(), kind, message).of_port(port.name());
        self.hub.publish(&event);
    }

    /// Something that a frontend can make happen as often as it likes.
    pub(super) fn paced(
        &self,
        port: &PortShared,
        reports: &Reports,
        kind: EventKind,
        message: impl Into<String>,
    ) {
        self.paced_as(port, reports, (kind, warns(kind)), message.into());
    }

    fn paced_as(
        &self,
        port: &PortShared,
        reports: &Reports,
        (kind, warns): (EventKind, bool),
        message: String,
    ) {
        // Plain values, whole at every moment.
        let mut pace = reports.lock().unwrap_or_else(PoisonError::into_inner);
        if !pace.admits(Instant::now()) {
            return;
        }
        let missing = pace.take_refused();
        drop(pace);
        if missing > 0 {
            let text = format!("{} not shown", count(missing, "more event"));
            self.port(port, EventKind::PortChanged, text);
        }
        self.port_as(port, (kind, warns), message);
    }

    /// Something that happened to the daemon.
    pub(super) fn daemon(&self, kind: EventKind, message: impl Into<String>) {
        let message = message.into();
        tracing::info!("{message}");
        self.hub
            .publish(&Event::new(SystemTime::now(), kind, message));
    }

    /// A poll thread that does not take over in time, or does so again.
    pub(super) fn poll_thread(&self, message: String) {
        tracing::warn!("{message}");
        let event = Event::new(SystemTime::now(), EventKind::PollThread, message);
        self.hub.publish(&event);
    }

    /// A poll thread that begins or ends, or what they do by themselves.
    pub(super) fn polling(&self, message: String) {
        self.daemon(EventKind::PollThread, message);
    }

    /// Queues of a port that go to another poll thread, and why.
    pub(super) fn moved(&self, port: &PortShared, pair: Option<u16>, to: usize, why: &str) {
        let which = pair.map_or("all transmit queues go".to_string(), |pair| {
            format!("transmit queue {pair} goes")
        });
        let message = format!("{which} to poll-{to}: {why}");
        tracing::info!(port = port.name(), "{message}");
        let event = Event::new(SystemTime::now(), EventKind::QueueMoved, message);
        let event = event.of_port(port.name());
        self.hub.publish(&match pair {
            Some(pair) => event.of_queue(pair),
            None => event,
        });
    }

    /// Something that a session tells.
    pub(super) fn session(&self, port: &PortShared, reports: &Reports, event: &SessionEvent) {
        let kind = match event {
            SessionEvent::RingStarted { .. } => EventKind::RingStarted,
            SessionEvent::RingStopped { .. } => EventKind::RingStopped,
            SessionEvent::RingBroken { .. } => EventKind::RingBroken,
            SessionEvent::Memory { .. }
            | SessionEvent::MemoryUnusable(_)
            | SessionEvent::MemoryLost => EventKind::MemoryChanged,
            _ => EventKind::PortChanged,
        };
        self.paced_as(port, reports, (kind, event.is_warning()), event.to_string());
    }
}
