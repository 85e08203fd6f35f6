//! Holds the source to what `src/lib.rs` says of it: which module may use which, where unsafe code
//! may stand, how long a file may be; `shape.rs` adds functions and circles of imports.
//!
//! The table of modules in the crate documentation is read, not repeated here. Rows may name only
//! rows below them, so the modules have no cycles. Code under `#[cfg(test)]` and files of tests may
//! use what they like.
//!
//! This reads lines, not syntax, and relies on rustfmt: an item ends at the brace in its own
//! column.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod shape;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Longest file, in lines, without tests.
const MAX_LINES: usize = 500;
/// Modules that may contain unsafe code.
const UNSAFE: [&str; 2] = ["memory", "sys"];
/// Modules that are told the time and touch nothing outside: what they may not name.
const PURE: [(&str, &[&str]); 3] = [
    (
        "config",
        &["std::fs", "std::net", "std::thread", "rustix", "libc"],
    ),
    (
        "switch",
        &[
            "Instant",
            "SystemTime",
            "std::thread",
            "std::fs",
            "std::net",
            "rustix",
            "libc",
        ],
    ),
    (
        "wire",
        &[
            "Instant",
            "SystemTime",
            "std::thread",
            "std::fs",
            "std::net",
            "rustix",
            "libc",
        ],
    ),
];

/// What reads memory other than by one atomic load of a word: it may tear what it reads.
const COPIES: [&str; 7] = [
    "read_bytes",
    "copy_from",
    "atomics",
    "ptr",
    "as_ptr",
    "from_ptr",
    "transmute",
];
/// Where it may stand in a ring all the same, once: entries of indirect tables that are not
/// aligned, each into a copy.
const COPY_OF_TABLE: &str = "src/virtio/chain.rs";

/// A file of `src`.
struct Source {
    /// Relative to the root of the repository, for messages.
    name: String,
    /// The module at the top that it belongs to: `main`, or one of `src/lib.rs`.
    module: String,
    /// The whole file is a test.
    is_test: bool,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `dir`, sorted. Links are not followed.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(files(&entry.path()));
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root())
        .unwrap()
        .to_string_lossy()
        .into_owned()
}

fn sources() -> Vec<Source> {
    let src = root().join("src");
    let mut sources = Vec::new();
    for path in files(&src) {
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let inside = path
            .strip_prefix(&src)
            .unwrap()
            .to_string_lossy()
            .into_owned();
        let first = inside.split('/').next().unwrap();
        let is_test = inside.ends_with("tests.rs") || inside.split('/').any(|part| part == "tests");
        sources.push(Source {
            name: relative(&path),
            module: first.trim_end_matches(".rs").to_string(),
            is_test,
            text: fs::read_to_string(&path).unwrap(),
        });
    }
    assert!(
        sources.len() > 50,
        "only {} files found in src",
        sources.len()
    );
    sources
}

/// The lines of a file outside of items under `#[cfg(test)]`, with their numbers.
fn without_tests(text: &str) -> Vec<(usize, &str)> {
    let mut kept = Vec::new();
    let mut lines = text.lines().enumerate().map(|(at, line)| (at + 1, line));
    while let Some((number, line)) = lines.next() {
        let item = line.trim_start();
        if !item.starts_with("#[cfg(test)]") && !item.starts_with("#[cfg(all(test") {
            kept.push((number, line));
            continue;
        }
        let column = line.len() - item.len();
        let mut next = lines.find(|(_, line)| !line.trim_start().starts_with("#["));
        while let Some((_, line)) = next {
            let first_column = line.len() - line.trim_start().len();
            let closes = first_column == column && line.trim_start().starts_with('}');
            // An item on one line, a field, or the end of a longer one.
            if closes || (first_column == column && line.ends_with([';', ',', '}'])) {
                break;
            }
            next = lines.next();
        }
    }
    kept
}

/// A line without its comment. A `//` inside a string cuts too much, which hides nothing: paths of
/// modules do not stand behind strings.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

/// Whether `word` stands in `text` as a whole word.
fn has_word(text: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + word.len()..].chars().next();
        !before.is_some_and(is_part) && !after.is_some_and(is_part)
    })
}

/// The names behind each `prefix::` in a line of code.
fn named<'a>(line: &'a str, prefix: &str) -> Vec<&'a str> {
    let start = format!("{prefix}::");
    line.match_indices(start.as_str())
        .filter(|(at, _)| !line[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
        .map(|(at, _)| {
            let rest = &line[at + start.len()..];
            let end = rest
                .find(|c: char| !c.is_alphanumeric() && c != '_')
                .unwrap_or(rest.len());
            &rest[..end]
        })
        .collect()
}

/// The rows of the module table in the crate documentation, from top to bottom: module, and what it
/// may use.
fn table() -> Vec<(String, BTreeSet<String>)> {
    let text = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let rows = text
        .lines()
        .skip_while(|line| *line != "//! # Modules")
        .skip(1)
        .take_while(|line| !line.starts_with("//! # "))
        .filter_map(|line| line.strip_prefix("//! | "))
        .filter(|row| row.starts_with('`') || row.starts_with("[`"));
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_end_matches(" |").split(" | ").collect();
        assert_eq!(
            cells.len(),
            3,
            "a row of the module table has three cells: {row}"
        );
        let module = cells[0].trim_matches(['[', ']', '`']);
        // `mod@` tells rustdoc that no macro of that name is meant.
        let module = module.trim_start_matches("mod@").to_string();
        let uses = cells[2].split(", ").filter(|cell| *cell != "–");
        (
            module,
            uses.map(|cell| cell.trim_matches('`').to_string())
                .collect(),
        )
    })
    .collect()
}

/// The modules that `src/lib.rs` declares.
fn declared() -> BTreeSet<String> {
    let text = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let modules = text
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod "));
    modules
        .map(|line| line.trim_end_matches(';').to_string())
        .collect()
}

fn assert_none(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn the_module_table_names_every_module_once_and_only_downwards() {
    let table = table();
    let mut expected = declared();
    expected.insert("main".to_string());
    let names: Vec<&String> = table.iter().map(|(name, _)| name).collect();
    assert_eq!(
        names.len(),
        expected.len(),
        "a module is missing or twice: {names:?}"
    );
    assert_eq!(
        names
            .iter()
            .map(|name| (*name).clone())
            .collect::<BTreeSet<_>>(),
        expected
    );
    let mut problems = Vec::new();
    for (at, (name, uses)) in table.iter().enumerate() {
        for used in uses {
            if !names[at + 1..].contains(&used) {
                problems.push(format!("{name} may use {used}, which is no row below it"));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn modules_use_only_what_the_module_table_allows() {
    let allowed: BTreeMap<String, BTreeSet<String>> = table().into_iter().collect();
    let declared = declared();
    let mut problems = Vec::new();
    for source in sources()
        .iter()
        .filter(|source| !source.is_test && source.module != "lib")
    {
        // The binary reaches the library by its name.
        let prefix = if source.module == "main" {
            "pollux"
        } else {
            "crate"
        };
        for (number, line) in without_tests(&source.text) {
            let line = code(line);
            let place = format!("{}:{number}", source.name);
            if line.contains(&format!("use {prefix}::{{")) && source.module != "main" {
                problems.push(format!("{place}: one `use` for each module, please"));
            }
            let mut used = named(line, prefix);
            if let Some((_, group)) = line.split_once("use pollux::{") {
                used.extend(group.trim_end_matches("};").split(", "));
            }
            for used in used {
                let own = used == source.module;
                let is_module = declared.contains(used);
                let may = allowed
                    .get(&source.module)
                    .is_some_and(|uses| uses.contains(used));
                if is_module && !own && !may {
                    problems.push(format!("{place}: {} may not use {used}", source.module));
                }
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn unsafe_code_stands_only_where_it_may() {
    let mut problems = Vec::new();
    for source in sources() {
        if UNSAFE.contains(&source.module.as_str()) {
            continue;
        }
        for (at, line) in source.text.lines().enumerate() {
            if has_word(code(line), "unsafe") {
                problems.push(format!("{}:{}: unsafe", source.name, at + 1));
            }
        }
    }
    let text = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let permitted = lines
        .windows(2)
        .filter(|pair| pair[0] == "#[allow(unsafe_code)]");
    let permitted: Vec<&str> = permitted
        .filter_map(|pair| pair[1].strip_prefix("pub mod "))
        .map(|name| name.trim_end_matches(';'))
        .collect();
    assert_eq!(permitted, UNSAFE, "#[allow(unsafe_code)] in src/lib.rs");
    assert_none(&problems);
}

/// An index that is read in two halves may be one that nobody wrote. That nothing is read twice is
/// for the tests in which descriptors flip.
#[test]
fn rings_read_what_they_share_by_atomic_words_only() {
    let (mut of_tables, mut problems) = (Vec::new(), Vec::new());
    for source in sources().iter().filter(|source| !source.is_test) {
        // The driver's side is for the load generator and tests.
        if source.module != "virtio" || source.name.starts_with("src/virtio/driver") {
            continue;
        }
        for (number, line) in without_tests(&source.text) {
            for word in COPIES.iter().filter(|word| has_word(code(line), word)) {
                if source.name == COPY_OF_TABLE {
                    of_tables.push(*word);
                } else {
                    problems.push(format!("{}:{number}: {word}", source.name));
                }
            }
        }
    }
    assert_eq!(of_tables, ["read_bytes"], "in {COPY_OF_TABLE}");
    assert_none(&problems);
}

/// Whoever delivers does not ask of which kind a ring is: the device's side tells them apart here,
/// the driver's in one file of its own.
const KINDS_OF_RINGS: [&str; 2] = ["src/virtio/mod.rs", "src/virtio/driver.rs"];

#[test]
fn split_and_packed_rings_are_told_apart_in_one_place() {
    let (mut places, mut problems) = (BTreeSet::new(), Vec::new());
    // The load generator has its own idea of kinds: what it is to ask for.
    let switch = |source: &&Source| !source.is_test && source.module != "bench";
    for source in sources().iter().filter(switch) {
        for (number, line) in without_tests(&source.text) {
            if !["Ring::Split", "Ring::Packed"]
                .iter()
                .any(|kind| code(line).contains(kind))
            {
                continue;
            }
            places.insert(source.name.clone());
            if !KINDS_OF_RINGS.contains(&source.name.as_str()) {
                problems.push(format!("{}:{number}", source.name));
            }
        }
    }
    assert_eq!(places.len(), KINDS_OF_RINGS.len(), "{places:?}");
    assert_none(&problems);
}

#[test]
fn decisions_know_no_clock_and_no_system() {
    let mut problems = Vec::new();
    for source in sources().iter().filter(|source| !source.is_test) {
        let Some((_, words)) = PURE.iter().find(|(module, _)| *module == source.module) else {
            continue;
        };
        for (number, line) in without_tests(&source.text) {
            for word in words.iter().filter(|word| has_word(code(line), word)) {
                problems.push(format!("{}:{number}: {word}", source.name));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn no_file_is_longer_than_a_reader_can_hold() {
    let mut problems = Vec::new();
    for source in sources().iter().filter(|source| !source.is_test) {
        let lines = without_tests(&source.text).len();
        if lines > MAX_LINES {
            problems.push(format!(
                "{}: {lines} lines, at most {MAX_LINES}",
                source.name
            ));
        }
    }
    assert_none(&problems);
}

#[test]
fn nothing_is_left_to_be_done_in_the_source() {
    // Put together here, so that this file does not contain them.
    let words = [
        ["to", "do!"],
        ["unimple", "mented!"],
        ["TO", "DO"],
        ["FIX", "ME"],
    ]
    .map(|w| w.concat());
    let mut problems = Vec::new();
    for dir in ["src", "tests", "benches", "qemu", "docs"] {
        for path in files(&root().join(dir)) {
            let bytes = fs::read(&path).unwrap();
            let text = String::from_utf8_lossy(&bytes);
            for (at, line) in text.lines().enumerate() {
                for word in words.iter().filter(|word| line.contains(word.as_str())) {
                    problems.push(format!("{}:{}: {word}", relative(&path), at + 1));
                }
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn every_drop_reason_is_explained_to_operators() {
    let stats = fs::read_to_string(root().join("src/stats.rs")).unwrap();
    let guide = fs::read_to_string(root().join("docs/operating.md")).unwrap();
    // Rows such as `RxShortFrame = "rx_short_frame", Rx;`.
    let rows = stats
        .lines()
        .filter(|line| line.ends_with("\", Rx;") || line.ends_with("\", Tx;"));
    let names: Vec<&str> = rows.filter_map(|line| line.split('"').nth(1)).collect();
    assert!(names.len() > 10, "only {names:?} found in src/stats.rs");
    let missing: Vec<String> = names
        .iter()
        .filter(|name| !guide.contains(&format!("| `{name}` |")))
        .map(|name| format!("docs/operating.md does not explain {name}"))
        .collect();
    assert_none(&missing);
}

/// `place::name` stands for a test of that name in `tests/place.rs`, or in the module `place` of
/// `src`.
#[test]
fn every_test_named_for_a_hostile_input_exists() {
    let page = fs::read_to_string(root().join("docs/hostile-inputs.md")).unwrap();
    let quoted = page.lines().skip(12).flat_map(|line| line.split('`'));
    let named: Vec<(&str, &str)> = quoted.filter_map(|text| text.split_once("::")).collect();
    assert!(named.len() > 100, "only {} tests are named", named.len());
    let mut texts: Vec<(String, String)> = sources()
        .into_iter()
        .map(|source| (source.module, source.text))
        .collect();
    for path in files(&root().join("tests")) {
        if path.extension().is_some_and(|extension| extension == "rs") {
            // A test program is a file, or a folder of files.
            let inside = path.strip_prefix(root().join("tests")).unwrap();
            let first = inside.iter().next().unwrap().to_string_lossy();
            let place = first.trim_end_matches(".rs").to_string();
            texts.push((place, fs::read_to_string(&path).unwrap()));
        }
    }
    let exists = |place: &str, name: &str| {
        let (whole, test) = (format!("fn {name}("), "#[test]");
        texts.iter().filter(|(of, _)| of == place).any(|(_, text)| {
            let before = text.split_once(&whole).map(|(before, _)| before.trim_end());
            // Between a test's mark and its name there is at most a condition.
            before.is_some_and(|before| before.lines().rev().take(3).any(|l| l.trim() == test))
        })
    };
    let missing: Vec<String> = named
        .into_iter()
        .filter(|(place, name)| !exists(place, name))
        .map(|(place, name)| format!("docs/hostile-inputs.md names {place}::{name}"))
        .collect();
    assert_none(&missing);
}

/// A suite that became a folder once fell out of the run unseen.
#[test]
fn every_test_program_is_run() {
    let run = fs::read_to_string(root().join("tests/run")).unwrap();
    assert!(
        run.contains("for file in tests/*.rs tests/*/main.rs;"),
        "tests/run"
    );
    let (_, others) = run.split_once("case $file in ").unwrap();
    let (others, _) = others.split_once(')').unwrap();
    for name in others.split(" | ") {
        assert!(
            run.contains(&format!("--test {name}")),
            "tests/run leaves out {name}"
        );
    }
    assert!(run.contains("-p pollux-models"), "tests/run");
}

#[test]
fn items_under_cfg_test_are_left_out() {
    let text = "a\n#[cfg(test)]\nmod tests;\nb\n#[cfg(all(test, not(loom)))]\n#[allow(x)]\nmod more {\n    c\n}\nd\n    #[cfg(test)]\n    fn e() {\n    }\nf";
    let kept: Vec<(usize, &str)> = without_tests(text);
    assert_eq!(kept, [(1, "a"), (4, "b"), (10, "d"), (14, "f")]);
}
