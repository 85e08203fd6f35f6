//! Stopping a capture that Wireshark's programs have started: quiet, however they ask for it.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::Duration;

use common::capture::read;
use common::daemon::DaemonOptions;
use common::process::Process;
use common::scene::Scene;
use common::user::{User, set_mode};
use common::wait_for;
use pollux::api::client::Client;
use rustix::process::{Pid, Signal, kill_process_group};

const SOON: Duration = Duration::from_secs(20);
/// A capture that has so many bytes is under way.
const UNDER_WAY: u64 = 64 * 1024;

/// tshark of an ordinary user, which takes extcap programs from where the environment says; that
/// of root does not.
fn start(user: &User, scene: &Scene, file: &Path) -> Process {
    let mut command = user.command("tshark");
    command
        .args(["-q", "-i", "pollux-all", "-w"])
        .arg(file)
        .env("WIRESHARK_EXTCAP_DIR", user.dir().join("extcap"))
        .env("POLLUX_API_SOCKET", scene.daemon.dir().join("api.sock"))
        // As a shell does, so that Ctrl-C reaches all of them.
        .process_group(0);
    Process::spawn("tshark", &mut command)
}

#[test]
fn a_stopped_tshark_complains_of_nothing() {
    let user = User::new();
    let scene = Scene::with(&DaemonOptions {
        args: user.api_group(),
        ..DaemonOptions::default()
    });
    set_mode(scene.daemon.dir(), 0o755);
    fs::create_dir(user.dir().join("extcap")).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("wireshark/pollux");
    user.install(&script, "extcap/pollux");
    let client = Client::new(scene.daemon.dir().join("api.sock"));
    // Ctrl-C and timeout(1) signal the whole group, a supervisor tshark alone, which passes it on.
    let stops = [Signal::TERM, Signal::INT]
        .into_iter()
        .flat_map(|signal| [true, false, true, false].map(|whole_group| (signal, whole_group)));
    for (n, (signal, whole_group)) in stops.enumerate() {
        let file = user.dir().join(format!("{n}.pcapng"));
        let mut process = start(&user, &scene, &file);
        wait_for("frames", || {
            let length = fs::metadata(&file).map_or(0, |data| data.len());
            assert!(process.ended().is_none(), "{}", process.words());
            length > UNDER_WAY
        });
        if whole_group {
            let group = Pid::from_raw(process.pid() as i32).unwrap();
            kill_process_group(group, signal).unwrap();
        }
        process.signal(signal);
        let ended = process.wait(SOON);
        let words = process.words();
        assert!(ended.is_some(), "{signal:?}: tshark goes on{words}");
        assert!(!words.contains("extcap pipe"), "{signal:?}{words}");
        assert!(!words.contains("pollux:"), "{signal:?}{words}");
        assert!(!read(&file).is_empty());
        wait_for("the observer to go", || {
            let observers = client.get("/v1/observers").unwrap().value().unwrap();
            observers.as_array().unwrap().is_empty()
        });
    }
    scene.finish();
}
