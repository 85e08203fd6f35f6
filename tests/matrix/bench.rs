//! A cell of `pollux bench`: its two guests fill each other's rings with frames of each length in
//! turn, and check them.

use std::process::Command;

use serde_json::Value;

use crate::cells::Cell;
use crate::common::daemon::{Daemon, DaemonOptions};
use crate::common::{cpus, wait_for};

/// Of each length; it warms up for half a second first.
const SECONDS: &str = "0.3";

pub(crate) fn run(cell: &Cell) {
    let daemon = Daemon::start(&DaemonOptions {
        ports: 2,
        queues: cell.queues,
        client: cell.client,
        args: vec!["--poll-cpus".to_string(), cpus().0.to_string()],
        ..DaemonOptions::default()
    });
    for size in cell.sizes() {
        exchange(cell, &daemon, *size);
    }
    daemon.stop();
}

/// Frames and what became of them, of both ports: in, out, dropped for want of a destination.
fn counters(daemon: &Daemon) -> [u64; 3] {
    let ports = ["p0", "p1"].map(|name| daemon.port(name)["statistics"].clone());
    let sum = |direction: &str, count: &str| -> u64 {
        let counts = ports.iter().map(|port| &port[direction]);
        counts
            .filter_map(|counts| counts.pointer(count)?.as_u64())
            .sum()
    };
    [
        sum("rx", "/frames"),
        sum("tx", "/frames"),
        sum("rx", "/drops/no_destination"),
    ]
}

fn exchange(cell: &Cell, daemon: &Daemon, size: usize) {
    let before = counters(daemon);
    let on = |set: bool| if set { "on" } else { "off" };
    let mut command = Command::new(env!("CARGO_BIN_EXE_pollux"));
    command.args(["bench", "--json", "--seconds", SECONDS]);
    command.args(["--cpu", &cpus().1.to_string()]);
    for socket in daemon.sockets() {
        command.arg("--attach").arg(socket);
    }
    command.args(["--size", &size.to_string()]);
    command.args(["--ring", if cell.packed { "packed" } else { "split" }]);
    command.args(["--ring-size", &cell.entries.to_string()]);
    command.args(["--queues", &cell.queues.to_string()]);
    command.args(["--mergeable", on(cell.mergeable)]);
    command.args(["--in-order", on(cell.in_order)]);
    command.args([
        "--mode-of-socket",
        if cell.client { "client" } else { "server" },
    ]);
    let output = command.output().expect("pollux runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let words = String::from_utf8_lossy(&output.stderr);
    // It says `ok` only if every frame came once, intact, in order, and every buffer came back.
    let report: Value =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}{words}"));
    assert_eq!(report["verdict"], "ok", "{size} bytes: {report}");
    let exchanged = report["sent"].as_u64().unwrap();
    assert_eq!(report["received"], exchanged, "{size} bytes: {report}");
    assert!(
        exchanged > 4 * u64::from(cell.entries),
        "{size} bytes: {report}"
    );

    let moved = || {
        let after = counters(daemon);
        [0, 1, 2].map(|n| after[n] - before[n])
    };
    // Beside the frames that it counts, each guest announces itself once a queue, perhaps to nobody
    // yet.
    let announced = 2 * u64::from(cell.queues);
    wait_for("the counters", || moved()[0] == exchanged + announced);
    let [came, went, nowhere] = moved();
    assert_eq!(came, went + nowhere, "{size} bytes: in, and out or dropped");
    assert!(
        nowhere <= announced,
        "{size} bytes: {nowhere} frames had no destination"
    );
    daemon.assert_logged(&format!(
        "receiveq 0 started: {}, {} entries",
        if cell.packed { "packed" } else { "split" },
        cell.entries
    ));
}
