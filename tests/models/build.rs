//! Writes the modules that the models run over: the production files as they stand, and for each
//! deliberate mistake the same files with one place changed. Nothing generated is committed.
//!
//! A mistake is a substitution of text. The build fails where its text does not stand in the
//! production file exactly once, so a mistake cannot drift away from the code.

#![allow(clippy::unwrap_used, reason = "a build script fails by panicking")]

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// Module `production`, which holds everything.
const PRODUCTION: &[&str] = &[
    "src/virtio/claim.rs",
    "src/stats/counter.rs",
    "src/daemon/handover.rs",
    "src/daemon/mailbox.rs",
    "src/observe/pen.rs",
    "src/sys/snapshot.rs",
    "delivery",
    "observers",
    "removal",
    "views",
];

/// What is compiled for a mistake in the file that stands first: other production files, and the
/// models that must find the mistake.
const PARTS: &[&[&str]] = &[
    &["src/virtio/claim.rs", "delivery"],
    &[
        "src/sys/snapshot.rs",
        "src/stats/counter.rs",
        "src/daemon/handover.rs",
        "src/observe/pen.rs",
        "observers",
        "views",
    ],
    &["src/daemon/handover.rs", "src/sys/snapshot.rs", "views"],
    &["src/daemon/mailbox.rs", "src/sys/snapshot.rs", "removal"],
    &[
        "src/observe/pen.rs",
        "src/stats/counter.rs",
        "src/daemon/handover.rs",
        "src/sys/snapshot.rs",
        "observers",
    ],
];

/// Module of the mistake, production file, and which text is replaced by what.
const MISTAKES: &[(&str, &str, &str, &str)] = &[
    (
        "token_stored",
        "src/virtio/claim.rs",
        "let left = self.release(claims);",
        "let turn = self.turn.load(Ordering::Acquire) - claims * FILLED;\n            \
         self.turn.store(turn - HELD, Ordering::Release);\n            let left = turn / FILLED;",
    ),
    (
        "one_round",
        "src/virtio/claim.rs",
        "if left == 0 || self.filled_from(end, 1).1 == 0 {",
        "if left == 0 || self.filled_from(end, 1).1 <= 1 {",
    ),
    (
        "no_barrier",
        "src/virtio/claim.rs",
        "fence(Ordering::SeqCst);",
        "fence(Ordering::Release);",
    ),
    (
        "no_room",
        "src/virtio/claim.rs",
        "(self.published() + self.size()).saturating_sub(p)",
        "(u64::MAX / 2).saturating_sub(p)",
    ),
    (
        "looked_before",
        "src/virtio/claim.rs",
        "let turn = self.turn.fetch_or(HELD, Ordering::AcqRel);
            if turn & HELD != 0 {
                return Published::Clean;
            }
            let old = self.published.load(Ordering::Relaxed);",
        "let old = self.published.load(Ordering::Relaxed);
            let turn = self.turn.fetch_or(HELD, Ordering::AcqRel);
            if turn & HELD != 0 {
                return Published::Clean;
            }",
    ),
    (
        "posts_though_gone",
        "src/daemon/mailbox.rs",
        "if self.gone {",
        "if self.gone && device.is_none() {",
    ),
    (
        "kept_when_gone",
        "src/daemon/mailbox.rs",
        "self.gone = true;\n        self.device = None;",
        "self.gone = true;",
    ),
    (
        "answers_before",
        "src/daemon/mailbox.rs",
        "(self.published >= post || self.gone)",
        "(self.posted >= post || self.gone)",
    ),
    (
        "acknowledges_unread",
        "src/sys/snapshot.rs",
        "self.word().store(view.generation, Ordering::Release);",
        "self.word()\n            .store(self.shared.generation.load(Ordering::Acquire), Ordering::Release);",
    ),
    (
        "wakes_without_barrier",
        "src/sys/snapshot.rs",
        "// Pairs with the barrier in `Publisher::publish`.\n            fence(Ordering::SeqCst);",
        "// Pairs with the barrier in `Publisher::publish`.\n            fence(Ordering::Release);",
    ),
    (
        "owned_on_its_way",
        "src/daemon/handover.rs",
        "Place::Between { .. } => None,",
        "Place::Between { to } => Some(to),",
    ),
    (
        "unacknowledged",
        "src/daemon/handover.rs",
        "self.generation.is_some_and(reached)",
        "self.generation.map(reached).is_some()",
    ),
    (
        "arrives_twice",
        "src/daemon/handover.rs",
        "let here = *place == (Place::Between { to: self.to });",
        "let here = matches!(*place, Place::Between { .. });",
    ),
    (
        "kept",
        "src/observe/pen.rs",
        "self.place.0.store(Some(pen));",
        "drop(pen);",
    ),
    (
        "unsettled",
        "src/observe/pen.rs",
        "reached(*generation).then_some(reason)",
        "Some(reached(*generation)).map(|_| reason.as_str())",
    ),
    (
        "looked_at_last",
        "src/observe/pen.rs",
        "let end = end(stream);\n    let more = take(stream);",
        "let more = take(stream);\n    let end = end(stream);",
    ),
];

/// The module `name` with `parts`, of which `changed` names one and the file that replaces it.
fn module(name: &str, parts: &[&str], changed: Option<(&str, &Path)>) -> String {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap());
    let mut text = format!("pub mod {name} {{\n");
    for part in parts {
        let path = match changed {
            Some((original, copy)) if original == *part => copy.to_path_buf(),
            _ if part.starts_with("src/") => here.join("../..").join(part),
            _ => here.join(part).with_extension("rs"),
        };
        let module = Path::new(part).file_stem().unwrap().display();
        writeln!(
            text,
            "#[allow(dead_code, reason = \"not everything is run\")]"
        )
        .unwrap();
        writeln!(text, "#[path = {:?}]", path.to_str().unwrap()).unwrap();
        writeln!(text, "pub mod {module};").unwrap();
    }
    text + "}\n"
}

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    let root = Path::new(&env::var_os("CARGO_MANIFEST_DIR").unwrap()).join("../..");
    let mut modules = module("production", PRODUCTION, None);
    for (name, file, from, to) in MISTAKES {
        let original = root.join(file);
        println!("cargo::rerun-if-changed={}", original.display());
        let text = fs::read_to_string(&original).unwrap();
        let found = text.matches(from).count();
        assert_eq!(found, 1, "{name}: this must stand in {file} once: {from}");
        let copy = out.join(name).with_extension("rs");
        fs::write(&copy, text.replacen(from, to, 1)).unwrap();
        let parts = PARTS.iter().find(|parts| parts[0] == *file);
        let parts = parts.unwrap_or_else(|| panic!("no parts for mistakes in {file}"));
        modules += &module(name, parts, Some((file, &copy)));
    }
    println!("cargo::rerun-if-changed=build.rs");
    fs::write(out.join("modules.rs"), modules).unwrap();
}
