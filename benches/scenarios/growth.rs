//! How the cost of a frame grows with what there is: ports, addresses, copies, frames of a burst,
//! entries of a ring.
//!
//! The points of a curve are measured in turn (A B C … A B C …), since the machine drifts.

use std::path::Path;
use std::sync::atomic::Ordering;

use pollux::bench::plan::Plan;
use pollux::bench::plot::{self, Line, Panel, Scale};
use pollux::wire::Mac;
use quanta::Clock;
use serde_json::{Value, json};

use crate::rig::Rig;
use crate::turns::{Turn, passes};
use crate::{Effort, median, plan};

/// One curve.
struct Curve {
    name: &'static str,
    /// What the abscissa counts, and the ordinate's quantity.
    abscissa: &'static str,
    ordinate: &'static str,
    scale: Scale,
    points: &'static [usize],
    /// The ordinate, measured once.
    sample: fn(usize, &Effort) -> f64,
    /// What the curve shows, and whether that is as it must be where something must be.
    shape: fn(&Measured) -> (String, Option<bool>),
}

/// A curve's samples: by round and point.
struct Measured {
    points: &'static [usize],
    rounds: Vec<Vec<f64>>,
}

impl Measured {
    fn at(&self, point: usize) -> f64 {
        median(self.rounds.iter().map(|round| round[point]))
    }

    fn first(&self) -> f64 {
        self.at(0)
    }

    fn last(&self) -> f64 {
        self.at(self.points.len() - 1)
    }

    /// The last point by the first: the median of the rounds' ratios, for drift falls on both.
    fn ratio(&self) -> f64 {
        let last = self.points.len() - 1;
        median(self.rounds.iter().map(|round| round[last] / round[0]))
    }

    /// The line of least squares through the medians, each multiplied by `factor` of its abscissa:
    /// what there is at 0, and what each step adds.
    fn line(&self, factor: impl Fn(f64) -> f64) -> (f64, f64) {
        let points = self.points.iter().enumerate();
        let points: Vec<(f64, f64)> = points
            .map(|(at, x)| (*x as f64, self.at(at) * factor(*x as f64)))
            .collect();
        let count = points.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
        let (x, y) = (mean(|point| point.0), mean(|point| point.1));
        let slope = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum::<f64>()
            / points.iter().map(|p| (p.0 - x).powi(2)).sum::<f64>();
        (y - slope * x, slope)
    }
}

/// Frames of a pass, except where their number is what varies.
const FRAMES: usize = 32;
/// Senders to the addresses of a table, with one frame each in a pass.
const SENDERS: usize = 32;
/// Each sender's buffers, and so the addresses that it can send to.
const BUFFERS: usize = 256;
/// The number of the first address in the table that is not a guest's own.
const ADDRESSES: usize = 64;
/// An address that no table has.
const NOBODY: usize = 1000;

const CURVES: [Curve; 6] = [
    Curve {
        name: "idle-ports",
        abscissa: "idle ports",
        ordinate: "a pass (ns)",
        scale: Scale::Linear,
        points: &[2, 4, 8, 16, 32, 62],
        sample: idle,
        shape: |measured| {
            let (start, slope) = measured.line(|_| 1.0);
            let text = format!(
                "A straight line: {start:.0} ns and {slope:.1} ns a port; {:.2} µs over 62 idle ports (must: under 1).",
                measured.last() / 1e3
            );
            (text, Some(measured.last() < 1000.0))
        },
    },
    Curve {
        name: "ports",
        abscissa: "ports that send the 64 frames of a pass",
        ordinate: "a frame (ns)",
        scale: Scale::Logarithmic,
        points: &[2, 4, 8, 16, 32, 64],
        sample: ports,
        shape: |measured| {
            let text = format!(
                "A frame that comes alone from its port costs {:.1} times one of 32 from the same port.",
                measured.ratio()
            );
            (text, None)
        },
    },
    Curve {
        name: "fdb",
        abscissa: "addresses in use",
        ordinate: "a frame (ns)",
        scale: Scale::Logarithmic,
        points: &[1, 8, 64, 512, 2048, 8192],
        sample: addresses,
        shape: |measured| {
            let ratio = measured.ratio();
            let text = format!(
                "8192 addresses, each frame for another one, cost {ratio:.2} times a single one (must: at most 1.15)."
            );
            (text, Some(ratio <= 1.15))
        },
    },
    Curve {
        name: "flood",
        abscissa: "receivers of each frame",
        ordinate: "a frame (ns)",
        scale: Scale::Linear,
        points: &[2, 4, 8, 16, 32],
        sample: flood,
        shape: |measured| {
            let copies = |at: usize| measured.at(at) / measured.points[at] as f64;
            let (first, last) = (copies(0), copies(measured.points.len() - 1));
            let text = format!(
                "Linear in copies: {first:.0} ns each for 2 receivers, {last:.0} ns each for 32 (must: at most 1.15 times)."
            );
            (text, Some(last <= 1.15 * first))
        },
    },
    Curve {
        name: "burst",
        abscissa: "frames of a pass",
        ordinate: "a frame (ns)",
        scale: Scale::Logarithmic,
        points: &[1, 2, 4, 8, 16, 32, 64],
        sample: burst,
        shape: |measured| {
            let (start, slope) = measured.line(|frames| frames);
            let text = format!(
                "{:.0} ns for a frame alone, {:.0} ns each for 64: about {start:.0} ns a pass and {slope:.0} ns a frame.",
                measured.first(),
                measured.last()
            );
            (text, None)
        },
    },
    Curve {
        name: "ring",
        abscissa: "entries of a ring",
        ordinate: "a frame (ns)",
        scale: Scale::Logarithmic,
        points: &[64, 128, 256, 512, 1024],
        sample: ring,
        shape: |measured| {
            let text = format!(
                "A ring of 1024 entries costs {:.2} times one of 64: its buffers go round through more cache.",
                measured.ratio()
            );
            (text, None)
        },
    },
];

/// Passes over ports whose guests do nothing.
fn idle(ports: usize, effort: &Effort) -> f64 {
    let rig = Rig::new(plan(ports, 64), &[]).unwrap();
    let _guests = rig.guests().unwrap();
    let mut switch = rig.switch(1, |_| 0);
    let (poller, shared) = (switch.pollers.pop().unwrap(), switch.shared[0].clone());
    let (clock, limit) = (Clock::new(), effort.time.as_nanos() as u64);
    effort.pin(0);
    let (began, mut passes) = (clock.raw(), 0_u64);
    poller.run_with(|| {
        passes += 1;
        if passes.is_multiple_of(1024) && clock.delta_as_nanos(began, clock.raw()) >= limit {
            shared.stop.store(true, Ordering::Relaxed);
        }
    });
    clock.delta_as_nanos(began, clock.raw()) as f64 / passes as f64
}

/// `ports` guests in pairs, which send 64 frames in all.
fn ports(ports: usize, effort: &Effort) -> f64 {
    let flows: Vec<(usize, usize)> = (0..ports).map(|port| (port, port ^ 1)).collect();
    let rig = Rig::new(plan(ports, 64), &flows).unwrap();
    let (guests, switch) = (rig.guests().unwrap(), rig.switch(1, |_| 0));
    let sent = (0..ports).map(|port| (port, 64 / ports)).collect();
    let turn = Turn { sent, received: 64 };
    passes(&rig, guests, switch, &turn, effort) / 64.0
}

/// Frames for `addresses` addresses in turn, all of one guest, from 32 others.
fn addresses(addresses: usize, effort: &Effort) -> f64 {
    let flow = |n: usize| (n / BUFFERS, ADDRESSES + n % addresses);
    let flows: Vec<(usize, usize)> = (0..SENDERS * BUFFERS).map(flow).collect();
    let rig = Rig::new(plan(SENDERS + 1, 64), &flows).unwrap();
    let (guests, switch) = (rig.guests().unwrap(), rig.switch(1, |_| 0));
    let receiver = switch.ports[SENDERS].reference;
    for n in 0..addresses {
        let mac = Mac::from_bytes(rig.macs.mac(ADDRESSES + n));
        switch.fdb.insert_static(0, mac, receiver).unwrap();
    }
    let sent = (0..SENDERS).map(|port| (port, 1)).collect();
    let turn = Turn {
        sent,
        received: SENDERS,
    };
    passes(&rig, guests, switch, &turn, effort) / SENDERS as f64
}

/// Frames for an address that nobody knows.
fn flood(receivers: usize, effort: &Effort) -> f64 {
    let rig = Rig::new(plan(receivers + 1, 64), &[(0, NOBODY)]).unwrap();
    let (guests, switch) = (rig.guests().unwrap(), rig.switch(1, |_| 0));
    let turn = Turn {
        sent: vec![(0, FRAMES)],
        received: FRAMES * receivers,
    };
    passes(&rig, guests, switch, &turn, effort) / FRAMES as f64
}

/// `frames` frames a pass between two guests with this plan.
fn pair(plan: Plan, frames: usize, effort: &Effort) -> f64 {
    let rig = Rig::new(plan, &[(0, 1)]).unwrap();
    let (guests, switch) = (rig.guests().unwrap(), rig.switch(1, |_| 0));
    let turn = Turn {
        sent: vec![(0, frames)],
        received: frames,
    };
    passes(&rig, guests, switch, &turn, effort) / frames as f64
}

fn burst(frames: usize, effort: &Effort) -> f64 {
    pair(plan(2, 64), frames, effort)
}

fn ring(entries: usize, effort: &Effort) -> f64 {
    let ring_size = entries as u16;
    let plan = Plan {
        ring_size,
        ..plan(2, 64)
    };
    pair(plan, FRAMES, effort)
}

/// The names of all curves.
pub(crate) fn names() -> Vec<&'static str> {
    CURVES.iter().map(|curve| curve.name).collect()
}

/// Measures the curves of these names; draws each into a file of `plots`.
pub(crate) fn measure(names: &[String], plots: Option<&Path>, effort: &Effort) -> Value {
    let wanted = |curve: &&Curve| names.is_empty() || names.iter().any(|name| name == curve.name);
    let curves = CURVES.iter().filter(wanted).map(|curve| {
        let points = curve.points;
        let round = |_| points.iter().map(|x| (curve.sample)(*x, effort)).collect();
        let measured = Measured {
            points,
            rounds: (0..effort.rounds).map(round).collect(),
        };
        if let Some(dir) = plots {
            std::fs::write(
                dir.join(format!("{}.svg", curve.name)),
                draw(curve, &measured),
            )
            .unwrap();
        }
        report(curve, &measured)
    });
    json!({ "curves": curves.collect::<Vec<Value>>() })
}

fn draw(curve: &Curve, measured: &Measured) -> String {
    let points = curve.points.iter().enumerate();
    let line = Line {
        name: curve.name,
        points: points.map(|(at, x)| (*x as f64, measured.at(at))).collect(),
    };
    let panel = Panel {
        name: curve.ordinate,
        lines: vec![line],
    };
    plot::draw(curve.abscissa, curve.scale, &[panel])
}

fn report(curve: &Curve, measured: &Measured) -> Value {
    let point = |(at, x): (usize, &usize)| {
        let values = || measured.rounds.iter().map(|round| round[at]);
        let (least, most) = values().fold((f64::MAX, 0.0), |(a, b), v| (v.min(a), v.max(b)));
        json!({"x": x, "median": measured.at(at), "min": least, "max": most})
    };
    let points: Vec<Value> = curve.points.iter().enumerate().map(point).collect();
    let (shape, ok) = (curve.shape)(measured);
    json!({
        "name": curve.name,
        "abscissa": curve.abscissa,
        "ordinate": curve.ordinate,
        "rounds": measured.rounds.len(),
        "points": points,
        "shape": shape,
        "ok": ok,
    })
}
