//! The fan-out of events. A publisher never waits for a reader.
//!
//! Each reader has a bounded channel. The last place in the channel is reserved for the notice that
//! the reader was too slow. So the reader learns of the gap: it gets all events up to the notice,
//! then the end of the stream.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::types::{Event, EventKind};

/// Most events that a reader may be behind.
pub const MAX_BEHIND: usize = 1024;

impl Event {
    /// An event of the daemon as a whole.
    pub fn new(time: SystemTime, kind: EventKind, message: impl Into<String>) -> Self {
        let time = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Event {
            time: time.as_secs_f64(),
            kind,
            port: None,
            queue: None,
            message: message.into(),
        }
    }

    /// Returns the event as an event of one port.
    pub fn of_port(self, port: impl Into<String>) -> Self {
        Event {
            port: Some(port.into()),
            ..self
        }
    }

    /// Returns the event as an event of one queue pair.
    pub fn of_queue(self, queue: u16) -> Self {
        Event {
            queue: Some(queue),
            ..self
        }
    }
}

/// Hands each event to every reader.
#[derive(Debug, Default)]
pub struct EventHub {
    readers: Mutex<Vec<Sender<Event>>>,
}

impl EventHub {
    /// Returns a hub without readers.
    pub fn new() -> Self {
        Self::default()
    }

    fn readers(&self) -> MutexGuard<'_, Vec<Sender<Event>>> {
        // A poisoned lock is usable: the list of senders is consistent at every moment.
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the events from now on.
    pub fn subscribe(&self) -> Receiver<Event> {
        let (sender, receiver) = bounded(MAX_BEHIND);
        self.readers().push(sender);
        receiver
    }

    /// Gives `event` to every reader that keeps up, and disconnects the others.
    pub fn publish(&self, event: &Event) {
        self.readers().retain(|reader| {
            if reader.len() + 1 >= MAX_BEHIND {
                let notice = Event {
                    time: event.time,
                    kind: EventKind::TooSlow,
                    port: None,
                    queue: None,
                    message: format!("{MAX_BEHIND} events behind; events from here on are lost"),
                };
                // The send fails only if the reader has left.
                let _ = reader.try_send(notice);
                return false;
            }
            reader.try_send(event.clone()).is_ok()
        });
    }

    /// Tells every reader that the daemon stops, and ends their streams.
    pub fn stop(&self, time: SystemTime) {
        self.publish(&Event::new(time, EventKind::Stopping, "the daemon stops"));
        self.readers().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(n: usize) -> Event {
        Event::new(UNIX_EPOCH, EventKind::PortAdded, n.to_string())
    }

    #[test]
    fn a_slow_reader_is_told_and_cut_off_and_others_go_on() {
        let hub = EventHub::new();
        let (slow, quick) = (hub.subscribe(), hub.subscribe());
        let mut seen = 0;
        for n in 0..2 * MAX_BEHIND {
            hub.publish(&event(n));
            seen += quick.try_iter().count();
        }
        assert_eq!(seen, 2 * MAX_BEHIND);
        let late: Vec<Event> = slow.iter().collect();
        assert_eq!(late.len(), MAX_BEHIND);
        assert_eq!(late[0].message, "0");
        assert_eq!(late[MAX_BEHIND - 1].kind, EventKind::TooSlow);
    }

    #[test]
    fn readers_that_left_are_forgotten() {
        let hub = EventHub::new();
        drop(hub.subscribe());
        hub.publish(&event(0));
        assert!(hub.readers().is_empty());
    }

    #[test]
    fn a_stop_ends_every_stream_with_its_notice() {
        let hub = EventHub::new();
        let reader = hub.subscribe();
        hub.stop(UNIX_EPOCH);
        let kinds: Vec<EventKind> = reader.iter().map(|event| event.kind).collect();
        assert_eq!(kinds, [EventKind::Stopping]);
    }
}
