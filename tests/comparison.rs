//! `benches/compare` where something is wrong: a clear sentence, partial results marked as such, never a wrong number.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

const BINARY: &str = env!("CARGO_BIN_EXE_pollux");

/// What it printed as JSON, and its exit code.
fn compare(arguments: &str, change: impl FnOnce(&mut Command)) -> (Value, i32) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/compare");
    let mut command = Command::new(script);
    command
        .args(arguments.split(' '))
        .args(["--quiet", "--json"]);
    // Each of the two shares the only processor with the other, where there is just one.
    if std::thread::available_parallelism().unwrap().get() == 1 {
        command.args(["--client-cpu", "0"]);
    }
    command.env("POLLUX", BINARY);
    change(&mut command);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let json = serde_json::from_slice(&output.stdout);
    let json = json.unwrap_or_else(|error| panic!("{error}: {said}"));
    (json, output.status.code().unwrap())
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
    let mortal = dir.path().join("pollux");
    // Only the switch: the client has the same name.
    let script = format!(
        "#!/bin/sh\n[ \"$1\" != run ] || exec timeout -s KILL 1.5 {BINARY} \"$@\"\nexec {BINARY} \"$@\"\n"
    );
    fs::write(&mortal, script).unwrap();
    fs::set_permissions(&mortal, fs::Permissions::from_mode(0o755)).unwrap();
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
