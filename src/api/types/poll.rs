//! Values of the API about poll threads.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::{IdlePolicy, Rebalance};

/// Whether a poll thread is polling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PollState {
    /// Polling.
    Busy,
    /// Waiting for a kick.
    Asleep,
    /// Has not taken over a published topology for too long. Whoever must wait for that waits on.
    Overdue,
}

/// A poll thread and what it works on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PollThreadView {
    /// Number of the thread, from 0.
    pub thread: u32,
    /// CPU it is pinned to; null if unpinned.
    pub cpu: Option<u32>,
    /// NUMA node of that CPU.
    pub numa_node: Option<u32>,
    /// Kernel thread id.
    pub tid: u32,
    /// Polling or asleep.
    pub state: PollState,
    /// It serves ports whose guests' memory is slow to touch, and no others (`poll-slow`).
    #[serde(default)]
    pub slow_ports: bool,
    /// Page faults in guests' memory that were slow.
    #[serde(default)]
    pub slow_faults: u64,
    /// How long it waited for these.
    #[serde(default)]
    pub slow_fault_seconds: f64,
    /// What it does without work: `busy` polls on, `adaptive:N` sleeps after N microseconds.
    #[serde(default)]
    #[schema(value_type = String, example = "adaptive:50")]
    pub idle: IdlePolicy,
    /// Seconds for which it has not acknowledged, while it is overdue.
    #[serde(default)]
    pub overdue_seconds: Option<f64>,
    /// Turns of the poll loop.
    pub passes: u64,
    /// Time spent in passes that found work, since it started: what frames cost, whatever time was
    /// left.
    #[serde(default)]
    pub busy_seconds: f64,
    /// Share of the time spent on frames since it started, 0 to 1.
    pub busy_ratio: f64,
    /// The same over the last seconds.
    #[serde(default)]
    pub recent_busy_ratio: f64,
    /// Frames taken from its queues.
    pub frames: u64,
    /// Times it went to sleep.
    pub sleeps: u64,
    /// Generation published to it.
    pub generation: u64,
    /// Generation it has acknowledged.
    pub acknowledged_generation: u64,
    /// Transmit queues it owns.
    pub queues: Vec<QueueRef>,
    /// Time without a CPU in passes of more than 50 µs and in those that took over a new view of
    /// the switch.
    pub off_cpu_seconds: f64,
    /// How long its passes take that find work, without the time counted as `off_cpu_seconds`.
    pub pass_length: Option<Latency>,
    /// The same of passes that began with taking over a new view of the switch; `pass_length` has
    /// the others.
    pub takeover_length: Option<Latency>,
    /// How long it takes to acknowledge a publication.
    pub acknowledge_latency: Option<Latency>,
}

/// One queue of one port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct QueueRef {
    /// The port.
    pub port: String,
    /// Its queue pair, from 0.
    pub queue: u16,
    /// Share of the thread's time that it takes, 0 to 1, estimated over the last seconds.
    #[serde(default)]
    pub load: f64,
}

/// A poll thread to be started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PollAdd {
    /// CPU to pin it to; unpinned if null.
    #[serde(default)]
    pub cpu: Option<u32>,
    /// What it does without work; as all do if null.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "busy")]
    pub idle: Option<IdlePolicy>,
}

/// Queues to be given to a poll thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PollMove {
    /// The port.
    pub port: String,
    /// One queue pair of it; all if null.
    #[serde(default)]
    pub queue: Option<u16>,
    /// Number of the poll thread.
    pub thread: u32,
}

/// What a move did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Moved {
    /// Queue pairs that have another owner now.
    pub queues: u32,
}

/// How queues are placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PollSettings {
    /// Whether queues move by themselves.
    pub rebalance: Rebalance,
    /// Number of the thread that the change was for; absent if it was for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread: Option<u32>,
    /// Policy of `thread`, or of threads that were told nothing else: `busy`, or `adaptive:` and
    /// microseconds.
    #[serde(default)]
    #[schema(value_type = String, example = "adaptive:50")]
    pub idle: IdlePolicy,
}

/// What to change of that; what is left out stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PollSettingsPatch {
    /// Whether queues move by themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebalance: Option<Rebalance>,
    /// What threads do without work: of all there are and will be, or of `thread`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "adaptive:50")]
    pub idle: Option<IdlePolicy>,
    /// Number of the only thread that `idle` is for; refused without `idle`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread: Option<u32>,
}

/// A distribution of durations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Latency {
    /// Durations seen.
    pub count: u64,
    /// Half of them were at most this long.
    pub p50_seconds: f64,
    /// 99 % of them were at most this long.
    pub p99_seconds: f64,
    /// 99.9 % of them were at most this long.
    pub p999_seconds: f64,
    /// The longest.
    pub max_seconds: f64,
    /// How many there were of each length, ascending; lengths that did not occur are left out.
    /// Eight to a power of two.
    #[serde(default)]
    pub buckets: Vec<LatencyBucket>,
}

/// Durations of about the same length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LatencyBucket {
    /// They were at most this long, and longer than those of the bucket below.
    pub up_to_seconds: f64,
    /// How many.
    pub count: u64,
}
