//! The poll threads as control sees them: start, kick registration, wake-up, stop.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::Sender;

use super::DaemonError;
use super::command::Command;
use super::elsewhere::Elsewhere;
use crate::config::IdlePolicy;
use crate::poll::{PollShared, Poller};
use crate::sys::affinity;
use crate::sys::aio::Caller;
use crate::sys::eventfd::KickFd;
use crate::sys::sched;
use crate::sys::snapshot::Reader;
use crate::sys::thread;
use crate::sys::wake::Wake;
use crate::topology::{Plan, Topology};

/// One poll thread.
#[derive(Debug)]
pub(super) struct PollThread {
    pub(super) shared: Arc<PollShared>,
    pub(super) cpu: Option<usize>,
    /// NUMA node of that CPU.
    pub(super) node: Option<usize>,
    pub(super) tid: Arc<AtomicU32>,
    handle: Option<JoinHandle<()>>,
    /// Kicks in the thread's epoll, by address of the object. The map keeps the objects alive.
    kicks: HashMap<usize, Arc<KickFd>>,
    /// When an overdue acknowledgement was reported: the moment since which it was missing.
    pub(super) overdue: Option<Instant>,
    /// Whether the newest plan differs from the plan before it.
    changed: bool,
    /// The work that the last plan held. A comparison shows whether a new plan brings work.
    work: Vec<Work>,
    /// The thread is to end. Its queues go to others, and it gets no new ones.
    pub(super) leaving: bool,
    /// Set when the thread was removed for good, so that it hands its reader back.
    removed: Arc<AtomicBool>,
}

/// All poll threads, by number.
#[derive(Debug)]
pub(super) struct PollThreads {
    pub(super) threads: BTreeMap<usize, PollThread>,
    /// Readers without a thread. They are marked asleep, so nobody waits for their acknowledgement.
    spare: Vec<Reader<Topology>>,
    /// Idle policy of the threads that have none of their own.
    pub(super) idle: IdlePolicy,
    /// Keeps other threads off the poll CPUs. Only in a process that is nothing but the switch.
    elsewhere: Option<Elsewhere>,
    epoch: Instant,
    /// Where a thread that ended hands its reader back.
    commands: Sender<Command>,
    wake: Arc<Wake>,
}

impl PollThreads {
    /// Starts without threads. `readers` holds a reader for each thread that there can be.
    pub(super) fn new(
        readers: Vec<Reader<Topology>>,
        idle: IdlePolicy,
        epoch: Instant,
        commands: Sender<Command>,
        wake: Arc<Wake>,
    ) -> Self {
        PollThreads {
            threads: BTreeMap::new(),
            spare: readers,
            idle,
            elsewhere: None,
            epoch,
            commands,
            wake,
        }
    }

    /// From now on keeps other threads of the process off the CPUs of poll threads.
    pub(super) fn own_process(&mut self, elsewhere: Elsewhere) {
        self.elsewhere = Some(elsewhere);
        self.keep_others_off();
    }

    /// Adjusts the masks of other threads after poll threads came or went.
    pub(super) fn keep_others_off(&self) {
        let Some(elsewhere) = &self.elsewhere else {
            return;
        };
        let pinned = self.threads.values().filter_map(|thread| {
            let id = thread.tid.load(Ordering::Relaxed);
            thread.cpu.map(|cpu| (cpu, id))
        });
        let (taken, pinned) = pinned.unzip();
        elsewhere.keep_off(&taken, &pinned);
    }

    /// Starts a thread, pinned to `cpu` if given. `idle` is its own policy, else the common policy
    /// applies. Returns the number of the thread, the lowest that was free.
    pub(super) fn start(
        &mut self,
        cpu: Option<usize>,
        idle: Option<IdlePolicy>,
    ) -> Result<usize, DaemonError> {
        let Some(reader) = self.spare_reader() else {
            return Err(DaemonError::TooManyThreads(self.threads.len() + 1));
        };
        let shared = PollShared::new(idle.unwrap_or(self.idle));
        self.start_with(reader, cpu, shared)
    }

    /// Starts the thread of slow ports, pinned to no CPU. Returns its number.
    pub(super) fn start_slow(&mut self) -> Result<usize, DaemonError> {
        let Some(reader) = self.spare_reader() else {
            return Err(DaemonError::TooManyThreads(self.threads.len() + 1));
        };
        self.start_with(reader, None, PollShared::slow())
    }

    fn start_with(
        &mut self,
        reader: Reader<Topology>,
        cpu: Option<usize>,
        shared: io::Result<PollShared>,
    ) -> Result<usize, DaemonError> {
        let number = reader.index();
        match self.start_one(reader, cpu, shared) {
            Ok(thread) => {
                self.threads.insert(number, thread);
                Ok(number)
            }
            Err((error, reader)) => {
                self.spare.extend(reader);
                Err(error)
            }
        }
    }

    /// Returns the number that the next thread will get.
    pub(super) fn next_number(&self) -> Option<usize> {
        self.spare.iter().map(|reader| reader.index()).min()
    }

    /// Takes the spare reader with the lowest number.
    fn spare_reader(&mut self) -> Option<Reader<Topology>> {
        let lowest = self.spare.iter().enumerate();
        let (at, _) = lowest.min_by_key(|(_, reader)| reader.index())?;
        Some(self.spare.swap_remove(at))
    }

    /// Like [`PollThreads::start`], but no thread runs. The test uses the reader in place of the
    /// thread.
    #[cfg(test)]
    pub(super) fn start_scripted(&mut self, shared: PollShared) -> Reader<Topology> {
        let reader = self.spare_reader().unwrap();
        let thread = PollThread::new(Arc::new(shared), None, Default::default(), None);
        self.threads.insert(reader.index(), thread);
        reader
    }

    /// Threads that may be given queues: those that do not leave, without the thread of slow ports.
    pub(super) fn staying(&self) -> impl Iterator<Item = usize> + '_ {
        let staying = self
            .threads
            .iter()
            .filter(|(_, thread)| !thread.leaving && !thread.shared.is_slow());
        staying.map(|(number, _)| *number)
    }

    /// Tells a thread without queues to end. [`Command::PollEnded`] reports when it has ended.
    pub(super) fn end(&mut self, number: usize) {
        if let Some(thread) = self.threads.get_mut(&number) {
            thread.removed.store(true, Ordering::Relaxed);
            thread.shared.stop.store(true, Ordering::Release);
            thread.shared.sleeper.wake();
        }
    }

    /// Joins a thread that has ended, and makes its number free.
    pub(super) fn ended(&mut self, reader: Reader<Topology>) {
        if let Some(mut thread) = self.threads.remove(&reader.index())
            && let Some(handle) = thread.handle.take()
        {
            // The join is short: the thread is executing its last instructions.
            let _ = handle.join();
        }
        self.spare.push(reader);
    }

    /// Adds the kicks of a topology to the threads' epolls, before it is published.
    ///
    /// Kicks that are in no plan any more leave epoll here. So they leave before their topology is
    /// retired.
    pub(super) fn prepare(&mut self, before: &Topology, topology: &Topology) {
        for (number, thread) in &mut self.threads {
            let (old, new) = (&before.plans[*number], &topology.plans[*number]);
            thread.changed = !Arc::ptr_eq(old, new);
            if thread.changed {
                thread.prepare(new);
            }
        }
    }

    /// Wakes the threads with new work, as noted by [`PollThreads::prepare`]. A thread that is just
    /// falling asleep does not look at the topology again. So the bell rings whether the thread
    /// sleeps or not.
    pub(super) fn wake(&mut self, topology: &Topology) {
        for (number, thread) in &mut self.threads {
            if !std::mem::take(&mut thread.changed) {
                continue;
            }
            let work = work_of(&topology.plans[*number]);
            let known: HashSet<_> = thread.work.iter().collect();
            if work.iter().any(|item| !known.contains(item)) {
                thread.shared.sleeper.wake();
            }
            thread.work = work;
        }
    }

    /// Stops and joins all poll threads.
    pub(super) fn stop(&mut self) {
        for thread in self.threads.values() {
            thread.shared.stop.store(true, Ordering::Relaxed);
            thread.shared.sleeper.wake();
        }
        for thread in self.threads.values_mut() {
            if let Some(handle) = thread.handle.take()
                && handle.join().is_err()
            {
                tracing::error!("a poll thread had panicked");
            }
            thread.kicks.clear();
        }
    }
}

impl Drop for PollThreads {
    fn drop(&mut self) {
        self.stop();
    }
}

impl PollThread {
    fn new(
        shared: Arc<PollShared>,
        cpu: Option<usize>,
        (tid, removed): (Arc<AtomicU32>, Arc<AtomicBool>),
        handle: Option<JoinHandle<()>>,
    ) -> Self {
        PollThread {
            shared,
            cpu,
            node: cpu.and_then(affinity::numa_node),
            tid,
            handle,
            kicks: HashMap::new(),
            overdue: None,
            changed: false,
            work: Vec::new(),
            leaving: false,
            removed,
        }
    }

    fn prepare(&mut self, plan: &Plan) {
        let wanted: HashMap<usize, &Arc<KickFd>> = plan
            .queues
            .iter()
            .filter_map(|queue| queue.kick.as_ref())
            .map(|kick| (Arc::as_ptr(kick).addr(), kick))
            .collect();
        let sleeper = &self.shared.sleeper;
        self.kicks.retain(|key, kick| {
            let keep = wanted.contains_key(key);
            if !keep && let Err(error) = sleeper.remove(&**kick) {
                tracing::debug!("kick leaves epoll: {error}");
            }
            keep
        });
        for (key, kick) in wanted {
            if self.kicks.contains_key(&key) {
                continue;
            }
            // epoll's data serves only as a name: every wake-up looks at all queues. Descriptors
            // that epoll cannot take were refused earlier (each must be an eventfd). So this fails
            // only for lack of kernel memory.
            match sleeper.add_kick(&**kick, key as u64 >> 4) {
                Ok(()) => drop(self.kicks.insert(key, kick.clone())),
                Err(error) => tracing::warn!("a kick cannot wake its poll thread: {error}"),
            }
        }
    }
}

/// The part of a plan that decides whether a sleeping thread must wake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Work {
    /// Address of the queue. It is not reused while the view that holds the queue is current.
    queue: usize,
    /// Address of the kick; 0 means that the queue must be polled. A new kick counts as work: a
    /// signal of the old kick may have been lost when the old kick left epoll.
    kick: usize,
    enabled: bool,
}

fn work_of(plan: &Plan) -> Vec<Work> {
    let queues = plan.queues.iter().map(|queue| Work {
        queue: Arc::as_ptr(&queue.queue).addr(),
        kick: queue
            .kick
            .as_ref()
            .map_or(0, |kick| Arc::as_ptr(kick).addr()),
        enabled: queue.enabled,
    });
    queues.collect()
}

impl PollThreads {
    /// Starts a thread with `reader`. If that fails, the error comes with the reader where
    /// possible.
    fn start_one(
        &self,
        reader: Reader<Topology>,
        cpu: Option<usize>,
        shared: io::Result<PollShared>,
    ) -> Result<PollThread, (DaemonError, Option<Reader<Topology>>)> {
        let index = reader.index();
        // Everything that may fail comes first. A thread that cannot start must leave its reader
        // for another thread.
        let needs = shared.and_then(|shared| Ok((Arc::new(shared), Caller::new()?)));
        let (shared, caller) = match needs {
            Ok(needs) => needs,
            Err(error) => return Err((DaemonError::System(error), Some(reader))),
        };
        shared.report_to(self.wake.clone());
        let poller = Poller::with(caller, shared.clone(), reader, self.epoch);
        let (give, given) = crossbeam_channel::bounded::<Poller>(1);
        let (tid, removed) = (
            Arc::new(AtomicU32::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let (started, answer) = crossbeam_channel::bounded(1);
        let (own_tid, own_removed) = (tid.clone(), removed.clone());
        let (commands, wake) = (self.commands.clone(), self.wake.clone());
        let name = if shared.is_slow() {
            "poll-slow".to_string()
        } else {
            format!("poll-{index}")
        };
        let spawned = thread::spawn(name, move || {
            let Ok(poller) = given.recv() else {
                return;
            };
            own_tid.store(sched::thread_id(), Ordering::Relaxed);
            // The starter waits for this answer, so the result of the pinning reaches it.
            if let Err(error) = cpu.map_or(Ok(()), affinity::pin) {
                let _ = started.send(Err((error, poller.into_reader())));
                return;
            }
            let _ = started.send(Ok(()));
            let reader = poller.run();
            // At the end of the switch the reader is dropped here, before the publisher is.
            if own_removed.load(Ordering::Relaxed) {
                let _ = commands.send(Command::PollEnded(reader));
                wake.wake();
            }
        });
        let handle = match spawned {
            Ok(handle) => handle,
            Err(error) => return Err((DaemonError::System(error), Some(poller.into_reader()))),
        };
        // The thread waits for its poller, and the starter waits for the thread's answer.
        let _ = give.send(poller);
        match answer.recv() {
            Ok(Ok(())) => {}
            Ok(Err((error, reader))) => return Err((DaemonError::Pin(error), Some(reader))),
            Err(_) => {
                let error = std::io::ErrorKind::Other.into();
                return Err((DaemonError::System(error), None));
            }
        }
        let told = (tid, removed);
        Ok(PollThread::new(shared, cpu, told, Some(handle)))
    }
}
