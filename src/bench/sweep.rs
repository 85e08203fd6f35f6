//! Repeats a run with one value of a setting after the other.

use std::io;

use super::plan::Plan;
use super::plot::{self, Line, Panel, Scale};
use super::report::Report;

/// Values to run with in turn: `size=64,128,256`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sweep {
    /// What varies.
    pub parameter: Parameter,
    /// Its values.
    pub values: Vec<usize>,
}

/// What a sweep can vary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameter {
    /// `--size`.
    Size,
    /// `--window`.
    Window,
    /// `--ring-size`.
    RingSize,
}

impl std::str::FromStr for Sweep {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "expected size=N,N,… or window=N,N,… or ring-size=N,N,…";
        let (name, values) = text.split_once('=').ok_or(EXPECTED)?;
        let parameter = match name {
            "size" => Parameter::Size,
            "window" => Parameter::Window,
            "ring-size" => Parameter::RingSize,
            _ => return Err(EXPECTED),
        };
        let values = values.split(',').map(|value| value.parse::<usize>());
        let values = values
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| EXPECTED)?;
        Ok(Sweep { parameter, values })
    }
}

impl Parameter {
    pub(super) fn apply(self, mut plan: Plan, value: usize) -> Plan {
        match self {
            Parameter::Size => plan.size = value,
            Parameter::Window => plan.window = Some(value),
            // What does not fit 16 bits is refused as ring size 0 is.
            Parameter::RingSize => plan.ring_size = u16::try_from(value).unwrap_or(0),
        }
        plan
    }

    fn of(self, report: &Report) -> f64 {
        let value = match self {
            Parameter::Size => report.size,
            Parameter::Window => report.window,
            Parameter::RingSize => usize::from(report.ring_size),
        };
        value as f64
    }

    fn label(self) -> &'static str {
        match self {
            Parameter::Size => "frame size (bytes)",
            Parameter::Window => "window (frames)",
            Parameter::RingSize => "ring size (entries)",
        }
    }
}

/// The plot of a sweep's rates.
pub(super) fn draw(sweep: &Sweep, reports: &[Report]) -> io::Result<String> {
    let points = |value: fn(&Report) -> f64| -> Vec<(f64, f64)> {
        reports
            .iter()
            .map(|report| (sweep.parameter.of(report), value(report)))
            .collect()
    };
    let panel = |name, points| Panel {
        name,
        lines: vec![Line { name, points }],
    };
    let panels = [
        panel("Mpps", points(|report| report.mpps)),
        panel("Gbit/s", points(|report| report.gbit_per_second)),
    ];
    Ok(plot::draw(sweep.parameter.label(), Scale::Linear, &panels))
}
