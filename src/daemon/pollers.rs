//! The poll threads as control sees them: start, kick registration, wake-ups, stop.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use super::DaemonError;
use crate::config::IdlePolicy;
use crate::poll::{PollShared, Poller};
use crate::stats::ThreadStats;
use crate::sys::affinity;
use crate::sys::epoll::Sleeper;
use crate::sys::eventfd::KickFd;
use crate::sys::sched;
use crate::sys::snapshot::Reader;
use crate::topology::{Plan, Topology};

/// One poll thread.
#[derive(Debug)]
pub(super) struct PollThread {
    pub(super) shared: Arc<PollShared>,
    pub(super) cpu: Option<usize>,
    pub(super) tid: Arc<AtomicU32>,
    handle: Option<JoinHandle<()>>,
    /// Kicks in the thread's epoll, by address of the object (which they keep alive).
    kicks: HashMap<usize, Arc<KickFd>>,
    /// It was reported as overdue, for what was published then.
    pub(super) overdue: Option<Instant>,
    /// What the last plan held, to see whether a new one brings work.
    work: Vec<(usize, usize, bool)>,
}

/// All of them.
#[derive(Debug)]
pub(super) struct PollThreads {
    pub(super) threads: Vec<PollThread>,
}

impl PollThreads {
    /// Starts one thread for each reader, pinned to its CPU if `cpus` names one.
    pub(super) fn start(
        readers: Vec<Reader<Topology>>,
        cpus: &[usize],
        idle: IdlePolicy,
        epoch: Instant,
    ) -> Result<Self, DaemonError> {
        let mut threads = PollThreads {
            threads: Vec::new(),
        };
        for reader in readers {
            let cpu = cpus.get(reader.index()).copied();
            threads.threads.push(start_one(reader, cpu, idle, epoch)?);
        }
        Ok(threads)
    }

    /// Brings the kicks of a topology into the threads' beds, before it is published.
    ///
    /// Kicks that are in no plan any more leave epoll here, so before their topology is retired.
    pub(super) fn prepare(&mut self, topology: &Topology) {
        for (thread, plan) in self.threads.iter_mut().zip(&topology.plans) {
            thread.prepare(plan);
        }
    }

    /// Wakes the threads that got new work. A thread that is just falling asleep does not look at the topology again,
    /// so the bell rings whether it sleeps or not.
    pub(super) fn wake(&mut self, topology: &Topology) {
        for (thread, plan) in self.threads.iter_mut().zip(&topology.plans) {
            let work = work_of(plan);
            if work.iter().any(|item| !thread.work.contains(item)) {
                thread.shared.sleeper.wake();
            }
            thread.work = work;
        }
    }

    /// Stops and joins them.
    pub(super) fn stop(&mut self) {
        for thread in &self.threads {
            thread.shared.stop.store(true, Ordering::Relaxed);
            thread.shared.sleeper.wake();
        }
        for thread in &mut self.threads {
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
            // The data is only a name: every wake-up looks at all queues. A descriptor that epoll does not take was
            // refused when it came (it must be an eventfd), so this fails only for lack of kernel memory.
            match sleeper.add_kick(&**kick, key as u64 >> 4) {
                Ok(()) => drop(self.kicks.insert(key, kick.clone())),
                Err(error) => tracing::warn!("a kick cannot wake its poll thread: {error}"),
            }
        }
    }
}

/// What of a plan may need a thread that sleeps: queues, where they are called, whether they are enabled.
fn work_of(plan: &Plan) -> Vec<(usize, usize, bool)> {
    let queues = plan.queues.iter().map(|queue| {
        let call = queue
            .call
            .as_ref()
            .map_or(0, |call| Arc::as_ptr(call).addr());
        (Arc::as_ptr(&queue.queue).addr(), call, queue.enabled)
    });
    let starts = plan
        .starts
        .iter()
        .map(|start| (start.address, start.call, true));
    queues.chain(starts).collect()
}

fn start_one(
    reader: Reader<Topology>,
    cpu: Option<usize>,
    idle: IdlePolicy,
    epoch: Instant,
) -> Result<PollThread, DaemonError> {
    let index = reader.index();
    let shared = Arc::new(PollShared {
        stats: ThreadStats::default(),
        sleeper: Sleeper::new().map_err(DaemonError::System)?,
        stop: AtomicBool::new(false),
    });
    let poller = Poller::new(shared.clone(), reader, idle, epoch).map_err(DaemonError::System)?;
    let tid = Arc::new(AtomicU32::new(0));
    let (started, answer) = crossbeam_channel::bounded(1);
    let own_tid = tid.clone();
    let handle = std::thread::Builder::new()
        .name(format!("poll-{index}"))
        .spawn(move || {
            own_tid.store(sched::thread_id(), Ordering::Relaxed);
            let pinned = cpu.map_or(Ok(()), affinity::pin);
            let failed = pinned.is_err();
            // The starter waits for this answer.
            let _ = started.send(pinned);
            if !failed {
                poller.run();
            }
        })
        .map_err(DaemonError::System)?;
    match answer.recv() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(DaemonError::Pin(error)),
        Err(_) => return Err(DaemonError::System(std::io::ErrorKind::Other.into())),
    }
    Ok(PollThread {
        shared,
        cpu,
        tid,
        handle: Some(handle),
        kicks: HashMap::new(),
        overdue: None,
        work: Vec::new(),
    })
}
