//! `pollux bench`: guests that measure a switch, over real vhost-user sockets and real shared
//! memory.
//!
//! ```text
//! run ── plan (settings, flows)
//!  ├─ frontend (vhost-user) ── backend under test
//!  ├─ memory (rings, buffers)
//!  └─ client threads ── guest (queues) ── virtio::driver
//!                        └─ frame (stamp, verify) ── tracker ── report
//! ```
//!
//! The client is one or more threads, each playing some of the guests. What a frame costs it is
//! kept low, since it bounds what can be measured, and is itself measured with `--self-test`.
//! Without `--attach` the caller starts a switch in this process ([`StartSwitch`]).
//!
//! What its exit codes mean: [`EXIT_CODES`].

pub mod client;
pub mod frame;
pub mod frontend;
pub mod guest;
pub mod memory;
pub mod null_peer;
pub mod plan;
pub mod plot;
pub mod report;
pub mod run;
pub mod self_test;
pub mod sweep;
pub mod tracker;

use std::error::Error;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use rustix::thread::{CpuSet, sched_getaffinity};

use self::frontend::Order;
use self::plan::{Mode, Pattern, Plan, PlanError};
use self::report::{Report, Verdict};
use self::run::{RunError, Setting};
use self::sweep::{Sweep, draw};
use crate::config::{CpuList, SocketMode};

/// Success.
pub const EXIT_OK: u8 = 0;
/// The client itself failed.
pub const EXIT_FAILED: u8 = 1;
/// Bad arguments.
pub const EXIT_ARGUMENTS: u8 = 2;
/// Cannot attach.
pub const EXIT_ATTACH: u8 = 3;
/// Loss, corruption, a partial or an inconclusive run.
pub const EXIT_RUN: u8 = 6;

/// What the codes mean, in `--help`, in the man page and in `docs/operating.md`.
pub const EXIT_CODES: [(u8, &str); 5] = [
    (
        EXIT_OK,
        "every frame accounted for; with `open:RATE` loss is a result, not a failure",
    ),
    (
        EXIT_FAILED,
        "the client itself failed: memory, threads, files",
    ),
    (
        EXIT_ARGUMENTS,
        "bad arguments, or such as do not go together",
    ),
    (EXIT_ATTACH, "cannot attach to a backend"),
    (
        EXIT_RUN,
        "frames lost, changed, doubled or out of order; or cut short; or inconclusive",
    ),
];

/// How long each step of attaching may take.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(5);

/// A switch that was started for a run; dropping it ends it.
#[derive(Debug)]
pub struct EmbeddedSwitch<T> {
    /// A socket for each guest, on which the switch listens.
    pub sockets: Vec<PathBuf>,
    /// The switch.
    pub switch: T,
}

/// Starts a switch in this process, with so many ports of so many queue pairs.
pub type StartSwitch<T> =
    fn(ports: usize, queue_pairs: u16) -> Result<EmbeddedSwitch<T>, Box<dyn Error>>;

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// Negotiate it.
    On,
    /// Do not.
    Off,
}

/// Kinds of ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Ring {
    /// virtio 1.2 §2.7.
    Split,
    /// virtio 1.2 §2.8.
    Packed,
}

/// Who listens on the sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Listener {
    /// The backend listens, the guests connect.
    Server,
    /// The guests listen, the backend connects.
    Client,
}

/// Message orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Vmm {
    /// As QEMU.
    Qemu,
    /// As cloud-hypervisor.
    CloudHypervisor,
}

/// Measure a switch, or any vhost-user backend, with built-in guests.
///
/// Without --attach a switch is started in this process; with it, the guests attach to any
/// vhost-user backend: DPDK testpmd, Open vSwitch, another Pollux.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Frame size in bytes, without the check sequence
    #[arg(long, default_value_t = 64, value_name = "BYTES")]
    pub size: usize,
    /// How long to measure
    #[arg(long, default_value_t = 5.0)]
    pub seconds: f64,
    /// Number of guests
    #[arg(long, default_value_t = 2)]
    pub guests: usize,
    /// tput: a window of frames in flight; rtt: one frame, there and back; open:RATE: so many
    /// frames a second from each sender
    #[arg(long, default_value = "tput")]
    pub mode: Mode,
    /// Who sends to whom
    #[arg(long, value_enum, default_value = "pairs")]
    pub pattern: Pattern,
    /// Queue pairs of each guest
    #[arg(long, default_value_t = 1)]
    pub queues: usize,
    /// Frames in flight for each flow [default: as many as the receiver's ring holds]
    #[arg(long)]
    pub window: Option<usize>,
    /// Kind of ring
    #[arg(long, value_enum, default_value = "split")]
    pub ring: Ring,
    /// Entries of each ring
    #[arg(long, default_value_t = 256)]
    pub ring_size: u16,
    /// Mergeable receive buffers
    #[arg(long, value_enum, default_value = "off")]
    pub mergeable: OnOff,
    /// VIRTIO_F_IN_ORDER
    #[arg(long, value_enum, default_value = "off")]
    pub in_order: OnOff,
    /// Attach to these sockets, one for each guest
    #[arg(long, value_delimiter = ',', value_name = "SOCK")]
    pub attach: Vec<PathBuf>,
    /// Who listens: with server the backend, with client the guests
    #[arg(long, value_enum, default_value = "server")]
    pub mode_of_socket: Listener,
    /// Whose order of vhost-user messages to follow
    #[arg(long, value_enum, default_value = "qemu")]
    pub vmm: Vmm,
    /// Client threads; one plays all guests by default
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Pin the client threads to these processors, in turn
    #[arg(long, value_name = "LIST")]
    pub cpu: Option<CpuList>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Measure what the client itself costs, against a peer that does nothing but copy
    #[arg(long, conflicts_with_all = ["attach", "sweep"])]
    pub self_test: bool,
    /// Repeat with each value: size=64,128,… or window=… or ring-size=…
    #[arg(long)]
    pub sweep: Option<Sweep>,
    /// Draw a sweep's Mpps and Gbit/s
    #[arg(long, value_name = "FILE.svg", requires = "sweep")]
    pub plot: Option<PathBuf>,
}

/// Why `pollux bench` failed before it had a result.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The run.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The switch in this process.
    #[error("cannot start the switch")]
    Switch(#[source] Box<dyn Error>),
    /// No switch in this process.
    #[error("--attach is needed: this program has no switch built in")]
    NoSwitch,
    /// Output.
    #[error("cannot write the result")]
    Output(#[source] io::Error),
    /// The plot.
    #[error("cannot write {path}")]
    Plot {
        /// Where to.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl BenchError {
    fn exit_code(&self) -> u8 {
        match self {
            BenchError::Run(RunError::Plan(_) | RunError::Sockets { .. }) => EXIT_ARGUMENTS,
            BenchError::NoSwitch => EXIT_ARGUMENTS,
            BenchError::Run(RunError::Attach { .. }) => EXIT_ATTACH,
            _ => EXIT_FAILED,
        }
    }
}

impl From<PlanError> for BenchError {
    fn from(error: PlanError) -> Self {
        BenchError::Run(RunError::Plan(error))
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Runs the command; `start` starts a switch where none is attached to. Returns the exit code.
pub fn run<T>(args: &Args, start: Option<StartSwitch<T>>) -> u8 {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // Without the handler Ctrl-C ends the program without a partial result: no reason not to
        // run.
        let _ = vmm_sys_util::signal::register_signal_handler(signal, interrupt);
    }
    match bench(args, start) {
        Ok(code) => code,
        Err(error) => {
            let text = format!("pollux bench: {}\n", chain(&error));
            // Nobody is left to tell if this fails.
            let _ = io::stderr().write_all(text.as_bytes());
            error.exit_code()
        }
    }
}

/// An error and its sources in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}

fn bench<T>(args: &Args, start: Option<StartSwitch<T>>) -> Result<u8, BenchError> {
    let plans = args.plans()?;
    if args.self_test {
        return self_test(args, &plans[0]);
    }
    if let Some(path) = &args.plot {
        check_plot(path)?;
    }
    let mut reports = Vec::new();
    for plan in &plans {
        let embedded = match (&args.attach[..], start) {
            ([], Some(start)) => {
                Some(start(plan.guests, plan.queues as u16).map_err(BenchError::Switch)?)
            }
            ([], None) => return Err(BenchError::NoSwitch),
            _ => None,
        };
        let sockets = embedded
            .as_ref()
            .map_or_else(|| args.attach.clone(), |e| e.sockets.clone());
        let report = one(plan, &args.setting(sockets))?;
        let cut_short = report.verdict == Verdict::Incomplete;
        print(&report, args.json).map_err(BenchError::Output)?;
        reports.push(report);
        if cut_short {
            break;
        }
    }
    if let (Some(path), Some(sweep)) = (&args.plot, &args.sweep) {
        draw(sweep, &reports)
            .and_then(|svg| std::fs::write(path, svg))
            .map_err(|source| BenchError::Plot {
                path: path.clone(),
                source,
            })?;
    }
    let good = reports.iter().all(|report| report.verdict == Verdict::Ok);
    Ok(if good { EXIT_OK } else { EXIT_RUN })
}

/// Opens the file of a plot before an hour's sweep rather than behind it.
fn check_plot(path: &Path) -> Result<(), BenchError> {
    let mut options = OpenOptions::new();
    let opened = options.create(true).append(true).open(path);
    opened.map(drop).map_err(|source| BenchError::Plot {
        path: path.to_path_buf(),
        source,
    })
}

impl Args {
    /// One plan, or one for each value of a sweep.
    fn plans(&self) -> Result<Vec<Plan>, PlanError> {
        let seconds = Duration::try_from_secs_f64(self.seconds).map_err(|_| PlanError::Seconds)?;
        self.check_threads()?;
        let plan = Plan {
            size: self.size,
            duration: seconds,
            guests: self.guests,
            mode: self.mode,
            pattern: self.pattern,
            queues: self.queues,
            ring_size: self.ring_size,
            window: self.window,
            packed: self.ring == Ring::Packed,
            mergeable: self.mergeable == OnOff::On,
            in_order: self.in_order == OnOff::On,
        };
        let plans = match &self.sweep {
            None => vec![plan],
            Some(sweep) => sweep
                .values
                .iter()
                .map(|&value| sweep.parameter.apply(plan.clone(), value))
                .collect(),
        };
        // All before the first runs: an hour's sweep must not end at a bad last value.
        plans.iter().try_for_each(|plan| plan.check().map(|_| ()))?;
        Ok(plans)
    }

    /// Where the client is to run. Where the system does not say what is possible, pinning will.
    fn check_threads(&self) -> Result<(), PlanError> {
        if self.threads == 0 {
            return Err(PlanError::Threads);
        }
        let Ok(allowed) = sched_getaffinity(None) else {
            return Ok(());
        };
        let mut wanted = self.cpu.iter().flat_map(|list| &list.0).copied();
        let refused = |cpu: &usize| *cpu >= CpuSet::MAX_CPU || !allowed.is_set(*cpu);
        wanted
            .find(refused)
            .map_or(Ok(()), |cpu| Err(PlanError::Cpu(cpu)))
    }

    fn setting(&self, sockets: Vec<PathBuf>) -> Setting {
        Setting {
            sockets,
            backend: match self.mode_of_socket {
                Listener::Server => SocketMode::Server,
                Listener::Client => SocketMode::Client,
            },
            order: match self.vmm {
                Vmm::Qemu => Order::Qemu,
                Vmm::CloudHypervisor => Order::CloudHypervisor,
            },
            timeout: ATTACH_TIMEOUT,
            threads: self.threads,
            cpus: self.cpu.clone().map(|list| list.0).unwrap_or_default(),
        }
    }
}

fn one(plan: &Plan, setting: &Setting) -> Result<Report, BenchError> {
    let bar = if io::stderr().is_terminal() {
        ProgressBar::new(1000)
    } else {
        ProgressBar::hidden()
    };
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {percent:>3} %  {msg}") {
        bar.set_style(style);
    }
    let mut progress = |share: f64, received: u64| {
        bar.set_position((share * 1000.0) as u64);
        bar.set_message(format!("{received} frames received"));
    };
    let report = run::run(plan, setting, &INTERRUPTED, &mut progress);
    bar.finish_and_clear();
    Ok(report?)
}

fn self_test(args: &Args, plan: &Plan) -> Result<u8, BenchError> {
    let cost = self_test::measure(plan).map_err(RunError::Memory)?;
    let text = if args.json {
        json(&cost)
    } else {
        Ok(cost.to_string())
    };
    text.and_then(|text| io::stdout().lock().write_all(text.as_bytes()))
        .map_err(BenchError::Output)?;
    Ok(if cost.intact { EXIT_OK } else { EXIT_RUN })
}

fn json(value: &impl serde::Serialize) -> io::Result<String> {
    let mut text = serde_json::to_string(value)?;
    text.push('\n');
    Ok(text)
}

fn print(report: &Report, as_json: bool) -> io::Result<()> {
    let text = if as_json {
        json(report)?
    } else {
        report.to_string()
    };
    io::stdout().lock().write_all(text.as_bytes())
}

#[cfg(test)]
mod tests;
