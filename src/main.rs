//! The `pollux` command: parse, run, exit code.

use std::error::Error;
use std::process::ExitCode;

use pollux::config::DaemonConfig;
use pollux::daemon::DaemonError;
use pollux::{bench, cli, daemon};

fn main() -> ExitCode {
    cli::main(run, measure)
}

fn run(config: DaemonConfig) -> Result<(), Box<dyn Error>> {
    daemon::run(config).map_err(|error| match error {
        // What the command line alone cannot know to be wrong.
        DaemonError::Pin(source) => bad_argument(format!("--poll-cpus: {source}")),
        DaemonError::IdlePolicies { .. } => bad_argument(format!("--idle, --poll-cpus: {error}")),
        DaemonError::TooManyThreads(_) | DaemonError::Fdb(_) => bad_argument(error.to_string()),
        DaemonError::Port(source) => source.into(),
        DaemonError::Api(source) => source.into(),
        other => other.into(),
    })
}

fn bad_argument(text: String) -> Box<dyn Error> {
    cli::Failure::new(cli::EXIT_BAD_ARGUMENTS, text).into()
}

fn measure(args: &bench::Args) -> u8 {
    bench::run(args, Some(daemon::embedded::start))
}
