//! Observers as control knows them: names, registration, and their end when ports are removed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::control::Control;
use super::registry::Registry;
use crate::api::types::{EventKind, ObserverKind, ObserverStatistics, ObserverView};
use crate::api::{ControlError, What};
use crate::config::MAX_OBSERVERS;
use crate::observe::{Kind, Observer};
use crate::switch::PortRef;

/// Why an observer ends that has no purpose without the removed port.
pub(super) const PORT_REMOVED: &str = "port removed";

/// Number of names of removed ports that are kept, because records may still refer to them.
const GONE: usize = 256;

/// Names of ports by registration, for readers of records.
#[derive(Debug, Default)]
pub(super) struct Names(Mutex<VecDeque<(PortRef, String, bool)>>);

impl Names {
    fn entries(&self) -> std::sync::MutexGuard<'_, VecDeque<(PortRef, String, bool)>> {
        // A poisoned lock is usable: the list is consistent at every moment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, port: PortRef, name: &str) {
        self.entries().push_back((port, name.to_string(), false));
    }

    pub(super) fn remove(&self, port: PortRef) {
        let mut entries = self.entries();
        if let Some(entry) = entries.iter_mut().find(|entry| entry.0 == port) {
            entry.2 = true;
        }
        let gone = entries.iter().filter(|entry| entry.2).count();
        if gone > GONE
            && let Some(oldest) = entries.iter().position(|entry| entry.2)
        {
            entries.remove(oldest);
        }
    }

    /// Returns the name of a registration, or its slot number if the name is not known any more.
    pub(super) fn of(&self, port: PortRef) -> String {
        let entries = self.entries();
        let found = entries.iter().find(|entry| entry.0 == port);
        found.map_or_else(|| format!("slot {}", port.slot), |entry| entry.1.clone())
    }

    /// Returns every registration that exists now.
    pub(super) fn present(&self) -> Vec<PortRef> {
        let entries = self.entries();
        let present = entries.iter().filter(|entry| !entry.2);
        present.map(|entry| entry.0).collect()
    }

    /// Returns every known registration in the order of registration, including removed ones.
    pub(super) fn all(&self) -> Vec<PortRef> {
        self.entries().iter().map(|entry| entry.0).collect()
    }
}

/// An observer with its name and the names of its ports.
#[derive(Clone, Debug)]
pub(super) struct ObserverRecord {
    pub(super) name: String,
    pub(super) observer: Arc<Observer>,
    /// Names of the ports that it looks at. Empty for all.
    pub(super) ports: Vec<String>,
    /// Name of a mirror's destination.
    pub(super) to: Option<String>,
}

impl ObserverRecord {
    fn view(&self) -> ObserverView {
        let spec = &self.observer.spec;
        let counts = self.observer.counts();
        ObserverView {
            name: self.name.clone(),
            kind: match spec.kind {
                Kind::Capture => ObserverKind::Capture,
                Kind::Drops => ObserverKind::Drops,
                Kind::Trace => ObserverKind::Trace,
                Kind::Mirror(_) => ObserverKind::Mirror,
            },
            ports: self.ports.clone(),
            to: self.to.clone(),
            direction: spec.direction,
            snaplen: spec.snaplen,
            filter: spec.filter.text().to_string(),
            statistics: ObserverStatistics {
                captured: counts.captured,
                missed: counts.missed,
                filtered: counts.filtered,
            },
        }
    }

    /// Whether the observer has no purpose without the port `gone`.
    fn ends_with(&self, gone: PortRef, mut is_there: impl FnMut(PortRef) -> bool) -> bool {
        let spec = &self.observer.spec;
        if matches!(spec.kind, Kind::Mirror(to) if to == gone) {
            return true;
        }
        let Some(ports) = &spec.ports else {
            return false;
        };
        ports.contains(&gone) && !ports.iter().any(|port| *port != gone && is_there(*port))
    }
}

/// An observer that was taken out while its reader still reads. Its end is reported together with
/// the number of frames read.
#[derive(Debug)]
pub(super) struct Unread {
    observer: Weak<Observer>,
    name: String,
    kind: &'static str,
    why: String,
}

/// What is needed to build an observer.
#[derive(Clone, Debug)]
pub(super) struct Prospect {
    /// The ports, in the order in which the caller named them. `None` for all.
    pub(super) ports: Option<Vec<PortRef>>,
    pub(super) to: Option<PortRef>,
    /// Numbers of the existing poll threads.
    pub(super) threads: Vec<usize>,
}

impl Registry {
    /// Makes the pages of what the next poll thread will write for observers, before it begins.
    pub(super) fn prefault_feeds(&self) {
        if let Some(number) = self.polls.next_number() {
            let observers = self.observers.iter();
            observers.for_each(|record| record.observer.feed(number).prefault());
        }
    }

    /// Resolves the ports that an observer names. Returns an error if a port does not exist.
    pub(super) fn prospect(
        &mut self,
        ports: Option<&[String]>,
        to: Option<&str>,
    ) -> Result<Prospect, ControlError> {
        let mut reference = |name: &str| {
            let record = self.find(name);
            let found = record.map(|record| record.shared.reference);
            found.ok_or_else(|| ControlError::no_port(name))
        };
        let to = to.map(&mut reference).transpose()?;
        let ports = ports.map(|names| names.iter().map(|name| reference(name)).collect());
        Ok(Prospect {
            ports: ports.transpose()?,
            to,
            threads: self.polls.staying().collect(),
        })
    }

    /// Registers a complete observer, and publishes a view with it. Returns the generation of that
    /// view.
    pub(super) fn observe(&mut self, record: ObserverRecord) -> Result<u64, ControlError> {
        if self.observers.len() >= MAX_OBSERVERS {
            return Err(ControlError::Conflict {
                text: format!("{MAX_OBSERVERS} observers are the most there can be"),
            });
        }
        if self.observers.iter().any(|other| other.name == record.name) {
            return Err(ControlError::Conflict {
                text: format!("observer {:?} exists already", record.name),
            });
        }
        let spec = &record.observer.spec;
        let to = match spec.kind {
            Kind::Mirror(to) => Some(to),
            _ => None,
        };
        // Any of the ports may have been removed while the observer was built.
        for port in spec.ports.iter().flatten().chain(&to) {
            if !self.is_registered(*port) {
                let what = What::Port(self.names.of(*port));
                return Err(ControlError::Gone { what });
            }
        }
        self.observers.push(record);
        self.touch();
        self.publish();
        Ok(self.generation())
    }

    fn is_registered(&self, port: PortRef) -> bool {
        let mut ports = self.ports.iter();
        ports.any(|record| record.shared.reference == port)
    }

    /// Takes out the observers that have no purpose without `gone`. The caller then publishes the
    /// view without that port.
    pub(super) fn observers_of(&mut self, gone: PortRef) -> Vec<ObserverRecord> {
        let ports: Vec<PortRef> = self.ports.iter().map(|p| p.shared.reference).collect();
        let ends =
            |record: &mut ObserverRecord| record.ends_with(gone, |port| ports.contains(&port));
        self.observers.extract_if(.., ends).collect()
    }

    /// Takes an observer out and publishes a view without it. `None` if it is not registered.
    fn stop_observing(
        &mut self,
        which: impl Fn(&ObserverRecord) -> bool,
        why: &str,
    ) -> Option<ObserverRecord> {
        let at = self.observers.iter().position(which)?;
        let record = self.observers.remove(at);
        self.touch();
        self.publish();
        record.observer.end(why, self.generation());
        Some(record)
    }
}

impl Control {
    pub(super) fn observe(
        &mut self,
        mut record: ObserverRecord,
    ) -> Result<(String, u64), ControlError> {
        if record.name.is_empty() {
            let kind = record.observer.spec.kind.name();
            // A mirror may have been given a name of this form.
            loop {
                self.registry.observed += 1;
                record.name = format!("{kind}-{}", self.registry.observed);
                let mut others = self.registry.observers.iter();
                if others.all(|other| other.name != record.name) {
                    break;
                }
            }
        }
        let name = record.name.clone();
        let kind = record.observer.spec.kind.name();
        let ports = match record.ports.join(", ") {
            none if none.is_empty() => "all ports".to_string(),
            ports => ports,
        };
        let to = record.to.as_ref().map(|to| format!(" to {to}"));
        let generation = self.registry.observe(record)?;
        let text = format!("{kind} {name:?} of {ports}{}", to.unwrap_or_default());
        self.report.daemon(EventKind::ObserverAdded, text);
        Ok((name, generation))
    }

    /// Ends an observer by name. With `mirror`, only a mirror is ended.
    pub(super) fn end_observer(&mut self, name: &str, mirror: bool) -> Result<(), ControlError> {
        let which = |record: &ObserverRecord| {
            let is_mirror = matches!(record.observer.spec.kind, Kind::Mirror(_));
            record.name == name && (is_mirror || !mirror)
        };
        let ended = self.registry.stop_observing(which, "stopped");
        let Some(record) = ended else {
            let name = name.to_string();
            return Err(ControlError::NotFound {
                what: match mirror {
                    true => What::Mirror(name),
                    false => What::Observer(name),
                },
            });
        };
        self.report_end(&record, "stopped");
        Ok(())
    }

    /// Ends an observer because its reader stops.
    pub(super) fn leave_observer(&mut self, observer: &Arc<Observer>, why: &str) {
        let which = |record: &ObserverRecord| Arc::ptr_eq(&record.observer, observer);
        if let Some(record) = self.registry.stop_observing(which, why) {
            self.report_end(&record, why);
        }
    }

    /// Reports the end of an observer that was taken out. The counts of a mirror are known now. The
    /// counts of a capture or a trace come later, from its reader.
    pub(super) fn report_end(&mut self, record: &ObserverRecord, why: &str) {
        let ended = Unread {
            observer: Arc::downgrade(&record.observer),
            name: record.name.clone(),
            kind: record.observer.spec.kind.name(),
            why: why.to_string(),
        };
        if matches!(record.observer.spec.kind, Kind::Mirror(_)) {
            let counts = record.observer.counts();
            self.report_read(&ended, counts.captured, counts.missed);
        } else {
            self.registry.unread.push(ended);
        }
    }

    /// Reports the end of an observer whose reader has read everything or has left.
    pub(super) fn observer_read(&mut self, observer: &Weak<Observer>, frames: u64, missed: u64) {
        let mut unread = self.registry.unread.iter();
        if let Some(at) = unread.position(|ended| ended.observer.ptr_eq(observer)) {
            let ended = self.registry.unread.remove(at);
            self.report_read(&ended, frames, missed);
        }
    }

    /// Reports the end with the numbers that the reader itself shows.
    fn report_read(&self, ended: &Unread, frames: u64, missed: u64) {
        let Unread {
            name, kind, why, ..
        } = ended;
        let text = format!("{kind} {name:?} ends: {why}; {frames} frames, {missed} missed");
        self.report.daemon(EventKind::ObserverEnded, text);
    }

    pub(super) fn observers(&self) -> Vec<ObserverView> {
        let observers = self.registry.observers.iter();
        observers.map(ObserverRecord::view).collect()
    }
}
