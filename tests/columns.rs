//! Lines end at 100 columns: code, comments and the prose of Markdown pages.
//!
//! Tables may be longer, and so may lines with a text literal: a message that is searched for
//! should stand in one piece. `benches/RESULTS.md` is written by a program.

use std::path::Path;
use std::process::Command;

const COLUMNS: usize = 100;

/// Files of the repository that end in `suffix`.
fn files(suffix: &str) -> Vec<String> {
    let root = env!("CARGO_MANIFEST_DIR");
    let output = Command::new("git")
        .args([
            "-C",
            root,
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .output()
        .expect("git runs");
    assert!(output.status.success(), "{output:?}");
    let names = String::from_utf8(output.stdout).expect("names are text");
    let names: Vec<String> = names
        .lines()
        .filter(|name| name.ends_with(suffix) && Path::new(root).join(name).exists())
        .filter(|name| *name != "benches/RESULTS.md")
        .map(String::from)
        .collect();
    assert!(!names.is_empty(), "no {suffix} in {root}");
    names
}

/// Lines of these files that are too long and not `exempt`; the latter is told the line, and
/// whether it is in a block of code.
fn long_lines(suffix: &str, exempt: impl Fn(&str, bool) -> bool) -> Vec<String> {
    let mut long = Vec::new();
    for name in files(suffix) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&name);
        let text = std::fs::read_to_string(path).expect("a text");
        let mut in_code = false;
        for (at, line) in text.lines().enumerate() {
            in_code ^= line.trim_start().starts_with("```");
            if line.chars().count() > COLUMNS && !exempt(line, in_code) {
                long.push(format!("{name}:{}: {line}", at + 1));
            }
        }
    }
    long
}

/// What stands behind the marks of a comment.
fn comment(line: &str) -> Option<&str> {
    let text = line.trim_start().strip_prefix("//")?;
    Some(text.trim_start_matches(['/', '!']).trim_start())
}

#[test]
fn lines_of_rust_end_at_100_columns() {
    let long = long_lines(".rs", |line, _| match comment(line) {
        Some(text) => text.starts_with('|'),
        None => line.contains('"') || line.trim_end().ends_with('\\'),
    });
    assert!(long.is_empty(), "{}", long.join("\n"));
}

#[test]
fn lines_of_prose_end_at_100_columns() {
    let long = long_lines(".md", |line, in_code| {
        in_code || line.trim_start().starts_with('|') || !line.trim().contains(' ')
    });
    assert!(long.is_empty(), "{}", long.join("\n"));
}
