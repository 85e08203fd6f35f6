//! What a frame costs that comes alone, where many come alone from different ports: they are
//! gathered into one claim.

use serde_json::{Value, json};

use crate::rig::Rig;
use crate::turns::{Turn, passes};
use crate::{Effort, median, plan};

/// Frames of a pass.
const FRAMES: usize = 32;

/// Nanoseconds a frame: the median over all passes.
fn sample(ports: usize, effort: &Effort) -> f64 {
    let flows: Vec<(usize, usize)> = (1..=ports).map(|port| (port, 0)).collect();
    let rig = Rig::new(plan(ports + 1, 64), &flows).unwrap();
    let (guests, switch) = (rig.guests().unwrap(), rig.switch(1, |_| 0));
    let sent = (1..=ports).map(|port| (port, FRAMES / ports)).collect();
    let turn = Turn {
        sent,
        received: FRAMES,
    };
    passes(&rig, guests, switch, &turn, effort) / FRAMES as f64
}

pub(crate) fn measure(effort: &Effort) -> Value {
    let rounds: Vec<(f64, f64)> = (0..effort.rounds)
        .map(|_| (sample(1, effort), sample(FRAMES, effort)))
        .collect();
    json!({
        "one_port_ns": median(rounds.iter().map(|round| round.0)),
        "ports_ns": median(rounds.iter().map(|round| round.1)),
        "ratio": median(rounds.iter().map(|round| round.1 / round.0)),
    })
}
