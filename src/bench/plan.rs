//! What one run does: validated settings, and the flows between its guests.

use crossbeam_utils::CachePadded;
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use super::frame::{MAX_SIZE, MIN_SIZE};
use super::memory::{MemoryNeeds, NET_HDR};
use crate::virtio::driver::RingLayout;
use crate::virtio::{MAX_RING_SIZE, RingFeatures};

/// Frame bytes that a receive buffer holds at least: a VLAN-tagged Ethernet frame.
const USUAL_FRAME: usize = 1518;
/// Most flows of a run: the flow's number has 16 bits.
const MAX_FLOWS: usize = 65_536;

/// What the guests do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// Each flow keeps a window of frames in flight.
    Throughput,
    /// One frame in flight, there and back.
    RoundTrip,
    /// So many frames a second from each sending guest, whatever comes back.
    Open(f64),
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rate = match text {
            "tput" => return Ok(Mode::Throughput),
            "rtt" => return Ok(Mode::RoundTrip),
            _ => text.strip_prefix("open:"),
        };
        let scaled = rate.and_then(|rate| {
            let (number, factor) = match rate.as_bytes().last()? {
                b'k' => (&rate[..rate.len() - 1], 1e3),
                b'M' => (&rate[..rate.len() - 1], 1e6),
                _ => (rate, 1.0),
            };
            let rate = number.parse::<f64>().ok()? * factor;
            (rate.is_finite() && rate >= 1.0).then_some(rate)
        });
        scaled.map(Mode::Open).ok_or_else(|| {
            "expected tput, rtt or open:RATE (frames a second, e.g. open:2.5M)".into()
        })
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mode::Throughput => f.write_str("tput"),
            Mode::RoundTrip => f.write_str("rtt"),
            Mode::Open(rate) => write!(f, "open:{rate}"),
        }
    }
}

/// Who sends to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pattern {
    /// Guests 0 and 1, 2 and 3, … in both directions; a single guest to itself.
    Pairs,
    /// All others to guest 0.
    #[value(name = "n-to-1")]
    NTo1,
    /// Everyone to everyone else.
    All,
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Pattern::Pairs => "pairs",
            Pattern::NTo1 => "n-to-1",
            Pattern::All => "all",
        })
    }
}

/// Settings that are impossible, or that do not fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Frame size.
    #[error("--size {0}: frames have {MIN_SIZE} to {MAX_SIZE} bytes")]
    Size(usize),
    /// Ring size.
    #[error(
        "--ring-size {0}: a ring has 2 to {MAX_RING_SIZE} entries, a split ring a power of two"
    )]
    RingSize(u16),
    /// Number of guests for the pattern.
    #[error("--guests {guests} --pattern {pattern}: {needs}")]
    Guests {
        /// As given.
        guests: usize,
        /// As given.
        pattern: Pattern,
        /// What would do.
        needs: &'static str,
    },
    /// No client thread.
    #[error("--threads 0: somebody must play the guests; the least is 1")]
    Threads,
    /// A processor to pin to.
    #[error("--cpu {0}: this process may not run there; `taskset -cp $$` shows where a shell may")]
    Cpu(usize),
    /// Number of queues.
    #[error("--queues {0}: a guest has 1 to 128 queue pairs")]
    Queues(usize),
    /// Round trips need somebody who answers.
    #[error(
        "--mode rtt measures pairs of guests with one queue pair; leave out --pattern and --queues"
    )]
    RoundTrip,
    /// The window.
    #[error(
        "--window {window}: up to {fits} frames of a flow fit the receiver's ring; more would make loss"
    )]
    Window {
        /// As given.
        window: usize,
        /// Most that are safe.
        fits: usize,
    },
    /// A frame needs more buffers than a ring has.
    #[error(
        "--size {size}: such a frame does not fit {entries} receive buffers; raise --ring-size"
    )]
    TooLong {
        /// Frame size.
        size: usize,
        /// Ring entries.
        entries: u16,
    },
    /// Too many senders for one ring.
    #[error(
        "{flows} flows into one guest are more than the {entries} buffers of its ring; raise --ring-size"
    )]
    TooManyFlows {
        /// Flows.
        flows: usize,
        /// Ring entries.
        entries: u16,
    },
    /// No time.
    #[error("--seconds: a run lasts 0.1 s to a day")]
    Seconds,
}

/// One direction between two guests' queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowSpec {
    /// Sending guest.
    pub source: usize,
    /// Queue pair of the sending guest.
    pub queue: usize,
    /// Receiving guest.
    pub destination: usize,
}

/// A flow's counters, written by one side each.
#[derive(Debug, Default)]
pub struct FlowCounters {
    /// Frames sent, counted by the sender.
    pub sent: CachePadded<AtomicU64>,
    /// Different intact frames, counted by the receiver.
    pub received: CachePadded<AtomicU64>,
}

/// One run's settings.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Frame bytes.
    pub size: usize,
    /// How long to measure.
    pub duration: Duration,
    /// Guests.
    pub guests: usize,
    /// What they do.
    pub mode: Mode,
    /// Who sends to whom.
    pub pattern: Pattern,
    /// Queue pairs of each.
    pub queues: usize,
    /// Entries of each ring.
    pub ring_size: u16,
    /// Frames in flight for each flow; `None` for what the rings hold.
    pub window: Option<usize>,
    /// Kind of ring.
    pub packed: bool,
    /// VIRTIO_NET_F_MRG_RXBUF.
    pub mergeable: bool,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: bool,
}

impl Plan {
    /// Checks that the settings go together; returns the flows.
    pub fn check(&self) -> Result<Vec<FlowSpec>, PlanError> {
        if !(MIN_SIZE..=MAX_SIZE).contains(&self.size) {
            return Err(PlanError::Size(self.size));
        }
        let power = self.packed || self.ring_size.is_power_of_two();
        if !power || self.ring_size < 2 || u32::from(self.ring_size) > MAX_RING_SIZE {
            return Err(PlanError::RingSize(self.ring_size));
        }
        if !(1..=128).contains(&self.queues) {
            return Err(PlanError::Queues(self.queues));
        }
        if self.duration < Duration::from_millis(100) || self.duration.as_secs() > 86_400 {
            return Err(PlanError::Seconds);
        }
        let pairs = self.pattern == Pattern::Pairs && self.queues == 1;
        if self.mode == Mode::RoundTrip && !pairs {
            return Err(PlanError::RoundTrip);
        }
        let flows = self.flows()?;
        self.check_window()?;
        Ok(flows)
    }

    fn check_window(&self) -> Result<(), PlanError> {
        let entries = self.ring_size;
        if self.buffers_per_frame() > usize::from(entries) {
            return Err(PlanError::TooLong {
                size: self.size,
                entries,
            });
        }
        let fits = self.fitting_window();
        if fits == 0 {
            return Err(PlanError::TooManyFlows {
                flows: self.flows_into_one(),
                entries,
            });
        }
        match self.window {
            Some(window) if window == 0 || window > fits => Err(PlanError::Window { window, fits }),
            _ => Ok(()),
        }
    }

    fn flows(&self) -> Result<Vec<FlowSpec>, PlanError> {
        let (guests, pattern) = (self.guests, self.pattern);
        let bad = |needs| PlanError::Guests {
            guests,
            pattern,
            needs,
        };
        if pattern == Pattern::Pairs && guests != 1 && (guests % 2 != 0 || guests == 0) {
            return Err(bad(
                "pairs need an even number of guests, or one that talks to itself",
            ));
        }
        if pattern != Pattern::Pairs && guests < 2 {
            return Err(bad("at least two guests are needed"));
        }
        if guests > 1024 || guests * guests * self.queues > MAX_FLOWS && pattern == Pattern::All {
            return Err(bad("these are too many guests"));
        }
        let peers = |source: usize| -> Vec<usize> {
            match pattern {
                Pattern::Pairs if guests == 1 => vec![0],
                Pattern::Pairs => vec![source ^ 1],
                Pattern::NTo1 if source == 0 => vec![],
                Pattern::NTo1 => vec![0],
                Pattern::All => (0..guests).filter(|&peer| peer != source).collect(),
            }
        };
        let mut flows = Vec::new();
        for source in 0..guests {
            for queue in 0..self.queues {
                flows.extend(peers(source).into_iter().map(|destination| FlowSpec {
                    source,
                    queue,
                    destination,
                }));
            }
        }
        Ok(flows)
    }

    fn flows_into_one(&self) -> usize {
        match self.pattern {
            Pattern::Pairs => self.queues,
            Pattern::NTo1 | Pattern::All => (self.guests - 1) * self.queues,
        }
    }

    /// Frames of one flow that fit when the switch puts all flows to a guest into one of its
    /// queues, which it may.
    fn fitting_window(&self) -> usize {
        usize::from(self.ring_size) / self.buffers_per_frame() / self.flows_into_one()
    }

    /// Frames in flight for each flow.
    pub fn window(&self) -> usize {
        match self.mode {
            Mode::RoundTrip => 1,
            _ => self.window.unwrap_or_else(|| self.fitting_window()),
        }
    }

    /// Header and frame bytes of a receive buffer.
    fn receive_capacity(&self) -> usize {
        if self.mergeable || self.size <= USUAL_FRAME {
            NET_HDR + USUAL_FRAME
        } else {
            NET_HDR + self.size
        }
    }

    fn buffers_per_frame(&self) -> usize {
        (NET_HDR + self.size).div_ceil(self.receive_capacity())
    }

    /// What each guest's memory has to hold.
    pub fn memory_needs(&self) -> MemoryNeeds {
        MemoryNeeds {
            queue_pairs: self.queues,
            ring: RingLayout::new(self.ring_size, self.packed),
            transmit_capacity: NET_HDR + self.size,
            receive_capacity: self.receive_capacity(),
        }
    }

    /// The rings' features.
    pub fn ring_features(&self) -> RingFeatures {
        RingFeatures {
            packed: self.packed,
            in_order: self.in_order,
            mergeable: self.mergeable,
            version_1: true,
            ..Default::default()
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A small run.
    pub(in super::super) fn plan() -> Plan {
        Plan {
            size: 64,
            duration: Duration::from_millis(200),
            guests: 2,
            mode: Mode::Throughput,
            pattern: Pattern::Pairs,
            queues: 1,
            ring_size: 256,
            window: None,
            packed: false,
            mergeable: false,
            in_order: false,
        }
    }

    #[test]
    fn modes_are_read_and_nonsense_is_refused() {
        assert_eq!("tput".parse(), Ok(Mode::Throughput));
        assert_eq!("open:2.5M".parse(), Ok(Mode::Open(2.5e6)));
        assert_eq!("open:100k".parse(), Ok(Mode::Open(1e5)));
        for bad in [
            "", "open", "open:", "open:-1", "open:inf", "open:M", "open:é",
        ] {
            assert!(bad.parse::<Mode>().is_err(), "{bad}");
        }
    }

    #[test]
    fn patterns_connect_the_right_guests() {
        let ends = |plan: Plan| -> Vec<(usize, usize)> {
            let flows = plan.check().unwrap();
            flows.iter().map(|f| (f.source, f.destination)).collect()
        };
        let of = |pattern, guests| Plan {
            pattern,
            guests,
            ..plan()
        };
        assert_eq!(ends(of(Pattern::Pairs, 1)), [(0, 0)]);
        assert_eq!(ends(of(Pattern::Pairs, 2)), [(0, 1), (1, 0)]);
        assert_eq!(ends(of(Pattern::NTo1, 3)), [(1, 0), (2, 0)]);
        assert_eq!(ends(of(Pattern::All, 3)).len(), 6);
    }

    #[test]
    fn windows_never_exceed_what_a_receive_ring_holds() {
        let long = Plan {
            size: 9000,
            mergeable: true,
            ..plan()
        };
        assert_eq!(long.window(), 256 / 6);
        let crowd = Plan {
            pattern: Pattern::NTo1,
            guests: 5,
            ..plan()
        };
        assert_eq!(crowd.window(), 64);
        let too_much = Plan {
            window: Some(257),
            ..plan()
        };
        let refused = PlanError::Window {
            window: 257,
            fits: 256,
        };
        assert_eq!(too_much.check(), Err(refused));
    }

    #[test]
    fn impossible_combinations_are_refused() {
        let all = [
            Plan { size: 59, ..plan() },
            Plan {
                ring_size: 100,
                ..plan()
            },
            Plan {
                guests: 3,
                ..plan()
            },
            Plan {
                guests: 1,
                pattern: Pattern::NTo1,
                ..plan()
            },
            Plan {
                guests: 0,
                ..plan()
            },
            Plan {
                queues: 0,
                ..plan()
            },
            Plan {
                mode: Mode::RoundTrip,
                queues: 2,
                ..plan()
            },
            Plan {
                size: 9000,
                mergeable: true,
                ring_size: 4,
                ..plan()
            },
            Plan {
                guests: 300,
                pattern: Pattern::NTo1,
                ..plan()
            },
            Plan {
                duration: Duration::ZERO,
                ..plan()
            },
        ];
        assert!(all.iter().all(|plan| plan.check().is_err()));
    }
}
