//! The `pollux` command: parse, do, exit code.
//!
//! - `args`: what exists on the command line; help, man pages and completions come from it.
//! - `commands`: the client commands, one request each.
//! - `observe`, `blocks`: captures, traces and mirrors; pcapng as it arrives.
//! - `views`, `text`: answers as tables for people. Text that a frontend may have chosen is escaped
//!   before it reaches a terminal.
//!
//! `pollux run` is handed to a [`Runner`], so that nothing here knows the daemon.

mod args;
mod blocks;
mod commands;
mod observe;
mod text;
mod views;

use std::error::Error;
use std::ffi::OsStr;
use std::fmt;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use crate::api::client::ClientError;
use crate::api::{ControlError, ServerError};
use crate::bench;
use crate::config::{ConfigError, DaemonConfig, MAX_PORTS};
use crate::log;

pub use args::{Cli, Command, RunArgs};

/// Done.
pub const EXIT_OK: u8 = 0;
/// Internal error of pollux or the operating system.
pub const EXIT_INTERNAL: u8 = 1;
/// Bad arguments.
pub const EXIT_BAD_ARGUMENTS: u8 = 2;
/// No daemon answers on the API socket.
pub const EXIT_NO_DAEMON: u8 = 3;
/// No such port or entry.
pub const EXIT_NOT_FOUND: u8 = 4;
/// Refused: no permission, or in conflict with what exists.
pub const EXIT_REFUSED: u8 = 5;

/// What QEMU's backend conventions ask for; its schema defines no features for `net`.
const CAPABILITIES: &str = "{\"type\":\"net\"}\n";

/// Runs the switch until it is told to stop. An error that is a [`Failure`] brings its own exit
/// code; those of the API server and of configuration are known here.
pub type Runner = fn(DaemonConfig) -> Result<(), Box<dyn Error>>;

/// Measures a backend; says by itself what went wrong, and returns the exit code.
pub type Bencher = fn(&bench::Args) -> u8;

/// Why a command did not do what it was asked, and the exit code that says so.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    text: String,
    hint: Option<String>,
}

impl Failure {
    /// A failure with its exit code and one sentence.
    pub fn new(code: u8, text: impl Into<String>) -> Self {
        Failure {
            code,
            text: text.into(),
            hint: None,
        }
    }

    fn internal(text: impl Into<String>) -> Self {
        Failure::new(EXIT_INTERNAL, text)
    }

    fn bad_arguments(text: impl Into<String>) -> Self {
        Failure::new(EXIT_BAD_ARGUMENTS, text)
    }

    /// Whoever read our output wants no more of it: nothing to say, nothing wrong.
    fn reader_left() -> Self {
        Failure::new(EXIT_OK, "")
    }

    /// The exit code.
    pub fn code(&self) -> u8 {
        self.code
    }

    fn from_runner(error: Box<dyn Error>) -> Self {
        match error.downcast::<Failure>() {
            Ok(failure) => *failure,
            Err(error) => Failure::new(code_of(&*error), chain(&*error)),
        }
    }

    fn report(&self) {
        if self.text.is_empty() {
            return;
        }
        let mut message = format!("pollux: {}\n", text::escape(&self.text));
        if let Some(hint) = &self.hint {
            message.push_str(&format!("  {}\n", text::escape(hint)));
        }
        // A daemon's last words wait for nobody, either.
        if !log::say(&message) {
            text::note(&message);
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for Failure {}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Failure {
            code: client_code(&error),
            text: chain(&error),
            hint: match error {
                ClientError::Refused { error, .. } => error.hint,
                _ => None,
            },
        }
    }
}

fn client_code(error: &ClientError) -> u8 {
    match error {
        ClientError::NoDaemon { .. }
        | ClientError::Silent { .. }
        | ClientError::NotPollux { .. }
        | ClientError::OtherVersion { .. }
        | ClientError::Cut { .. } => EXIT_NO_DAEMON,
        ClientError::Denied { .. } => EXIT_REFUSED,
        ClientError::BadPath { .. } => EXIT_BAD_ARGUMENTS,
        ClientError::Io { .. } => EXIT_INTERNAL,
        ClientError::Refused { status, .. } => match status {
            400 | 405 | 408 | 413 => EXIT_BAD_ARGUMENTS,
            404 | 410 => EXIT_NOT_FOUND,
            403 | 409 | 503 => EXIT_REFUSED,
            _ => EXIT_INTERNAL,
        },
    }
}

/// The exit code of whatever stopped the daemon from starting.
fn code_of(error: &(dyn Error + 'static)) -> u8 {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<ConfigError>() {
            return EXIT_BAD_ARGUMENTS;
        }
        match error.downcast_ref::<ControlError>() {
            Some(ControlError::BadArgument(_)) => return EXIT_BAD_ARGUMENTS,
            Some(ControlError::Conflict { .. }) => return EXIT_REFUSED,
            Some(ControlError::NotFound { .. } | ControlError::Gone { .. }) => {
                return EXIT_NOT_FOUND;
            }
            Some(ControlError::Internal(_)) | None => {}
        }
        match error.downcast_ref::<ServerError>() {
            Some(ServerError::Path { .. } | ServerError::Group(_)) => return EXIT_BAD_ARGUMENTS,
            Some(ServerError::Live { .. } | ServerError::NotASocket { .. }) => {
                return EXIT_REFUSED;
            }
            _ => {}
        }
        next = error.source();
    }
    EXIT_INTERNAL
}

/// An error and what caused it, on one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(": ");
        text.push_str(&error.to_string());
        next = error.source();
    }
    text
}

/// Does what the command line says; `run` is called for `pollux run`.
pub fn main(run: Runner, bench: Bencher) -> ExitCode {
    let capabilities = std::env::args_os()
        .skip(1)
        .take_while(|argument| argument != OsStr::new("--"))
        .any(|argument| argument == OsStr::new("--print-capabilities"));
    let result = if capabilities {
        // Before parsing: other options, even unknown ones, are to be ignored.
        text::print(CAPABILITIES)
    } else {
        // Exits with 2 and the usage by itself.
        dispatch(Cli::parse(), run, bench)
    };
    let code = match result {
        Ok(()) => EXIT_OK,
        Err(failure) => {
            failure.report();
            failure.code
        }
    };
    log::flush();
    ExitCode::from(code)
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
            // It has said why.
            code => Err(Failure::new(code, "")),
        },
        Command::Completions { shell } => completions(shell),
        Command::Man { dir } => man(dir),
        command => commands::execute(command, socket_path(cli.api_socket)?),
    }
}

/// The API socket: as given, or where the daemon of this user puts it by itself.
fn socket_path(given: Option<PathBuf>) -> Result<PathBuf, Failure> {
    if let Some(path) = given {
        return Ok(path);
    }
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/run/pollux/api.sock"));
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => Ok(PathBuf::from(dir).join("pollux/api.sock")),
        None => Err(Failure::bad_arguments(
            "neither root nor XDG_RUNTIME_DIR is set; name the API socket with --api-socket PATH \
             or POLLUX_API_SOCKET",
        )),
    }
}

fn run_daemon(args: RunArgs, api_socket: PathBuf, run: Runner) -> Result<(), Failure> {
    let filter = EnvFilter::builder().parse(&args.log).map_err(|error| {
        Failure::bad_arguments(format!(
            "--log {:?}: {error}; use off, error, warn, info, debug or trace",
            args.log
        ))
    })?;
    check_ports(&args)?;
    let log = log::Log::start().map_err(|error| {
        Failure::internal(format!("the system refuses what the log needs: {error}"))
    })?;
    tracing_subscriber::fmt()
        .compact()
        .with_writer(log)
        // It would print to standard error by itself.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .with_env_filter(filter)
        .init();
    let ring_state = args
        .ring_state
        .unwrap_or_else(|| api_socket.with_extension("rings"));
    let config = DaemonConfig {
        ports: args.ports,
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

fn check_ports(args: &RunArgs) -> Result<(), Failure> {
    if args.ports.len() > MAX_PORTS {
        return Err(Failure::bad_arguments(format!(
            "{} ports given; a daemon has at most {MAX_PORTS}",
            args.ports.len()
        )));
    }
    for (n, port) in args.ports.iter().enumerate() {
        for other in &args.ports[..n] {
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
    Ok(())
}

fn completions(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "pollux", &mut script);
    text::print(&String::from_utf8_lossy(&script))
}

fn man(dir: Option<PathBuf>) -> Result<(), Failure> {
    let Some(dir) = dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command())
            .render(&mut page)
            .map_err(|error| Failure::internal(error.to_string()))?;
        return text::print(&String::from_utf8_lossy(&page));
    };
    clap_mangen::generate_to(Cli::command(), &dir).map_err(|error| {
        let text = format!("cannot write man pages into {dir:?}: {error}");
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Failure::bad_arguments(text),
            _ => Failure::internal(text),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::ApiError;

    #[test]
    fn each_refusal_has_its_exit_code() {
        for (status, code) in [
            (400, EXIT_BAD_ARGUMENTS),
            (404, EXIT_NOT_FOUND),
            (410, EXIT_NOT_FOUND),
            (409, EXIT_REFUSED),
            (503, EXIT_REFUSED),
            (500, EXIT_INTERNAL),
        ] {
            let error = ApiError {
                code: "x".into(),
                message: "y".into(),
                hint: None,
            };
            let failure = Failure::from(ClientError::Refused { status, error });
            assert_eq!(failure.code(), code, "{status}");
        }
    }

    #[test]
    fn a_daemon_that_cannot_start_says_why_with_its_code() {
        let live = ServerError::Live { path: "/x".into() };
        let failure = Failure::from_runner(Box::new(live));
        assert_eq!(failure.code(), EXIT_REFUSED);
        assert!(failure.to_string().contains("another pollux answers on"));
        let own = Failure::from_runner(Box::new(Failure::new(EXIT_NOT_FOUND, "gone")));
        assert_eq!(own.code(), EXIT_NOT_FOUND);
    }
}
