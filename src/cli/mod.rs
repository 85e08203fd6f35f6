//! The `pollux` command: parse, do, exit code.
//!
//! - `args`: what exists on the command line; help, man pages and completions come from it.
//! - `commands`: the client commands, one request each.
//! - `failure`: exit codes.
//! - `log_filter`: which lines of the log are wanted.
//! - `observe`, `blocks`: captures, traces and mirrors; pcapng as it arrives.
//! - `views`, `text`: answers as tables for people. Text that a frontend may have chosen is escaped
//!   before it reaches a terminal.
//!
//! `pollux run` is handed to a [`Runner`], so that nothing here knows the daemon.

mod args;
mod blocks;
mod commands;
mod failure;
mod log_filter;
mod man;
mod observe;
mod text;
mod views;

use std::error::Error;
use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::api;
use crate::bench;
use crate::config::{DaemonConfig, MAX_PORTS, PortSpec};
use crate::log;

pub use args::{Cli, Command, RunArgs};
pub use failure::{
    EXIT_BAD_ARGUMENTS, EXIT_INTERNAL, EXIT_NO_DAEMON, EXIT_NOT_FOUND, EXIT_OK, EXIT_REFUSED,
    Failure,
};

/// The answer that QEMU's backend conventions require. Their schema defines no features for `net`.
const CAPABILITIES: &str = "{\"type\":\"net\"}\n";

/// Runs the switch until it is told to stop. An error that is a [`Failure`] has its own exit code.
/// The exit codes of API server errors and configuration errors are known here.
pub type Runner = fn(DaemonConfig) -> Result<(), Box<dyn Error>>;

/// Runs a benchmark. It reports its errors by itself and returns the exit code.
pub type Bencher = fn(&bench::Args) -> u8;

/// Executes the command line. `run` is called for `pollux run`, `bench` for `pollux bench`.
pub fn main(run: Runner, bench: Bencher) -> ExitCode {
    let capabilities = std::env::args_os()
        .skip(1)
        .take_while(|argument| argument != OsStr::new("--"))
        .any(|argument| argument == OsStr::new("--print-capabilities"));
    let result = if capabilities {
        // Checked before parsing: other options must be ignored, even unknown ones.
        text::print(CAPABILITIES)
    } else {
        parse().and_then(|cli| dispatch(cli, run, bench))
    };
    let code = match result {
        Ok(()) => EXIT_OK,
        Err(failure) => {
            failure.report();
            failure.code()
        }
    };
    log::flush();
    ExitCode::from(code)
}

fn parse() -> Result<Cli, Failure> {
    let matches = Cli::command().try_get_matches().map_err(|e| usage(&e))?;
    let cli = Cli::from_arg_matches(&matches).map_err(|e| usage(&e))?;
    // `POLLUX_API_SOCKET` may be set for other commands, so only the option counts here.
    let named = matches.value_source("api_socket") == Some(ValueSource::CommandLine);
    let needs_none = matches!(
        cli.command,
        Some(Command::Bench(_) | Command::Completions { .. } | Command::Man { .. })
    );
    if named && needs_none {
        let text = "--api-socket is for commands that talk to a daemon, and this one does not";
        return Err(Failure::bad_arguments(text));
    }
    Ok(cli)
}

/// Prints help or an error about the arguments, as wide as the terminal.
fn usage(error: &clap::Error) -> Failure {
    if !error.use_stderr() {
        let printed = error
            .print()
            .map_or_else(text::unprinted, |()| Failure::new(EXIT_OK, ""));
        return printed;
    }
    let message = error.render().ansi().to_string();
    let message = text::fit(&message, text::columns(&io::stderr()), 2);
    // If this write fails, nobody can be told.
    let _ = anstream::AutoStream::auto(io::stderr()).write_all(message.as_bytes());
    Failure::new(EXIT_BAD_ARGUMENTS, "")
}

fn dispatch(cli: Cli, run: Runner, bench: Bencher) -> Result<(), Failure> {
    let Some(command) = cli.command else {
        return Err(Failure::bad_arguments(
            "a command is needed; pollux --help lists them",
        ));
    };
    match command {
        Command::Run(args) => run_daemon(args, socket_path(cli.api_socket)?, run),
        Command::Bench(args) => match bench(&args) {
            EXIT_OK => Ok(()),
            // `bench` has already reported the reason.
            code => Err(Failure::new(code, "")),
        },
        Command::Completions { shell } => completions(shell),
        Command::Man { dir } => man::man(dir.as_deref()),
        command => commands::execute(command, socket_path(cli.api_socket)?),
    }
}

/// Returns the API socket: the given path, or this user's default path.
fn socket_path(given: Option<PathBuf>) -> Result<PathBuf, Failure> {
    given.or_else(api::default_socket).ok_or_else(|| {
        Failure::bad_arguments(
            "XDG_RUNTIME_DIR is not set, and this user is not root; name the API socket with \
             --api-socket PATH or POLLUX_API_SOCKET",
        )
    })
}

fn run_daemon(args: RunArgs, api_socket: PathBuf, run: Runner) -> Result<(), Failure> {
    let ports = check_ports(args.ports)?;
    let log = log::Log::start().map_err(|error| {
        Failure::internal(format!("the system refuses what the log needs: {error}"))
    })?;
    let lines = tracing_subscriber::fmt::layer()
        .compact()
        .with_writer(log)
        // The layer would print its own errors to standard error.
        .log_internal_errors(false)
        .with_ansi(text::takes_escapes(&io::stderr()))
        .with_target(false);
    tracing_subscriber::registry()
        .with(lines)
        .with(args.log.targets())
        .init();
    let ring_state = args
        .ring_state
        .unwrap_or_else(|| api_socket.with_extension("rings"));
    let config = DaemonConfig {
        ports,
        poll_cpus: args.poll_cpus.unwrap_or_default().0,
        idle: args.idle,
        rebalance: args.rebalance,
        api_socket: Some(api_socket),
        api_group: args.api_group,
        mac_ageing: Duration::from_secs(args.mac_ageing),
        fdb_size: args.fdb_size as usize,
        ring_state: Some(ring_state),
    };
    run(config).map_err(Failure::from_runner)
}

/// Checks the ports and makes their paths absolute, as the API requires.
fn check_ports(mut ports: Vec<PortSpec>) -> Result<Vec<PortSpec>, Failure> {
    if ports.len() > MAX_PORTS {
        return Err(Failure::bad_arguments(format!(
            "{} ports given; a daemon has at most {MAX_PORTS}",
            ports.len()
        )));
    }
    ports.iter_mut().try_for_each(commands::make_absolute)?;
    for (n, port) in ports.iter().enumerate() {
        for other in &ports[..n] {
            if port.name == other.name {
                let text = format!("--port: two ports are named {:?}", port.name);
                return Err(Failure::bad_arguments(text));
            }
            if port.socket == other.socket {
                return Err(Failure::bad_arguments(format!(
                    "--port: {:?} and {:?} both use socket {:?}",
                    other.name, port.name, port.socket
                )));
            }
        }
    }
    Ok(ports)
}

fn completions(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "pollux", &mut script);
    text::print(&String::from_utf8_lossy(&script))
}
