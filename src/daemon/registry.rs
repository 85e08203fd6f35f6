//! The registry: which ports exist, and the one publisher of topologies.
//!
//! The control thread owns the registry. `register` gets a complete port and publishes it. Frames
//! may arrive before it returns. `unregister` publishes a topology without the port, frees the name
//! and the socket path, and returns. It waits for nobody. Once all poll threads have acknowledged
//! that topology, nobody touches the port's rings and memory. The reaper or the session then drops
//! the last reference to them (see `port`).

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

/// All ports and slots, and the publisher of topologies.
#[derive(Debug)]
pub(super) struct Registry {
    /// In order of creation.
    pub(super) ports: Vec<PortRecord>,
    pub(super) fdb: Arc<Fdb>,
    /// Largest number of learned addresses.
    pub(super) fdb_capacity: usize,
    pub(super) polls: PollThreads,
    pub(super) acknowledgements: Acknowledgements<Topology>,
    publisher: Publisher<Topology>,
    /// The last generation of each slot that was ever used. A slot is free if no port in `ports`
    /// has it.
    slots: Vec<u32>,
    /// Posts that are answered with the generation of the next publication.
    posts: Vec<(Arc<super::link::Link>, u64)>,
    dirty: bool,
    reaper: Sender<Retired<Topology>>,
    /// FDB cells that can be reused once this generation is acknowledged.
    fdb_retired: Option<(RetireMark, u64)>,
    /// Ports whose frontends have gone. Their learned addresses are to be forgotten.
    left: Vec<PortRef>,
    /// When the next walk that forgets addresses may start.
    forget_at: Instant,
    epoch: Instant,
    /// Moves of queues and removals of threads that are not complete.
    pub(super) moves: Moves,
    pub(super) loads: Loads,
    /// The thread of slow ports and the detour to it.
    pub(super) slow: SlowPorts,
    /// Captures, traces, mirrors.
    pub(super) observers: Vec<ObserverRecord>,
    /// Captures and traces that were taken out while their readers still read.
    pub(super) unread: Vec<Unread>,
    /// Number of names given so far to observers that came without one.
    pub(super) observed: u64,
    /// Names of ports, for readers of records.
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

    /// Returns the seconds of the switch's monotonic clock.
    pub(super) fn now_s(&self) -> u32 {
        u32::try_from(self.epoch.elapsed().as_secs()).unwrap_or(u32::MAX)
    }

    /// Returns a free slot, with a generation that the slot never had.
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

    /// Returns the record of a port by name.
    pub(super) fn find(&mut self, name: &str) -> Option<&mut PortRecord> {
        self.ports
            .iter_mut()
            .find(|port| port.shared.name() == name)
    }

    /// Returns the record of a port by registration. `None` if the port was removed meanwhile, even
    /// if its slot or name is in use again.
    pub(super) fn find_registration(&mut self, port: &Arc<PortShared>) -> Option<&mut PortRecord> {
        self.ports
            .iter_mut()
            .find(|record| Arc::ptr_eq(&record.shared, port))
    }

    /// Returns the record of a port by the reference of its registration.
    pub(super) fn find_reference(&mut self, port: PortRef) -> Option<&mut PortRecord> {
        let mut ports = self.ports.iter_mut();
        ports.find(|record| record.shared.reference == port)
    }

    /// Registers a complete port and publishes a view with it.
    pub(super) fn register(&mut self, record: PortRecord) {
        let shared = &record.shared;
        self.names.add(shared.reference, shared.name());
        self.ports.push(record);
        self.dirty = true;
        self.publish();
    }

    /// Takes a port out. Returns its record, so that the caller can end its session, and the
    /// observers that end with the port.
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

    /// Takes all ports out in one view. With one view for each port, the remaining ports would lose
    /// the frames that they send to removed ports. At the end of the switch these frames should
    /// stay in the guests' rings for the next switch.
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

    /// Takes a session's newest post. It is published with everything else at the end of the turn.
    pub(super) fn post(&mut self, link: &Arc<super::link::Link>) {
        let Some((post, device)) = link.take() else {
            return;
        };
        let current = self.find_registration(&link.port);
        // A session that is just enabling its rings cannot bring an unregistered port back. A
        // session that was replaced cannot post for the port.
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

    /// Publishes a new view if anything has changed. Waits for nobody.
    pub(super) fn publish(&mut self) {
        if !std::mem::take(&mut self.dirty) {
            return;
        }
        let entries: Vec<PortEntry> = self.ports.iter().map(PortRecord::entry).collect();
        // Indexed by slot. A search for each port would make the cost of a view quadratic in ports.
        let mut placements: Vec<&[Place]> = vec![&[]; self.slots.len()];
        for record in &self.ports {
            placements[usize::from(record.shared.reference.slot)] = &record.placement;
        }
        let placement = |port: &PortShared, pair: u16| {
            let places = placements[usize::from(port.reference.slot)];
            places.get(usize::from(pair))?.owner()
        };
        // One entry for each thread. The real values are set when the view is complete.
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
        // Set as late as possible. Time in which control loses its CPU before this point does not
        // count as a poll thread's delay.
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

    /// Returns since when each poll thread has a view to acknowledge, once a view is published at
    /// `now`.
    fn waiting_since(&self, now: Instant) -> Box<[Instant]> {
        let since = |thread: usize| self.unacknowledged(thread).unwrap_or(now);
        (0..MAX_THREADS).map(since).collect()
    }

    /// Returns since when a poll thread has not acknowledged the published view. `None` once it
    /// has, and while it sleeps.
    pub(super) fn unacknowledged(&self, thread: usize) -> Option<Instant> {
        // 0 means that the thread is just waking. It need not acknowledge views published while it
        // slept.
        let seen = self.acknowledgements.of(thread).filter(|seen| *seen > 0)?;
        (seen < self.generation()).then(|| self.publisher.current().since[thread])
    }

    /// Hands retired topologies that nobody uses any more to the reaper. Returns whether some are
    /// still waited for.
    pub(super) fn retire(&mut self) -> bool {
        for retired in self.publisher.retire() {
            // The send cannot fail: the reaper lives until control has ended.
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

    /// Forgets the learned addresses of a port whose frontend has gone, as the Linux bridge does
    /// when a link goes down. Otherwise frames to them would be lost here (`egress_not_ready`)
    /// until the addresses age. A station may be behind another port by now and only listen there.
    /// Flooded frames reach it. A guest that comes back is learned again with its first frame.
    /// Until then frames to it are flooded, as after a start of the switch with an empty table.
    /// Static entries stay: the operator has set them, and may not want these frames to be seen
    /// elsewhere.
    ///
    /// The session has waited until no poll thread takes frames from the port's rings. So no
    /// address is learned again.
    pub(super) fn forget(&mut self, port: PortRef) {
        if self.fdb.learned(port) > 0 {
            self.left.push(port);
            self.forget_due(Instant::now());
        }
    }

    /// Forgets the addresses that are due. Returns when the next walk over the table may start, if
    /// ports wait for it. All waiting ports share one walk. The pause after each walk limits the
    /// walks to a twentieth of this thread's time, however large the table is.
    pub(super) fn forget_due(&mut self, now: Instant) -> Option<Instant> {
        if !self.left.is_empty() && now >= self.forget_at {
            let began = Instant::now();
            self.fdb.forget(&std::mem::take(&mut self.left));
            // The cells can be reused once a view published from now on is acknowledged.
            self.dirty = true;
            self.forget_at = now + began.elapsed() * FORGET_PAUSE;
        }
        (!self.left.is_empty()).then_some(self.forget_at)
    }

    /// Once a second: ages addresses. Their cells can be reused after all threads have adopted a
    /// view published later.
    pub(super) fn age(&mut self) {
        if self.fdb.age(self.now_s()) > 0 {
            self.dirty = true;
        }
        if self.fdb_retired.is_none() && self.fdb.retired().is_some() {
            self.dirty = true;
        }
        self.publish();
    }

    /// Returns the generation of the current view.
    pub(super) fn generation(&self) -> u64 {
        self.publisher.generation()
    }
}

/// The pause after a walk over the table is this many times as long as the walk.
const FORGET_PAUSE: u32 = 19;

/// Number of readers made for a daemon. More poll threads than this are refused.
pub(super) const MAX_THREADS: usize = MAX_POLL_THREADS;
