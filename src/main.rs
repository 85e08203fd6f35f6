//! The `pollux` command: parse, run, exit code.

use std::error::Error;
use std::process::ExitCode;

use pollux::cli;
use pollux::config::DaemonConfig;
use pollux::daemon;

fn main() -> ExitCode {
    cli::main(run)
}

fn run(config: DaemonConfig) -> Result<(), Box<dyn Error>> {
    daemon::run(config).map_err(Into::into)
}
