//! A port as the operator describes it, and the table of its options.
//!
//! Every option is one row of [`PORT_OPTIONS`]: its key, its help, its parser, its check, and
//! whether `port set` takes it. `--port`, `port add`, `port set`, their help and the error texts
//! read the table. JSON takes the fields of [`PortSpec`] and [`PortPatch`], and the same checks.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{ALL_PORTS, ConfigError};

/// Longest port name, in bytes.
pub const MAX_PORT_NAME: usize = 63;
/// Longest socket path the kernel takes (`sun_path` less the terminating zero).
pub const MAX_SOCKET_PATH: usize = 107;
/// Most queue pairs of one port. The payload of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR
/// names a ring in its bits 0 to 7 (bit 8 says that no descriptor comes), so 256 rings are all that
/// a frontend can name; QEMU masks with 0xff, and DPDK has as many.
pub const MAX_QUEUE_PAIRS: u16 = 128;
/// Queue pairs offered unless the operator says otherwise: more than most guests have CPUs to use.
pub const DEFAULT_QUEUE_PAIRS: u16 = 8;
/// Most poll threads that a port can be pinned to, more than there can be.
const MAX_PINS: usize = 64;

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

impl Default for PortSpec {
    /// Every option at its default. Name and socket have none and are empty.
    fn default() -> Self {
        PortSpec {
            name: String::new(),
            socket: PathBuf::new(),
            mode: SocketMode::default(),
            queues: DEFAULT_QUEUE_PAIRS,
            poll: Vec::new(),
            ring_reset: false,
            socket_mode: None,
            socket_group: None,
        }
    }
}

fn default_queues() -> u16 {
    DEFAULT_QUEUE_PAIRS
}

/// What may change while a port exists; absent fields stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PortPatch {
    /// Queue pairs offered, 1 to 128; a connected frontend sees it when it reconnects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
}

/// Copies an option's value into a patch. Returns whether the patch had a value already.
type Patch = fn(&PortSpec, &mut PortPatch) -> bool;

/// One option of a port.
pub(crate) struct PortOption {
    /// The name in `KEY=VALUE`. The JSON field has `_` in place of `-`.
    pub(crate) key: &'static str,
    /// The value as help texts show it.
    form: &'static str,
    /// What the option takes, with the unit, as error texts say it.
    pub(crate) expected: &'static str,
    /// Puts the value of a text into the port; `None` if the text has another form.
    pub(crate) parse: fn(&mut PortSpec, &str) -> Option<()>,
    /// Checks what the field's type does not.
    pub(crate) check: fn(&PortOption, &PortSpec) -> Result<(), ConfigError>,
    /// For an option that `port set` takes.
    pub(crate) patch: Option<Patch>,
}

impl fmt::Debug for PortOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key)
    }
}

/// Every option of a port, in the order in which help and errors name them.
pub(crate) const PORT_OPTIONS: &[PortOption] = &[
    PortOption {
        key: "socket",
        form: "PATH",
        expected: "the path of a unix socket",
        parse: |spec, text| {
            spec.socket = PathBuf::from(text);
            Some(())
        },
        check: |_, spec| check_socket(spec),
        patch: None,
    },
    PortOption {
        key: "mode",
        form: "server|client",
        expected: "server or client",
        parse: |spec, text| {
            spec.mode = match text {
                "server" => SocketMode::Server,
                "client" => SocketMode::Client,
                _ => return None,
            };
            Some(())
        },
        check: |_, _| Ok(()),
        patch: None,
    },
    PortOption {
        key: "queues",
        form: "N",
        expected: "1 to 128 queue pairs; vhost-user's kick and call messages have 8 bits for a ring",
        parse: |spec, text| {
            spec.queues = digits(text)?.parse().ok()?;
            Some(())
        },
        check: |option, spec| match spec.queues {
            1..=MAX_QUEUE_PAIRS => Ok(()),
            queues => Err(option.refusal(spec, queues.to_string())),
        },
        patch: Some(|spec, patch| patch.queues.replace(spec.queues).is_some()),
    },
    PortOption {
        key: "poll",
        form: "N+N…",
        expected: "numbers of poll threads such as 0 or 0+2, each once",
        parse: |spec, text| {
            let numbers: Result<Vec<u32>, _> = text.split('+').map(str::parse).collect();
            spec.poll = numbers.ok()?;
            Some(())
        },
        check: |option, spec| {
            let threads = &spec.poll;
            let twice = |at: usize| threads[..at].contains(&threads[at]);
            if threads.len() > MAX_PINS || (0..threads.len()).any(twice) {
                return Err(option.refusal(spec, thread_list(threads)));
            }
            Ok(())
        },
        patch: None,
    },
    PortOption {
        key: "ring-reset",
        form: "on|off",
        expected: "on or off",
        parse: |spec, text| {
            spec.ring_reset = match text {
                "on" => true,
                "off" => false,
                _ => return None,
            };
            Some(())
        },
        check: |_, _| Ok(()),
        patch: None,
    },
    PortOption {
        key: "socket-mode",
        form: "0660",
        expected: "octal permission bits such as 0660",
        parse: |spec, text| {
            let bits = u32::from_str_radix(digits(text)?, 8).ok()?;
            spec.socket_mode = Some(bits).filter(|bits| *bits <= 0o777);
            spec.socket_mode.map(drop)
        },
        check: |option, spec| match spec.socket_mode {
            None => Ok(()),
            Some(bits) if bits > 0o777 => Err(option.refusal(spec, format!("{bits:o}"))),
            Some(_) => option.check_server(spec),
        },
        patch: None,
    },
    PortOption {
        key: "socket-group",
        form: "NAME",
        expected: "the name or number of a group",
        parse: |spec, text| {
            spec.socket_group = Some(text.to_string());
            Some(())
        },
        check: |option, spec| match spec.socket_group {
            None => Ok(()),
            Some(_) => option.check_server(spec),
        },
        patch: None,
    },
];

impl PortOption {
    /// The option with this key.
    pub(crate) fn find(key: &str) -> Option<&'static PortOption> {
        PORT_OPTIONS.iter().find(|option| option.key == key)
    }

    fn refusal(&self, spec: &PortSpec, value: String) -> ConfigError {
        ConfigError::Value {
            name: spec.name.clone(),
            key: self.key,
            value,
            expected: self.expected,
        }
    }

    /// Refuses an option of a socket file that the frontend makes.
    fn check_server(&self, spec: &PortSpec) -> Result<(), ConfigError> {
        match spec.mode {
            SocketMode::Server => Ok(()),
            SocketMode::Client => Err(ConfigError::NotOurSocket {
                name: spec.name.clone(),
                key: self.key,
            }),
        }
    }
}

fn check_socket(spec: &PortSpec) -> Result<(), ConfigError> {
    let path = spec.socket.as_os_str().as_encoded_bytes();
    if path.is_empty() || path.contains(&0) {
        return Err(ConfigError::NoSocket(spec.name.clone()));
    }
    if path.len() > MAX_SOCKET_PATH {
        return Err(ConfigError::SocketPath {
            name: spec.name.clone(),
            len: path.len(),
        });
    }
    Ok(())
}

fn join<'a>(parts: impl Iterator<Item = &'a PortOption>, form: bool) -> String {
    let texts = parts.map(|option| match form {
        true => format!("{}={}", option.key, option.form),
        false => option.key.to_string(),
    });
    texts.collect::<Vec<_>>().join(", ")
}

/// The keys of all options.
pub(super) fn known_keys() -> String {
    join(PORT_OPTIONS.iter(), false)
}

/// All options but the socket, as help texts show them.
pub(crate) fn optional_forms() -> String {
    let optional = PORT_OPTIONS.iter().filter(|option| option.key != "socket");
    join(optional, true)
}

/// The options that `port set` takes, as help texts show them.
pub(crate) fn settable_forms() -> String {
    let settable = PORT_OPTIONS.iter().filter(|option| option.patch.is_some());
    join(settable, true)
}

/// Whether a text can name a port or a mirror.
pub fn is_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=MAX_PORT_NAME).contains(&text.len()) && text.bytes().all(allowed)
}

impl PortSpec {
    /// Checks the name, then what each option's row checks.
    pub fn validate(&self) -> Result<(), ConfigError> {
        // `pollux capture all` is of every port.
        if self.name == ALL_PORTS {
            return Err(ConfigError::Reserved(self.name.clone()));
        }
        if !is_name(&self.name) {
            return Err(ConfigError::PortName(self.name.clone()));
        }
        let mut options = PORT_OPTIONS.iter();
        options.try_for_each(|option| (option.check)(option, self))
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
        let option = PortOption::find(key).ok_or_else(|| ConfigError::UnknownOption {
            name: self.name.clone(),
            key: key.to_string(),
        })?;
        (option.parse)(self, value).ok_or_else(|| option.refusal(self, value.to_string()))
    }
}

impl FromStr for PortSpec {
    type Err = ConfigError;

    /// Parses `NAME,socket=PATH` and further `,KEY=VALUE` in any order.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut parts = text.split(',');
        let mut spec = PortSpec {
            name: parts.next().unwrap_or_default().to_string(),
            ..PortSpec::default()
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

/// The text, if it has digits alone: `parse` takes a sign, too.
fn digits(text: &str) -> Option<&str> {
    let all = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    all.then_some(text)
}

/// Numbers of poll threads as `poll=` takes them.
pub fn thread_list(threads: &[u32]) -> String {
    let numbers: Vec<String> = threads.iter().map(u32::to_string).collect();
    numbers.join("+")
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
