//! Ports whose memory is slow to touch (`sys::pages`): who serves them, and how they come back.
//!
//! A poll thread marks such a port and rings. Control then gives the port's transmit queues to a
//! thread that only slow ports share, and has other threads' frames to the port go to that thread,
//! too (`topology::detour`). The thread is made when the first port is slow, is pinned to no CPU,
//! and stays. If no thread can be made, the port's session ends, because nobody else is to wait.
//!
//! After a minute without a slow touch the port comes back. Its queues go to where they were. When
//! every poll thread has acknowledged that, and its last frame on the detour has arrived, the port
//! is served like any other one.
//!
//! Queues change hands by the usual hand-over, so a flow *from* the port keeps its order. A flow
//! *to* the port keeps its order, too. When the detour begins, a thread's earlier frames are in the
//! ring before the thread adopts the topology with the detour. When the detour ends, a thread
//! delivers directly only after all frames that it sent by the detour have arrived.

use std::sync::Arc;
use std::time::Instant;

use super::DaemonError;
use super::balance::lightest;
use super::control::Control;
use super::handover::Place;
use super::registry::Registry;
use crate::api::types::EventKind;
use crate::port::PortShared;
use crate::sys::pages::Pace;
use crate::topology::detour::Detour;

/// Why a session ends if no thread can be made to serve its guest's memory.
const NO_THREAD: &str =
    "guest memory is slow to touch, and no thread can be made that serves such ports";
/// Why a session ends that makes the switch touch new pages without end.
const ENDLESS: &str = "guest memory is slow to touch, and the switch has made far more pages of it than there are: \
     holes are punched into it again and again";

/// A port that the thread of slow ports serves.
#[derive(Debug)]
pub(super) struct Slowness {
    pub(super) since: Instant,
    /// Where its queue pairs were placed before.
    home: Vec<Place>,
    /// Generation of the view in which the port is on its way back.
    returning: Option<u64>,
}

/// The thread of slow ports and the detour to it. Both are empty until the first port is slow.
#[derive(Debug, Default)]
pub(super) struct SlowPorts {
    pub(super) thread: Option<usize>,
    pub(super) detour: Option<Arc<Detour>>,
    /// The detour is in the views that are published.
    in_use: bool,
    /// The first generation without a slow port, while the published views still contain the
    /// detour.
    unused_since: Option<u64>,
}

impl SlowPorts {
    /// Returns the detour for the next view, if needed. A poll thread that has not acknowledged a
    /// port's return may still write into the detour. So the detour stays until all threads have
    /// acknowledged and it is empty.
    pub(super) fn way(&mut self, any_slow: bool) -> Option<&Arc<Detour>> {
        self.in_use |= any_slow;
        self.detour.as_ref().filter(|_| self.in_use)
    }

    /// Notes that a view was published, and whether it has slow ports.
    pub(super) fn published(&mut self, generation: u64, any_slow: bool) {
        self.unused_since = match self.unused_since {
            _ if any_slow || !self.in_use => None,
            Some(since) => Some(since),
            None => Some(generation),
        };
    }

    /// Stops using the detour if nobody writes into it any more and it is empty. Returns whether
    /// this call stopped the use.
    fn end_use(&mut self, reached: impl Fn(u64) -> bool) -> bool {
        let unused = self.unused_since.is_some_and(reached);
        let ends = unused && self.detour.as_ref().is_none_or(|detour| detour.is_empty());
        if ends {
            (self.in_use, self.unused_since) = (false, None);
        }
        ends
    }
}

impl Registry {
    /// Returns the position of the first port that is marked as slow and not yet handled.
    fn marked(&self) -> Option<usize> {
        let marked = |pace| pace == Pace::Marked;
        self.ports
            .iter()
            .position(|record| marked(record.shared.pages.pace()))
    }

    /// Gives the port at position `at` to the thread of slow ports. Starts that thread if needed.
    pub(super) fn slow_down(&mut self, at: usize) -> Result<(), DaemonError> {
        let port = self.ports[at].shared.clone();
        // First, so that a failure below does not leave the port marked.
        port.pages.set_pace(Pace::Slow);
        self.touch();
        let thread = match self.slow.thread {
            Some(thread) => thread,
            None => {
                self.prefault_feeds();
                self.polls.start_slow()?
            }
        };
        self.slow.thread = Some(thread);
        self.slow.detour.get_or_insert_default();
        let record = &mut self.ports[at];
        match &mut record.slow {
            Some(slowness) => slowness.returning = None,
            None => {
                let (since, home) = (Instant::now(), record.placement.clone());
                let returning = None;
                record.slow = Some(Slowness {
                    since,
                    home,
                    returning,
                });
            }
        }
        self.send_queues(&port, |_| true, thread, None);
        Ok(())
    }

    /// Starts the return of a slow port's queues to where they were placed before.
    pub(super) fn send_back(&mut self, at: usize) {
        let record = &self.ports[at];
        let port = record.shared.clone();
        let home = record.slow.as_ref().map(|slowness| slowness.home.clone());
        let home = home.unwrap_or_default();
        port.pages.set_pace(Pace::Returning);
        for pair in 0..self.ports[at].placement.len() {
            let thread = home.get(pair).map(|place| place.thread());
            let stays = |thread: &usize| self.polls.staying().any(|other| other == *thread);
            let to = thread.filter(stays);
            let to = to.or_else(|| lightest(&self.thread_loads(), &port.spec.poll, None));
            if let Some(to) = to {
                self.send_queues(&port, |other| usize::from(other) == pair, to, None);
            }
        }
        self.touch();
        self.publish();
        let generation = self.generation();
        if let Some(slowness) = &mut self.ports[at].slow {
            slowness.returning = Some(generation);
        }
    }

    /// Whether a port on its way back has arrived.
    fn is_back(&self, port: &PortShared, slowness: &Slowness) -> bool {
        let known = |generation| self.acknowledgements.reached(generation);
        let arrived = |detour: &Arc<Detour>| detour.have_all_arrived(port.reference);
        slowness.returning.is_some_and(known) && self.slow.detour.as_ref().is_none_or(arrived)
    }

    /// Once a second: starts and completes returns of ports that are not slow any more. Returns the
    /// ports whose return is complete.
    pub(super) fn look_at_slow_ports(&mut self) -> Vec<Arc<PortShared>> {
        let mut back = Vec::new();
        for at in 0..self.ports.len() {
            let record = &self.ports[at];
            let pages = &record.shared.pages;
            pages.refill();
            let Some(slowness) = &record.slow else {
                continue;
            };
            match pages.pace() {
                Pace::Slow if pages.is_calm() => self.send_back(at),
                Pace::Returning if self.is_back(&record.shared, slowness) => {
                    pages.set_pace(Pace::Normal);
                    back.push(record.shared.clone());
                    self.ports[at].slow = None;
                    self.touch();
                }
                _ => {}
            }
        }
        let acknowledgements = &self.acknowledgements;
        if self
            .slow
            .end_use(|generation| acknowledgements.reached(generation))
        {
            self.touch();
        }
        back
    }
}

impl Control {
    /// Every turn: handles the ports that poll threads have marked as slow.
    pub(super) fn look_at_marks(&mut self) {
        while let Some(at) = self.registry.marked() {
            let port = self.registry.ports[at].shared.clone();
            let (cost, faults) = (port.pages.cost(), port.pages.faults());
            let said = match self.registry.slow_down(at) {
                Ok(()) => "poll-slow serves it from now on".to_string(),
                Err(error) => {
                    self.cut_off(at, NO_THREAD);
                    port.pages.set_pace(Pace::Normal);
                    format!("its session ends: no thread can be made for it: {error}")
                }
            };
            let text = format!(
                "guest memory is slow to touch: {faults} page faults took poll threads {:.1} ms; {said}",
                cost.as_secs_f64() * 1e3
            );
            self.report.port(&port, EventKind::MemorySlow, text);
        }
    }

    /// Once a second: reports slow ports that have recovered, and ends the sessions of those that
    /// touch new pages without end.
    pub(super) fn look_at_slow_ports(&mut self) {
        for port in self.registry.look_at_slow_ports() {
            let text = "guest memory is as fast to touch as others' again";
            self.report.port(&port, EventKind::MemoryNormal, text);
        }
        for at in 0..self.registry.ports.len() {
            let record = &self.registry.ports[at];
            let bytes = record.device.as_ref().map(|it| it.memory.len_bytes());
            if bytes.is_some_and(|bytes| record.shared.pages.is_endless(bytes)) {
                self.cut_off(at, ENDLESS);
            }
        }
    }

    fn cut_off(&mut self, at: usize, why: &'static str) {
        if let Some(session) = &mut self.registry.ports[at].session {
            session.cut_off = Some(why);
            session.stopper.stop();
        }
    }
}
