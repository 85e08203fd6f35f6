//! Writes a log line and publishes an API event for everything that happens.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::pace::Pace;
use crate::api::EventHub;
use crate::api::types::{Event, EventKind};
use crate::config::count;
use crate::port::PortShared;
use crate::vhost_user::SessionEvent;

/// Lines about one port, whatever its frontends do: this many at once, then one every `LINE_EVERY`.
/// The burst is enough for all lines of a start of 256 rings.
const LINES: u32 = 700;
const LINE_EVERY: Duration = Duration::from_millis(250);

/// Limits the lines about one port.
pub(super) type Reports = Arc<Mutex<Pace>>;

/// Returns the limit of a new port.
pub(super) fn reports(now: Instant) -> Reports {
    Arc::new(Mutex::new(Pace::new(LINES, LINE_EVERY, now)))
}

/// Whether events of this kind are logged as warnings.
fn warns(kind: EventKind) -> bool {
    matches!(
        kind,
        EventKind::RingBroken | EventKind::SessionRefused | EventKind::MemorySlow
    )
}

/// The log and the hub of API events.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) hub: EventHub,
}

impl Report {
    /// Reports something that happened to a port.
    pub(super) fn port(&self, port: &PortShared, kind: EventKind, message: impl Into<String>) {
        self.port_as(port, (kind, warns(kind)), message.into());
    }

    /// Reports something that happened to a port, as a warning if `warns`.
    fn port_as(&self, port: &PortShared, (kind, warns): (EventKind, bool), message: String) {
        if warns {
            tracing::warn!(port = port.name(), "{message}");
        } else {
            tracing::info!(port = port.name(), "{message}");
        }
        let event = Event::new(SystemTime::now(), kind, message).of_port(port.name());
        self.hub.publish(&event);
    }

    /// Reports something that a frontend can cause as often as it likes, within the limit of
    /// `reports`.
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
        // A poisoned lock is usable: it holds plain values.
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

    /// Reports something that happened to the daemon.
    pub(super) fn daemon(&self, kind: EventKind, message: impl Into<String>) {
        let message = message.into();
        tracing::info!("{message}");
        self.hub
            .publish(&Event::new(SystemTime::now(), kind, message));
    }

    /// Reports a poll thread whose acknowledgement is overdue, or that has acknowledged after that.
    pub(super) fn poll_thread(&self, message: String) {
        tracing::warn!("{message}");
        let event = Event::new(SystemTime::now(), EventKind::PollThread, message);
        self.hub.publish(&event);
    }

    /// Reports the start or end of a poll thread, or what poll threads do by themselves.
    pub(super) fn polling(&self, message: String) {
        self.daemon(EventKind::PollThread, message);
    }

    /// Reports that queues of a port go to another poll thread, and why.
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

    /// Reports an event of a session, within the limit of `reports`.
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
