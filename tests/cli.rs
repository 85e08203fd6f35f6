//! The `pollux` program as a user meets it: exit codes, tables, JSON, generated files.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

#[expect(dead_code, reason = "each test program uses its part of it")]
#[path = "support/model.rs"]
mod model;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use model::serve;
use pollux::api::types::EventKind;
use serde_json::Value;

fn pollux(socket: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pollux"));
    command
        .env("POLLUX_API_SOCKET", socket)
        .env_remove("POLLUX_LOG")
        .stdin(Stdio::null());
    command
}

fn run(socket: &Path, arguments: &str) -> (i32, String, String) {
    let arguments = arguments.split(' ').filter(|argument| !argument.is_empty());
    let Output {
        status,
        stdout,
        stderr,
    } = pollux(socket).args(arguments).output().unwrap();
    (
        status.code().unwrap(),
        String::from_utf8(stdout).unwrap(),
        String::from_utf8(stderr).unwrap(),
    )
}

const NOWHERE: &str = "/nonexistent/api.sock";

#[test]
fn capabilities_ignore_every_other_option() {
    for arguments in [
        "--print-capabilities",
        "--print-capabilities --no-such-option",
        "run --socket-path=/x --print-capabilities",
    ] {
        let (code, out, _) = run(Path::new(NOWHERE), arguments);
        assert_eq!(
            (code, out.as_str()),
            (0, "{\"type\":\"net\"}\n"),
            "{arguments}"
        );
    }
}

#[test]
fn bad_arguments_exit_with_2() {
    for arguments in [
        "",
        "frobnicate",
        "port add vm1",
        "port set vm1 colour=red",
        "run --port vm1",
        "run --port a,socket=/x --port a,socket=/y",
        "run --port a,socket=/x --port b,socket=/x",
        "run --idle busy --idle adaptive",
        "run --idle busy,adaptive",
        "run --log nonsense=nonsense",
        "run --log pollux=dbug",
        "run --log inof",
        "run --log foo",
        "run --log=",
        "run --port vm1,socket=/x,mode=client,socket-mode=0660",
        "port set vm1 queues=2 queues=4",
        "capture all -w - --rotate 1M",
        "completions bash --api-socket /x",
        "man --api-socket /x",
        "bench --api-socket /x",
    ] {
        let (code, _, err) = run(Path::new(NOWHERE), arguments);
        assert_eq!(code, 2, "{arguments}: {err}");
        assert!(!err.is_empty(), "{arguments}");
    }
    let mut misspelt = pollux(Path::new(NOWHERE));
    misspelt.arg("run").env("POLLUX_LOG", "garbage,,");
    assert_eq!(misspelt.output().unwrap().status.code(), Some(2));
}

#[test]
fn other_words_for_remove_and_list_are_understood() {
    for arguments in [
        "port del x",
        "port rm x",
        "port delete x",
        "port ls",
        "fdb del 52:54:00:00:00:01",
        "fdb ls",
        "poll rm 0",
        "poll ls",
        "mirror del x",
        "mirror ls",
    ] {
        assert_eq!(run(Path::new(NOWHERE), arguments).0, 3, "{arguments}");
    }
}

#[test]
fn no_daemon_exits_with_3_and_says_what_to_do() {
    for arguments in [
        "port list",
        "stats",
        "fdb list --json",
        "events",
        "port remove a --if-exists",
    ] {
        let (code, out, err) = run(Path::new(NOWHERE), arguments);
        assert_eq!((code, out.as_str()), (3, ""), "{arguments}");
        assert!(err.contains(NOWHERE) && err.contains("pollux run"), "{err}");
    }
    let dir = tempfile::tempdir().unwrap();
    let stale = dir.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    assert_eq!(run(&stale, "port list").0, 3);
}

#[test]
fn ports_are_operated_with_the_documented_exit_codes() {
    let served = serve();
    let (socket, dir) = (served.socket.as_path(), served.dir.path().display());
    let add = format!("port add vm1,socket={dir}/vm1.sock");
    for (arguments, code) in [
        (add.as_str(), 0),
        (add.as_str(), 5),
        (&format!("{add} --may-exist"), 0),
        ("port set vm1 queues=2", 0),
        ("port set vm2 queues=2", 4),
        ("port show vm2", 4),
        ("port show gone", 4),
        ("port show panics", 1),
        ("fdb add 52:54:00:00:00:01 --port vm1", 0),
        ("fdb add 52:54:00:00:00:01 --port vm1", 5),
        ("fdb add 52:54:00:00:00:01 --port vm1 --replace", 0),
        ("fdb add 52:54:00:00:00:1 --port vm1", 2),
        ("fdb add 52:54:00:00:00:02 --port vm1 --vlan 5", 2),
        ("fdb add 52:54:00:00:00:01 --port vm9", 4),
        ("fdb add 01:54:00:00:00:01 --port vm1", 2),
        ("fdb flush --port vm1", 0),
        ("fdb remove 52:54:00:00:00:01", 0),
        ("fdb remove 52:54:00:00:00:01", 4),
        ("fdb remove 52:54:00:00:00:01 --if-exists", 0),
        ("port remove vm1", 0),
        ("port remove vm1", 4),
        ("port remove vm1 --if-exists", 0),
    ] {
        let (found, _, err) = run(socket, arguments);
        assert_eq!(found, code, "{arguments}: {err}");
        assert_eq!(err.is_empty(), code == 0, "{arguments}: {err}");
    }
}

#[test]
fn reads_are_tables_for_people_and_json_for_programs() {
    let served = serve();
    let socket = served.socket.as_path();
    let dir = served.dir.path().display();
    run(socket, &format!("port add vm1,socket={dir}/vm1.sock"));
    run(socket, "fdb add 52:54:00:00:00:01 --port vm1");
    for (arguments, parts) in [
        ("port list", vec!["NAME", "vm1", "negotiating"]),
        (
            "port show vm1",
            vec![
                "driver not ready",
                "broken: avail.idx",
                "ring_full",
                "refused 37 times in 12",
                "52:54:00:00:00:01 to and from vm2, 412 times",
                "512 MiB in 2 regions",
                "64 MiB at 0x100000000: its file",
                "ring tx 0 will not survive a restart of the switch: no",
                "ring tx 0 is enabled, but never had a buffer",
                "5 receive buffers went back unused, 4 of them",
            ],
        ),
        ("fdb list", vec!["52:54:00:00:00:01", "static"]),
        (
            "poll list",
            vec!["overdue 2.5s", "50%", "vm1:0 12%", "TAKE-OVERS", "busy"],
        ),
        ("stats", vec!["RX FRAMES", "vm1", "generation 4"]),
    ] {
        let (code, out, _) = run(socket, arguments);
        assert_eq!(code, 0, "{arguments}");
        for part in parts {
            assert!(out.contains(part), "{arguments}: {out}");
        }
        assert!(!out.contains('\x1b'), "{arguments}: {out:?}");
        let wide = out.lines().find(|line| line.chars().count() > 80);
        assert_eq!(wide, None, "{arguments}");
        let (code, out, _) = run(socket, &format!("{arguments} --json"));
        assert_eq!(code, 0);
        serde_json::from_str::<Value>(&out).unwrap();
    }
}

#[test]
fn settings_of_poll_threads_are_answered_with_what_they_are_then() {
    let served = serve();
    for (arguments, expected) in [
        ("rebalance=auto", "rebalance=auto idle=adaptive:50\n"),
        ("idle=busy", "rebalance=off idle=busy\n"),
        ("idle=busy --thread 0", "rebalance=off idle=busy thread=0\n"),
    ] {
        let (code, out, err) = run(&served.socket, &format!("poll set {arguments}"));
        assert_eq!((code, out.as_str()), (0, expected), "{arguments}: {err}");
    }
    let (code, out, _) = run(&served.socket, "poll set idle=busy --thread 0 --json");
    let answer: Value = serde_json::from_str(&out).unwrap();
    let expected = serde_json::json!({"rebalance": "off", "thread": 0, "idle": "busy"});
    assert_eq!((code, answer), (0, expected));
}

#[test]
fn events_are_printed_as_they_happen_and_end_with_the_daemon() {
    let mut served = serve();
    let mut child = pollux(&served.socket)
        .args(["events", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let model = served.model.clone();
    let (done, stop) = std::sync::mpsc::channel::<()>();
    let feeder = std::thread::spawn(move || {
        while stop
            .recv_timeout(std::time::Duration::from_millis(50))
            .is_err()
        {
            model.event(EventKind::SessionConnected, "frontend connected");
        }
    });
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    done.send(()).unwrap();
    feeder.join().unwrap();
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(event["kind"], "session_connected");
    served.server.take().unwrap().stop();
    assert_eq!(child.wait().unwrap().code(), Some(3));
}

#[test]
fn watching_ends_with_3_when_the_daemon_goes() {
    let mut served = serve();
    let mut child = pollux(&served.socket)
        .args(["stats", "--watch"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    served.server.take().unwrap().stop();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(3));
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = pollux(Path::new(NOWHERE))
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Closed before the program can have written its script.
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty());
}

#[test]
fn completions_and_man_pages_come_from_the_same_source() {
    for shell in ["bash", "zsh", "fish"] {
        let (code, out, _) = run(Path::new(NOWHERE), &format!("completions {shell}"));
        assert_eq!(code, 0);
        assert!(out.contains("poll-cpus"), "{shell}");
    }
    let (code, page, _) = run(Path::new(NOWHERE), "man");
    assert_eq!(code, 0);
    assert!(
        page.contains(".TH pollux 1") && page.contains("EXIT STATUS"),
        "{page}"
    );
    let dir = tempfile::tempdir().unwrap();
    let (code, _, _) = run(
        Path::new(NOWHERE),
        &format!("man --dir {}", dir.path().display()),
    );
    assert_eq!(code, 0);
    for page in [
        "pollux.1",
        "pollux-run.1",
        "pollux-port-add.1",
        "pollux-fdb-flush.1",
    ] {
        assert!(fs::exists(dir.path().join(page)).unwrap(), "{page}");
    }
}

#[test]
fn version_and_help_name_the_essentials() {
    let (code, out, _) = run(Path::new(NOWHERE), "--version");
    assert_eq!(
        (code, out),
        (0, format!("pollux {}\n", env!("CARGO_PKG_VERSION")))
    );
    let (code, out, _) = run(Path::new(NOWHERE), "--help");
    assert_eq!(code, 0);
    assert!(out.contains("Exit codes") && out.contains("3  no daemon"));
}

#[test]
fn a_daemon_that_cannot_start_says_what_is_wrong_and_where() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (live, file, api) = (at("live.sock"), at("file"), at("api.sock"));
    let _listener = UnixListener::bind(&live).unwrap();
    fs::write(&file, "mine").unwrap();
    let long = at(&"x".repeat(120));
    let missing = at("missing/p.sock");
    let good = at("good.sock");
    for (arguments, code, parts) in [
        (
            format!("--port p,socket={long}"),
            2,
            vec!["port p", "at most 107"],
        ),
        (
            format!("--port p,socket={live}"),
            5,
            vec![live.as_str(), "another process"],
        ),
        (
            format!("--port p,socket={file}"),
            5,
            vec![file.as_str(), "not a socket"],
        ),
        (
            format!("--port p,socket={missing}"),
            5,
            vec!["missing", "does not exist"],
        ),
        (
            format!("--port p,socket={good} --port p,socket={good}2"),
            2,
            vec!["\"p\"", "two ports"],
        ),
        (
            format!("--port p,socket={good} --poll-cpus 4000"),
            2,
            vec!["--poll-cpus", "CPU 4000"],
        ),
        (
            format!("--port p,socket={good} --poll-cpus 0 --idle busy,adaptive"),
            2,
            vec![
                "--idle",
                "--poll-cpus",
                "2 idle policies for 1 poll thread;",
            ],
        ),
        (
            format!("--port p,socket={good},socket-group=nosuchgroup"),
            5,
            vec!["nosuchgroup", good.as_str()],
        ),
    ] {
        let (found, out, err) = run(Path::new(&api), &format!("run {arguments}"));
        assert_eq!((found, out.as_str()), (code, ""), "{arguments}: {err}");
        for part in parts {
            assert!(err.contains(part), "{arguments}: {err}");
        }
        // Nothing is left behind, and nobody else's file is touched.
        assert!(!Path::new(&api).exists() && !Path::new(&good).exists());
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    assert!(Path::new(&live).exists());
}
