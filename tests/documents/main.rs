//! What the documents say can be done is done: every command of `README.md`, `docs/*.md` and
//! `qemu/README.md`, as it stands there but for its paths and its length, with a daemon and guests
//! where it wants some. A command ends by itself unless the table here says otherwise; one that
//! cannot be run here is listed with the reason. And the scripts, as somebody meets them who has
//! just cloned the repository.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

#[path = "../common/mod.rs"]
mod common;

mod extract;
mod frontends;
mod scene;
mod scripts;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use extract::{Block, blocks, documents, root};
use scene::{Scene, beside_responder};

/// How a command is run.
#[derive(Clone, Copy, Debug)]
enum How {
    /// It ends by itself, with status 0.
    Ends,
    /// Ctrl-C ends it.
    Endless,
    /// It is the daemon of its block.
    Daemon,
    /// It goes on beside the commands after it.
    Beside,
    /// A frontend for vm1, which is as good as its attachment.
    Qemu,
    /// The option of the frontend before it that is another one.
    QemuListens,
    /// DPDK's, for vm1 and vm2.
    Testpmd,
    /// In a directory with a space.
    Demo,
    /// Not here, for this reason.
    Elsewhere(&'static str),
}

/// By how they begin, the first that fits; [`How::Ends`] is for all others.
const COMMANDS: [(&str, How); 14] = [
    ("target/release/pollux run", How::Daemon),
    ("pollux run", How::Daemon),
    ("pollux capture vm1 -w vm1.pcapng --seconds", How::Ends),
    ("pollux capture", How::Endless),
    (
        "curl -sN --unix-socket $S http://localhost/v1/events",
        How::Endless,
    ),
    ("qemu/guest ", How::Beside),
    ("qemu-system-x86_64", How::Qemu),
    ("-chardev socket,", How::QemuListens),
    ("dpdk-testpmd", How::Testpmd),
    ("qemu/demo --json", How::Demo),
    ("qemu/demo", How::Elsewhere("a step of tests/run")),
    ("tests/run", How::Elsewhere("it runs this test")),
    (
        "cloud-hypervisor ",
        How::Elsewhere("Debian has no such package; qemu/cloud-hypervisor takes a binary"),
    ),
    ("crosvm run", How::Elsewhere("Debian has no such package")),
];

/// The place in [`COMMANDS`].
fn entry(text: &str) -> Option<usize> {
    COMMANDS
        .iter()
        .position(|(begin, _)| text.starts_with(begin))
}

fn how(text: &str) -> How {
    entry(text).map_or(How::Ends, |at| COMMANDS[at].1)
}

fn run(scene: &mut Scene, block: &Block) {
    let mut frontend = String::new();
    for command in block {
        let text = command.text.as_str();
        println!("{}: {text}", command.place);
        match how(text) {
            How::Ends => drop(scene.run(text)),
            How::Endless => scene.interrupt(text),
            How::Daemon => scene.start(text),
            How::Beside => {
                let text = scene.adapt(text.trim_end_matches('&'));
                let process = scene.spawn(&text);
                scene.beside.push(process);
            }
            How::Qemu => {
                frontends::qemu(scene, text);
                frontend = text.to_string();
            }
            How::QemuListens => frontends::qemu_listens(scene, &frontend, text),
            How::Testpmd => frontends::testpmd(scene, text),
            How::Demo => scripts::demo(scene, text),
            How::Elsewhere(reason) => println!("    not here: {reason}"),
        }
    }
}

/// A block, with what it expects to be there.
fn run_block(block: &Block) {
    let has = |part: &str| block.iter().any(|command| command.text.contains(part));
    let needs_daemon = block.iter().any(|command| {
        let alone = ["cargo ", "tests/run", "qemu/demo", "benches/"];
        !alone.iter().any(|begin| command.text.starts_with(begin))
    });
    let mut scene = Scene::new();
    if needs_daemon && !has("pollux run") {
        scene.start_usual();
    }
    if has("capture") || has("trace") {
        scene.start_traffic();
    }
    if has("qemu/guest ") {
        beside_responder(&mut scene, |scene| run(scene, block));
    } else {
        run(&mut scene, block);
    }
    scene.stop();
}

/// The blocks of one document; a fragment of QEMU's options follows the block of the whole command.
fn joined(blocks: Vec<Block>) -> Vec<Block> {
    let mut joined: Vec<Block> = Vec::new();
    for block in blocks {
        let fragment = matches!(how(&block[0].text), How::QemuListens);
        match joined.last_mut().filter(|_| fragment) {
            Some(before) => before.extend(block),
            None => joined.push(block),
        }
    }
    joined
}

fn assert_all_run(blocks: &[Block]) {
    assert!(!blocks.is_empty());
    let failed: Vec<&str> = blocks
        .iter()
        .filter(|block| catch_unwind(AssertUnwindSafe(|| run_block(block))).is_err())
        .map(|block| block[0].place.as_str())
        .collect();
    assert!(
        failed.is_empty(),
        "blocks that fail, by their first commands: {failed:?}"
    );
}

fn of(name: &str) -> Vec<Block> {
    joined(blocks(&root().join(name)))
}

#[test]
fn the_commands_of_the_readme_work() {
    assert_all_run(&of("README.md"));
}

#[test]
fn the_commands_of_qemus_readme_work() {
    assert_all_run(&of("qemu/README.md"));
}

#[test]
fn the_commands_of_the_documentation_work() {
    let readmes = ["README.md", "qemu/README.md"].map(|name| root().join(name));
    let others = documents()
        .into_iter()
        .filter(|path| !readmes.contains(path));
    let all: Vec<Block> = others.flat_map(|path| joined(blocks(&path))).collect();
    assert_all_run(&all);
}

/// The sections that another program writes are its own affair; what measures by itself is to be
/// run by hand.
#[test]
fn the_benchmarks_that_the_results_name_work() {
    let mut all = of("benches/RESULTS.md");
    for block in &mut all {
        block.retain(|command| command.text.starts_with("cargo bench"));
    }
    all.retain(|block| !block.is_empty());
    assert_all_run(&all);
}

#[test]
fn no_command_is_excused_that_no_document_has() {
    let all = documents().into_iter().flat_map(|path| blocks(&path));
    let used: HashSet<usize> = all
        .flatten()
        .filter_map(|command| entry(&command.text))
        .collect();
    for (at, (begin, _)) in COMMANDS.iter().enumerate() {
        assert!(used.contains(&at), "no document has {begin:?}");
    }
}
