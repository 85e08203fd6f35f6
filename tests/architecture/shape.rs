//! Files of `src` import each other in no circle, and no function is longer than a screen.
//!
//! Both rules came after code that breaks them. The lists below name that code, and may only
//! shrink: nothing is to be added.

use std::collections::{BTreeMap, BTreeSet};

use super::{assert_none, code, sources, without_tests};

/// Longest function, in lines of code: neither blank lines nor comments.
const MAX_FUNCTION: usize = 60;

/// Functions that are longer.
const KNOWN_LONG: &[(&str, &str)] = &[
    ("src/bench/report.rs", "new"),
    ("src/cli/views.rs", "poll_threads"),
    ("src/daemon/control.rs", "handle"),
    ("src/observe/filter/headers.rs", "read"),
    ("src/poll/mod.rs", "serve"),
    ("src/poll/pass.rs", "take"),
    ("src/vhost_user/event.rs", "fmt"),
    ("src/wire/summary.rs", "summary"),
];

/// Circles of files, by the paths of their modules.
const KNOWN_CIRCLES: &[&[&str]] = &[
    &["api::server", "api::socket"],
    &["bench::guest", "bench::guest::receive"],
    &["cli::args", "cli::commands"],
    &[
        "daemon::accept",
        "daemon::command",
        "daemon::control",
        "daemon::link",
        "daemon::observers",
        "daemon::placement",
        "daemon::pollers",
        "daemon::port",
        "daemon::registry",
        "daemon::slow",
        "daemon::stations",
        "daemon::views",
    ],
    &["daemon::handle", "daemon::mirrors", "daemon::streams"],
    &["observe::feed", "observe::mirror"],
    &[
        "poll::context",
        "poll::deliver",
        "poll::detour",
        "poll::egress",
        "poll::notify",
        "poll::recorder",
        "poll::steer",
    ],
    &[
        "vhost_user::device",
        "vhost_user::error",
        "vhost_user::event",
        "vhost_user::look",
        "vhost_user::options",
        "vhost_user::records",
        "vhost_user::ring",
        "vhost_user::status",
    ],
    &["virtio::open_claim", "virtio::receiveq"],
];

/// The modules that each file names outside its tests, by paths such as `poll::pass`.
fn imports() -> BTreeMap<String, BTreeSet<String>> {
    let sources = sources();
    let files: Vec<(String, &str)> = sources
        .iter()
        .filter(|source| !source.is_test)
        .map(|source| {
            let path = source
                .name
                .trim_start_matches("src/")
                .trim_end_matches(".rs");
            let path = path.trim_end_matches("/mod").replace('/', "::");
            (path, source.text.as_str())
        })
        .collect();
    let modules: BTreeSet<&str> = files.iter().map(|(path, _)| path.as_str()).collect();
    let mut imports = BTreeMap::new();
    for (path, text) in &files {
        let mut named = BTreeSet::new();
        for (_, line) in without_tests(text) {
            for full in paths(code(line), path) {
                // The longest beginning that is a file: what stands behind it are items.
                let mut part = full.as_str();
                while !part.is_empty() && !modules.contains(part) {
                    part = part.rsplit_once("::").map_or("", |(before, _)| before);
                }
                if !part.is_empty() && part != path {
                    named.insert(part.to_string());
                }
            }
        }
        imports.insert(path.clone(), named);
    }
    imports
}

/// The paths in a line of the file `own` that begin with `crate`, `self` or `super`, from the root.
fn paths(line: &str, own: &str) -> Vec<String> {
    let words = line.split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
    let mut paths = Vec::new();
    for word in words {
        let mut parts = word.split("::").peekable();
        let mut full: Vec<&str> = match parts.next() {
            // `pub(super)` names nothing.
            _ if !word.contains("::") => continue,
            Some("crate") => Vec::new(),
            Some("self") => own.split("::").collect(),
            Some("super") => own.split("::").take(own.split("::").count() - 1).collect(),
            _ => continue,
        };
        for part in parts {
            if part == "super" {
                full.pop();
            } else {
                full.push(part);
            }
        }
        paths.push(full.join("::"));
    }
    paths
}

/// What can be reached from `start` by one import or more.
fn reached(imports: &BTreeMap<String, BTreeSet<String>>, start: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut left = vec![start.to_string()];
    while let Some(path) = left.pop() {
        for next in imports.get(&path).into_iter().flatten() {
            if found.insert(next.clone()) {
                left.push(next.clone());
            }
        }
    }
    found
}

#[test]
fn files_import_each_other_in_no_circle() {
    let imports = imports();
    assert!(imports.values().flatten().count() > 300, "imports are read");
    let reached: BTreeMap<&String, BTreeSet<String>> = imports
        .keys()
        .map(|path| (path, reached(&imports, path)))
        .collect();
    let mut problems = Vec::new();
    for (path, others) in &reached {
        let circle: BTreeSet<&str> = others
            .iter()
            .filter(|other| reached[other].contains(*path))
            .map(String::as_str)
            .collect();
        let is_known = |known: &&[&str]| circle.iter().all(|path| known.contains(path));
        if !circle.is_empty() && !KNOWN_CIRCLES.iter().any(is_known) {
            problems.push(format!("{path} is in a circle of imports: {circle:?}"));
        }
    }
    assert_none(&problems);
}

/// The name of the function that begins on this line.
fn function(line: &str) -> Option<&str> {
    let (before, behind) = line.trim_start().split_once("fn ")?;
    let is_head = before.split(' ').all(|word| {
        word.is_empty()
            || word.starts_with("pub")
            || [
                "const", "async", "unsafe", "extern", "\"C\"", "super)", "crate)",
            ]
            .contains(&word)
    });
    let end = behind.find(['(', '<'])?;
    is_head.then_some(&behind[..end])
}

#[test]
fn no_function_is_longer_than_a_screen() {
    let mut problems = Vec::new();
    let mut count = 0;
    for source in sources().iter().filter(|source| !source.is_test) {
        let lines = without_tests(&source.text);
        for (at, (number, line)) in lines.iter().enumerate() {
            let Some(name) = function(line) else {
                continue;
            };
            let margin = &line[..line.len() - line.trim_start().len()];
            let ends = |text: &str| {
                let text = text.strip_prefix(margin).unwrap_or_default();
                text.starts_with('}') || !text.starts_with(' ') && text.ends_with([';', '}'])
            };
            let body = lines[at..].iter().map(|(_, line)| *line);
            let length = body
                .clone()
                .take_while(|line| !ends(line))
                .filter(|line| !code(line).trim().is_empty())
                .count()
                + 1;
            count += 1;
            let known = KNOWN_LONG.contains(&(source.name.as_str(), name));
            if length > MAX_FUNCTION && !known {
                problems.push(format!(
                    "{}:{number}: {name} has {length} lines, at most {MAX_FUNCTION}",
                    source.name
                ));
            }
        }
    }
    assert!(count > 1000, "only {count} functions found in src");
    assert_none(&problems);
}
