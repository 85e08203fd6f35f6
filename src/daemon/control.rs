//! The control thread: listening sockets, reconnect timers, signals and commands. The posts of all
//! sessions in one turn share one publication.
//!
//! The control thread is the only owner of the registry. It waits for no frontend, and for no poll
//! thread to acknowledge. Whatever must wait for these does so on another thread.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};

use super::balance::Balance;
use super::closer::Closer;
use super::command::Command;
use super::link::Link;
use super::port::Door;
use super::registry::Registry;
use super::report::Report;
use super::socket::start_connect;
use super::{DaemonError, views};
use crate::api::ControlError;
use crate::api::types::EventKind;
use crate::config::{DaemonConfig, Rebalance, count};
use crate::stats::Histogram;
use crate::sys::signal::{Signal, Signals};
use crate::sys::wake::Wake;
use crate::vhost_user::{MEMORY_LOST, RingRecords};

/// Time between two attempts to connect to a frontend that listens (mode=client).
pub(super) const RECONNECT: Duration = Duration::from_millis(100);
/// Time between looks at acknowledgements while retired topologies or moves wait for them.
const RETIRE: Duration = Duration::from_millis(1);
/// Time after which a missing acknowledgement of a poll thread is reported. A report is the only
/// consequence: the thread may still use what was retired, so waiting goes on.
pub(super) const OVERDUE: Duration = Duration::from_secs(1);
/// Time between looks at what changes without an event: ages, broken rings.
const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// Longest wait for the sessions to end at shutdown.
const SHUTDOWN: Duration = Duration::from_secs(2);
/// Time between publications for the ports that post too often.
const LATE: Duration = Duration::from_millis(2);

/// epoll data of the wake descriptor and of the signals. A listener has [`LISTENER`] plus its slot.
const WAKE: u32 = 0;
const SIGNALS: u32 = 1;
pub(super) const LISTENER: u32 = 1 << 16;

/// The state of the control thread.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) registry: Registry,
    pub(super) started: Instant,
    pub(super) report: Arc<Report>,
    pub(super) closer: Closer,
    commands: Receiver<Command>,
    pub(super) sender: Sender<Command>,
    pub(super) wake: Arc<Wake>,
    signals: Option<Signals>,
    /// Directory of the records of packed rings.
    ring_state: Option<PathBuf>,
    pub(super) rebalance: Rebalance,
    pub(super) balance: Balance,
    next_housekeeping: Instant,
    /// Duration of port additions and removals.
    pub(super) times: OperationTimes,
    /// Session threads that have not been seen to end.
    pub(super) sessions: Vec<std::thread::JoinHandle<()>>,
    /// Sessions of ports that post too often. All are served with one publication at `late_at`.
    late: Vec<Arc<Link>>,
    late_at: Instant,
    /// The warning about descriptors was given.
    pub(super) short_of_descriptors: bool,
    stopping: bool,
}

/// Histograms of nanoseconds from a command to its answer.
#[derive(Debug, Default)]
pub(super) struct OperationTimes {
    pub(super) port_add: Histogram,
    pub(super) port_remove: Histogram,
}

fn record(times: &Histogram, began: Instant) {
    times.record(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX));
}

impl Control {
    pub(super) fn new(
        registry: Registry,
        report: Arc<Report>,
        commands: (Sender<Command>, Receiver<Command>),
        wake: Arc<Wake>,
        signals: Option<Signals>,
        closer: Closer,
        config: &DaemonConfig,
    ) -> Self {
        let now = Instant::now();
        Control {
            registry,
            started: now,
            report,
            closer,
            sender: commands.0,
            commands: commands.1,
            wake,
            signals,
            ring_state: config.ring_state.clone(),
            rebalance: config.rebalance,
            balance: Balance::default(),
            next_housekeeping: now + HOUSEKEEPING,
            times: OperationTimes::default(),
            sessions: Vec::new(),
            late: Vec::new(),
            late_at: now,
            short_of_descriptors: false,
            stopping: false,
        }
    }

    /// Runs until a signal or [`Command::Stop`] ends the daemon. All sockets are closed then.
    /// Sessions get `SHUTDOWN` to end.
    pub(super) fn run(self) -> Result<(), DaemonError> {
        let control = Arc::new(Mutex::new(self));
        let mut events = EventManager::<Arc<Mutex<Control>>>::new()
            .map_err(|error| DaemonError::Events(error.to_string()))?;
        events.add_subscriber(control.clone());
        loop {
            let timeout = {
                let mut control = control.lock().unwrap_or_else(PoisonError::into_inner);
                if control.stopping {
                    break;
                }
                control.turn()
            };
            let timeout = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
            events
                .run_with_timeout(timeout)
                .map_err(|error| DaemonError::Events(error.to_string()))?;
        }
        drop(events);
        control
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .shut_down();
        Ok(())
    }

    /// Does what is due now. Returns the time until the next thing is due.
    fn turn(&mut self) -> Duration {
        let now = Instant::now();
        if now >= self.next_housekeeping {
            self.next_housekeeping = now + HOUSEKEEPING;
            self.housekeeping(now);
        }
        let mut next = self.next_housekeeping;
        let due = [
            self.connect_due(now),
            self.accept_due(now),
            self.refuse_due(now),
            self.take_late(now),
            self.registry.forget_due(now),
        ];
        for due in due.into_iter().flatten() {
            next = next.min(due);
        }
        self.look_at_marks();
        self.registry.publish();
        let moving = self.registry.finish_moves();
        if self.registry.retire() || moving {
            next = next.min(now + RETIRE);
        }
        self.watch_acknowledgements(now);
        // Rounded up to 1 ms. A timeout of zero would spin until the moment comes.
        next.saturating_duration_since(now)
            .max(Duration::from_millis(1))
    }

    /// Reports each poll thread with an overdue acknowledgement once, and once more when it has
    /// acknowledged.
    fn watch_acknowledgements(&mut self, now: Instant) {
        let numbers: Vec<usize> = self.registry.polls.threads.keys().copied().collect();
        for index in numbers {
            let since = self.registry.unacknowledged(index);
            let Some(thread) = self.registry.polls.threads.get_mut(&index) else {
                continue;
            };
            let waited = |since: Instant| now.saturating_duration_since(since).as_secs_f64();
            match (thread.overdue, since) {
                (None, Some(since)) if now.saturating_duration_since(since) >= OVERDUE => {
                    thread.overdue = Some(since);
                    self.report.poll_thread(format!(
                        "poll-{index} has not taken over the newest topology for {:.1} s; what waits for it waits on",
                        waited(since)
                    ));
                }
                (Some(since), None) => {
                    thread.overdue = None;
                    self.report.poll_thread(format!(
                        "poll-{index} has taken over again, after {:.1} s",
                        waited(since)
                    ));
                }
                _ => {}
            }
        }
    }

    /// Tries to connect to frontends that listen (mode=client). Returns when the next attempt is
    /// due.
    fn connect_due(&mut self, now: Instant) -> Option<Instant> {
        let mut next: Option<Instant> = None;
        let mut reached = Vec::new();
        for record in &mut self.registry.ports {
            let Door::Connecting(at) = &mut record.door else {
                continue;
            };
            if record.session.is_some() {
                continue;
            }
            if *at <= now {
                *at = now + RECONNECT;
                if let Ok(stream) = start_connect(&record.shared.spec.socket) {
                    reached.push((record.shared.clone(), stream));
                    continue;
                }
            }
            next = Some(next.map_or(*at, |next| next.min(*at)));
        }
        for (port, stream) in reached {
            self.start_session(&port, stream);
        }
        next
    }

    fn housekeeping(&mut self, now: Instant) {
        self.registry.age();
        self.look_at_moves(now);
        self.end_second_frontends(now);
        self.rebalance();
        self.look_at_slow_ports();
        self.sessions.retain(|thread| !thread.is_finished());
        for record in &mut self.registry.ports {
            let Some(session) = &mut record.session else {
                continue;
            };
            // A session that lost its memory is cut off. Its frontend then reconnects with intact
            // memory.
            if record
                .device
                .as_ref()
                .is_some_and(|device| device.memory.faulted())
            {
                let lost = format!("{MEMORY_LOST}; the session is cut off");
                if record.reported_state.as_deref() != Some(&lost) {
                    self.report
                        .port(&record.shared, EventKind::RingBroken, &lost);
                    record.reported_state = Some(lost);
                }
                session.cut_off = Some(MEMORY_LOST);
                session.stopper.stop();
            }
        }
    }

    fn handle(&mut self, command: Command, ops: &mut EventOps) {
        match command {
            Command::Posted(link) => self.posted(link),
            Command::SessionEnded { link, reason } => self.session_ended(&link, reason),
            // Sending an answer fails if the caller no longer waits. This is no error.
            Command::AddPort(spec, may_exist, reply) => {
                let began = Instant::now();
                let answer = self.add_port(spec, may_exist, ops);
                record(&self.times.port_add, began);
                let _ = reply.send(answer);
            }
            Command::RemovePort(name, reply) => {
                let began = Instant::now();
                let removed = self.remove_port(&name, ops);
                record(&self.times.port_remove, began);
                let (answer, sockets) =
                    removed.map_or_else(|error| (Err(error), None), |s| (Ok(()), Some(s)));
                let _ = reply.send(answer);
                // The answer goes first: the closer's thread may take the CPU of this thread for
                // milliseconds.
                sockets
                    .into_iter()
                    .for_each(|sockets| self.close_sockets(sockets));
            }
            Command::SetPort(name, patch, reply) => {
                let _ = reply.send(self.set_port(&name, &patch));
            }
            Command::Ports(reply) => {
                let _ = reply.send(Ok(views::ports(&self.registry)));
            }
            Command::Port(name, reply) => {
                let fdb = self.registry.fdb.clone();
                let record = self.registry.find(&name);
                let view = record.map(|record| views::port(record, &fdb));
                let _ = reply.send(view.ok_or_else(|| ControlError::no_port(&name)));
            }
            Command::Fdb(reply) => {
                let _ = reply.send(Ok(views::fdb(&self.registry)));
            }
            Command::FdbAdd(entry, reply) => {
                let _ = reply.send(views::fdb_add(&mut self.registry, entry));
            }
            Command::FdbRemove(mac, reply) => {
                let _ = reply.send(views::fdb_remove(&mut self.registry, mac));
            }
            Command::FdbFlush(port, reply) => {
                let _ = reply.send(views::fdb_flush(&mut self.registry, port.as_deref()));
            }
            Command::PollThreads(reply) => {
                let _ = reply.send(Ok(views::poll_threads(&self.registry)));
            }
            Command::Stats(reply) => {
                let _ = reply.send(Ok(views::stats(
                    &self.registry,
                    &self.times,
                    self.started.elapsed(),
                )));
            }
            Command::PollAdd(order, reply) => {
                let _ = reply.send(self.add_thread(order));
            }
            Command::PollRemove(thread, reply) => self.remove_thread(thread, reply),
            Command::PollMove(order, reply) => self.move_queues(&order, reply),
            Command::PollSet(patch, reply) => {
                let _ = reply.send(self.set_poll(patch));
            }
            Command::Prospect(ports, to, reply) => {
                let answer = self.registry.prospect(ports.as_deref(), to.as_deref());
                let _ = reply.send(answer);
            }
            Command::Observe(record, reply) => {
                let _ = reply.send(self.observe(record));
            }
            Command::Observers(reply) => {
                let _ = reply.send(Ok(self.observers()));
            }
            Command::EndObserver(name, mirror, reply) => {
                let _ = reply.send(self.end_observer(&name, mirror));
            }
            Command::LeaveObserver(observer, why) => self.leave_observer(&observer, why),
            Command::ObserverRead(observer, frames, missed) => {
                self.observer_read(&observer, frames, missed);
            }
            Command::PollEnded(reader) => {
                let text = format!("poll-{} has ended", reader.index());
                self.registry.thread_ended(reader);
                self.report.polling(text);
            }
            Command::Stop => self.stopping = true,
        }
    }

    /// Takes a session's newest device. It is published at the end of this turn, or later with all
    /// ports that post too often.
    fn posted(&mut self, link: Arc<Link>) {
        let now = Instant::now();
        let record = self.registry.find_registration(&link.port);
        if record.is_none_or(|record| record.posts.admits(now)) {
            return self.registry.post(&link);
        }
        if self.late.is_empty() {
            self.late_at = now + LATE;
        }
        self.late.push(link);
    }

    /// Takes the deferred posts once they are due. Returns when they are due, if any wait.
    fn take_late(&mut self, now: Instant) -> Option<Instant> {
        if now >= self.late_at {
            for link in std::mem::take(&mut self.late) {
                self.registry.post(&link);
            }
        }
        (!self.late.is_empty()).then_some(self.late_at)
    }

    /// Returns the records of a port's packed rings, which survive a restart of the daemon.
    pub(super) fn ring_records(&self, port: &str) -> Option<RingRecords> {
        let dir = self.ring_state.as_ref()?;
        Some(RingRecords::new(dir, port))
    }

    /// Ends the daemon quickly: sockets, then sessions, then poll threads. Its event is the last
    /// event.
    fn shut_down(&mut self) {
        tracing::info!("stopping");
        for record in self.registry.unregister_all() {
            if let Some(session) = &record.session {
                session.stopper.stop();
            }
            self.close_sockets(self.sockets(record));
        }
        // Sessions wait for acknowledgements of poll threads, so sessions end first. The wait is
        // bounded: a frontend's descriptor may belong to a file system that does not answer.
        let deadline = Instant::now() + SHUTDOWN;
        while Instant::now() < deadline && self.sessions.iter().any(|thread| !thread.is_finished())
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        let (ended, stuck): (Vec<_>, Vec<_>) = self
            .sessions
            .drain(..)
            .partition(|thread| thread.is_finished());
        ended.into_iter().for_each(|thread| drop(thread.join()));
        if !stuck.is_empty() {
            tracing::warn!("{} did not end", count(stuck.len() as u64, "session"));
        }
        self.registry.polls.stop();
        self.registry.retire();
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        let wake = Events::with_data(&*self.wake, WAKE, EventSet::IN);
        let signals = self
            .signals
            .as_ref()
            .map(|signals| Events::with_data(signals, SIGNALS, EventSet::IN));
        for events in std::iter::once(wake).chain(signals) {
            if let Err(error) = ops.add(events) {
                tracing::error!("the control loop cannot start: {error}");
                self.stopping = true;
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            WAKE => {
                self.wake.drain();
                // Handles only the commands that have come by now, for one publication. Later
                // commands belong to the next turn.
                for _ in 0..self.commands.len() {
                    let Ok(command) = self.commands.try_recv() else {
                        break;
                    };
                    self.handle(command, ops);
                }
            }
            SIGNALS => {
                while let Some(signal) = self.signals.as_ref().and_then(Signals::next_pending) {
                    let name = match signal {
                        Signal::Terminate => "SIGTERM",
                        Signal::Interrupt => "SIGINT",
                    };
                    tracing::info!("{name} received");
                    self.stopping = true;
                }
            }
            data => {
                if let Ok(slot) = u16::try_from(data - LISTENER) {
                    self.accept(slot);
                }
            }
        }
    }
}
