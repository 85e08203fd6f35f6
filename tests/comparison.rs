//! `benches/compare` and `benches/change` where something is wrong: a clear sentence, partial
//! results marked as such, never a wrong number. And all of `benches/change`, as short as it can
//! be: what it promises of its output, not how fast anything is.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use serde_json::{Value, json};

const BINARY: &str = env!("CARGO_BIN_EXE_pollux");

/// A script of `benches`.
fn script(name: &str) -> Command {
    let benches = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches");
    Command::new(benches.join(name))
}

/// How it ends.
fn run(name: &str, arguments: &str, change: impl FnOnce(&mut Command)) -> Output {
    let mut command = script(name);
    command.args(["--quiet", "--json"]);
    // Each of the two shares the only processor with the other, where there is just one.
    if std::thread::available_parallelism().unwrap().get() == 1 {
        command.args(["--client-cpu", "0"]);
    }
    command.args(arguments.split(' ')).env("POLLUX", BINARY);
    change(&mut command);
    command.output().unwrap()
}

/// What it printed as JSON, and its exit code.
fn report(name: &str, arguments: &str, change: impl FnOnce(&mut Command)) -> (Value, i32) {
    let output = run(name, arguments, change);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let json = serde_json::from_slice(&output.stdout);
    let json = json.unwrap_or_else(|error| panic!("{error}: {said}"));
    (json, output.status.code().unwrap())
}

fn compare(arguments: &str, change: impl FnOnce(&mut Command)) -> (Value, i32) {
    report("compare", arguments, change)
}

/// What `benches/change` measures with, in this test's own profile: its libraries are built
/// already.
fn scenarios() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        cargo.args(["build", "--locked", "--message-format", "json"]);
        cargo.args(["--bench", "scenarios"]);
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        let output = cargo.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let messages = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>();
        let mut messages = messages.map(Result::unwrap);
        let program = messages.find(|message| message["target"]["name"] == "scenarios");
        PathBuf::from(program.unwrap()["executable"].as_str().unwrap())
    })
}

/// A shell script.
fn executable(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// The figures of one scenario.
fn figures<'r>(report: &'r Value, scenario: &str) -> Vec<&'r Value> {
    let figures = report["figures"].as_array().unwrap().iter();
    figures
        .filter(|figure| figure["scenario"] == scenario)
        .collect()
}

/// The one whose name begins so.
fn figure<'r>(report: &'r Value, scenario: &str, name: &str) -> &'r Value {
    let figures = figures(report, scenario);
    let mut named = figures
        .into_iter()
        .filter(|figure| figure["figure"].as_str().unwrap().starts_with(name));
    let found = named.next();
    found.unwrap_or_else(|| panic!("{scenario} has no {name}: {report}"))
}

fn notes(report: &Value) -> String {
    report["notes"].to_string()
}

/// A directory of links to all programs of the system but these.
fn programs_without(missing: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for place in ["/usr/bin", "/bin", "/usr/sbin", "/usr/local/bin"] {
        for entry in fs::read_dir(place).into_iter().flatten() {
            let entry = entry.unwrap();
            let name = entry.file_name();
            if !missing.iter().any(|missing| name == *missing) {
                // The first place that has it counts, as in a search path.
                let _ = symlink(entry.path(), dir.path().join(name));
            }
        }
    }
    dir
}

#[test]
fn a_backend_that_is_not_there_is_said_and_has_no_number() {
    let path = programs_without(&["dpdk-testpmd"]);
    let arguments = "--backends pollux,testpmd,nonesuch --sizes 64 --rings split --mergeable off --rounds 1 --seconds 0.3";
    let (report, code) = compare(arguments, |command| {
        command.env("PATH", path.path());
    });
    assert_eq!((code, &report["complete"]), (1, &false.into()), "{report}");
    let notes = notes(&report);
    assert!(notes.contains("dpdk-testpmd is not installed"), "{notes}");
    assert!(
        notes.contains("no starter benches/backends/nonesuch"),
        "{notes}"
    );
    let backends = report["table"][0]["backends"].as_object().unwrap();
    assert_eq!(backends.keys().collect::<Vec<_>>(), ["pollux"], "{report}");
    let found = &backends["pollux"];
    for figure in ["mpps", "p50_us", "p999_us", "busy"] {
        assert!(
            found[figure]["median"].as_f64().unwrap() > 0.0,
            "{figure}: {found}"
        );
    }
    // The share of a processor: frames take all of one at most.
    assert!(found["busy"]["median"].as_f64().unwrap() < 1.1, "{found}");
}

#[test]
fn a_backend_that_dies_under_way_has_no_number() {
    let dir = tempfile::tempdir().unwrap();
    // Only the switch: the client has the same name.
    let script = format!(
        "[ \"$1\" != run ] || exec timeout -s KILL 1.5 '{BINARY}' \"$@\"\nexec '{BINARY}' \"$@\""
    );
    let mortal = executable(dir.path(), "pollux", &script);
    let arguments = "--backends pollux --sizes 64 --rings split --mergeable off --rounds 1 --seconds 4 --mode tput";
    let (report, code) = compare(arguments, |command| {
        command.env("POLLUX", &mortal);
    });
    assert_eq!((code, &report["complete"]), (3, &false.into()), "{report}");
    assert!(notes(&report).contains("died"), "{report}");
    assert_eq!(
        report["table"][0]["backends"],
        serde_json::json!({}),
        "{report}"
    );
    let samples = report["samples"].as_array().unwrap();
    assert!(
        samples.iter().all(|sample| sample.get("mpps").is_none()),
        "{report}"
    );
}

#[test]
fn the_page_of_results_has_a_place_for_every_section() {
    let benches = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches");
    let script = fs::read_to_string(benches.join("results")).unwrap();
    let page = fs::read_to_string(benches.join("RESULTS.md")).unwrap();
    let sections = script
        .lines()
        .find_map(|line| line.strip_prefix("SECTIONS = "));
    let sections: Vec<String> = serde_json::from_str(sections.unwrap()).unwrap();
    assert!(sections.len() > 5, "{sections:?}");
    for name in sections {
        let begin = format!("<!-- {name}: written by benches/results -->\n");
        let end = format!("<!-- end of {name} -->\n");
        let place = page.find(&begin).unwrap_or_else(|| panic!("no {name}"));
        assert!(page[place..].contains(&end), "{name} has no end");
    }
}

#[test]
fn a_client_that_is_not_there_is_said() {
    let path = programs_without(&["dpdk-testpmd"]);
    let arguments = "--client testpmd --backends pollux --sizes 64 --rounds 1";
    let (report, code) = compare(arguments, |command| {
        command.env("PATH", path.path());
    });
    assert_eq!((code, &report["complete"]), (3, &false.into()), "{report}");
    assert!(
        notes(&report).contains("client testpmd: dpdk-testpmd is not installed"),
        "{report}"
    );
    let (report, code) = compare("--backends pollux --sizes 64 --rounds 1", |command| {
        command.env("POLLUX", "/nonexistent/pollux");
    });
    assert_eq!((code, &report["complete"]), (3, &false.into()), "{report}");
    assert!(notes(&report).contains("it is not built"), "{report}");
}

/// The least that `benches/change` can be asked for.
const LEAST: &str = "--backends pollux --cycles 1 --seconds 0.2 --rounds 1 --memory 16";

#[test]
fn every_scenario_of_changes_has_figures_and_no_bystander_loses_a_frame() {
    let (report, code) = report("change", LEAST, |command| {
        command.env("SCENARIOS", scenarios());
    });
    assert_eq!(report["notes"], json!([]), "{report}");
    let scenarios = [
        "churn", "reset", "claims", "gather", "slow", "flood", "fair",
    ];
    for scenario in scenarios {
        let found = figures(&report, scenario);
        assert!(!found.is_empty(), "{scenario}: {report}");
        for figure in found {
            assert!(figure["value"].as_f64().unwrap().is_finite(), "{figure}");
        }
    }
    // How fast this machine is, nobody knows: a must may not be met, and a flooder may get no
    // processor to flood with. The exit code says so.
    let all = report["figures"].as_array().unwrap();
    let conclusive = all.iter().all(|figure| figure["inconclusive"].is_null());
    let met = all.iter().all(|figure| figure["ok"] != false);
    assert_eq!(report["complete"], conclusive, "{report}");
    assert_eq!(code, i32::from(!(conclusive && met)), "{report}");
    let lost = figure(&report, "churn", "bystanders' frames lost");
    assert_eq!((&lost["value"], &lost["ok"]), (&0.into(), &true.into()));
}

#[test]
fn a_loss_beside_a_flooder_that_does_not_flood_is_inconclusive() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        (0.031, 0.002, 1, Value::Null),
        (0.6, 0.002, 0, true.into()),
        (0.6, 0.02, 1, false.into()),
    ];
    for (flooder, paced, expected, ok) in cases {
        let result = json!({
            "flooder_loss_share": flooder,
            "paced_loss_share": paced,
            "taken_mpps": 1.0,
        });
        let program = executable(dir.path(), "scenarios", &format!("echo '{result}'"));
        let (report, code) = report("change", "--backends pollux --scenarios flood", |command| {
            command.env("SCENARIOS", program);
        });
        let loss = figure(&report, "flood", "the paced sender's loss");
        assert_eq!((code, &loss["ok"]), (expected, &ok), "{report}");
        let why = match ok {
            Value::Null => "inconclusive: the flooder lost only 3.1 %".into(),
            _ => Value::Null,
        };
        assert_eq!(loss["inconclusive"], why, "{report}");
        assert_eq!(report["complete"], why.is_null(), "{report}");
    }
}

#[test]
fn long_passes_are_counted_beside_the_pauses_of_a_thread_that_only_looks_at_the_clock() {
    let dir = tempfile::tempdir().unwrap();
    // Whenever it is asked, there is one more in each bucket; the first one holds no long ones.
    let bucket = |up_to_seconds| json!({"up_to_seconds": up_to_seconds, "count": 777});
    let buckets = [Some(100e-6), Some(110e-6), None].map(bucket);
    let answer = json!([{"pass_length": {"buckets": buckets}, "takeover_length": null}]);
    fs::write(dir.path().join("answer"), answer.to_string()).unwrap();
    let script = format!(
        "[ \"$1 $2\" = 'poll list' ] || exec '{BINARY}' \"$@\"\n\
         cd '{}'\necho >>asked\nsed \"s/777/$(wc -l <asked)/g\" answer",
        dir.path().display()
    );
    let switch = executable(dir.path(), "pollux", &script);
    let arguments = format!("{LEAST} --scenarios reset");
    let (report, _) = report("change", &arguments, |command| {
        command.env("SCENARIOS", scenarios()).env("POLLUX", switch);
    });
    assert_eq!(report["notes"], json!([]), "{report}");
    figure(
        &report,
        "reset",
        "passes with work over about 100 us, 2 in ",
    );
    let absences = figure(&report, "reset", "absences over 100 us of that thread, ");
    assert!(absences["value"].as_f64().unwrap() >= 0.0, "{absences}");
}

#[test]
fn wrong_options_of_changes_are_said_in_a_sentence() {
    for (arguments, said) in [
        ("--scenarios churn,nonesuch", "nonesuch: use churn, reset"),
        ("--scenarios ,", "--scenarios: at least one is needed"),
        ("--backends testpmd", "testpmd: use pollux or ovs"),
        ("--cycles 0", "--cycles, --rounds, --memory: at least 1"),
        ("--rounds 0", "--cycles, --rounds, --memory: at least 1"),
        ("--seconds 0", "--seconds: 0.1 to 3600"),
        ("--seconds nan", "--seconds: 0.1 to 3600"),
        ("--client-cpu 100000", "there is no CPU 100000 here"),
        ("--nonesuch", "unrecognized arguments: --nonesuch"),
    ] {
        let output = run("change", arguments, |_| {});
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments}: {text}");
        assert!(output.stdout.is_empty(), "{arguments}");
        assert!(text.lines().last().unwrap().contains(said), "{text}");
    }
}

#[test]
fn wrong_options_of_comparisons_are_said_in_a_sentence() {
    for (arguments, said) in [
        ("--ring-size 0", "--ring-size: a power of two, 64 to 32768"),
        ("--ring-size 96", "--ring-size: a power of two, 64 to 32768"),
        ("--ring-size many", "--ring-size: invalid int value: 'many'"),
        ("--window 64", "--window: client pollux has none"),
        ("--window 0", "--window: client pollux has none"),
        (
            "--client testpmd --window 0",
            "--window: a multiple of 32, at most half of a ring, 512",
        ),
        (
            "--client testpmd --window 96 --ring-size 128",
            "--window: a multiple of 32, at most half of a ring, 64",
        ),
        ("--client testpmd --mode rtt", "--mode: testpmd does not"),
        ("--client nonesuch", "--client: invalid choice: 'nonesuch'"),
        ("--sizes 64,59", "--sizes: 59: use 60 to 9000"),
        ("--sizes \u{b2}", "--sizes: \u{b2}: use 60 to 9000"),
        ("--sizes 64,064", "--sizes: each once"),
        ("--sizes ,", "--sizes: at least one is needed"),
        ("--rings split,bent", "--rings: bent: use split or packed"),
        ("--mergeable maybe", "--mergeable: maybe: use off or on"),
        ("--backends ,", "--backends: at least one is needed"),
        ("--backends pollux,pollux", "--backends: each once"),
        ("--rounds 0", "--rounds: at least 1, --seconds: 0.2 to 3600"),
        (
            "--seconds nan",
            "--rounds: at least 1, --seconds: 0.2 to 3600",
        ),
        ("--client-cpu 100000", "there is no CPU 100000 here"),
        ("--nonesuch", "unrecognized arguments: --nonesuch"),
    ] {
        let output = run("compare", arguments, |_| {});
        assert_one_line(&output, "compare: ", said);
    }
}

#[test]
fn wrong_options_of_the_page_of_results_are_said_in_a_sentence() {
    for (arguments, said) in [
        ("nonesuch", "nonesuch: use rates, stock"),
        ("rates nonesuch", "nonesuch: use rates, stock"),
        ("--rounds 0", "--rounds: at least 1"),
        ("--rounds few", "--rounds: invalid int value: 'few'"),
        ("--rounds", "--rounds: expected one argument"),
        ("--nonesuch", "unrecognized arguments: --nonesuch"),
    ] {
        let output = script("results").args(arguments.split(' ')).output();
        assert_one_line(&output.unwrap(), "results: ", said);
    }
}

/// Wrong usage, in one line, and nothing else was done.
fn assert_one_line(output: &Output, program: &str, said: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}: {text}");
    assert!(output.stdout.is_empty(), "{said}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with(program) && text.contains(said), "{text}");
}

#[test]
fn changes_that_cannot_be_measured_at_all_have_no_figure() {
    for (name, said) in [
        ("POLLUX", "/nonexistent is not built"),
        ("SCENARIOS", "there is no program /nonexistent"),
    ] {
        let (report, code) = report("change", "--backends pollux --scenarios slow", |command| {
            command.env("SCENARIOS", BINARY).env(name, "/nonexistent");
        });
        assert_eq!((code, &report["complete"]), (3, &false.into()), "{report}");
        assert!(notes(&report).contains(said), "{report}");
        assert_eq!(report["figures"], json!([]), "{report}");
    }
}
