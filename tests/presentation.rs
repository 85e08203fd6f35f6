//! How the program presents itself: in 80 columns, with or without colours, in man pages, on
//! outputs that take nothing; and that every option of a port can be read back.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

#[expect(dead_code, reason = "each test program uses its part of it")]
#[path = "support/model.rs"]
mod model;

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use clap::CommandFactory;
use common::daemon::{Daemon, DaemonOptions};
use model::{Served, serve};
use pollux::cli::Cli;
use pollux::config::{ConfigError, PortSpec};
use serde_json::{Value, json};

const POLLUX: &str = env!("CARGO_BIN_EXE_pollux");

fn pollux(socket: &Path, arguments: &str) -> Command {
    let mut command = Command::new(POLLUX);
    command
        .args(arguments.split(' ').filter(|argument| !argument.is_empty()))
        .env("POLLUX_API_SOCKET", socket)
        .env_remove("POLLUX_LOG")
        .stdin(Stdio::null());
    command
}

/// A daemon's model with a port and an address.
fn served() -> Served {
    let served = serve();
    let dir = served.dir.path().display();
    for arguments in [
        format!("port add vm1,socket={dir}/vm1.sock,socket-mode=0660"),
        "fdb add 52:54:00:00:00:01 --port vm1".to_string(),
        "mirror add ids --from vm1 --to vm1".to_string(),
    ] {
        let output = pollux(&served.socket, &arguments).output().unwrap();
        assert!(output.status.success(), "{arguments}: {output:?}");
    }
    served
}

/// All commands there are, each as it is typed.
fn commands() -> Vec<String> {
    fn walk(command: &clap::Command, path: &str, all: &mut Vec<String>) {
        all.push(path.to_string());
        for command in command.get_subcommands() {
            walk(command, &format!("{path} {}", command.get_name()), all);
        }
    }
    let mut all = Vec::new();
    walk(&Cli::command(), "", &mut all);
    all
}

fn assert_narrow(what: &str, text: &[u8]) {
    let text = String::from_utf8_lossy(text);
    let wide = text.lines().find(|line| line.chars().count() > 80);
    assert_eq!(wide, None, "{what}");
}

#[test]
fn help_messages_and_tables_have_80_columns_at_most() {
    let served = served();
    let socket = served.socket.as_path();
    let said = |arguments: &str| {
        let mut command = pollux(socket, arguments);
        let Output { stdout, stderr, .. } = command.env("COLUMNS", "80").output().unwrap();
        assert!(!stdout.is_empty() || !stderr.is_empty(), "{arguments}");
        assert_narrow(arguments, &stdout);
        assert_narrow(arguments, &stderr);
    };
    let commands = commands();
    assert!(commands.len() > 25, "{commands:?}");
    for command in commands {
        said(&format!("{command} --help"));
        said(&format!("{command} -h"));
    }
    for arguments in [
        "port list",
        "port show vm1",
        "fdb list",
        "poll list",
        "poll set",
        "stats",
        "mirror list",
        "port add a,socket=/x,colour=red",
        "port add a,socket=/x,queues=129",
        "port add vm!,socket=/x",
        "port add a",
        "port set vm1 colour=red",
        "port show vm9",
        "poll set idle=lazy",
        "poll set colour=red",
        "poll set rebalance=auto rebalance=off",
        "fdb add 52:54:00:00:00 --port vm1",
        "run --log inof",
        "run --log polux=debug",
        "run --idle lazy",
        "run --port a,socket=/x --port a,socket=/y",
        "run --port a,socket=/no/directory/of/this/name/socket",
        "run --api-socket /no/directory/of/this/name/socket",
        "port list --api-socket /no/directory/of/this/name/socket",
        "bench --api-socket /x",
        "capture all -w - --rotate 1M",
        "capture all -w /no/directory/of/this/name/file",
        "man --dir /no/directory/of/this/name",
        "frobnicate",
    ] {
        said(arguments);
    }
}

#[test]
fn what_a_program_reads_has_a_line_a_record() {
    let served = served();
    let mut command = pollux(&served.socket, "run --log polux=debug");
    let stderr = command.env_remove("COLUMNS").output().unwrap().stderr;
    let text = String::from_utf8(stderr).unwrap();
    let first = text.lines().next().unwrap();
    assert!(
        first.contains("no module") && first.contains("pollux::daemon"),
        "{text}"
    );
}

#[test]
fn every_option_of_a_port_can_be_read_back() {
    let wrong = "x,socket=/x,colour=red".parse::<PortSpec>();
    let ConfigError::UnknownOption { .. } = wrong.clone().unwrap_err() else {
        panic!("{wrong:?}");
    };
    // What a message says is known is what there is.
    let known = wrong.unwrap_err().to_string();
    let (_, known) = known.split_once("known are ").unwrap();
    let daemon = Daemon::start(&DaemonOptions::default());
    let socket = daemon.dir().join("p.sock");
    let group = match rustix::process::geteuid().is_root() {
        true => "nogroup".to_string(),
        // One of those that this user may give.
        false => rustix::process::getegid().as_raw().to_string(),
    };
    let value = |option: &str| match option {
        "socket" => (socket.display().to_string(), json!(socket)),
        "mode" => ("server".to_string(), json!("server")),
        "queues" => ("3".to_string(), json!(3)),
        "poll" => ("0".to_string(), json!([0])),
        "ring-reset" => ("on".to_string(), json!(true)),
        "socket-mode" => ("0600".to_string(), json!(0o600)),
        "socket-group" => (group.clone(), json!(group)),
        other => panic!("{other} is new: give it a value that can be told from its default"),
    };
    let options: Vec<&str> = known.split(", ").collect();
    let given = options
        .iter()
        .map(|option| format!(",{option}={}", value(option).0));
    let spec = format!("p{}", given.collect::<String>());
    let keys = serde_json::to_value(spec.parse::<PortSpec>().unwrap()).unwrap();
    assert_eq!(keys.as_object().unwrap().len(), options.len() + 1, "{keys}");
    let (code, said) = daemon.try_pollux(&["port", "add", &spec]);
    assert_eq!(code, 0, "{said}");
    let port = daemon.port("p");
    let text = daemon.try_pollux(&["port", "show", "p"]).1;
    for option in options {
        let found = &port[option.replace('-', "_")];
        assert_eq!(*found, value(option).1, "{option}: {port}");
        let line = text.lines().find(|line| {
            let words = option.replace('-', " ");
            line.starts_with(&words)
        });
        assert!(line.is_some(), "{option}: {text}");
    }
    // The same again is the same port.
    let (code, said) = daemon.try_pollux(&["port", "add", &spec, "--may-exist"]);
    assert_eq!(code, 0, "{said}");
    daemon.stop();
}

#[test]
fn the_log_has_colours_only_where_they_are_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let log = |environment: &str| {
        // The switch says where its API is, and then that it cannot make the port. A machine of
        // continuous integration says so in `CI`, which counts as a terminal with colours.
        let run = format!(
            "env -u CI -u CLICOLOR -u CLICOLOR_FORCE {environment} \
             '{POLLUX}' run --port p,socket={0}/no/p --api-socket {0}/api",
            dir.path().display()
        );
        let mut terminal = Command::new("script");
        terminal
            .args(["-qec", &run, "/dev/null"])
            .stdin(Stdio::null());
        let output = terminal.output().expect("script, of Debian's bsdutils");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("API on"), "{environment}: {text}");
        text.contains('\x1b')
    };
    assert!(log("-u NO_COLOR TERM=xterm"));
    assert!(!log("NO_COLOR=1 TERM=xterm"));
    assert!(!log("-u NO_COLOR TERM=dumb"));
}

#[test]
fn man_pages_are_formatted_without_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = Path::new("/nonexistent/api.sock");
    let written = pollux(nowhere, &format!("man --dir {}", dir.path().display())).status();
    assert!(written.unwrap().success());
    let pages: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(pages.len(), commands().len());
    for page in pages {
        let path = page.unwrap().path();
        let mut man = Command::new("man");
        man.args(["--warnings", "-l"])
            .arg(&path)
            .env("MANWIDTH", "80");
        man.env("LC_ALL", "C.UTF-8")
            .env("MANPAGER", "cat")
            .stdin(Stdio::null());
        let output = man.output().expect("man, of Debian's man-db");
        let warnings = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && warnings.is_empty(),
            "{path:?}: {warnings}"
        );
        let text = String::from_utf8_lossy(&output.stdout);
        for section in [
            "SYNOPSIS",
            "EXIT STATUS",
            "ENVIRONMENT",
            "FILES",
            "SEE ALSO",
        ] {
            assert!(text.lines().any(|line| line == section), "{path:?}: {text}");
        }
        assert!(
            !text.contains("[--port]") && !text.contains("SUBCOMMANDS"),
            "{text}"
        );
        assert_narrow(&path.display().to_string(), text.as_bytes());
    }
    let page = |name: &str| {
        fs::read_to_string(dir.path().join(name))
            .unwrap()
            .replace('\\', "")
    };
    let (run, add) = (page("pollux-run.1"), page("pollux-port-add.1"));
    assert!(run.contains("fB--portfR fISPECfR"), "{run}");
    assert!(
        run.contains("\n.SH EXAMPLES\n") && run.contains("POLLUX_LOG"),
        "{run}"
    );
    assert!(
        add.contains("\n.SH ARGUMENTS\n") && add.contains("pollux-port-remove(1)"),
        "{add}"
    );
    assert!(
        run.contains(".TH pollux-run 1 ") && run.contains("\"Pollux manual\""),
        "{run}"
    );
}

/// The outputs of a command: neither takes a byte.
fn full() -> File {
    OpenOptions::new().write(true).open("/dev/full").unwrap()
}

#[test]
fn outputs_that_take_nothing_are_failures_and_no_panics() {
    let served = served();
    for arguments in [
        "--help",
        "--version",
        "port list",
        "port show vm1",
        "port list --json",
        "stats",
        "stats --watch",
        "poll list",
        "fdb flush",
        "completions bash",
        "man",
    ] {
        let mut command = pollux(&served.socket, arguments);
        let output = command.stdout(full()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments}: {said}");
        assert!(said.contains("No space left"), "{arguments}: {said}");
    }
    for arguments in [
        "frobnicate",
        "port show vm9",
        "capture vm1",
        "trace vm1",
        "bench --seconds 0",
        "run --log inof",
        "run --port a,socket=/no/dir/p --api-socket /no/dir/api",
    ] {
        let mut command = pollux(&served.socket, arguments);
        let code = |command: &mut Command| command.output().unwrap().status.code().unwrap();
        let expected = code(&mut command);
        assert_eq!(code(command.stderr(full())), expected, "{arguments}");
        assert!(expected < 6, "{arguments}: {expected}");
    }
}

#[test]
fn memory_is_in_the_units_of_the_log() {
    let served = served();
    let output = pollux(&served.socket, "port show vm1 --json")
        .output()
        .unwrap();
    let port: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(port["session"]["memory_bytes"], 512 << 20);
    let text = pollux(&served.socket, "port show vm1")
        .output()
        .unwrap()
        .stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("512 MiB in 2 regions"), "{text}");
}
