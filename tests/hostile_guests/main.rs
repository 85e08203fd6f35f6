//! Guests that misuse their rings, attached to a running daemon.
//!
//! What a ring makes of each misdeed is tested in `hostile_rings`; here is what comes of it: one
//! counter moves, the buffer comes back, the next good frame passes, and bystanders lose nothing.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../support/guest.rs"]
mod guest;
#[path = "../packed_reference/mod.rs"]
mod packed_reference;

mod broken;
mod packed;
mod receive;
mod room;
mod transmit;

use common::guest::GuestOptions;
use common::scene::Scene;

const HEADER: u32 = 12;
/// Offsets in a descriptor of a split ring.
const LEN: usize = 8;
const FLAGS: usize = 12;
const NEXT: usize = 14;
/// Offset of the index in the available ring, and of its entries.
const INDEX: usize = 2;
const ENTRIES: usize = 4;
const MALFORMED: &str = "rx_malformed_chain";
const SHORT: &str = "rx_short_frame";
const LONG: &str = "rx_too_long";

fn split() -> GuestOptions {
    GuestOptions::default()
}

fn packed() -> GuestOptions {
    GuestOptions {
        packed: true,
        ..GuestOptions::default()
    }
}

/// The counters of a port that moved, without those of frames and bytes.
fn counters(scene: &Scene, port: &str) -> Vec<(String, u64)> {
    let statistics = &scene.daemon.port(port)["statistics"];
    let mut found = Vec::new();
    for direction in ["rx", "tx"] {
        let drops = statistics[direction]["drops"].as_object().unwrap();
        found.extend(
            drops
                .iter()
                .map(|(name, n)| (name.clone(), n.as_u64().unwrap())),
        );
    }
    let bad = statistics["bad_buffers"].as_u64().unwrap();
    found.extend((bad > 0).then(|| ("bad_buffers".to_string(), bad)));
    found
}
