//! What changes cost: the scenarios of `benches/change` that need a program of their own.
//!
//! ```text
//! scenarios claims|gather|pairs|growth|copies  in this process, without sockets
//! scenarios scale|footprint                    switches of its own, with 0 to 512 ports
//! scenarios slow|flood|fair  --attach A,B,…    guests on a switch's sockets, all of one thread
//! scenarios victim|reset     --attach A,B      guests that come, go and are killed
//! scenarios plot FILE.svg                      draws figures from standard input
//! ```
//!
//! Guests are those of `pollux bench`. Every scenario prints one JSON object. Without arguments
//! (`cargo bench`) the two of the first line run. Exit status: 0 measured, 1 not.

#![allow(
    clippy::unwrap_used,
    reason = "a measurement that cannot be made fails by panicking"
)]

mod attached;
mod claims;
mod copies;
mod footprint;
mod gather;
mod growth;
#[path = "../../tests/common/many.rs"]
#[allow(dead_code, reason = "a helper of tests")]
mod many;
mod pairs;
mod plots;
#[path = "../rig/mod.rs"]
mod rig;
mod scale;
mod spin;
mod turns;
mod victims;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use pollux::bench::plan::{Mode, Pattern, Plan};
use pollux::bench::run::RunError;
use pollux::sys::affinity;

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    scenario: Option<Scenario>,
    /// Measured time of one sample
    #[arg(long, global = true, default_value_t = 1.0)]
    seconds: f64,
    /// Samples of each kind, in turn
    #[arg(long, global = true, default_value_t = 3)]
    rounds: usize,
    /// Processor of the (first) thread, and of the second
    #[arg(long, global = true, value_delimiter = ',')]
    cpus: Vec<usize>,
    /// What `cargo bench` passes, behind all other arguments
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum Scenario {
    /// Two delivering threads into one receive ring, against one
    Claims {
        /// Frames of a claim
        #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
        frames: Vec<usize>,
    },
    /// 32 ports that send one frame each in a pass, against one port that sends 32
    Gather,
    /// Two poll threads that serve two pairs of guests, against one
    Pairs,
    /// Start, memory, passes and changes of a switch with many ports
    Scale {
        /// Numbers of ports
        #[arg(long, value_delimiter = ',', default_value = "2,8,32,128,512")]
        ports: Vec<usize>,
    },
    /// How the cost grows with ports, addresses, copies, bursts and rings
    Growth {
        /// Curves; all by default
        #[arg(
            long,
            value_delimiter = ',',
            value_parser = clap::builder::PossibleValuesParser::new(growth::names())
        )]
        curves: Vec<String>,
        /// Draw each into a file here
        #[arg(long, value_name = "DIR")]
        plots: Option<PathBuf>,
    },
    /// What one core copies, in the memory of two guests of `pollux bench`
    Copies {
        /// Bytes of a copy
        #[arg(long, default_value_t = 9000)]
        size: usize,
        /// The memory of guests with mergeable receive buffers
        #[arg(long)]
        mergeable: bool,
        /// Entries of each ring
        #[arg(long, default_value_t = 256)]
        ring_size: u16,
    },
    /// How long and how often a thread that only looks at the clock is away
    Spin,
    /// Memory of a switch without ports and with them, and the time from its start to the first
    /// frame
    Footprint {
        /// Ports
        #[arg(long, default_value_t = 64)]
        ports: usize,
    },
    /// Draw {"abscissa":…,"logarithmic":…,"panels":[{"name":…,"lines":[{"name":…,
    /// "points":[[x,y],…]},…]},…]}
    Plot {
        /// Where to
        file: PathBuf,
    },
    /// A sender, a fast receiver, and one that at times returns no buffer
    Slow {
        #[arg(long, value_delimiter = ',')]
        attach: Vec<PathBuf>,
    },
    /// A receiver at a quarter of its capacity, a flooder, and a sender at 1 % of what the receiver
    /// takes
    Flood {
        #[arg(long, value_delimiter = ',')]
        attach: Vec<PathBuf>,
    },
    /// A flooder of long frames and its receiver, a paced sender of small ones and its receiver
    Fair {
        #[arg(long, value_delimiter = ',')]
        attach: Vec<PathBuf>,
        /// Bytes of the long frames
        #[arg(long, default_value_t = 65_000)]
        size: usize,
    },
    /// Two guests that exchange frames until they are killed; says `exchanged` when they have
    Victim {
        #[arg(long, value_delimiter = ',')]
        attach: Vec<PathBuf>,
        /// MiB of further touched memory of each
        #[arg(long, default_value_t = 512)]
        ballast: usize,
    },
    /// Two guests that exchange frames and reset their devices, again and again
    Reset {
        #[arg(long, value_delimiter = ',')]
        attach: Vec<PathBuf>,
        /// MiB of further touched memory of each
        #[arg(long, default_value_t = 512)]
        ballast: usize,
        /// How often
        #[arg(long, default_value_t = 10)]
        times: u32,
    },
}

/// How a scenario is measured.
#[derive(Clone, Debug)]
struct Effort {
    time: Duration,
    rounds: usize,
    cpus: Vec<usize>,
}

impl Effort {
    /// Pins the calling thread to the `n`-th processor that was named.
    fn pin(&self, n: usize) {
        if let Some(cpu) = self.cpus.get(n) {
            affinity::pin(*cpu).unwrap();
        }
    }
}

/// The settings of `pollux bench`'s guests, as far as they are the same in all scenarios.
fn plan(guests: usize, size: usize) -> Plan {
    Plan {
        size,
        duration: Duration::from_secs(86_400),
        guests,
        mode: Mode::Throughput,
        pattern: Pattern::Pairs,
        queues: 1,
        ring_size: 256,
        window: None,
        packed: false,
        mergeable: size > 1514,
        in_order: false,
    }
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn run(scenario: &Scenario, effort: &Effort) -> Result<serde_json::Value, RunError> {
    match scenario {
        Scenario::Claims { frames } => Ok(claims::measure(frames, effort)),
        Scenario::Gather => Ok(gather::measure(effort)),
        Scenario::Pairs => Ok(pairs::measure(effort)),
        Scenario::Scale { ports } => Ok(scale::measure(ports, effort)),
        Scenario::Growth { curves, plots } => Ok(growth::measure(curves, plots.as_deref(), effort)),
        Scenario::Copies {
            size,
            mergeable,
            ring_size,
        } => Ok(copies::measure(*size, *mergeable, *ring_size, effort)),
        Scenario::Footprint { ports } => footprint::measure(*ports, effort),
        Scenario::Spin => Ok(spin::measure(effort)),
        Scenario::Plot { file } => Ok(plots::draw(file)),
        Scenario::Slow { attach } => attached::slow(attach, effort),
        Scenario::Flood { attach } => attached::flood(attach, effort),
        Scenario::Fair { attach, size } => attached::fair(attach, *size, effort),
        Scenario::Victim { attach, ballast } => victims::victim(attach, ballast << 20, effort),
        Scenario::Reset {
            attach,
            ballast,
            times,
        } => victims::reset(attach, ballast << 20, *times, effort),
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let effort = Effort {
        time: Duration::from_secs_f64(args.seconds),
        rounds: args.rounds.max(1),
        cpus: args.cpus,
    };
    let frames = vec![1, 8, 32];
    let all = [Scenario::Claims { frames }, Scenario::Gather];
    let scenarios = args
        .scenario
        .as_ref()
        .map_or(&all[..], std::slice::from_ref);
    for scenario in scenarios {
        match run(scenario, &effort) {
            Ok(result) => println!("{result}"),
            Err(error) => {
                let mut next: Option<&dyn std::error::Error> = Some(&error);
                while let Some(error) = next {
                    eprintln!("scenarios: {error}");
                    next = error.source();
                }
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
