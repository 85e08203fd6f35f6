//! Configuration values of poll threads: their CPUs and what they do without work.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// Whether queues move between poll threads by themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Rebalance {
    /// By measured load, one queue at a time and rarely.
    Auto,
    /// Only when the operator says so.
    #[default]
    Off,
}

impl fmt::Display for Rebalance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rebalance::Auto => "auto",
            Rebalance::Off => "off",
        })
    }
}

impl FromStr for Rebalance {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "auto" => Ok(Rebalance::Auto),
            "off" => Ok(Rebalance::Off),
            _ => Err(ConfigError::Rebalance(text.to_string())),
        }
    }
}

/// What a poll thread does when it finds no work. In JSON it is a string such as `adaptive:50`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum IdlePolicy {
    /// Never sleeps.
    Busy,
    /// Spins this long without work, then arms notifications and sleeps.
    Adaptive(Duration),
}

impl Default for IdlePolicy {
    /// 50 µs is longer than a guest needs between two bursts, and far shorter than a scheduler
    /// tick.
    fn default() -> Self {
        IdlePolicy::Adaptive(Duration::from_micros(50))
    }
}

impl FromStr for IdlePolicy {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.split_once(':') {
            None if text == "busy" => Ok(IdlePolicy::Busy),
            None if text == "adaptive" => Ok(IdlePolicy::default()),
            Some(("adaptive", micros)) => micros
                .parse()
                .ok()
                .filter(|micros| *micros <= 1_000_000)
                .map(|micros| IdlePolicy::Adaptive(Duration::from_micros(micros)))
                .ok_or_else(|| ConfigError::Idle(text.to_string())),
            _ => Err(ConfigError::Idle(text.to_string())),
        }
    }
}

impl From<IdlePolicy> for String {
    fn from(policy: IdlePolicy) -> String {
        policy.to_string()
    }
}

impl TryFrom<String> for IdlePolicy {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl fmt::Display for IdlePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IdlePolicy::Busy => f.write_str("busy"),
            IdlePolicy::Adaptive(spin) => write!(f, "adaptive:{}", spin.as_micros()),
        }
    }
}

/// What poll threads do without work, such as `busy,adaptive`: one policy for all, or one for each
/// in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdleList(pub Vec<IdlePolicy>);

impl IdleList {
    /// Returns the policy of threads that have no place in the list. If each thread has its own
    /// policy, the others get the default.
    pub fn of_all(&self) -> IdlePolicy {
        match self.0[..] {
            [all] => all,
            _ => IdlePolicy::default(),
        }
    }
}

impl Default for IdleList {
    fn default() -> Self {
        IdleList(vec![IdlePolicy::default()])
    }
}

impl FromStr for IdleList {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let policies: Result<Vec<IdlePolicy>, ConfigError> =
            text.split(',').map(str::parse).collect();
        Ok(IdleList(policies?))
    }
}

impl fmt::Display for IdleList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policies: Vec<String> = self.0.iter().map(IdlePolicy::to_string).collect();
        f.write_str(&policies.join(","))
    }
}

/// A list of CPUs such as `0,2-3`, in the order given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuList(pub Vec<usize>);

impl FromStr for CpuList {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = || ConfigError::Cpus(text.to_string());
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let first: usize = first.parse().map_err(|_| bad())?;
            let last: usize = last.parse().map_err(|_| bad())?;
            if first > last || last > 4095 {
                return Err(bad());
            }
            for cpu in first..=last {
                if cpus.contains(&cpu) {
                    return Err(bad());
                }
                cpus.push(cpu);
            }
        }
        Ok(CpuList(cpus))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_policies_round_trip() {
        for text in ["busy", "adaptive:50", "adaptive:0"] {
            assert_eq!(text.parse::<IdlePolicy>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "lazy",
            "adaptive:",
            "adaptive:-1",
            "adaptive:9999999999",
        ] {
            assert!(text.parse::<IdlePolicy>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn one_idle_policy_is_for_all_and_several_are_not() {
        let adaptive = IdlePolicy::default();
        for (text, all) in [
            ("busy", IdlePolicy::Busy),
            ("busy,busy", adaptive),
            ("busy,adaptive:20,adaptive:50", adaptive),
        ] {
            let list: IdleList = text.parse().unwrap();
            assert_eq!(list.to_string(), text);
            assert_eq!(list.of_all(), all, "{text}");
        }
        assert_eq!(IdleList::default().of_all(), adaptive);
        for text in ["", "busy,", ",busy", "busy lazy", "busy,lazy"] {
            assert!(text.parse::<IdleList>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn cpu_lists_take_ranges_and_refuse_repeats() {
        assert_eq!("0,2-3".parse::<CpuList>().unwrap().0, [0, 2, 3]);
        for text in ["", "a", "3-2", "0,0", "1-", "99999"] {
            assert!(text.parse::<CpuList>().is_err(), "{text:?}");
        }
    }
}
