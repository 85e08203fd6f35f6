//! The `pollux` command: parse, run, exit code.

use std::error::Error;
use std::process::ExitCode;

use pollux::config::DaemonConfig;
use pollux::{bench, cli, daemon};

fn main() -> ExitCode {
    cli::main(run, measure)
}

fn run(config: DaemonConfig) -> Result<(), Box<dyn Error>> {
    daemon::run(config).map_err(Into::into)
}

fn measure(args: &bench::Args) -> u8 {
    bench::run(args, Some(daemon::embedded::start))
}
