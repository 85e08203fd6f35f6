//! The `pollux` command: parse, run, exit code.

use std::error::Error;
use std::process::ExitCode;

use pollux::cli::{self, EXIT_INTERNAL, Failure};
use pollux::config::DaemonConfig;

fn main() -> ExitCode {
    cli::main(run)
}

fn run(_config: DaemonConfig) -> Result<(), Box<dyn Error>> {
    Err(Failure::new(EXIT_INTERNAL, "the switch is not part of this build").into())
}
