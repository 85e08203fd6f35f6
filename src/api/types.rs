//! The values of the API.
//!
//! Names are stable: within `/v1` a field may be added, but no field is renamed or changes its
//! unit. Amounts are in base units (bytes, seconds, a ratio from 0 to 1). rx and tx are always from
//! the *switch's* view: rx is a frame that enters the switch from the port's guest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use crate::config::PortPatch;
use crate::config::SocketMode;
use crate::wire::Mac;

mod memory;
mod observe;
mod poll;

pub use memory::UnusableMemory;
pub use observe::{
    CaptureOrder, MirrorAdd, ObserverKind, ObserverStatistics, ObserverView, TraceFrame, TraceLine,
    TraceOrder, TraceOutcome,
};
pub use poll::{
    Latency, LatencyBucket, Moved, PollAdd, PollMove, PollSettings, PollSettingsPatch, PollState,
    PollThreadView, QueueRef,
};

/// Where a port stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PortState {
    /// Listening; no frontend has connected.
    Waiting,
    /// Trying to reach the frontend's socket.
    Connecting,
    /// A frontend is connected; its driver runs no ring yet.
    Negotiating,
    /// At least one queue pair runs.
    Running,
    /// A ring broke, or the session cannot go on until the guest resets.
    Broken,
}

impl PortState {
    /// Returns the word used in JSON and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            PortState::Waiting => "waiting",
            PortState::Connecting => "connecting",
            PortState::Negotiating => "negotiating",
            PortState::Running => "running",
            PortState::Broken => "broken",
        }
    }
}

/// A port, its session if a frontend is connected, and its counters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortView {
    /// Unique name.
    pub name: String,
    /// Path of the vhost-user socket.
    pub socket: String,
    /// Who listens on it.
    pub mode: SocketMode,
    /// Queue pairs offered.
    pub queues: u16,
    /// Numbers of the poll threads that may own its transmit queues; any, where empty.
    #[serde(default)]
    pub poll: Vec<u32>,
    /// Whether the reset of one ring is offered.
    #[serde(default)]
    pub ring_reset: bool,
    /// Permission bits that the socket file was given; null where the umask decided.
    #[serde(default)]
    pub socket_mode: Option<u32>,
    /// Group that the socket file was given; null where the directory or the process decided.
    #[serde(default)]
    pub socket_group: Option<String>,
    /// Where it stands.
    pub state: PortState,
    /// In words, why it does not work (yet), or what of its memory cannot be used; null otherwise.
    pub reason: Option<String>,
    /// The connected frontend; null without one.
    pub session: Option<SessionView>,
    /// Frontends that try to connect while another one is: null if none does.
    #[serde(default)]
    pub second_frontend: Option<SecondFrontend>,
    /// An address that keeps moving between this port and another one: null if none does.
    #[serde(default)]
    pub moving_address: Option<MovingAddress>,
    /// Who signals its drivers.
    #[serde(default)]
    pub calls: CallMode,
    /// How fast its guest's memory is to touch.
    #[serde(default)]
    pub memory: MemoryPace,
    /// Seconds for which it has been slow; null while it is not.
    #[serde(default)]
    pub memory_slow_seconds: Option<f64>,
    /// What went through.
    pub statistics: PortStatistics,
}

/// Frontends that were refused because another one is connected: most often a second VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SecondFrontend {
    /// How often.
    pub refused: u64,
    /// Seconds since the first time.
    pub since_seconds: f64,
    /// Seconds since the last time; after a minute without any this is forgotten.
    pub last_seconds: f64,
}

/// An address that keeps moving between two ports: most often two guests have it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MovingAddress {
    /// The address.
    #[schema(value_type = String, example = "52:54:00:12:34:56")]
    pub mac: Mac,
    /// The other port.
    pub other_port: String,
    /// How often it has moved, one way or the other.
    pub moves: u64,
    /// Seconds since the last time, as control looks once a second; after a minute without any this
    /// is forgotten.
    pub last_seconds: f64,
}

/// Who signals a port's drivers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CallMode {
    /// Poll threads, at the end of a pass.
    #[default]
    Direct,
    /// The port's session, because signalling its descriptors is slow.
    Deferred,
}

/// How fast a guest's memory is to touch, and so who serves its port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MemoryPace {
    /// As fast as others': any poll thread.
    #[default]
    Normal,
    /// Slow: a thread that only such ports share.
    Slow,
}

/// What a connected frontend has set up.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SessionView {
    /// Acknowledged virtio features, by name.
    pub features: Vec<String>,
    /// Acknowledged vhost-user protocol features, by name.
    pub protocol_features: Vec<String>,
    /// Shared memory regions.
    pub memory_regions: u32,
    /// Bytes of guest memory shared.
    pub memory_bytes: u64,
    /// Regions of guest memory that the switch cannot use: frames with buffers there are dropped.
    #[serde(default)]
    pub memory_unusable: Vec<UnusableMemory>,
    /// Its vrings.
    pub rings: Vec<RingView>,
    /// Seconds since the frontend connected.
    pub age_seconds: f64,
}

/// Which way a ring carries frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RingDirection {
    /// transmitq of the guest: frames enter the switch.
    Rx,
    /// receiveq of the guest: frames leave the switch.
    Tx,
    /// controlq of the guest: no frames, but what its driver commands.
    Control,
}

/// Layout of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RingKind {
    /// Split virtqueue.
    Split,
    /// Packed virtqueue.
    Packed,
}

/// Where a ring stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RingState {
    /// Not started by the driver.
    Stopped,
    /// Started.
    Running,
    /// Impossible contents; left alone until it is reset.
    Broken,
}

/// One vring of a session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RingView {
    /// Queue pair it belongs to, from 0.
    pub queue: u16,
    /// Which way it carries frames, from the switch's view.
    pub direction: RingDirection,
    /// Layout.
    pub kind: RingKind,
    /// Entries.
    pub size: u32,
    /// Where it stands.
    pub state: RingState,
    /// Why it is broken; null while it is not.
    pub broken_reason: Option<String>,
    /// Enabled by the frontend.
    pub enabled: bool,
    /// Enabled, but its driver has never put a buffer into it, as into others: no flow goes there.
    #[serde(default)]
    pub unserved: bool,
    /// Why a restart of the switch would lose its position; null where it would not.
    #[serde(default)]
    pub no_record: Option<String>,
    /// The switch's position in it, as the answer to GET_VRING_BASE: of a split ring the index of
    /// what it gave back, 16 bits; of a packed ring a slot with the wrap counter in bit 15, in both
    /// halves of 32 bits.
    pub position: u64,
}

/// Counters of a port.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortStatistics {
    /// From the guest into the switch.
    pub rx: DirectionStatistics,
    /// From the switch to the guest.
    pub tx: DirectionStatistics,
    /// Receive buffers of the guest that could hold no frame and went back unused.
    #[serde(default)]
    pub bad_buffers: u64,
    /// Those of them that are in guest memory which the switch cannot use.
    #[serde(default)]
    pub unusable_buffers: u64,
    /// Addresses that moved here from other ports.
    #[serde(default)]
    pub moved_addresses: u64,
    /// Slow calls (over 50 µs) that poll threads made; more than a few, and the session makes them.
    #[serde(default)]
    pub slow_calls: u64,
    /// Calls that the port's sessions made in place of poll threads.
    #[serde(default)]
    pub deferred_calls: u64,
    /// Messages of the port's frontends that had to wait: more than a start-up needs came at once.
    #[serde(default)]
    pub paced_messages: u64,
    /// Page faults in the memory of the port's guests that were slow.
    #[serde(default)]
    pub slow_faults: u64,
    /// How long threads waited for these.
    #[serde(default)]
    pub slow_fault_seconds: f64,
}

/// Counters of one direction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DirectionStatistics {
    /// Frames passed.
    pub frames: u64,
    /// Bytes of those frames.
    pub bytes: u64,
    /// Frames dropped, by reason; reasons that never occurred may be left out.
    pub drops: BTreeMap<String, u64>,
}

impl DirectionStatistics {
    /// Returns the number of frames dropped for any reason.
    pub fn dropped(&self) -> u64 {
        self.drops.values().fold(0, |sum, n| sum.saturating_add(*n))
    }
}

/// An entry of the forwarding table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FdbEntry {
    /// The station's address.
    #[schema(value_type = String, example = "52:54:00:12:34:56")]
    pub mac: Mac,
    /// Where it is.
    pub port: String,
    /// Seconds since a frame from it was seen; 0 for static entries.
    pub age_seconds: f64,
    /// Set by the operator: does not age, does not move.
    #[serde(rename = "static")]
    pub is_static: bool,
}

/// A static entry to add.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FdbAdd {
    /// The station's address.
    #[schema(value_type = String, example = "52:54:00:12:34:56")]
    pub mac: Mac,
    /// The port it is on.
    pub port: String,
    /// Take the place of a static entry that the address has already.
    #[serde(default)]
    pub replace: bool,
}

/// How many entries a flush removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Flushed {
    /// Entries removed.
    pub removed: u64,
}

/// Counters of everything at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StatsView {
    /// Seconds since the daemon started, by a monotonic clock: the base for rates.
    pub uptime_seconds: f64,
    /// Generation of the published topology.
    pub generation: u64,
    /// The forwarding table.
    pub fdb: FdbStatistics,
    /// The ports, in the order of their creation.
    pub ports: Vec<PortCounters>,
    /// The poll threads.
    pub poll_threads: Vec<PollThreadView>,
    /// How long it took to add a port, from the command to its answer; null before the first.
    pub port_add: Option<Latency>,
    /// The same of the removal of a port.
    pub port_remove: Option<Latency>,
    /// Lines of the daemon's log that were lost: standard error could not be written, or was not
    /// read in time.
    #[serde(default)]
    pub log_lines_lost: u64,
}

/// Fill of the forwarding table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FdbStatistics {
    /// Entries in it.
    pub entries: u64,
    /// Most it takes.
    pub capacity: u64,
    /// What happened to its entries: how many were `learned`, have `moved` from port to port, have
    /// `aged`.
    pub counters: BTreeMap<String, u64>,
}

/// A port's counters, without its session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortCounters {
    /// The port.
    pub name: String,
    /// Where it stands.
    pub state: PortState,
    /// What went through.
    pub statistics: PortStatistics,
}

/// What is running.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VersionView {
    /// Version of the program.
    pub version: String,
    /// Version of the API, `v1`.
    pub api: String,
    /// Process id of the daemon.
    pub pid: u32,
}

impl VersionView {
    /// Returns the values of this program and process.
    pub fn current() -> Self {
        VersionView {
            version: env!("CARGO_PKG_VERSION").to_string(),
            api: "v1".to_string(),
            pid: std::process::id(),
        }
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A port was created.
    PortAdded,
    /// A port was removed.
    PortRemoved,
    /// A port's settings were changed.
    PortChanged,
    /// A frontend connected.
    SessionConnected,
    /// The frontend left, or was cut off.
    SessionDisconnected,
    /// A frontend was refused: a second one, or a protocol it breaks.
    SessionRefused,
    /// A ring started.
    RingStarted,
    /// A ring stopped.
    RingStopped,
    /// A ring broke.
    RingBroken,
    /// Guest memory was shared, changed or taken away.
    MemoryChanged,
    /// A guest's memory is slow to touch: its port has a thread that only such ports share.
    MemorySlow,
    /// It is not slow any more.
    MemoryNormal,
    /// A poll thread did not acknowledge in time, does so again, begins or ends.
    PollThread,
    /// A transmit queue goes to another poll thread.
    QueueMoved,
    /// An address that was behind another port is behind this one. Paced: five at once, then one a
    /// minute for each port.
    MacMoved,
    /// An observer was added: a capture, a trace or a mirror.
    ObserverAdded,
    /// An observer has ended.
    ObserverEnded,
    /// The reader was too slow and is cut off; this is the last event of the stream.
    TooSlow,
    /// The daemon stops; this is the last event of the stream.
    Stopping,
    /// A kind that this version does not know.
    #[serde(other)]
    Other,
}

/// Something that happened, as it happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Seconds since 1970-01-01 00:00 UTC.
    pub time: f64,
    /// What happened.
    pub kind: EventKind,
    /// The port it happened to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// The queue pair it happened to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<u16>,
    /// In words.
    pub message: String,
}

/// Every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiError {
    /// Stable word: `bad_argument`, `not_found`, `conflict`, `gone`, `internal`, `forbidden`,
    /// `no_such_route`, `method_not_allowed`, `too_large`, `timeout`, `busy`, `stopping`.
    pub code: String,
    /// One sentence for the operator.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}
