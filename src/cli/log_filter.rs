//! Parses `--log` and checks each word.
//!
//! The filters of `tracing` accept any word as the name of a module, so a typo makes the daemon
//! silent. Here only modules that log and known levels are accepted.

use std::collections::BTreeMap;
use std::str::FromStr;

use tracing_subscriber::filter::{LevelFilter, Targets};

/// The modules that log. A test checks that no other module logs.
const MODULES: [&str; 3] = ["pollux", "pollux::api", "pollux::daemon"];
const LEVELS: &str = "off, error, warn, info, debug or trace";

/// Why a text is not a log filter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogFilterError {
    /// The word is not a level.
    #[error("{0:?} is no level: use {LEVELS}")]
    Level(String),
    /// No module of this name logs.
    #[error("no module {0:?} logs: use {modules}", modules = MODULES.join(" or "))]
    Module(String),
    /// A module, or the default, has two levels.
    #[error("{0} has two levels")]
    Twice(String),
}

/// `info`, or `warn,pollux::api=debug`: the default level, and the modules with another level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFilter {
    all: LevelFilter,
    modules: BTreeMap<&'static str, LevelFilter>,
}

impl LogFilter {
    /// Returns the filter in the library's form.
    pub(super) fn targets(&self) -> Targets {
        Targets::new()
            .with_default(self.all)
            .with_targets(self.modules.iter().map(|(module, level)| (*module, *level)))
    }
}

impl FromStr for LogFilter {
    type Err = LogFilterError;

    fn from_str(text: &str) -> Result<Self, LogFilterError> {
        let (mut all, mut modules) = (None, BTreeMap::new());
        for part in text.split(',') {
            let (module, word) = match part.split_once('=') {
                Some((module, word)) => (Some(module), word),
                None => (None, part),
            };
            // The library accepts numbers as levels. The help does not mention numbers, so they are
            // refused.
            let level = Some(word).filter(|word| word.bytes().all(|b| b.is_ascii_alphabetic()));
            let level = level.and_then(|word| word.parse().ok().filter(|_| !word.is_empty()));
            let level: LevelFilter = level.ok_or_else(|| LogFilterError::Level(word.into()))?;
            let before = match module {
                None => all.replace(level),
                Some(module) => {
                    let known = MODULES.into_iter().find(|known| *known == module);
                    let known = known.ok_or_else(|| LogFilterError::Module(module.into()))?;
                    modules.insert(known, level)
                }
            };
            if before.is_some() {
                let which = module.unwrap_or("the log as a whole");
                return Err(LogFilterError::Twice(which.to_string()));
            }
        }
        Ok(LogFilter {
            all: all.unwrap_or(LevelFilter::INFO),
            modules,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use tracing::Level;

    use super::*;

    #[test]
    fn levels_are_of_all_and_of_modules() {
        let enabled = |text: &str, module: &str, level| {
            let filter: LogFilter = text.parse().unwrap();
            filter.targets().would_enable(module, &level)
        };
        assert!(enabled("INFO", "pollux::daemon::report", Level::INFO));
        assert!(!enabled("info", "pollux::daemon", Level::DEBUG));
        assert!(!enabled("off", "pollux::daemon", Level::ERROR));
        let text = "warn,pollux::api=debug";
        assert!(enabled(text, "pollux::api::server", Level::DEBUG));
        assert!(!enabled(text, "pollux::daemon", Level::INFO));
        // A module with more detail does not silence the others.
        assert!(enabled("pollux::api=trace", "pollux::daemon", Level::INFO));
    }

    #[test]
    fn a_typo_is_no_level_and_no_module() {
        for (text, part) in [
            ("inof", "\"inof\" is no level: use off, error"),
            ("", "\"\" is no level"),
            ("garbage,,", "\"garbage\" is no level"),
            ("info,", "\"\" is no level"),
            ("3", "\"3\" is no level"),
            ("pollux=dbug", "\"dbug\" is no level"),
            (
                "polux=debug",
                "no module \"polux\" logs: use pollux or pollux::api",
            ),
            ("pollux::swich=debug", "no module"),
            ("info,debug", "the log as a whole has two levels"),
            ("pollux=info,pollux=debug", "pollux has two levels"),
        ] {
            let error = text.parse::<LogFilter>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn the_modules_are_those_that_log() {
        fn logs(path: &Path) -> bool {
            if path.is_dir() {
                let mut entries = fs::read_dir(path).unwrap();
                return entries.any(|entry| logs(&entry.unwrap().path()));
            }
            let macros = ["error", "warn", "info", "debug", "trace"];
            let text = fs::read_to_string(path).unwrap();
            macros
                .iter()
                .any(|name| text.contains(&format!("tracing::{name}!")))
        }
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let found = fs::read_dir(src).unwrap().filter_map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_stem()?.to_str()?.to_string();
            (logs(&path) && name != "lib").then(|| format!("pollux::{name}"))
        });
        let mut found: Vec<String> = found.collect();
        found.sort();
        found.dedup();
        assert_eq!(found, MODULES[1..]);
    }
}
