//! The registry: which ports exist, and the one publisher of topologies.
//!
//! The control thread owns it. `register` builds everything that can fail first and then publishes;
//! frames may arrive before it returns. `unregister` publishes a topology without the port, frees
//! name and socket path, and returns. It waits for nobody. Once all poll threads have acknowledged
//! that topology, nobody touches the port's rings and memory, and the reaper drops their last
//! reference (or the session, see `port`).

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Sender;

use super::balance::Loads;
use super::handover::Place;
use super::observers::{Names, ObserverRecord, PORT_REMOVED, Unread};
use super::placement::Moves;
use super::pollers::PollThreads;
use super::port::PortRecord;
use super::slow::SlowPorts;
use crate::port::PortShared;
use crate::stats::MAX_POLL_THREADS;
use crate::switch::PortRef;
use crate::switch::fdb::{Fdb, RetireMark};
use crate::sys::snapshot::{Acknowledgements, Publisher, Retired};
use crate::topology::{PortEntry, Topology};

/// Ports, slots and the published view of them.
#[derive(Debug)]
pub(super) struct Registry {
    /// In the order of their creation.
    pub(super) ports: Vec<PortRecord>,
    pub(super) fdb: Arc<Fdb>,
    /// Most learned addresses.
    pub(super) fdb_capacity: usize,
    pub(super) polls: PollThreads,
    pub(super) acknowledgements: Acknowledgements<Topology>,
    publisher: Publisher<Topology>,
    /// Next generation of each slot that was ever used; a free slot is in no port.
    slots: Vec<u32>,
    /// Posts to be answered with the next generation.
    posts: Vec<(Arc<super::link::Link>, u64)>,
    dirty: bool,
    reaper: Sender<Retired<Topology>>,
    /// FDB cells that may be used again once this generation is acknowledged.
    fdb_retired: Option<(RetireMark, u64)>,
    /// Ports whose frontends have gone, and whose addresses are to be forgotten.
    left: Vec<PortRef>,
    /// When that may be done next.
    forget_at: Instant,
    epoch: Instant,
    /// Queues and threads that change hands.
    pub(super) moves: Moves,
    pub(super) loads: Loads,
    /// Who serves ports whose memory is slow to touch.
    pub(super) slow: SlowPorts,
    /// Captures, traces, mirrors.
    pub(super) observers: Vec<ObserverRecord>,
    /// Those that were taken out and are still read.
    pub(super) unread: Vec<Unread>,
    /// Those that there have ever been without a name of their own.
    pub(super) observed: u64,
    /// For whoever reads what they write.
    pub(super) names: Arc<Names>,
}

impl Registry {
    pub(super) fn new(
        publisher: Publisher<Topology>,
        polls: PollThreads,
        (fdb, fdb_capacity): (Arc<Fdb>, usize),
        reaper: Sender<Retired<Topology>>,
        epoch: Instant,
        names: Arc<Names>,
    ) -> Self {
        Registry {
            ports: Vec::new(),
            fdb,
            fdb_capacity,
            polls,
            acknowledgements: publisher.acknowledgements(),
            publisher,
            slots: Vec::new(),
            posts: Vec::new(),
            dirty: false,
            reaper,
            fdb_retired: None,
            left: Vec::new(),
            forget_at: epoch,
            epoch,
            moves: Moves::default(),
            loads: Loads::default(),
            slow: SlowPorts::default(),
            observers: Vec::new(),
            unread: Vec::new(),
            observed: 0,
            names,
        }
    }

    /// Seconds of the switch's monotonic clock.
    pub(super) fn now_s(&self) -> u32 {
        u32::try_from(self.epoch.elapsed().as_secs()).unwrap_or(u32::MAX)
    }

    /// A slot that no port has, with a generation that it never had.
    pub(super) fn free_slot(&mut self) -> PortRef {
        let mut free = vec![true; self.slots.len()];
        for port in &self.ports {
            free[usize::from(port.shared.reference.slot)] = false;
        }
        let slot = free.iter().position(|free| *free);
        let slot = slot.unwrap_or(self.slots.len());
        if slot == self.slots.len() {
            self.slots.push(0);
        }
        self.slots[slot] += 1;
        // MAX_PORTS is far below 2^16.
        PortRef {
            slot: slot as u16,
            generation: self.slots[slot],
        }
    }

    /// The record of a port by name.
    pub(super) fn find(&mut self, name: &str) -> Option<&mut PortRecord> {
        self.ports
            .iter_mut()
            .find(|port| port.shared.name() == name)
    }

    /// The record of a port by registration: `None` if it was removed meanwhile, even if its slot
    /// or name is in use again.
    pub(super) fn find_registration(&mut self, port: &Arc<PortShared>) -> Option<&mut PortRecord> {
        self.ports
            .iter_mut()
            .find(|record| Arc::ptr_eq(&record.shared, port))
    }

    /// The same by what names a registration.
    pub(super) fn find_reference(&mut self, port: PortRef) -> Option<&mut PortRecord> {
        let mut ports = self.ports.iter_mut();
        ports.find(|record| record.shared.reference == port)
    }

    /// Registers a port that is wholly built.
    pub(super) fn register(&mut self, record: PortRecord) {
        let shared = &record.shared;
        self.names.add(shared.reference, shared.name());
        self.ports.push(record);
        self.dirty = true;
        self.publish();
    }

    /// Takes a port out, and returns its record for its session to be ended, and the observers that
    /// end with it.
    pub(super) fn unregister(&mut self, name: &str) -> Option<(PortRecord, Vec<ObserverRecord>)> {
        let at = self
            .ports
            .iter()
            .position(|port| port.shared.name() == name)?;
        let record = self.ports.remove(at);
        self.fdb.port_removed(record.shared.reference);
        let observers = self.observers_of(record.shared.reference);
        self.names.remove(record.shared.reference);
        self.dirty = true;
        self.publish();
        for observer in &observers {
            observer.observer.end(PORT_REMOVED, self.generation());
        }
        if let Some(session) = &record.session {
            session.link.port_gone(self.publisher.generation());
        }
        Some((record, observers))
    }

    /// Takes all ports out, in one view: with one after the other, those that are still there would
    /// lose what they send to those that are not, where at the end of the switch it should wait in
    /// their rings for the next one.
    pub(super) fn unregister_all(&mut self) -> Vec<PortRecord> {
        let records = std::mem::take(&mut self.ports);
        let observers = std::mem::take(&mut self.observers);
        self.dirty = true;
        self.publish();
        for observer in observers {
            observer.observer.end("the daemon stops", self.generation());
        }
        for session in records.iter().filter_map(|record| record.session.as_ref()) {
            session.link.port_gone(self.publisher.generation());
        }
        records
    }

    /// Takes a session's newest post; published with everything else at the end of the turn.
    pub(super) fn post(&mut self, link: &Arc<super::link::Link>) {
        let Some((post, device)) = link.take() else {
            return;
        };
        let current = self.find_registration(&link.port);
        // A session that is just enabling its rings cannot bring an unregistered port back, nor can
        // one that was replaced speak for the port.
        let Some(record) = current.filter(|record| record.is_session(link)) else {
            return link.port_gone(self.publisher.generation());
        };
        let first = record.device.is_none();
        let node = device.as_ref().and_then(|device| device.numa_node);
        record.device = device;
        if first {
            link.port.pages.begin_count();
            self.place_near(&link.port, node);
        }
        self.posts.push((link.clone(), post));
        self.dirty = true;
    }

    /// Marks the view as out of date.
    pub(super) fn touch(&mut self) {
        self.dirty = true;
    }

    /// Publishes a new view if anything changed. Waits for nobody.
    pub(super) fn publish(&mut self) {
        if !std::mem::take(&mut self.dirty) {
            return;
        }
        let entries: Vec<PortEntry> = self.ports.iter().map(PortRecord::entry).collect();
        // By slot: one search for each port would make a view cost their square.
        let mut placements: Vec<&[Place]> = vec![&[]; self.slots.len()];
        for record in &self.ports {
            placements[usize::from(record.shared.reference.slot)] = &record.placement;
        }
        let placement = |port: &PortShared, pair: u16| {
            let places = placements[usize::from(port.reference.slot)];
            places.get(usize::from(pair))?.owner()
        };
        // One entry a thread; what they say is known when the view is ready.
        let since = vec![Instant::now(); MAX_THREADS].into();
        let before = self.publisher.current();
        let fdb = self.fdb.clone();
        let topology = Topology::succeed(Some(before), &entries, since, fdb, placement);
        let observers = self.observers.iter();
        let observers: Vec<_> = observers.map(|record| record.observer.clone()).collect();
        let topology = topology.with_observers(&observers);
        let any_slow = self.ports.iter().any(|record| record.slow.is_some());
        let mut topology = topology.with_detour(self.slow.way(any_slow));
        self.polls.prepare(before, &topology);
        // As late as can be: a control thread that loses its processor here is no poll thread's
        // delay.
        topology.since = self.waiting_since(Instant::now());
        let generation = self.publisher.publish(topology);
        self.slow.published(generation, any_slow);
        self.polls.wake(self.publisher.current());
        self.moves.published(generation);
        for (link, post) in self.posts.drain(..) {
            link.published(post, generation);
        }
        if self.fdb_retired.is_none() {
            self.fdb_retired = self.fdb.retired().map(|mark| (mark, generation));
        }
    }

    /// Since when each poll thread has something to acknowledge, once a view is published `now`.
    fn waiting_since(&self, now: Instant) -> Box<[Instant]> {
        let since = |thread: usize| self.unacknowledged(thread).unwrap_or(now);
        (0..MAX_THREADS).map(since).collect()
    }

    /// Since when a poll thread has not acknowledged what is published; `None` once it has, and
    /// while it sleeps.
    pub(super) fn unacknowledged(&self, thread: usize) -> Option<Instant> {
        // 0: it is just waking, and what it slept through it had not to acknowledge.
        let seen = self.acknowledgements.of(thread).filter(|seen| *seen > 0)?;
        (seen < self.generation()).then(|| self.publisher.current().since[thread])
    }

    /// Hands what nobody uses any more to the reaper. Returns whether something is still waited
    /// for.
    pub(super) fn retire(&mut self) -> bool {
        for retired in self.publisher.retire() {
            // The reaper ends after control; until then it takes everything.
            let _ = self.reaper.send(retired);
        }
        if let Some((mark, generation)) = self.fdb_retired
            && self.acknowledgements.reached(generation)
        {
            self.fdb.reclaim(mark);
            self.fdb_retired = None;
        }
        self.publisher.has_retained() || self.fdb_retired.is_some()
    }

    /// The frontend of a port has gone, and with it what is behind the port: its learned addresses
    /// are forgotten, as Linux' bridge does when a link goes down. Else frames to them would be
    /// lost here (`egress_not_ready`) until they age, although the station may be behind another
    /// port by now, where it only listens. Flooded, they arrive. A guest that comes back is known
    /// again with its first frame; until then frames to it are flooded, as after a start of the
    /// switch, which begins with an empty table. Static entries stay: the operator has set them,
    /// and may not want these frames to be seen anywhere else.
    ///
    /// Its session has waited until no poll thread takes frames from its rings any more, so none is
    /// learned again.
    pub(super) fn forget(&mut self, port: PortRef) {
        if self.fdb.learned(port) > 0 {
            self.left.push(port);
            self.forget_due(Instant::now());
        }
    }

    /// Forgets what is due; returns when more will be. That takes a walk over the table. Frontends
    /// that come and go as often as they may get a twentieth of this thread for it, however large
    /// the table is, and share the walks.
    pub(super) fn forget_due(&mut self, now: Instant) -> Option<Instant> {
        if !self.left.is_empty() && now >= self.forget_at {
            let began = Instant::now();
            self.fdb.forget(&std::mem::take(&mut self.left));
            // The cells are usable again once a view of now is acknowledged.
            self.dirty = true;
            self.forget_at = now + began.elapsed() * FORGET_PAUSE;
        }
        (!self.left.is_empty()).then_some(self.forget_at)
    }

    /// Once a second: addresses age. What they leave behind is usable after a view that all threads
    /// have taken over.
    pub(super) fn age(&mut self) {
        if self.fdb.age(self.now_s()) > 0 {
            self.dirty = true;
        }
        if self.fdb_retired.is_none() && self.fdb.retired().is_some() {
            self.dirty = true;
        }
        self.publish();
    }

    /// Generation of the current view.
    pub(super) fn generation(&self) -> u64 {
        self.publisher.generation()
    }
}

/// How many times as long as a walk over the table the pause behind it is.
const FORGET_PAUSE: u32 = 19;

/// Readers made for a daemon; more poll threads than this are refused.
pub(super) const MAX_THREADS: usize = MAX_POLL_THREADS;
