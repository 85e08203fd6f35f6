//! The man pages: one page for each command, from the definitions of the command line.
//!
//! `clap_mangen` leaves values out of the synopsis, lists arguments as options, and has no
//! examples, files and exit codes. So only its writer of roff is used.

use std::path::Path;

use clap::{Arg, ArgAction, Command, CommandFactory};
use roff::{Inline, Roff, bold, italic, roman};

use super::failure::EXIT_CODES;
use super::text;
use super::{Cli, Failure};
use crate::bench;

/// Examples of each command. A test parses them.
const EXAMPLES: [(&str, &[&str]); 12] = [
    (
        "pollux",
        &[
            "pollux run --port vm1,socket=/run/pollux/vm1.sock \
             --port vm2,socket=/run/pollux/vm2.sock",
            "pollux port list",
            "pollux stats --watch",
        ],
    ),
    (
        "pollux run",
        &[
            "pollux run --port vm1,socket=/run/pollux/vm1.sock --poll-cpus 2-3 \
             --api-group netadmin",
            "pollux run --poll-cpus 2,3 --idle busy,adaptive --log warn,pollux::api=debug",
        ],
    ),
    (
        "pollux port add",
        &[
            "pollux port add vm3,socket=/run/pollux/vm3.sock,queues=4,poll=0+1 --may-exist",
            "pollux port add vm4,socket=/run/vm4/net.sock,mode=client",
        ],
    ),
    ("pollux port set", &["pollux port set vm3 queues=2"]),
    ("pollux port show", &["pollux port show vm3 --json"]),
    (
        "pollux fdb add",
        &["pollux fdb add 52:54:00:12:34:56 --port vm1"],
    ),
    (
        "pollux poll move",
        &["pollux poll move vm1 1", "pollux poll move vm1:2 0"],
    ),
    (
        "pollux poll set",
        &["pollux poll set rebalance=auto idle=adaptive:100"],
    ),
    (
        "pollux capture",
        &[
            "pollux capture vm1 --filter 'tcp port 80' --count 100",
            "pollux capture all --drops",
            "pollux capture vm1 -w vm1.pcapng --rotate 64M --keep 4",
        ],
    ),
    ("pollux trace", &["pollux trace vm1 --count 20"]),
    (
        "pollux mirror add",
        &["pollux mirror add ids --from vm1 --to probe --direction rx"],
    ),
    (
        "pollux bench",
        &[
            "pollux bench --seconds 10",
            "pollux bench --attach /run/pollux/a.sock,/run/pollux/b.sock --mode rtt --json",
        ],
    ),
];

/// Environment variables that commands use and that have no option.
const ENVIRONMENT: [(&str, &str); 3] = [
    ("NO_COLOR", "no colours, where it is set to anything"),
    (
        "COLUMNS",
        "width of tables and messages that do not go to a terminal",
    ),
    (
        "XDG_RUNTIME_DIR",
        "where the API socket of a user other than root is",
    ),
];

const FILES: [(&str, &str); 3] = [
    ("/run/pollux/api.sock", "the API socket, as root"),
    (
        "$XDG_RUNTIME_DIR/pollux/api.sock",
        "the API socket of another user",
    ),
    (
        "/run/pollux/api.rings",
        "positions of packed rings, for the next start of the switch",
    ),
];

/// Prints the page of `pollux`, or writes all pages into a directory.
pub(super) fn man(dir: Option<&Path>) -> Result<(), Failure> {
    let mut pollux = Cli::command();
    pollux.build();
    let Some(dir) = dir else {
        return text::print(&page(&pollux, &pollux));
    };
    write(&pollux, &pollux, dir)
}

fn write(pollux: &Command, command: &Command, dir: &Path) -> Result<(), Failure> {
    let path = dir.join(format!("{}.1", title(command)));
    std::fs::write(&path, page(pollux, command))
        .map_err(|error| Failure::file(&format!("write {path:?}"), &error))?;
    subcommands(command).try_for_each(|command| write(pollux, command, dir))
}

/// Returns the full name of a command, such as `pollux port add`.
fn name(command: &Command) -> &str {
    command.get_bin_name().unwrap_or(command.get_name())
}

fn title(command: &Command) -> String {
    name(command).replace(' ', "-")
}

fn subcommands(command: &Command) -> impl Iterator<Item = &Command> {
    let shown = |command: &&Command| command.get_name() != "help" && !command.is_hide_set();
    command.get_subcommands().filter(shown)
}

/// Returns the first line of a command's description, without its full stop.
fn summary(command: &Command) -> String {
    let about = command.get_about().map(ToString::to_string);
    let about = about.unwrap_or_default();
    let first = about.lines().next().unwrap_or_default();
    first.trim_end_matches('.').to_string()
}

fn page(pollux: &Command, command: &Command) -> String {
    let mut roff = Roff::new();
    let version = format!("pollux {}", env!("CARGO_PKG_VERSION"));
    let title = title(command);
    // No date, because it would change with every build.
    roff.control("TH", [&title, "1", " ", &version, "Pollux manual"]);
    // Users copy options and paths, so hyphenation and justification are off.
    roff.control("nh", []).control("ad", ["l"]);
    roff.control("SH", ["NAME"]);
    roff.text([roman(format!("{title} - {}", summary(command)))]);
    synopsis(&mut roff, command);
    description(&mut roff, command);
    arguments(&mut roff, "ARGUMENTS", command, Arg::is_positional);
    arguments(&mut roff, "OPTIONS", command, |arg| !arg.is_positional());
    let commands = subcommands(command);
    let commands = commands.map(|one| (bold(format!("{}(1)", self::title(one))), summary(one)));
    list(&mut roff, "COMMANDS", commands);
    let codes: &[(u8, &str)] = match name(command) {
        "pollux bench" => &bench::EXIT_CODES,
        _ => &EXIT_CODES,
    };
    let codes = codes.iter();
    let codes = codes.map(|(code, meaning)| (bold(code.to_string()), plain(meaning)));
    list(&mut roff, "EXIT STATUS", codes);
    let variables = command.get_arguments().filter_map(|arg| {
        let what = format!("the same as --{}", arg.get_long()?);
        Some((arg.get_env()?.to_string_lossy().into_owned(), what))
    });
    let others = ENVIRONMENT.map(|(variable, what)| (variable.to_string(), what.to_string()));
    let variables = variables.chain(others);
    let variables = variables.map(|(variable, what)| (bold(variable), what));
    list(&mut roff, "ENVIRONMENT", variables);
    let files = FILES.iter();
    let files = files.map(|(file, what)| (italic(*file), what.to_string()));
    list(&mut roff, "FILES", files);
    if let Some((_, lines)) = EXAMPLES.iter().find(|(of, _)| *of == name(command)) {
        roff.control("SH", ["EXAMPLES"]);
        for line in *lines {
            roff.control("PP", []).text([roman(*line)]);
        }
    }
    see_also(&mut roff, pollux, command);
    roff.render()
}

/// Removes the marks of Markdown from a help text.
fn plain(text: &str) -> String {
    text.replace('`', "")
}

/// Returns the value names of an argument, such as `SPEC`. `None` for a flag.
fn values(arg: &Arg) -> Option<String> {
    let takes = arg.is_positional() || arg.get_action().takes_values();
    let names = arg.get_value_names().filter(|_| takes)?;
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    Some(names.join(" "))
}

/// Returns an option or argument in the form in which it is typed.
fn form(arg: &Arg) -> Vec<Inline> {
    let mut form = Vec::new();
    let short = arg.get_short().map(|short| format!("-{short}"));
    let long = arg.get_long().map(|long| format!("--{long}"));
    let names: Vec<String> = short.into_iter().chain(long).collect();
    form.push(bold(names.join(", ")));
    if let Some(values) = values(arg) {
        let optional = arg
            .get_num_args()
            .is_some_and(|range| range.min_values() == 0);
        let (start, end) = if optional { ("[", "]") } else { ("", "") };
        let blank = if names.is_empty() { "" } else { " " };
        form.extend([roman(format!("{blank}{start}")), italic(values), roman(end)]);
    }
    form
}

fn shown(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| !arg.is_hide_set())
}

fn synopsis(roff: &mut Roff, command: &Command) {
    roff.control("SH", ["SYNOPSIS"]);
    let mut line = vec![bold(name(command))];
    let (places, options): (Vec<&Arg>, Vec<&Arg>) = shown(command).partition(|a| a.is_positional());
    for arg in options.into_iter().chain(places) {
        // Every command has `--help`.
        if arg.get_id() == "help" {
            continue;
        }
        let mut form = form(arg);
        // The synopsis shows only the long name.
        if let (Some(long), false) = (arg.get_long(), arg.is_positional()) {
            form[0] = bold(format!("--{long}"));
        }
        let (start, end) = match arg.is_required_set() {
            true => (" ", ""),
            false => (" [", "]"),
        };
        line.push(roman(start));
        line.extend(form);
        let many = matches!(arg.get_action(), ArgAction::Append);
        line.push(roman(if many {
            format!("{end} ...")
        } else {
            end.to_string()
        }));
    }
    if subcommands(command).next().is_some() {
        line.extend([roman(" "), italic("COMMAND"), roman(" ...")]);
    }
    roff.text(line);
}

fn description(roff: &mut Roff, command: &Command) {
    roff.control("SH", ["DESCRIPTION"]);
    let long = command.get_long_about().or_else(|| command.get_about());
    let long = long.map(ToString::to_string).unwrap_or_default();
    for paragraph in long.split("\n\n") {
        roff.control("PP", [])
            .text([roman(plain(&paragraph.replace('\n', " ")))]);
    }
}

fn arguments(roff: &mut Roff, title: &str, command: &Command, which: fn(&Arg) -> bool) {
    let mut arguments = shown(command).filter(|arg| which(arg)).peekable();
    if arguments.peek().is_none() {
        return;
    }
    roff.control("SH", [title]);
    for arg in arguments {
        roff.control("TP", []).text(form(arg));
        let help = arg.get_long_help().or_else(|| arg.get_help());
        let mut help = plain(&help.map(ToString::to_string).unwrap_or_default());
        let possible = arg.get_possible_values();
        if arg.get_action().takes_values() && !possible.is_empty() {
            let names: Vec<&str> = possible.iter().map(|value| value.get_name()).collect();
            help.push_str(&format!("; one of {}", names.join(", ")));
        }
        let defaults = arg.get_default_values().iter();
        let defaults: Vec<_> = defaults.map(|value| value.to_string_lossy()).collect();
        if arg.get_action().takes_values() && !defaults.is_empty() {
            help.push_str(&format!(" [default: {}]", defaults.join(",")));
        }
        roff.text([roman(help)]);
    }
}

fn list(roff: &mut Roff, title: &str, entries: impl Iterator<Item = (Inline, String)>) {
    let mut entries = entries.peekable();
    if entries.peek().is_none() {
        return;
    }
    roff.control("SH", [title]);
    for (name, what) in entries {
        roff.control("TP", []).text([name]).text([roman(what)]);
    }
}

/// Lists `pollux`, its commands, and the other commands of the same family.
fn see_also(roff: &mut Roff, pollux: &Command, command: &Command) {
    let own = title(command);
    let mut pages = vec!["pollux".to_string()];
    pages.extend(subcommands(pollux).map(title));
    if let Some((family, _)) = own
        .strip_prefix("pollux-")
        .and_then(|rest| rest.split_once('-'))
    {
        let family = pollux.find_subcommand(family);
        pages.extend(family.into_iter().flat_map(subcommands).map(title));
    }
    pages.retain(|page| *page != own);
    let pages: Vec<String> = pages.iter().map(|page| format!("{page}(1)")).collect();
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman(pages.join(", "))]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_are_of_commands_and_are_understood() {
        let mut pollux = Cli::command();
        pollux.build();
        fn names(command: &Command, all: &mut Vec<String>) {
            all.push(name(command).to_string());
            subcommands(command).for_each(|command| names(command, all));
        }
        let mut all = Vec::new();
        names(&pollux, &mut all);
        for (of, lines) in EXAMPLES {
            assert!(all.iter().any(|name| name == of), "{of}");
            for line in lines {
                let words = line.split('\'').enumerate().flat_map(|(n, part)| {
                    // Every other part was quoted.
                    let words: Vec<&str> = match n % 2 {
                        0 => part.split_whitespace().collect(),
                        _ => vec![part],
                    };
                    words
                });
                let parsed = Cli::command().try_get_matches_from(words);
                assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
                assert!(line.starts_with(of), "{line}");
            }
        }
    }
}
