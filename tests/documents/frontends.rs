//! Frontends of the documents: as far as their attachment to a port.

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use crate::common::linux::script;
use crate::common::testpmd::hugepages_free_mb;
use crate::scene::{Scene, signal_group};

/// A machine that does not begin, without the parts that would need a screen. Documents assume KVM.
const WITHOUT: &str = " -S -nodefaults -display none";

/// What the document gives for testpmd's memory, and what in its place.
const WITH_HUGEPAGES: &str = "--in-memory --single-file-segments -m 512";
const WITHOUT_HUGEPAGES: &str = "--no-huge -m 1024";

/// A newer QEMU's path, quoted for a shell.
fn newer_qemu() -> String {
    let output = Command::new(script("backports")).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
    format!("'{}'", String::from_utf8(output.stdout).unwrap().trim())
}

/// The command until the port has a frontend, and its end.
fn attach(scene: &Scene, text: &str) {
    let text = text
        .trim_end_matches(" ...")
        .replace("accel=kvm", "accel=tcg");
    let mut process = scene.spawn(&format!("exec {}{WITHOUT}", scene.adapt(&text)));
    scene.wait_until("vm1", "attached", |state| {
        let words = process.words();
        assert!(process.ended().is_none(), "{text}{words}");
        !["waiting", "connecting"].contains(&state)
    });
    process.signal(Signal::TERM);
    assert!(
        process.wait(Duration::from_secs(20)).is_some(),
        "{text}{}",
        process.words()
    );
    scene.wait_until("vm1", "left", |state| {
        ["waiting", "connecting"].contains(&state)
    });
}

/// With the system's QEMU, and with a newer one, whose option for reconnection is another.
pub(crate) fn qemu(scene: &Scene, text: &str) {
    assert!(text.contains("reconnect=1"), "{text}");
    attach(scene, text);
    let newer = text.replacen("qemu-system-x86_64", &newer_qemu(), 1);
    attach(scene, &newer.replace("reconnect=1", "reconnect-ms=500"));
}

/// The same with QEMU as the one that listens, at a port that connects.
pub(crate) fn qemu_listens(scene: &mut Scene, frontend: &str, option: &str) {
    let (before, rest) = frontend
        .split_once("-chardev ")
        .expect("a frontend before it");
    let (_, after) = rest.split_once(' ').expect("more options");
    let text = format!("{before}{option} {after}");
    scene.run("pollux port remove vm1");
    scene.run("pollux port add vm1,socket=/run/pollux/vm1.sock,mode=client");
    attach(scene, &text);
    attach(
        scene,
        &text.replacen("qemu-system-x86_64", &newer_qemu(), 1),
    );
}

/// Until frames have gone through, by the commands that its document names.
pub(crate) fn testpmd(scene: &Scene, text: &str) {
    assert!(text.contains(WITH_HUGEPAGES), "{text}");
    let mut text = text.to_string();
    if hugepages_free_mb() < 512 {
        text = text.replace(WITH_HUGEPAGES, WITHOUT_HUGEPAGES);
    }
    let text = scene.adapt(&text);
    let mut process = scene.spawn(&format!("exec stdbuf -oL {text}"));
    let mut seen = 0;
    let mut prompt = |process: &crate::common::process::Process, what: &str| {
        let said = process.out.wait("testpmd> ", seen, Duration::from_secs(60));
        let said = said.unwrap_or_else(|| panic!("no prompt after {what}{}", process.words()));
        seen += said.len();
        said
    };
    prompt(&process, "its start");
    let mut stats = String::new();
    for command in ["set txpkts 64", "start tx_first 32", "show port stats all"] {
        process.write(&format!("{command}\n"));
        stats = prompt(&process, command);
    }
    assert!(stats.contains("RX-packets:"), "{stats}");
    scene.wait_until("vm1", "running", |state| state == "running");
    process.write("quit\n");
    if process.wait(Duration::from_secs(30)).is_none() {
        signal_group(&process, Signal::KILL);
        panic!("testpmd stays{}", process.words());
    }
}
