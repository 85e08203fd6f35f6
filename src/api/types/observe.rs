//! Values of the API about observers.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::config::{MAX_SNAPLEN, ObserveDirection};

/// What an observer does with the frames that it sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ObserverKind {
    /// A client reads them.
    Capture,
    /// A client reads those that are dropped.
    Drops,
    /// A client reads what becomes of them.
    Trace,
    /// A port gets copies.
    Mirror,
}

/// An observer and its counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ObserverView {
    /// Unique name.
    pub name: String,
    /// What it does.
    pub kind: ObserverKind,
    /// The ports that it looks at; empty for all.
    pub ports: Vec<String>,
    /// Where a mirror sends copies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Which frames of these ports.
    pub direction: ObserveDirection,
    /// Bytes kept of each frame.
    pub snaplen: u32,
    /// Which of these frames; empty for all.
    pub filter: String,
    /// What it has counted.
    pub statistics: ObserverStatistics,
}

/// Counters of an observer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ObserverStatistics {
    /// Frames kept; of a trace, frames that have entered; of a mirror, copies delivered.
    pub captured: u64,
    /// Frames that it had no room for; of a trace, steps of frames; of a mirror, also copies that
    /// its destination had no room for.
    pub missed: u64,
    /// Frames that its filter refused.
    pub filtered: u64,
}

/// A capture to be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct CaptureOrder {
    /// The port; all ports, if it is `all` or left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// Which of its frames.
    #[serde(default)]
    #[param(inline)]
    pub direction: ObserveDirection,
    /// Frames that are dropped, instead of those that pass.
    #[serde(default)]
    pub drops: bool,
    /// Bytes kept of each frame, 1 to 65549.
    #[serde(default = "whole_frames")]
    pub snaplen: u32,
    /// A filter expression.
    #[serde(default)]
    pub filter: String,
    /// The stream ends after so many frames.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// The stream ends after so many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
}

/// A trace to be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct TraceOrder {
    /// The port whose frames are followed.
    pub port: String,
    /// How many, 1 to 10000.
    pub count: u64,
}

/// A mirror to be added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MirrorAdd {
    /// Unique name: letters, digits, `-`, `_`, `.`; 1 to 63 bytes.
    pub name: String,
    /// The ports whose frames are copied.
    pub from: Vec<String>,
    /// The port that gets the copies.
    pub to: String,
    /// Which of their frames.
    #[serde(default)]
    pub direction: ObserveDirection,
    /// Bytes copied of each frame, 14 to 65549.
    #[serde(default = "whole_frames")]
    pub snaplen: u32,
}

fn whole_frames() -> u32 {
    MAX_SNAPLEN
}

/// A line of a trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum TraceLine {
    /// What became of a frame.
    Frame(TraceFrame),
    /// The trace ends; this is its last line.
    End {
        /// Why.
        reason: String,
        /// Frames followed.
        frames: u64,
        /// Steps of frames that were not seen, because there was no room for them.
        missed: u64,
    },
}

/// A frame's way through the switch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TraceFrame {
    /// Seconds since 1970-01-01 00:00 UTC.
    pub time: f64,
    /// Where it entered.
    pub port: String,
    /// Queue pair.
    #[serde(default)]
    pub queue: Option<u16>,
    /// Its bytes.
    pub length: u32,
    /// Its headers, in words.
    pub summary: String,
    /// What its source address has taught: `new`, `known`, `moved`, or why nothing (`full`,
    /// `quota`…).
    #[serde(default)]
    pub learned: Option<String>,
    /// The port that its destination address is behind, which may be its own; null if that is
    /// unknown or nobody asks.
    #[serde(default)]
    pub lookup: Option<String>,
    /// `unicast`, `flood` or `drop`.
    pub verdict: String,
    /// What became of it, copy by copy.
    pub outcomes: Vec<TraceOutcome>,
}

/// What became of one copy of a frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TraceOutcome {
    /// The port it left through or should have left through, or the ingress of a frame that got no
    /// further.
    pub port: String,
    /// Queue pair.
    #[serde(default)]
    pub queue: Option<u16>,
    /// `delivered`, or the reason of the drop.
    pub outcome: String,
}
