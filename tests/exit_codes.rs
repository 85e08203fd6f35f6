//! Every exit code that the documents name, from the real program: the cause decides, not the
//! command.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::daemon::{Daemon, DaemonOptions};
use common::process::Process;
use common::user::{User, set_mode};
use common::wait_for;
use rustix::process::Signal;

const POLLUX: &str = env!("CARGO_BIN_EXE_pollux");
const SOON: Duration = Duration::from_secs(20);

fn ended(command: &mut Command) -> (i32, String) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap(), said)
}

fn daemon(ports: usize) -> Daemon {
    Daemon::start(&DaemonOptions {
        ports,
        ..DaemonOptions::default()
    })
}

/// A daemon that does not start: exit code and last line.
fn run(user: &User, api: &Path, arguments: &[&str]) -> (i32, String) {
    let mut command = user.command("pollux");
    command.arg("run").args(arguments).args(["--log", "error"]);
    ended(command.arg("--api-socket").arg(api))
}

#[test]
fn a_port_that_cannot_be_made_has_one_code_at_the_start_and_later() {
    let user = User::new();
    let at = |name: &str| user.dir().join(name).display().to_string();
    let _live = UnixListener::bind(at("live.sock")).unwrap();
    // Somebody else's: it can be seen, and not asked.
    set_mode(Path::new(&at("live.sock")), 0o600);
    fs::write(at("file"), "mine").unwrap();
    fs::create_dir(at("locked")).unwrap();
    set_mode(Path::new(&at("locked")), 0o000);
    let daemon = Daemon::start(&DaemonOptions::default());
    for (spec, code, part) in [
        (at("live.sock"), 5, "live.sock"),
        (at("file"), 5, "not a socket"),
        (at("missing/p.sock"), 5, "does not exist; create it"),
        (at("file/p.sock"), 5, "Not a directory"),
        (at("p.sock") + ",socket-group=nosuchgroup", 5, "nosuchgroup"),
        (at("p.sock") + ",poll=7", 4, "no such poll thread 7"),
        (at("p.sock") + ",queues=0", 2, "1 to 128"),
        (at("p.sock") + ",colour=red", 2, "known are socket"),
        (at(&"x".repeat(120)), 2, "at most 107"),
    ] {
        let spec = format!("p,socket={spec}");
        let (first, said) = run(&user, &user.dir().join("api.sock"), &["--port", &spec]);
        assert_eq!(first, code, "run --port {spec}: {said}");
        assert!(said.contains(part), "{said}");
        let (later, said) = daemon.try_pollux(&["port", "add", &spec]);
        assert_eq!(later, code, "port add {spec}: {said}");
        assert!(said.contains(part), "{said}");
    }
    let locked = format!("p,socket={}", at("locked/p.sock"));
    let (code, said) = run(&user, &user.dir().join("api.sock"), &["--port", &locked]);
    assert_eq!(
        (code, said.contains("ermission denied")),
        (5, true),
        "{said}"
    );
    assert!(!said.contains("another process"), "{said}");
    daemon.stop();
}

#[test]
fn an_api_socket_that_cannot_be_had_is_a_refusal() {
    let user = User::new();
    let (dir, first) = (user.dir().to_path_buf(), daemon(0));
    let _other = UnixListener::bind(dir.join("other.sock")).unwrap();
    set_mode(&dir.join("other.sock"), 0o777);
    fs::write(dir.join("file"), "mine").unwrap();
    fs::create_dir(dir.join("locked")).unwrap();
    set_mode(&dir.join("locked"), 0o000);
    for (path, arguments, code, part) in [
        (dir.join("other.sock"), vec![], 5, "another process listens"),
        (dir.join("file"), vec![], 5, "not a socket"),
        (dir.join("no/dir/api.sock"), vec![], 5, "does not exist"),
        (dir.join("locked/api.sock"), vec![], 5, "ermission denied"),
        (dir.join("x".repeat(120)), vec![], 2, "takes 1 to 107"),
        (
            dir.join("api.sock"),
            vec!["--api-group", "nosuchgroup"],
            5,
            "nosuchgroup",
        ),
        (
            dir.join("api.sock"),
            vec!["--poll-cpus", "4000"],
            2,
            "CPU 4000",
        ),
    ] {
        let (found, said) = run(&user, &path, &arguments);
        assert_eq!(found, code, "{path:?} {arguments:?}: {said}");
        assert!(said.contains(part), "{path:?}: {said}");
    }
    assert!(!dir.join("no").exists());
    let mut again = Command::new(POLLUX);
    again
        .args(["run", "--api-socket"])
        .arg(first.dir().join("api.sock"));
    let (code, said) = ended(&mut again);
    assert_eq!(
        (code, said.contains("another pollux answers")),
        (5, true),
        "{said}"
    );
    // A client may not use it, either.
    set_mode(first.dir(), 0o755);
    let mut stranger = user.command("pollux");
    stranger.args(["port", "list", "--api-socket"]);
    stranger.arg(first.dir().join("api.sock"));
    let (code, said) = ended(&mut stranger);
    let expected = if rustix::process::geteuid().is_root() {
        5
    } else {
        0
    };
    assert_eq!(code, expected, "{said}");
    first.stop();
}

#[test]
fn what_a_stop_of_the_daemon_ends_has_code_3_and_says_stopping_once() {
    let daemon = daemon(1);
    let streams = [
        &["events", "--json"][..],
        &["capture", "p0"],
        &["stats", "--watch"],
        &["trace", "p0"],
    ];
    let mut streams = streams.map(|arguments| {
        let mut command = Command::new(POLLUX);
        command.args(arguments).arg("--api-socket");
        Process::spawn("pollux", command.arg(daemon.dir().join("api.sock")))
    });
    assert!(streams[1].err.wait("has begun", 0, SOON).is_some());
    assert!(streams[2].out.wait("p0", 0, SOON).is_some());
    // Its subscription and the trace are there when an event of the trace has come.
    let observers = || daemon.pollux(&["port", "list"]);
    wait_for("the trace", || {
        observers().status.success() && daemon.log().contains("trace")
    });
    let from = daemon.dir().join("more.sock");
    let spec = format!("more,socket={}", from.display());
    wait_for("the events", || {
        // Until the subscription is there, events go to nobody.
        daemon.pollux(&["port", "add", &spec]);
        daemon.pollux(&["port", "remove", "more"]);
        streams[0].out.text().contains("port_added")
    });
    daemon.stop_by(Signal::TERM);
    for stream in &mut streams {
        let status = stream.wait(SOON);
        assert_eq!(
            status.and_then(|status| status.code()),
            Some(3),
            "{}",
            stream.words()
        );
    }
    let events = streams[0].out.text();
    assert_eq!(events.matches("\"stopping\"").count(), 1, "{events}");
    assert!(
        events.lines().last().unwrap().contains("\"stopping\""),
        "{events}"
    );
    let (code, said) =
        ended(Command::new(POLLUX).args(["port", "list", "--api-socket", "/no.sock"]));
    assert_eq!((code, said.contains("no pollux daemon answers")), (3, true));
}

#[test]
fn a_ports_socket_is_no_api_socket_and_the_port_has_nothing_to_report() {
    let daemon = daemon(2);
    for occupied in [false, true] {
        let port = &daemon.sockets()[usize::from(occupied)];
        let _frontend = occupied.then(|| {
            let frontend = UnixStream::connect(port).unwrap();
            wait_for("the session", || daemon.state("p1").0 == "negotiating");
            frontend
        });
        let mut command = Command::new(POLLUX);
        command.args(["port", "list", "--api-socket"]).arg(port);
        let (code, said) = ended(&mut command);
        assert_eq!(
            (code, said.contains("that is no API socket")),
            (3, true),
            "{said}"
        );
        if occupied {
            // One that is a frontend is told of, behind anything about the other.
            let _second = UnixStream::connect(port).unwrap();
            daemon.assert_logged("a second frontend was refused");
            let refused = daemon.log().matches("a second frontend").count();
            assert_eq!(refused, 1, "{}", daemon.log());
        }
    }
    daemon.stop();
}

/// The rows of the table of exit codes in `docs/operating.md`: what each column says.
fn documented() -> Vec<(String, String, String)> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operating.md");
    let text = fs::read_to_string(path).unwrap();
    let (_, text) = text.split_once("## Exit codes").unwrap();
    let rows = text.lines().filter_map(|line| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let number = cells.get(1).filter(|cell| cell.parse::<u8>().is_ok())?;
        Some((
            number.to_string(),
            cells[2].replace('`', ""),
            cells[3].replace('`', ""),
        ))
    });
    rows.collect()
}

/// The codes that a help text names, in its order.
fn helped(arguments: &[&str]) -> Vec<(String, String)> {
    let output = Command::new(POLLUX)
        .args(arguments)
        .env("COLUMNS", "100")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (_, text) = text.split_once("Exit codes:\n").unwrap();
    let mut codes: Vec<(String, String)> = Vec::new();
    for line in text.lines().map(str::trim_end) {
        match line.trim_start().split_once("  ") {
            Some((code, meaning)) if code.parse::<u8>().is_ok() => {
                codes.push((code.to_string(), meaning.to_string()));
            }
            // A line that goes on.
            _ => codes.last_mut().unwrap().1 += &format!(" {}", line.trim_start()),
        }
    }
    codes
}

#[test]
fn documents_help_and_man_pages_name_the_same_codes() {
    let rows = documented();
    assert_eq!(rows.len(), 7);
    let column = |which: fn(&(String, String, String)) -> &String| -> Vec<(String, String)> {
        let said = rows.iter().filter(|row| which(row) != "–");
        said.map(|row| (row.0.clone(), which(row).clone()))
            .collect()
    };
    let (commands, bench) = (column(|row| &row.1), column(|row| &row.2));
    assert_eq!(helped(&["--help"]), commands);
    assert_eq!(helped(&["bench", "--help"]), bench);
    let dir = tempfile::tempdir().unwrap();
    let mut man = Command::new(POLLUX);
    assert_eq!(ended(man.args(["man", "--dir"]).arg(dir.path())).0, 0);
    for (page, codes) in [("pollux-run.1", &commands), ("pollux-bench.1", &bench)] {
        let text = fs::read_to_string(dir.path().join(page))
            .unwrap()
            .replace('\\', "");
        for (code, meaning) in codes {
            assert!(
                text.contains(&format!("fB{code}fR\n{meaning}\n")),
                "{page} {code}: {text}"
            );
        }
    }
    let missing = dir.path().join("no");
    let mut man = Command::new(POLLUX);
    assert_eq!(ended(man.args(["man", "--dir"]).arg(missing)).0, 5);
}
