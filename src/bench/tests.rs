use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
struct Command {
    #[command(flatten)]
    bench: Args,
}

fn args(line: &str) -> Result<Args, clap::Error> {
    let words = std::iter::once("bench").chain(line.split_whitespace());
    Command::try_parse_from(words).map(|command| command.bench)
}

fn code(line: &str) -> u8 {
    run::<()>(&args(line).unwrap(), None)
}

#[test]
fn arguments_make_the_plan() {
    let all = "--size 1500 --mode open:1M --pattern n-to-1 --guests 3 --queues 2 --ring packed \
               --ring-size 100 --mergeable on --in-order on";
    let plan = &args(all).unwrap().plans().unwrap()[0];
    assert_eq!((plan.size, plan.guests, plan.queues), (1500, 3, 2));
    assert_eq!((plan.mode, plan.pattern), (Mode::Open(1e6), Pattern::NTo1));
    assert!(plan.packed && plan.mergeable && plan.in_order);
}

#[test]
fn a_sweep_is_checked_before_it_starts() {
    let plans = args("--sweep size=64,1500").unwrap().plans().unwrap();
    assert_eq!((plans[0].size, plans[1].size), (64, 1500));
    assert!(args("--sweep size=64,10").unwrap().plans().is_err());
    assert!(args("--sweep speed=1").is_err());
    assert!(args("--plot x.svg").is_err());
}

#[test]
fn failures_have_their_exit_codes() {
    assert_eq!(code("--size 10 --attach /nowhere,/nowhere"), EXIT_ARGUMENTS);
    assert_eq!(code("--attach /nowhere"), EXIT_ARGUMENTS);
    assert_eq!(code(""), EXIT_ARGUMENTS);
    assert_eq!(
        code("--seconds nan --attach /nowhere,/nowhere"),
        EXIT_ARGUMENTS
    );
    for line in ["--threads 0", "--cpu 4095"] {
        assert_eq!(
            code(&format!("{line} --attach /nowhere,/nowhere")),
            EXIT_ARGUMENTS
        );
    }
    assert_eq!(code("--attach /nowhere,/nowhere"), EXIT_ATTACH);
    // Before the sweep, not behind it.
    assert_eq!(
        code("--sweep size=64 --plot /nowhere/plot.svg --attach /nowhere,/nowhere"),
        EXIT_FAILED
    );
    assert_eq!(code("--self-test --seconds 0.1 --json"), EXIT_OK);
}
