//! The `pollux` command.

use clap::Parser;
#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    bench: pollux::bench::Args,
}
fn main() -> std::process::ExitCode {
    pollux::bench::run::<()>(&Cli::parse().bench, None).into()
}
