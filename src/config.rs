//! Plain configuration values from the operator, checked, without any I/O.
//!
//! The command line (`--port vm1,socket=…`), the API's JSON, the tests and `pollux bench` use the
//! same types.

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
    /// The port's name is empty, too long or has other characters.
    #[error("port name {0:?}: use 1 to {MAX_PORT_NAME} letters, digits, '-', '_' or '.'")]
    PortName(String),
    /// The name is reserved, because it stands for every port.
    #[error("port name {0:?} is reserved: it stands for every port")]
    Reserved(String),
    /// An option for a socket that Pollux creates, but the frontend creates the socket.
    #[error(
        "port {name}: {key} is for mode=server: with mode=client the frontend makes the socket"
    )]
    NotOurSocket {
        /// The port.
        name: String,
        /// The option.
        key: &'static str,
    },
    /// `socket=` is missing.
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
    /// The key is not an option.
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
    /// The value is not valid for its option.
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
    /// An option is given twice.
    #[error("port {name}: {key} is given twice")]
    Twice {
        /// The port.
        name: String,
        /// The option.
        key: String,
    },
    /// Not a valid value of `--idle`.
    #[error("idle policy {0:?}: use busy, adaptive or adaptive:MICROSECONDS (at most 1000000)")]
    Idle(String),
    /// Not a valid value of `--rebalance`.
    #[error("rebalance {0:?}: use auto or off")]
    Rebalance(String),
    /// Not a valid value of `--poll-cpus`.
    #[error("CPU list {0:?}: use numbers and ranges such as 0,2-3, each CPU once")]
    Cpus(String),
    /// Not a valid value of `--direction`.
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

/// The configuration of `pollux run`.
#[derive(Clone, Debug)]
pub struct DaemonConfig {
    /// Ports that are added at the start.
    pub ports: Vec<PortSpec>,
    /// A pinned poll thread is started on each CPU. If empty, one unpinned thread is started.
    pub poll_cpus: Vec<usize>,
    /// What poll threads do without work: one policy for all, or one for each of `poll_cpus`.
    /// Threads added later use the common policy, or the default if each thread has its own.
    pub idle: IdleList,
    /// Whether queues move between poll threads by themselves.
    pub rebalance: Rebalance,
    /// Path of the API socket. `None`: no API (in-process use).
    pub api_socket: Option<PathBuf>,
    /// Group that may use the API socket besides root and the daemon's own user.
    pub api_group: Option<String>,
    /// Age at which a learned address is removed.
    pub mac_ageing: Duration,
    /// Largest number of addresses in the FDB.
    pub fdb_size: usize,
    /// Directory of the records that packed rings need after a restart of the switch. `None`: no
    /// records.
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
