//! Configuration values of observers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// Most observers of all kinds that a daemon may have at once.
pub const MAX_OBSERVERS: usize = 32;
/// Default number of bytes kept of each frame. No frame is longer.
pub const MAX_SNAPLEN: u32 = 65_549;
/// Longest filter expression, in bytes.
pub const MAX_FILTER: usize = 1024;
/// Most frames that one trace follows.
pub const MAX_TRACE: u64 = 10_000;

/// Stands for every port in place of a port's name. No port can have this name.
pub const ALL_PORTS: &str = "all";

/// Which frames of a port, from the switch's view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ObserveDirection {
    /// Frames that enter the switch: the port's guest has sent them.
    Rx,
    /// Frames that leave the switch: the port's guest gets them.
    Tx,
    /// Both.
    #[default]
    Both,
}

impl ObserveDirection {
    /// Whether frames that enter the switch are observed.
    pub fn rx(self) -> bool {
        self != ObserveDirection::Tx
    }

    /// Whether frames that leave the switch are observed.
    pub fn tx(self) -> bool {
        self != ObserveDirection::Rx
    }
}

impl fmt::Display for ObserveDirection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ObserveDirection::Rx => "rx",
            ObserveDirection::Tx => "tx",
            ObserveDirection::Both => "both",
        })
    }
}

impl FromStr for ObserveDirection {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "rx" => Ok(ObserveDirection::Rx),
            "tx" => Ok(ObserveDirection::Tx),
            "both" => Ok(ObserveDirection::Both),
            _ => Err(ConfigError::Direction(text.to_string())),
        }
    }
}
