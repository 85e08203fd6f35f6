//! Plain configuration values: what an operator says, checked, without any I/O.
//!
//! The same types serve the command line (`--port vm1,socket=…`), the API's JSON and, in-process,
//! tests and `pollux bench`.

use std::path::PathBuf;
use std::time::Duration;

mod observe;
mod poll;
mod port;

pub use observe::{ALL_PORTS, MAX_FILTER, MAX_OBSERVERS, MAX_SNAPLEN, MAX_TRACE, ObserveDirection};
pub use poll::{CpuList, IdleList, IdlePolicy, Rebalance};
pub use port::{
    DEFAULT_QUEUE_PAIRS, MAX_PORT_NAME, MAX_QUEUE_PAIRS, MAX_SOCKET_PATH, PortPatch, PortSpec,
    SocketMode, is_name, thread_list,
};
pub(crate) use port::{PortOption, optional_forms, settable_forms};

/// Most ports of one daemon.
pub const MAX_PORTS: usize = 4096;

/// Why a configuration value is refused. The text names the value and the accepted form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The port's name is empty, too long or holds other characters.
    #[error("port name {0:?}: use 1 to {MAX_PORT_NAME} letters, digits, '-', '_' or '.'")]
    PortName(String),
    /// A name that means something else.
    #[error("port name {0:?} is reserved: it stands for every port")]
    Reserved(String),
    /// An option of a socket that Pollux makes, for one that the frontend makes.
    #[error(
        "port {name}: {key} is for mode=server: with mode=client the frontend makes the socket"
    )]
    NotOurSocket {
        /// The port.
        name: String,
        /// The option.
        key: &'static str,
    },
    /// No `socket=` given.
    #[error("port {0}: a socket is needed: {0},socket=/run/pollux/{0}.sock")]
    NoSocket(String),
    /// The socket path does not fit into a socket address.
    #[error(
        "port {name}: socket path is {len} bytes long, a unix socket takes at most {MAX_SOCKET_PATH}"
    )]
    SocketPath {
        /// The port.
        name: String,
        /// Length of the path in bytes.
        len: usize,
    },
    /// A key that no option has.
    #[error(
        "port {name}: unknown option {key:?}; known are {}",
        port::known_keys()
    )]
    UnknownOption {
        /// The port.
        name: String,
        /// The unknown key.
        key: String,
    },
    /// A value that its option does not take.
    #[error("port {name}: {key}={value} is not valid: {expected}")]
    Value {
        /// The port.
        name: String,
        /// The option.
        key: &'static str,
        /// What was given.
        value: String,
        /// What is accepted.
        expected: &'static str,
    },
    /// An option given twice.
    #[error("port {name}: {key} is given twice")]
    Twice {
        /// The port.
        name: String,
        /// The option.
        key: String,
    },
    /// `--idle` takes another form.
    #[error("idle policy {0:?}: use busy, adaptive or adaptive:MICROSECONDS (at most 1000000)")]
    Idle(String),
    /// `--rebalance` takes another word.
    #[error("rebalance {0:?}: use auto or off")]
    Rebalance(String),
    /// `--poll-cpus` takes another form.
    #[error("CPU list {0:?}: use numbers and ranges such as 0,2-3, each CPU once")]
    Cpus(String),
    /// `--direction` takes another word.
    #[error("direction {0:?}: use rx, tx or both")]
    Direction(String),
}

/// So many of something: `1 frame`, `2 frames`.
pub fn count(number: u64, what: &str) -> String {
    match number {
        1 => format!("1 {what}"),
        number => format!("{number} {what}s"),
    }
}

/// Everything `pollux run` needs to start.
#[derive(Clone, Debug)]
pub struct DaemonConfig {
    /// Ports present from the start.
    pub ports: Vec<PortSpec>,
    /// One pinned poll thread for each; one unpinned thread where empty.
    pub poll_cpus: Vec<usize>,
    /// What poll threads do without work: one policy for all, or one for each of `poll_cpus`.
    /// Threads that are added later have the one for all, or else the default.
    pub idle: IdleList,
    /// Whether queues move between poll threads by themselves.
    pub rebalance: Rebalance,
    /// Where the API listens; no API where `None` (in-process use).
    pub api_socket: Option<PathBuf>,
    /// Group that may use the API socket besides root and the daemon's own user.
    pub api_group: Option<String>,
    /// Age at which a learned address is forgotten.
    pub mac_ageing: Duration,
    /// Most addresses in the FDB.
    pub fdb_size: usize,
    /// Directory of what packed rings need after a restart of the switch; nothing is kept where
    /// `None`.
    pub ring_state: Option<PathBuf>,
}

impl Default for DaemonConfig {
    fn default() -> Self {
        DaemonConfig {
            ports: Vec::new(),
            poll_cpus: Vec::new(),
            idle: IdleList::default(),
            rebalance: Rebalance::default(),
            api_socket: None,
            api_group: None,
            mac_ageing: Duration::from_secs(300),
            fdb_size: 8192,
            ring_state: None,
        }
    }
}
