//! One line in the log and one event on the API for everything that happens.

use std::time::SystemTime;

use crate::api::EventHub;
use crate::api::types::{Event, EventKind};
use crate::port::PortShared;
use crate::vhost_user::SessionEvent;

/// Where events go.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) hub: EventHub,
}

impl Report {
    /// Something that happened to a port.
    pub(super) fn port(&self, port: &PortShared, kind: EventKind, message: impl Into<String>) {
        let message = message.into();
        match kind {
            EventKind::RingBroken | EventKind::SessionRefused => {
                tracing::warn!(port = port.name(), "{message}");
            }
            _ => tracing::info!(port = port.name(), "{message}"),
        }
        let event = Event::new(SystemTime::now(), kind, message).of_port(port.name());
        self.hub.publish(&event);
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

    /// Something that a session tells.
    pub(super) fn session(&self, port: &PortShared, event: &SessionEvent) {
        let kind = match event {
            SessionEvent::RingStarted { .. } => EventKind::RingStarted,
            SessionEvent::RingStopped { .. } => EventKind::RingStopped,
            SessionEvent::RingBroken { .. } => EventKind::RingBroken,
            SessionEvent::Memory { .. } | SessionEvent::MemoryLost => EventKind::MemoryChanged,
            _ => EventKind::PortChanged,
        };
        self.port(port, kind, event.to_string());
    }
}
