//! One run from attaching to the report.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::client::{Shared, ThreadReport, WARM_UP, play};
use super::frame::{Checker, MacPrefix};
use super::frontend::{
    AttachError, Frontend, IN_ORDER, MRG_RXBUF, Order, Queue, RING_PACKED, Region, VERSION_1,
};
use super::guest::Guest;
use super::memory::{GUEST_BASE, GuestRam};
use super::plan::{FlowCounters, FlowSpec, Plan, PlanError};
use super::report::{EndedEarly, Report};
use crate::config::SocketMode;
use crate::memory::SharedMemory;
use crate::virtio::driver::RingLayout;

/// Guest address of the ballast, far above the memory that the guest uses.
const BALLAST_BASE: u64 = 1 << 40;
const PAGE: usize = 4096;
/// How often progress, interruption and the backends are checked.
const WATCH: Duration = Duration::from_millis(100);

/// Why there was no run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Settings that do not go together.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A guest could not attach.
    #[error("guest {guest} cannot attach")]
    Attach {
        /// Which.
        guest: usize,
        /// Why.
        source: AttachError,
    },
    /// Fewer sockets than guests.
    #[error("{guests} guests need as many sockets, {sockets} are given (--attach)")]
    Sockets {
        /// Guests.
        guests: usize,
        /// Sockets.
        sockets: usize,
    },
    /// Memory or event descriptors.
    #[error("cannot set up the guests' memory")]
    Memory(#[source] io::Error),
    /// Threads.
    #[error("cannot start or pin a client thread")]
    Thread(#[source] io::Error),
}

/// Where and how guests attach, and how the client runs.
#[derive(Clone, Debug)]
pub struct Setting {
    /// One socket for each guest.
    pub sockets: Vec<PathBuf>,
    /// Who listens, from the backend's view: `Server` means that the client connects.
    pub backend: SocketMode,
    /// Message order.
    pub order: Order,
    /// For every step of attaching.
    pub timeout: Duration,
    /// Client threads.
    pub threads: usize,
    /// Where they run; empty for anywhere.
    pub cpus: Vec<usize>,
}

/// Called ten times a second with the share of the run that is over and the frames received so far.
pub type Progress<'p> = &'p mut dyn FnMut(f64, u64);

/// Memory and descriptors of one guest, from which its rings borrow.
#[derive(Debug)]
pub struct Attachment {
    ram: GuestRam,
    /// Shared, touched, and never used.
    ballast: Option<SharedMemory>,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
}

/// Attaches the guests, runs, detaches.
pub fn run(
    plan: &Plan,
    setting: &Setting,
    interrupted: &AtomicBool,
    progress: Progress<'_>,
) -> Result<Report, RunError> {
    let flows = plan.check()?;
    if setting.sockets.len() != plan.guests {
        return Err(RunError::Sockets {
            guests: plan.guests,
            sockets: setting.sockets.len(),
        });
    }
    let counters: Vec<FlowCounters> = flows.iter().map(|_| FlowCounters::default()).collect();
    let prefix = MacPrefix::random().map_err(RunError::Memory)?;
    let checker = Checker::new(plan.size, prefix);
    let attachments = (0..plan.guests)
        .map(|_| Attachment::new(plan, 0))
        .collect::<io::Result<Vec<_>>>()
        .map_err(RunError::Memory)?;
    let mut guests =
        build_guests(plan, &attachments, &flows, &counters, &checker).map_err(RunError::Memory)?;
    let mut frontends = Vec::new();
    for (guest, (path, attachment)) in setting.sockets.iter().zip(&attachments).enumerate() {
        let frontend = attach(plan, setting, path, attachment)
            .map_err(|source| RunError::Attach { guest, source })?;
        frontends.push(frontend);
    }
    guests.iter().for_each(Guest::kick_all);
    // As many threads as there are shares, which may be fewer than asked for: 4 guests on 3 threads
    // are 2 and 2.
    let share = plan.guests.div_ceil(setting.threads.clamp(1, plan.guests));
    let shared = Shared {
        plan,
        flows: &flows,
        counters: &counters,
        checker: &checker,
        clock: quanta::Clock::new(),
        threads: plan.guests.div_ceil(share),
        ready: AtomicUsize::new(0),
        finished: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
        abort: AtomicBool::new(false),
    };
    let (threads, early) = exchange(
        &shared,
        setting,
        &mut guests,
        &frontends,
        interrupted,
        progress,
    )?;
    let rings: Vec<u32> = (0..2 * plan.queues as u32).collect();
    // The numbers are in; a backend that does not stop its rings properly cannot spoil them any
    // more, and closing the connection stops them as well.
    frontends.iter().for_each(|frontend| {
        let _ = frontend.stop(&rings);
    });
    Ok(Report::new(plan, prefix, &threads, &counters, early))
}

impl Attachment {
    /// Memory and descriptors of one guest, with `ballast` bytes more than it needs.
    pub fn new(plan: &Plan, ballast: usize) -> io::Result<Self> {
        let fds = || (0..2 * plan.queues).map(|_| EventFd::new(EFD_NONBLOCK));
        let ballast = (ballast > 0).then(|| touched(ballast)).transpose()?;
        Ok(Attachment {
            ram: GuestRam::new(&plan.memory_needs())?,
            ballast,
            kicks: fds().collect::<io::Result<_>>()?,
            calls: fds().collect::<io::Result<_>>()?,
        })
    }

    /// The guest, with new rings; its device must be stopped.
    pub fn guest<'m>(
        &'m self,
        index: usize,
        plan: &Plan,
        flows: &[FlowSpec],
        counters: &'m [FlowCounters],
        checker: &Checker,
    ) -> io::Result<Guest<'m>> {
        let (ram, kicks) = (&self.ram, &self.kicks);
        Guest::new(index, ram, kicks, plan, flows, counters, checker)
    }

    /// Starts the device over a negotiated connection.
    pub fn start(
        &self,
        plan: &Plan,
        order: Order,
        frontend: &mut Frontend,
    ) -> Result<(), AttachError> {
        let mut regions = vec![Region::whole(&self.ram.memory, GUEST_BASE)];
        let ballast = self.ballast.iter();
        regions.extend(ballast.map(|memory| Region::whole(memory, BALLAST_BASE)));
        frontend.start(order, &regions, &self.queues(plan))
    }

    /// The queues as SET_VRING_* say them: receive and transmit in turn.
    fn queues(&self, plan: &Plan) -> Vec<Queue<'_>> {
        let layout = RingLayout::new(plan.ring_size, plan.packed);
        let places = self.ram.receive.iter().zip(&self.ram.transmit);
        let rings = places.flat_map(|(receive, transmit)| [receive.ring, transmit.ring]);
        rings
            .enumerate()
            .map(|(index, ring)| {
                let address = (self.ram.memory.address() + ring) as u64;
                Queue {
                    index: index as u32,
                    size: plan.ring_size,
                    descriptors: address,
                    available: address + layout.available as u64,
                    used: address + layout.used as u64,
                    base: Guest::start_base(plan),
                    kick: &self.kicks[index],
                    call: &self.calls[index],
                }
            })
            .collect()
    }
}

fn build_guests<'m>(
    plan: &Plan,
    attachments: &'m [Attachment],
    flows: &[FlowSpec],
    counters: &'m [FlowCounters],
    checker: &Checker,
) -> io::Result<Vec<Guest<'m>>> {
    attachments
        .iter()
        .enumerate()
        .map(|(index, attachment)| attachment.guest(index, plan, flows, counters, checker))
        .collect()
}

/// Features without which the run would not be what was asked for, and those only taken along.
fn features(plan: &Plan) -> u64 {
    let wanted = [
        (plan.packed, RING_PACKED),
        (plan.mergeable, MRG_RXBUF),
        (plan.in_order, IN_ORDER),
    ];
    let chosen = wanted.iter().filter(|(on, _)| *on);
    chosen.fold(VERSION_1, |all, (_, bit)| all | bit)
}

fn attach(
    plan: &Plan,
    setting: &Setting,
    path: &Path,
    attachment: &Attachment,
) -> Result<Frontend, AttachError> {
    let mut frontend = match setting.backend {
        SocketMode::Server => Frontend::connect(path, setting.timeout)?,
        SocketMode::Client => Frontend::listen(path, setting.timeout)?,
    };
    negotiate(plan, setting.order, &mut frontend)?;
    attachment.start(plan, setting.order, &mut frontend)?;
    Ok(frontend)
}

/// Agrees on the features that a run needs.
pub fn negotiate(plan: &Plan, order: Order, frontend: &mut Frontend) -> Result<(), AttachError> {
    frontend.negotiate(order, features(plan), 0, plan.queues as u64)?;
    Ok(())
}

/// Makes memory and touches every page of it.
fn touched(len: usize) -> io::Result<SharedMemory> {
    let memory = SharedMemory::create(len, true)?;
    let all = memory
        .window(0, memory.len())
        .ok_or(io::ErrorKind::InvalidInput)?;
    (0..all.len())
        .step_by(PAGE)
        .for_each(|page| all.write_bytes(page, &[0]));
    Ok(memory)
}

/// Runs the client threads and watches over them.
fn exchange(
    shared: &Shared<'_>,
    setting: &Setting,
    guests: &mut [Guest<'_>],
    frontends: &[Frontend],
    interrupted: &AtomicBool,
    progress: Progress<'_>,
) -> Result<(Vec<ThreadReport>, Option<EndedEarly>), RunError> {
    let share = guests.len().div_ceil(shared.threads);
    let (reports, mut early) = std::thread::scope(|scope| {
        let mut handles = Vec::new();
        let mut spawned = Ok(());
        for (n, guests) in guests.chunks_mut(share).enumerate() {
            let cpu = setting.cpus.get(n % setting.cpus.len().max(1)).copied();
            let thread = std::thread::Builder::new().name(format!("guests-{n}"));
            let body = move || -> io::Result<ThreadReport> {
                pin(cpu).inspect_err(|_| shared.abort.store(true, Ordering::Relaxed))?;
                Ok(play(shared, guests))
            };
            match thread.spawn_scoped(scope, body) {
                Ok(handle) => handles.push(handle),
                Err(error) => {
                    shared.abort.store(true, Ordering::Relaxed);
                    spawned = Err(error);
                    break;
                }
            }
        }
        let early = watch(shared, frontends, interrupted, progress, || {
            handles.iter().all(|handle| handle.is_finished())
        });
        let reports: io::Result<Vec<_>> = handles
            .into_iter()
            .map(|handle| match handle.join() {
                Ok(report) => report,
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect();
        spawned
            .and(reports)
            .map(|reports| (reports, early))
            .map_err(RunError::Thread)
    })?;
    for report in &reports {
        let deaf = report.deaf.map(|guest| EndedEarly::Deaf { guest });
        let fault = report.fault.map(EndedEarly::RingFault);
        early = early.or(fault).or(deaf);
    }
    Ok((reports, early))
}

fn pin(cpu: Option<usize>) -> io::Result<()> {
    use rustix::thread::{CpuSet, sched_setaffinity};
    let Some(cpu) = cpu else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

/// Until all threads are done: progress, interruption, and backends that go away.
fn watch(
    shared: &Shared<'_>,
    frontends: &[Frontend],
    interrupted: &AtomicBool,
    progress: Progress<'_>,
    done: impl Fn() -> bool,
) -> Option<EndedEarly> {
    let whole = shared.plan.duration + WARM_UP;
    let started = Instant::now();
    let mut early = None;
    while !done() {
        std::thread::sleep(WATCH);
        let over = started.elapsed().as_secs_f64() / whole.as_secs_f64();
        let counters = shared.counters.iter();
        let received = counters.map(|flow| flow.received.load(Ordering::Relaxed));
        progress(over.min(1.0), received.sum());
        if early.is_some() {
            continue;
        }
        if interrupted.load(Ordering::Relaxed) {
            early = Some(EndedEarly::Interrupted);
            shared.stop.store(true, Ordering::Relaxed);
        }
        if let Some(guest) = frontends.iter().position(Frontend::is_closed) {
            early = Some(EndedEarly::BackendClosed { guest });
            shared.abort.store(true, Ordering::Relaxed);
        }
    }
    early
}
