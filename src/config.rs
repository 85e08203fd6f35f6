//! Plain configuration values: what an operator says, checked, without any I/O.
//!
//! The same types serve the command line (`--port vm1,socket=…`), the API's JSON and, in-process,
//! tests and `pollux bench`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

mod observe;
mod poll;

pub use observe::{ALL_PORTS, MAX_FILTER, MAX_OBSERVERS, MAX_SNAPLEN, MAX_TRACE, ObserveDirection};
pub use poll::{CpuList, IdleList, IdlePolicy, Rebalance};

/// Longest port name, in bytes.
pub const MAX_PORT_NAME: usize = 63;
/// Longest socket path the kernel takes (`sun_path` less the terminating zero).
pub const MAX_SOCKET_PATH: usize = 107;
/// Most queue pairs of one port. The payload of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR
/// names a ring in its bits 0 to 7 (bit 8 says that no descriptor comes), so 256 rings are all that
/// a frontend can name; QEMU masks with 0xff, and DPDK has as many.
pub const MAX_QUEUE_PAIRS: u16 = 128;
/// What `queues=` takes.
pub(crate) const QUEUE_PAIRS: &str =
    "1 to 128 queue pairs; vhost-user's kick and call messages have 8 bits for a ring";
/// Most ports of one daemon.
pub const MAX_PORTS: usize = 4096;

/// Who listens on a port's socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SocketMode {
    /// Pollux listens, the frontend connects.
    #[default]
    Server,
    /// The frontend listens, Pollux connects and tries again every 100 ms.
    Client,
}

impl fmt::Display for SocketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SocketMode::Server => "server",
            SocketMode::Client => "client",
        })
    }
}

/// A port as the operator describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    /// Unique name: letters, digits, `-`, `_`, `.`; 1 to 63 bytes.
    pub name: String,
    /// Absolute or relative path of the vhost-user socket.
    #[schema(value_type = String)]
    pub socket: PathBuf,
    /// Who listens.
    #[serde(default)]
    pub mode: SocketMode,
    /// Queue pairs offered to the frontend, 1 to 128; it uses as many of them as it likes.
    #[serde(default = "default_queues")]
    pub queues: u16,
    /// Numbers of the poll threads that may own its transmit queues; any, where empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub poll: Vec<u32>,
    /// Whether a driver may reset one ring (VIRTIO_F_RING_RESET). For frontends that pass it on:
    /// QEMU 7.2 does not, and a guest that changes the length of its rings loses its card.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ring_reset: bool,
    /// Permission bits of the socket file (server mode only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_mode: Option<u32>,
    /// Group that owns the socket file (server mode only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_group: Option<String>,
}

/// Queue pairs offered unless the operator says otherwise: more than most guests have CPUs to use.
pub const DEFAULT_QUEUE_PAIRS: u16 = 8;

fn default_queues() -> u16 {
    DEFAULT_QUEUE_PAIRS
}

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
        "port {name}: unknown option {key:?}; known are socket, mode, queues, poll, ring-reset, socket-mode, \
         socket-group"
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

/// Whether a text can name a port or a mirror.
pub fn is_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=MAX_PORT_NAME).contains(&text.len()) && text.bytes().all(allowed)
}

impl PortSpec {
    /// Checks what the types do not: name, path length, range of queues.
    pub fn validate(&self) -> Result<(), ConfigError> {
        // `pollux capture all` is of every port.
        if self.name == ALL_PORTS {
            return Err(ConfigError::Reserved(self.name.clone()));
        }
        if !is_name(&self.name) {
            return Err(ConfigError::PortName(self.name.clone()));
        }
        self.validate_socket()?;
        if !(1..=MAX_QUEUE_PAIRS).contains(&self.queues) {
            return Err(ConfigError::Value {
                name: self.name.clone(),
                key: "queues",
                value: self.queues.to_string(),
                expected: QUEUE_PAIRS,
            });
        }
        let threads = &self.poll;
        let twice = |at: usize| threads[..at].contains(&threads[at]);
        if threads.len() > MAX_PINS || (0..threads.len()).any(twice) {
            return Err(ConfigError::Value {
                name: self.name.clone(),
                key: "poll",
                value: thread_list(threads),
                expected: THREADS,
            });
        }
        Ok(())
    }

    /// Checks path, permissions and group of the socket.
    fn validate_socket(&self) -> Result<(), ConfigError> {
        let path = self.socket.as_os_str().as_encoded_bytes();
        if path.is_empty() || path.contains(&0) {
            return Err(ConfigError::NoSocket(self.name.clone()));
        }
        if path.len() > MAX_SOCKET_PATH {
            return Err(ConfigError::SocketPath {
                name: self.name.clone(),
                len: path.len(),
            });
        }
        if self.socket_mode.is_some_and(|mode| mode > 0o777) {
            return Err(ConfigError::Value {
                name: self.name.clone(),
                key: "socket-mode",
                value: format!("{:o}", self.socket_mode.unwrap_or_default()),
                expected: PERMISSIONS,
            });
        }
        let ours = [
            (self.socket_mode.is_some(), "socket-mode"),
            (self.socket_group.is_some(), "socket-group"),
        ];
        match ours.iter().find(|(given, _)| *given) {
            Some((_, key)) if self.mode == SocketMode::Client => Err(ConfigError::NotOurSocket {
                name: self.name.clone(),
                key,
            }),
            _ => Ok(()),
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
        let bad = |key, expected| ConfigError::Value {
            name: self.name.clone(),
            key,
            value: value.to_string(),
            expected,
        };
        match key {
            "socket" => self.socket = PathBuf::from(value),
            "mode" => {
                self.mode = match value {
                    "server" => SocketMode::Server,
                    "client" => SocketMode::Client,
                    _ => return Err(bad("mode", "server or client")),
                }
            }
            "queues" => {
                let queues = Some(value).filter(|value| is_number(value));
                let queues = queues.and_then(|value| value.parse().ok());
                self.queues = queues.ok_or_else(|| bad("queues", QUEUE_PAIRS))?;
            }
            "poll" => {
                let numbers: Result<Vec<u32>, _> = value.split('+').map(str::parse).collect();
                self.poll = numbers.map_err(|_| bad("poll", THREADS))?;
            }
            "ring-reset" => {
                self.ring_reset = match value {
                    "on" => true,
                    "off" => false,
                    _ => return Err(bad("ring-reset", "on or off")),
                }
            }
            "socket-mode" => {
                let digits = Some(value).filter(|value| is_number(value));
                let bits = digits.and_then(|digits| u32::from_str_radix(digits, 8).ok());
                let bits = bits.filter(|bits| *bits <= 0o777);
                self.socket_mode = Some(bits.ok_or_else(|| bad("socket-mode", PERMISSIONS))?);
            }
            "socket-group" => self.socket_group = Some(value.to_string()),
            _ => {
                return Err(ConfigError::UnknownOption {
                    name: self.name.clone(),
                    key: key.to_string(),
                });
            }
        }
        Ok(())
    }
}

impl FromStr for PortSpec {
    type Err = ConfigError;

    /// Parses a port's name and its options.
    ///
    /// ```text
    /// NAME,socket=PATH[,mode=server|client][,queues=N][,poll=N+N…][,ring-reset=on|off]
    ///     [,socket-mode=0660][,socket-group=NAME]
    /// ```
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut parts = text.split(',');
        let mut spec = PortSpec {
            name: parts.next().unwrap_or_default().to_string(),
            socket: PathBuf::new(),
            mode: SocketMode::Server,
            queues: DEFAULT_QUEUE_PAIRS,
            poll: Vec::new(),
            ring_reset: false,
            socket_mode: None,
            socket_group: None,
        };
        let mut seen: Vec<&str> = Vec::new();
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            if seen.contains(&key) {
                return Err(ConfigError::Twice {
                    name: spec.name,
                    key: key.to_string(),
                });
            }
            seen.push(key);
            spec.set(key, value)?;
        }
        spec.validate()?;
        Ok(spec)
    }
}

/// What `socket-mode=` takes.
const PERMISSIONS: &str = "octal permission bits such as 0660";

/// Digits alone: the library takes a sign, too.
fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Most poll threads that a port can be pinned to, more than there can be.
const MAX_PINS: usize = 64;
/// What `poll=` takes.
const THREADS: &str = "numbers of poll threads such as 0 or 0+2, each once";

/// Numbers of poll threads as `poll=` takes them.
pub fn thread_list(threads: &[u32]) -> String {
    let numbers: Vec<String> = threads.iter().map(u32::to_string).collect();
    numbers.join("+")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_parsed_with_all_its_options() {
        let spec: PortSpec =
            "vm1,socket=/run/p/vm1.sock,mode=server,queues=4,poll=0+2,ring-reset=on,socket-mode=0660,socket-group=kvm"
                .parse()
                .unwrap();
        assert_eq!(spec.name, "vm1");
        assert_eq!(spec.mode, SocketMode::Server);
        assert_eq!(spec.queues, 4);
        assert_eq!(spec.poll, [0, 2]);
        assert!(spec.ring_reset);
        assert_eq!(spec.socket_mode, Some(0o660));
        assert_eq!(spec.socket_group.as_deref(), Some("kvm"));
    }

    #[test]
    fn each_wrong_port_is_refused_by_name() {
        let long = format!("vm1,socket=/{}", "x".repeat(200));
        for (text, part) in [
            ("", "port name"),
            ("a b,socket=/x", "port name"),
            ("vm1", "a socket is needed"),
            ("vm 1,socket=/x", "digits, '-', '_' or '.'"),
            ("all,socket=/x", "\"all\" is reserved"),
            ("vm1,socket=/x,mode=client,socket-mode=0660", "mode=server"),
            ("vm1,socket=/x,mode=client,socket-group=kvm", "mode=server"),
            ("vm1,socket=/x,queues=+4", "1 to 128"),
            ("vm1,socket=/x,socket-mode=+660", "octal"),
            ("vm1,socket=/x,mode=both", "server or client"),
            ("vm1,socket=/x,queues=0", "1 to 128"),
            ("vm1,socket=/x,queues=129", "1 to 128"),
            ("vm1,socket=/x,queues=256", "8 bits for a ring"),
            ("vm1,socket=/x,poll=0-2", "numbers of poll threads"),
            ("vm1,socket=/x,poll=0+0", "each once"),
            ("vm1,socket=/x,ring-reset=yes", "on or off"),
            ("vm1,socket=/x,socket-mode=999", "octal"),
            ("vm1,socket=/x,colour=red", "unknown option"),
            ("vm1,socket=/x,socket=/y", "given twice"),
            (long.as_str(), "at most 107"),
        ] {
            let error = text.parse::<PortSpec>().unwrap_err().to_string();
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }
}
