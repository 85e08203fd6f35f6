//! The command line: names, values and help texts.
//!
//! Man pages and completions are generated from the same definitions.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueHint};

use crate::api::types::PortPatch;
use crate::bench;
use crate::config::{
    CpuList, IdleList, IdlePolicy, PortOption, PortSpec, Rebalance, optional_forms, settable_forms,
};
use crate::wire::Mac;

use super::commands::once;
use super::failure::{EXIT_CODES, Failure, exit_codes};
use super::log_filter::LogFilter;

mod observe;

pub(super) use observe::{CaptureArgs, ExtcapArgs, MirrorCommand, WatchArgs};

/// Names that other programs of this kind use for `remove` and `list`.
const REMOVE: [&str; 3] = ["del", "delete", "rm"];
const LIST: &str = "ls";

/// A software switch for virtual machines.
///
/// QEMU and cloud-hypervisor guests attach to it over vhost-user sockets. `pollux run` is the
/// switch; the other commands talk to it over its API socket.
#[derive(Debug, Parser)]
#[command(
    name = "pollux",
    version,
    after_help = exit_codes(&EXIT_CODES),
    arg_required_else_help = true,
    max_term_width = 100
)]
pub struct Cli {
    /// API socket of the daemon [default: /run/pollux/api.sock as root, else
    /// $XDG_RUNTIME_DIR/pollux/api.sock]
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "POLLUX_API_SOCKET",
        value_hint = ValueHint::FilePath
    )]
    pub api_socket: Option<PathBuf>,
    /// Print the capabilities of the vhost-user backend as JSON and exit, whatever else is given
    #[arg(long)]
    pub print_capabilities: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the switch, in the foreground, until SIGTERM or SIGINT
    Run(RunArgs),
    /// Create, change, remove and look at ports
    #[command(subcommand)]
    Port(PortCommand),
    /// Look at and change the forwarding table
    #[command(subcommand)]
    Fdb(FdbCommand),
    /// Show the counters of ports and poll threads
    Stats {
        /// Show rates again and again, every so many seconds
        #[arg(
            long,
            value_name = "SECONDS",
            num_args = 0..=1,
            default_missing_value = "1",
            value_parser = clap::value_parser!(u64).range(1..=86400)
        )]
        watch: Option<u64>,
        /// How to print it.
        #[command(flatten)]
        output: Output,
    },
    /// Look at the poll threads
    #[command(subcommand)]
    Poll(PollCommand),
    /// Print what happens to ports, sessions and rings, as it happens
    Events(Output),
    /// Look at the frames of a port, or of all: as lines, or as pcapng for Wireshark
    Capture(CaptureArgs),
    /// Tell what becomes of the next frames that enter through a port, a line each
    Trace {
        /// The port.
        port: String,
        /// How many frames
        #[arg(
            long,
            value_name = "N",
            default_value_t = 10,
            value_parser = clap::value_parser!(u64).range(1..=crate::config::MAX_TRACE)
        )]
        count: u64,
        /// How to print it.
        #[command(flatten)]
        output: Output,
    },
    /// Send copies of frames to a port
    #[command(subcommand)]
    Mirror(MirrorCommand),
    /// Be an extcap program for Wireshark, which calls this
    Extcap(ExtcapArgs),
    /// Measure a switch with guests of our own, over real vhost-user sockets
    #[command(after_help = exit_codes(&bench::EXIT_CODES))]
    Bench(bench::Args),
    /// Print a completion script for a shell
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the man page, or write the pages of all commands
    Man {
        /// Write one page a command into this directory, which must exist
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        dir: Option<PathBuf>,
    },
}

/// `pollux run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Ports to start with.
    #[arg(
        long = "port",
        value_name = "SPEC",
        help = "A port, see pollux port add; may be given again"
    )]
    pub ports: Vec<PortSpec>,
    /// One poll thread pinned to each of these CPUs, such as 0,2-3 [default: one, unpinned]
    #[arg(long, value_name = "LIST")]
    pub poll_cpus: Option<CpuList>,
    /// What a poll thread does without work: busy, adaptive or adaptive:MICROSECONDS (spin so
    /// long, then sleep); one policy for all, or one for each of --poll-cpus (threads that are
    /// added later then have the default)
    #[arg(long, value_name = "POLICY", default_value_t = IdleList::default())]
    pub idle: IdleList,
    /// Whether transmit queues move between poll threads by measured load: auto or off
    #[arg(long, value_name = "POLICY", default_value_t = Rebalance::default())]
    pub rebalance: Rebalance,
    /// Group that may use the API socket, besides root and the daemon's own user
    #[arg(long, value_name = "NAME")]
    pub api_group: Option<String>,
    /// Age at which a learned address is forgotten
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 300,
        value_parser = clap::value_parser!(u64).range(1..=1_000_000)
    )]
    pub mac_ageing: u64,
    /// Most addresses in the forwarding table
    #[arg(
        long,
        value_name = "N",
        default_value_t = 8192,
        value_parser = clap::value_parser!(u32).range(64..=1 << 20)
    )]
    pub fdb_size: u32,
    /// Where the positions of packed rings are kept for the next start of the switch: a directory
    /// in memory (tmpfs) [default: beside the API socket, its name ending in .rings]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub ring_state: Option<PathBuf>,
    /// What to log to standard error: off, error, warn, info, debug or trace; or a list such as
    /// warn,pollux::api=debug, for the modules pollux::api and pollux::daemon
    #[arg(long, value_name = "LEVEL", env = "POLLUX_LOG", default_value = "info")]
    pub log: LogFilter,
}

/// How a read is printed.
#[derive(Clone, Copy, Debug, Args)]
pub struct Output {
    /// Print JSON with stable names in base units
    #[arg(long, short)]
    pub json: bool,
}

/// `pollux port`.
#[derive(Debug, Subcommand)]
pub enum PortCommand {
    /// Create a port
    Add {
        #[arg(help = format!("NAME,socket=PATH and what else it is to have, separated by commas: {}", optional_forms()))]
        spec: PortSpec,
        /// Do nothing if a port exists with the same values
        #[arg(long)]
        may_exist: bool,
    },
    /// Remove a port; other ports notice nothing
    #[command(aliases = REMOVE)]
    Remove {
        /// Its name.
        name: String,
        /// Do nothing if there is no such port
        #[arg(long)]
        if_exists: bool,
    },
    /// Change a port while it exists
    Set {
        /// Its name.
        name: String,
        #[arg(help = format!("What to change: {}", settable_forms()))]
        #[arg(value_name = "KEY=VALUE", required = true, value_parser = parse_setting)]
        settings: Vec<Setting>,
    },
    /// List the ports
    #[command(alias = LIST)]
    List(Output),
    /// Show one port: its state and why, its rings, its counters
    Show {
        /// Its name.
        name: String,
        #[command(flatten)]
        output: Output,
    },
}

/// `pollux fdb`.
#[derive(Debug, Subcommand)]
pub enum FdbCommand {
    /// List the forwarding table
    #[command(alias = LIST)]
    List(Output),
    /// Add a static entry, which does not age and does not move
    Add {
        /// The station's address.
        mac: Mac,
        /// The port it is on
        #[arg(long)]
        port: String,
        /// Take the place of a static entry that the address has already
        #[arg(long)]
        replace: bool,
    },
    /// Remove one entry, static or learned
    #[command(aliases = REMOVE)]
    Remove {
        /// The station's address.
        mac: Mac,
        /// Do nothing if there is no such entry
        #[arg(long)]
        if_exists: bool,
    },
    /// Forget the learned entries; static ones stay
    Flush {
        /// Only those of this port
        #[arg(long, value_name = "NAME")]
        port: Option<String>,
    },
}

/// `pollux poll`.
#[derive(Debug, Subcommand)]
pub enum PollCommand {
    /// List the poll threads, how busy they are and which queues they own
    #[command(alias = LIST)]
    List(Output),
    /// Start a poll thread
    Add {
        /// CPU to pin it to, which no other poll thread has
        #[arg(long, value_name = "N")]
        cpu: Option<u32>,
        /// What it does without work: busy, adaptive or adaptive:MICROSECONDS [default: that
        /// of all, which pollux poll set prints]
        #[arg(long, value_name = "POLICY")]
        idle: Option<IdlePolicy>,
    },
    /// End a poll thread; its queues go to the others, without loss
    #[command(aliases = REMOVE)]
    Remove {
        /// Its number.
        thread: u32,
    },
    /// Give a port's transmit queues to a poll thread, without loss and in order
    Move {
        /// The port, or one queue pair of it: NAME or NAME:PAIR
        #[arg(value_name = "PORT[:QUEUE]")]
        queue: QueueName,
        /// Number of the poll thread.
        thread: u32,
    },
    /// Change how queues are placed and what threads do without work, or say how that is
    Set {
        /// What to change: rebalance=auto|off, idle=busy|adaptive|adaptive:MICROSECONDS
        #[arg(value_name = "KEY=VALUE", value_parser = parse_poll_setting)]
        settings: Vec<PollSetting>,
        /// The only poll thread that idle= is for; without it all there are and will be
        #[arg(long, value_name = "N")]
        thread: Option<u32>,
        #[command(flatten)]
        output: Output,
    },
}

/// A port, or one of its queue pairs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueName {
    /// Name of the port.
    pub port: String,
    /// The queue pair. `None`: all queue pairs.
    pub queue: Option<u16>,
}

impl FromStr for QueueName {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        let (port, queue) = match text.split_once(':') {
            None => (text, None),
            Some((port, pair)) => {
                let pair = pair.parse();
                (
                    port,
                    Some(pair.map_err(|_| SettingError::Pair(text.to_string()))?),
                )
            }
        };
        Ok(QueueName {
            port: port.to_string(),
            queue,
        })
    }
}

/// One `KEY=VALUE` of `pollux poll set`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollSetting {
    /// `rebalance=auto|off`.
    Rebalance(Rebalance),
    /// `idle=POLICY`.
    Idle(IdlePolicy),
}

fn parse_poll_setting(text: &str) -> Result<PollSetting, SettingError> {
    match text.split_once('=') {
        Some(("rebalance", value)) => value
            .parse()
            .map(PollSetting::Rebalance)
            .map_err(|_| SettingError::Rebalance(value.to_string())),
        Some(("idle", value)) => value
            .parse()
            .map(PollSetting::Idle)
            .map_err(|_| SettingError::Idle(value.to_string())),
        _ => Err(SettingError::UnknownPoll(text.to_string())),
    }
}

/// One `KEY=VALUE` of `pollux port set`: an option, and a port that has the value.
#[derive(Clone, Debug)]
pub struct Setting {
    option: &'static PortOption,
    spec: PortSpec,
}

impl Setting {
    /// Puts this setting into `patch`.
    pub(super) fn apply(&self, patch: &mut PortPatch) -> Result<(), Failure> {
        let given_already = self.option.patch.is_some_and(|put| put(&self.spec, patch));
        once(given_already)
    }
}

/// A `KEY=VALUE` or `NAME:PAIR` that a command does not accept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// A key that cannot be changed, or does not exist.
    #[error("{0:?} cannot be set; known is {forms}", forms = settable_forms())]
    Unknown(String),
    /// A value that the option of a port does not take.
    #[error("{key}={value} is not valid: {expected}")]
    Value {
        /// The option.
        key: &'static str,
        /// The value given.
        value: String,
        /// What the option takes.
        expected: &'static str,
    },
    /// The same for `pollux poll set`.
    #[error("{0:?} cannot be set; known are rebalance=auto|off and idle=POLICY")]
    UnknownPoll(String),
    /// Not a valid rebalance policy.
    #[error("rebalance={0} is not valid: auto or off")]
    Rebalance(String),
    /// Not a valid idle policy.
    #[error("idle={0} is not valid: busy, adaptive or adaptive:MICROSECONDS (at most 1000000)")]
    Idle(String),
    /// The text after the port's name is not a number.
    #[error("{0:?}: use NAME or NAME:PAIR, pairs counting from 0")]
    Pair(String),
}

fn parse_setting(text: &str) -> Result<Setting, SettingError> {
    let unknown = || SettingError::Unknown(text.to_string());
    let (key, value) = text.split_once('=').ok_or_else(unknown)?;
    let option = PortOption::find(key).filter(|option| option.patch.is_some());
    let option = option.ok_or_else(unknown)?;
    let mut spec = PortSpec::default();
    let parsed = (option.parse)(&mut spec, value).is_some();
    if !parsed || (option.check)(option, &spec).is_err() {
        return Err(SettingError::Value {
            key: option.key,
            value: value.to_string(),
            expected: option.expected,
        });
    }
    Ok(Setting { option, spec })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn definitions_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_takes_everything_the_daemon_needs() {
        let cli = parse(
            "pollux run --port vm1,socket=/a --port vm2,socket=/b,mode=client --poll-cpus 0,2-3 \
             --idle busy --api-socket /x --api-group kvm --mac-ageing 60 --fdb-size 100 --log debug \
             --ring-state /r",
        )
        .unwrap();
        assert_eq!(cli.api_socket, Some(PathBuf::from("/x")));
        let Some(Command::Run(run)) = cli.command else {
            panic!("not run");
        };
        assert_eq!(run.ports.len(), 2);
        assert_eq!(run.poll_cpus.unwrap().0, [0, 2, 3]);
        assert_eq!(run.idle.0, [IdlePolicy::Busy]);
        assert_eq!((run.mac_ageing, run.fdb_size), (60, 100));
        assert_eq!(run.ring_state, Some(PathBuf::from("/r")));
        assert_eq!(run.log, "debug".parse().unwrap());
    }

    #[test]
    fn watch_takes_an_optional_number() {
        for (line, expected) in [
            ("pollux stats", None),
            ("pollux stats --watch", Some(1)),
            ("pollux stats --watch 5", Some(5)),
        ] {
            let Some(Command::Stats { watch, .. }) = parse(line).unwrap().command else {
                panic!("not stats");
            };
            assert_eq!(watch, expected, "{line}");
        }
    }

    #[test]
    fn wrong_lines_are_refused_and_say_what_is_right() {
        for (line, part) in [
            ("pollux run --port vm1", "a socket is needed"),
            ("pollux run --idle lazy", "busy, adaptive"),
            ("pollux run --idle busy,lazy", "busy, adaptive"),
            ("pollux run --idle busy --idle busy", "multiple times"),
            ("pollux run --poll-cpus 3-1", "0,2-3"),
            ("pollux run --fdb-size 1", "64..=1048576"),
            ("pollux run --mac-ageing 0", "1..=1000000"),
            ("pollux stats --watch 0", "1..=86400"),
            ("pollux fdb add 52:54:00:12:34 --port a", "six bytes of two"),
            (
                "pollux fdb add 52:54:00:12:34:9 --port a",
                "two hexadecimal",
            ),
            (
                "pollux fdb add 52:54:00:12:34:56 --port a --vlan 5",
                "unexpected argument '--vlan'",
            ),
            ("pollux fdb add 52:54:00:12:34:56", "--port"),
            ("pollux port set vm1", "KEY=VALUE"),
            ("pollux port set vm1 colour=red", "known is queues=N"),
            ("pollux port set vm1 queues=0", "1 to 128"),
            ("pollux poll set rebalance=often", "auto or off"),
            ("pollux poll set idle=lazy", "busy, adaptive"),
            ("pollux poll set colour=red", "known are rebalance"),
            ("pollux poll move vm1:x 0", "NAME:PAIR"),
            ("pollux poll move vm1", "<THREAD>"),
            ("pollux run --rebalance often", "use auto or off"),
            ("pollux port", "Usage"),
            ("pollux frobnicate", "unrecognized"),
        ] {
            let text = parse(line).expect_err(line).to_string();
            assert!(text.contains(part), "{line}: {text}");
        }
    }
}
