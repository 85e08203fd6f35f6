//! The composition root: starts the threads and connects them.
//!
//! | thread | does | may block? |
//! |---|---|---|
//! | `poll-N` (any number, pinned by `--poll-cpus`) | passes over its transmit queues; delivers into any port | never (`poll`) |
//! | `poll-slow` (made when needed) | passes over the transmit queues of ports whose memory is slow to touch | in the page faults of these ports, never behind others' claims |
//! | `session-NAME` (one for each frontend) | the vhost-user conversation, and the commands of its guest's driver | yes, only its own VM waits |
//! | control (the caller of [`run`]) | sockets, timers, signals, commands; owns the registry; the only publisher | briefly |
//! | `reaper` | drops retired topologies: munmap in steps, close | yes |
//! | `closer` | closes sockets that nobody has read to their end | yes |
//! | `api`, `api-call`, `api-stream` | HTTP on a unix socket; one call each; one endless answer each | yes |
//! | `start` | adds the ports of the command line, and ends | yes |
//! | `log` (of the command) | writes the log to standard error; others lose lines instead of waiting | yes |

mod accept;
mod balance;
mod closer;
mod command;
mod control;
mod elsewhere;
pub mod embedded;
mod handle;
mod handover;
mod link;
mod mailbox;
mod mirrors;
mod observers;
mod operations;
mod pace;
mod placement;
mod pollers;
mod polling;
mod port;
mod registry;
mod report;
mod slow;
mod socket;
mod stations;
mod streams;
#[cfg(test)]
mod tests;
mod views;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::unbounded;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::api::{Control as _, ControlError, Server, ServerError};
use crate::config::{DaemonConfig, PortSpec, count};
use crate::memory::fence;
use crate::switch::fdb::{Fdb, FdbConfig, FdbError};
use crate::sys::affinity::PinError;
use crate::sys::aio::with_spare;
use crate::sys::signal::Signals;
use crate::sys::snapshot::{Retired, snapshots};
use crate::sys::thread;
use crate::sys::wake::Wake;
use crate::topology::Topology;
use closer::Closer;
use command::Command;
use control::Control;
use elsewhere::Elsewhere;
pub use handle::Handle;
use observers::Names;
use pollers::PollThreads;
use registry::{MAX_THREADS, Registry};
use report::Report;

/// Why the daemon does not start, or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A port of the command line is refused.
    #[error("{0}")]
    Port(ControlError),
    /// A poll thread cannot be pinned.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// More poll CPUs than there can be poll threads.
    #[error("{0} poll CPUs are too many: at most {MAX_THREADS}")]
    TooManyThreads(usize),
    /// The number of idle policies is neither one nor the number of poll threads.
    #[error(
        "{policies} idle policies for {}; give one for all, or one for each",
        count(*threads as u64, "poll thread")
    )]
    IdlePolicies {
        /// Number of policies given.
        policies: usize,
        /// Number of poll threads to start.
        threads: usize,
    },
    /// The forwarding data base cannot be made.
    #[error(transparent)]
    Fdb(#[from] FdbError),
    /// The API cannot be served.
    #[error(transparent)]
    Api(#[from] ServerError),
    /// The control loop failed.
    #[error("the control loop failed: {0}")]
    Events(String),
    /// The operating system refused a resource.
    #[error("the system refuses what the switch needs: {0}")]
    System(io::Error),
}

/// Installs what must exist before any other thread: the SIGBUS fence, and signals as events of the
/// control loop.
pub fn prepare_process() -> io::Result<Signals> {
    raise_descriptor_limit();
    fence::install()?;
    Signals::block()
}

/// Raises the soft limit of descriptors to the hard limit. A port with a frontend and one queue
/// pair holds ten descriptors, so the usual soft limit of 1024 allows few ports.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!("the limit of open descriptors stays as it is: {error}");
    }
}

/// Runs the switch in the foreground until SIGTERM or SIGINT.
pub fn run(config: DaemonConfig) -> Result<(), DaemonError> {
    let signals = prepare_process().map_err(DaemonError::System)?;
    let (control, handle, reaper) = assemble(&config, Some(signals))?;
    let report = handle.report.clone();
    let server = match &config.api_socket {
        Some(path) => {
            let server =
                Server::start(path, config.api_group.as_deref(), Arc::new(handle.clone()))?;
            tracing::info!("API on {path:?}");
            Some(server)
        }
        None => None,
    };
    // Control answers only while its loop runs. So a separate thread adds the ports of the command
    // line.
    let (outcome, first_error) = crossbeam_channel::bounded(1);
    let ports = config.ports.clone();
    let adder = thread::spawn("start", move || add_first_ports(&handle, ports, &outcome))
        .map_err(DaemonError::System)?;
    let ended = control.run();
    let _ = adder.join();
    report.hub.stop(std::time::SystemTime::now());
    if let Some(server) = server {
        server.stop();
    }
    let _ = reaper.join();
    match first_error.try_recv() {
        // A signal that comes while ports are being added makes the adding fail. This is no error.
        Ok(ControlError::Stopping) | Err(_) => ended,
        Ok(error) => Err(DaemonError::Port(error)),
    }
}

fn add_first_ports(
    handle: &Handle,
    ports: Vec<PortSpec>,
    outcome: &crossbeam_channel::Sender<ControlError>,
) {
    for spec in ports {
        if let Err(error) = handle.add_port(spec, false) {
            let _ = outcome.send(error);
            let _ = handle.tell(Command::Stop);
            return;
        }
    }
    tracing::info!("ready");
}

/// A switch inside this process, without API and signals, for `pollux bench` and tests.
#[derive(Debug)]
pub struct Daemon {
    handle: Handle,
    threads: Vec<JoinHandle<()>>,
}

impl Daemon {
    /// Starts the switch. The process must have called [`prepare_process`] or [`fence::install`]
    /// before.
    pub fn start(config: &DaemonConfig) -> Result<Self, DaemonError> {
        let (control, handle, reaper) = assemble(config, None)?;
        let thread = thread::spawn("control", move || {
            if let Err(error) = control.run() {
                tracing::error!("{error}");
            }
        })
        .map_err(DaemonError::System)?;
        let daemon = Daemon {
            handle,
            threads: vec![thread, reaper],
        };
        for spec in &config.ports {
            daemon
                .handle
                .add_port(spec.clone(), false)
                .map_err(DaemonError::Port)?;
        }
        Ok(daemon)
    }

    /// Returns the handle that operates the switch.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.handle.tell(Command::Stop);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Builds everything except the running control loop. The caller runs the loop.
fn assemble(
    config: &DaemonConfig,
    signals: Option<Signals>,
) -> Result<(Control, Handle, JoinHandle<()>), DaemonError> {
    let threads = config.poll_cpus.len().max(1);
    if threads > MAX_THREADS {
        return Err(DaemonError::TooManyThreads(threads));
    }
    let policies = config.idle.0.len();
    if policies != 1 && policies != threads {
        return Err(DaemonError::IdlePolicies { policies, threads });
    }
    let epoch = Instant::now();
    let mut fdb_config = FdbConfig::with_capacity(config.fdb_size);
    fdb_config.ageing = config.mac_ageing;
    let fdb = Arc::new(Fdb::new(fdb_config)?);
    let (sender, receiver) = unbounded();
    let wake = Arc::new(Wake::new().map_err(DaemonError::System)?);
    // A reader for each thread that there may ever be. A reader without a thread is marked asleep,
    // so nobody waits for it.
    let since = vec![epoch; MAX_THREADS].into();
    let empty = Topology::build(&[], since, fdb.clone(), |_, _| None);
    let (publisher, readers) = snapshots(empty, MAX_THREADS);
    let all = config.idle.of_all();
    let mut polls = PollThreads::new(readers, all, epoch, sender.clone(), wake.clone());
    if config.poll_cpus.is_empty() {
        polls.start(None, None)?;
    }
    for (number, cpu) in config.poll_cpus.iter().enumerate() {
        polls.start(Some(*cpu), config.idle.0.get(number).copied())?;
    }
    let (reap, retired) = unbounded::<Retired<Topology>>();
    // The reaper ends when control, the only sender, is gone.
    let reaper = thread::spawn("reaper", move || retired.iter().for_each(drop))
        .map_err(DaemonError::System)?;
    let closer = Closer::start().map_err(DaemonError::System)?;
    // Reserves now the spare aio context that sessions need for calls, so that a failure shows at
    // start.
    with_spare(|_| ()).map_err(DaemonError::System)?;
    if signals.is_some() {
        polls.own_process(Elsewhere::new().map_err(DaemonError::System)?);
    }
    let names = Arc::new(Names::default());
    let acknowledgements = publisher.acknowledgements();
    let fdb = (fdb, config.fdb_size);
    let registry = Registry::new(publisher, polls, fdb, reap, epoch, names.clone());
    let report = Arc::new(Report::default());
    let handle = Handle {
        commands: sender.clone(),
        wake: wake.clone(),
        report: report.clone(),
        names,
        acknowledgements,
    };
    let control = Control::new(
        registry,
        report,
        (sender, receiver),
        wake,
        signals,
        closer,
        config,
    );
    Ok((control, handle, reaper))
}
