//! Arguments of `pollux capture`, `mirror` and `extcap`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};

use crate::config::{MAX_SNAPLEN, ObserveDirection};

/// `pollux capture`.
#[derive(Debug, Args)]
pub struct CaptureArgs {
    /// The port, or `all`
    #[arg(value_name = "PORT|all")]
    pub port: String,
    /// What to look at.
    #[command(flatten)]
    pub watch: WatchArgs,
    /// Write pcapng into this file, or to standard output (-), instead of printing a line for each
    /// frame
    #[arg(long, short, value_name = "FILE|-", value_hint = ValueHint::FilePath)]
    pub write: Option<PathBuf>,
    /// Begin the next file, FILE.1, FILE.2 and so on, before one has more bytes than this; K, M and
    /// G may follow
    #[arg(long, value_name = "BYTES", requires = "write", value_parser = parse_bytes)]
    pub rotate: Option<u64>,
    /// Keep only so many of these files, the newest
    #[arg(
        long,
        value_name = "N",
        requires = "rotate",
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    pub keep: Option<u64>,
    /// Print a JSON object for each frame
    #[arg(long, short, conflicts_with = "write")]
    pub json: bool,
}

/// Which frames are captured, and how much of them.
#[derive(Clone, Debug, Args)]
pub struct WatchArgs {
    /// Which frames: rx (sent by the port's guest), tx (delivered to it) or both
    #[arg(long, value_name = "DIRECTION", default_value_t = ObserveDirection::default())]
    pub direction: ObserveDirection,
    /// Frames that are dropped, each with its reason, instead of those that pass
    #[arg(long)]
    pub drops: bool,
    /// End after so many frames
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// End after so many seconds
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: Option<u64>,
    /// Bytes kept of each frame
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = MAX_SNAPLEN,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_SNAPLEN))
    )]
    pub snaplen: u32,
    /// Only frames that match, such as "tcp port 80 and not host 10.0.0.1": host, net, port,
    /// portrange, ether host, ether proto, ip, ip6, arp, icmp, icmp6, tcp, udp, sctp, vlan,
    /// broadcast, multicast, less, greater, with src and dst, joined by and, or, not and
    /// parentheses
    #[arg(long, value_name = "EXPR")]
    pub filter: Option<String>,
}

/// `pollux mirror`.
#[derive(Debug, Subcommand)]
pub enum MirrorCommand {
    /// Send copies of the frames of some ports to another one, until it is removed
    Add {
        /// Its name.
        name: String,
        /// The ports whose frames are copied
        #[arg(
            long,
            value_name = "PORT,PORT…",
            value_delimiter = ',',
            required = true
        )]
        from: Vec<String>,
        /// The port that gets the copies
        #[arg(long, value_name = "PORT")]
        to: String,
        /// Which frames: rx (sent by these ports' guests), tx (delivered to them) or both
        #[arg(long, value_name = "DIRECTION", default_value_t = ObserveDirection::default())]
        direction: ObserveDirection,
        /// Bytes copied of each frame
        #[arg(
            long,
            value_name = "BYTES",
            default_value_t = MAX_SNAPLEN,
            value_parser = clap::value_parser!(u32).range(14..=i64::from(MAX_SNAPLEN))
        )]
        snaplen: u32,
    },
    /// Remove a mirror
    #[command(aliases = super::REMOVE)]
    Remove {
        /// Its name.
        name: String,
        /// Do nothing if there is no such mirror
        #[arg(long)]
        if_exists: bool,
    },
    /// List the mirrors, what they copied and what they missed
    #[command(alias = super::LIST)]
    List(super::Output),
}

/// `pollux extcap`: the options that Wireshark gives, by Wireshark's names.
#[derive(Debug, Args)]
pub struct ExtcapArgs {
    /// List the interfaces
    #[arg(long)]
    pub extcap_interfaces: bool,
    /// Version of Wireshark
    #[arg(long, value_name = "VERSION", num_args = 0..=1)]
    pub extcap_version: Option<String>,
    /// The interface in question
    #[arg(long, value_name = "NAME")]
    pub extcap_interface: Option<String>,
    /// Tell its link type
    #[arg(long)]
    pub extcap_dlts: bool,
    /// Tell its options
    #[arg(long)]
    pub extcap_config: bool,
    /// Capture from it
    #[arg(long)]
    pub capture: bool,
    /// Where the capture goes
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub fifo: Option<PathBuf>,
    /// Filter expression
    #[arg(long, value_name = "EXPR")]
    pub extcap_capture_filter: Option<String>,
    /// rx, tx or both
    #[arg(long, value_name = "DIRECTION", default_value_t = ObserveDirection::default())]
    pub direction: ObserveDirection,
    /// Frames that are dropped
    #[arg(
        long,
        num_args = 0..=1,
        default_value_t = false,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    pub drops: bool,
    /// Bytes kept of each frame
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = MAX_SNAPLEN,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_SNAPLEN))
    )]
    pub snaplen: u32,
}

/// Parses a number of bytes. K, M and G stand for powers of 1024.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 1 << 10),
        Some((at, 'M' | 'm')) => (&text[..at], 1 << 20),
        Some((at, 'G' | 'g')) => (&text[..at], 1 << 30),
        _ => (text, 1_u64),
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .and_then(|number| number.checked_mul(unit))
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| "use a number of bytes such as 1000000, 64M or 1G".to_string())
}
