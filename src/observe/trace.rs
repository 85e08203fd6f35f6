//! Follows one frame through the switch, from the records of one poll thread.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::record::{Record, What, part};
use crate::stats::DropReason;
use crate::switch::PortRef;
use crate::switch::fdb::Learned;
use crate::switch::forward::{Decision, Verdict};

/// Bytes of an encoded [`Decided`], which precede the bytes of its frame.
pub const DECIDED_BYTES: usize = 16;
/// How long a journey waits for outcomes whose records may have been missed.
const PATIENCE: Duration = Duration::from_secs(1);

/// Every outcome of learning, in the order of the numbers that encode them.
const LEARNED: [Learned; 10] = [
    Learned::Known,
    Learned::Refreshed,
    Learned::New,
    Learned::Moved,
    Learned::Full,
    Learned::Quota,
    Learned::MoveLimited,
    Learned::Static,
    Learned::Gone,
    Learned::Contended,
];

/// A decision, as it is written into a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decided {
    /// What the switch has learned from the frame.
    pub learned: Option<Learned>,
    /// The port behind which the destination is, if known.
    pub known: Option<PortRef>,
    /// Where the frame goes.
    pub verdict: Verdict,
    /// Number of outcomes that follow, at least one: the frame is delivered or dropped so many
    /// times.
    pub outcomes: u16,
}

impl Decided {
    /// Makes the record of a decision. `others` is the number of ports to which a flooded frame
    /// goes.
    pub fn new(decision: &Decision, others: usize) -> Decided {
        Decided {
            learned: decision.learned,
            known: decision.known,
            verdict: decision.verdict,
            outcomes: match decision.verdict {
                // Without other ports the frame is dropped once.
                Verdict::Flood => u16::try_from(others.max(1)).unwrap_or(u16::MAX),
                _ => 1,
            },
        }
    }

    /// Returns the bytes to be written before the frame's.
    pub fn encode(&self) -> [u8; DECIDED_BYTES] {
        let mut bytes = [0; DECIDED_BYTES];
        let learned = LEARNED.iter().position(|one| Some(*one) == self.learned);
        bytes[0] = learned.map_or(u8::MAX, |at| at as u8);
        let (verdict, slot) = match self.verdict {
            Verdict::Unicast(slot) => (0, slot),
            Verdict::Flood => (1, 0),
            Verdict::Drop(reason) => (2, u16::from(reason as u8)),
        };
        bytes[1] = verdict;
        bytes[2..4].copy_from_slice(&slot.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.outcomes.to_ne_bytes());
        if let Some(port) = self.known {
            bytes[6] = 1;
            bytes[8..10].copy_from_slice(&port.slot.to_ne_bytes());
            bytes[12..16].copy_from_slice(&port.generation.to_ne_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Decided> {
        if bytes.len() < DECIDED_BYTES {
            return None;
        }
        let u16_at = |at| u16::from_ne_bytes(part(bytes, at));
        let slot = u16_at(2);
        Some(Decided {
            learned: LEARNED.get(usize::from(bytes[0])).copied(),
            known: (bytes[6] == 1).then(|| PortRef {
                slot: u16_at(8),
                generation: u32::from_ne_bytes(part(bytes, 12)),
            }),
            verdict: match bytes[1] {
                0 => Verdict::Unicast(slot),
                1 => Verdict::Flood,
                _ => Verdict::Drop(*DropReason::ALL.get(usize::from(slot))?),
            },
            outcomes: u16_at(4),
        })
    }
}

/// A frame's way through the switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Journey {
    /// The record of the frame's entry, or of its drop before that.
    pub entered: Record,
    /// What was decided; `None` if the frame was dropped before a decision.
    pub decided: Option<Decided>,
    /// The frame's first bytes.
    pub head: Vec<u8>,
    /// What became of each copy of the frame.
    pub outcomes: Vec<Record>,
}

impl Journey {
    fn is_complete(&self) -> bool {
        let expected = self.decided.map_or(1, |decided| decided.outcomes);
        self.outcomes.len() >= usize::from(expected)
    }
}

/// Collects records to journeys.
#[derive(Debug, Default)]
pub struct Tracer {
    /// Open journeys in the order of their decisions, each with its poll thread and with the time
    /// when it began.
    open: VecDeque<(usize, Journey, Instant)>,
}

impl Tracer {
    /// Takes a record of a poll thread, with its bytes. Begins no journey while `limit` journeys
    /// are open.
    pub fn take(
        &mut self,
        thread: usize,
        record: Record,
        bytes: &[u8],
        now: Instant,
        limit: usize,
    ) {
        let has_room = self.open.len() < limit;
        if record.what == What::Decided {
            if !has_room {
                return;
            }
            let journey = Journey {
                entered: record,
                decided: Decided::decode(bytes),
                head: bytes.get(DECIDED_BYTES..).unwrap_or_default().to_vec(),
                outcomes: Vec::new(),
            };
            return self.open.push_back((thread, journey, now));
        }
        let mut open = self.open.iter_mut().rev();
        let same = |(of, journey, _): &&mut (usize, Journey, Instant)| {
            *of == thread && journey.entered.frame == record.frame && !journey.is_complete()
        };
        match open.find(same) {
            Some((_, journey, _)) => journey.outcomes.push(record),
            // The frame was dropped before a decision. Other records without a journey belong to
            // frames that entered before the trace began.
            None if record.begins() && has_room => {
                let journey = Journey {
                    entered: record,
                    decided: None,
                    head: Vec::new(),
                    outcomes: vec![record],
                };
                self.open.push_back((thread, journey, now));
            }
            None => {}
        }
    }

    /// Returns the next journey that is complete, or whose missing outcomes are given up. `all`: no
    /// more records come, so all journeys are handed out.
    pub fn next(&mut self, now: Instant, all: bool) -> Option<Journey> {
        let (_, journey, since) = self.open.front()?;
        let over = all || now.saturating_duration_since(*since) >= PATIENCE;
        if !journey.is_complete() && !over {
            return None;
        }
        self.open.pop_front().map(|(_, journey, _)| journey)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: PortRef = PortRef {
        slot: 3,
        generation: 7,
    };

    fn record(what: What, frame: (u16, u32)) -> Record {
        Record {
            time: 5,
            len: 64,
            captured: 0,
            port: PORT,
            queue: Some(0),
            what,
            frame,
        }
    }

    fn decision(verdict: Verdict) -> Decision {
        Decision {
            verdict,
            learned: Some(Learned::Moved),
            known: Some(PORT),
        }
    }

    #[test]
    fn a_decision_is_read_as_it_was_written() {
        let drops = DropReason::ALL.into_iter().map(Verdict::Drop);
        for verdict in [Verdict::Unicast(9), Verdict::Flood]
            .into_iter()
            .chain(drops)
        {
            let decided = Decided::new(&decision(verdict), 5);
            assert_eq!(Decided::decode(&decided.encode()), Some(decided));
        }
        let none = Decided::new(
            &Decision {
                learned: None,
                known: None,
                ..decision(Verdict::Flood)
            },
            0,
        );
        assert_eq!(none.outcomes, 1);
        assert_eq!(Decided::decode(&none.encode()), Some(none));
        for learned in LEARNED {
            let one = Decided::new(
                &Decision {
                    learned: Some(learned),
                    ..decision(Verdict::Flood)
                },
                1,
            );
            assert_eq!(
                Decided::decode(&one.encode()).unwrap().learned,
                Some(learned)
            );
        }
    }

    #[test]
    fn a_journey_is_complete_with_its_last_copy_and_keeps_its_turn() {
        let (mut tracer, now) = (Tracer::default(), Instant::now());
        let flood = Decided::new(&decision(Verdict::Flood), 2).encode();
        let unicast = Decided::new(&decision(Verdict::Unicast(1)), 2).encode();
        tracer.take(
            0,
            record(What::Decided, (0, 1)),
            &[&flood[..], &[1, 2]].concat(),
            now,
            9,
        );
        tracer.take(0, record(What::Decided, (0, 2)), &unicast, now, 9);
        // The same name on another thread is another frame.
        tracer.take(1, record(What::Delivered, (0, 1)), &[1], now, 9);
        tracer.take(0, record(What::Delivered, (0, 2)), &[1], now, 9);
        tracer.take(0, record(What::Delivered, (0, 1)), &[1], now, 9);
        assert_eq!(tracer.next(now, false), None);
        let full = What::Dropped(DropReason::EgressRingFull);
        tracer.take(0, record(full, (0, 1)), &[1], now, 9);
        let first = tracer.next(now, false).unwrap();
        assert_eq!(first.head, [1, 2]);
        let outcomes: Vec<What> = first.outcomes.iter().map(|one| one.what).collect();
        assert_eq!(outcomes, [What::Delivered, full]);
        assert_eq!(tracer.next(now, false).unwrap().outcomes.len(), 1);
        assert_eq!(tracer.next(now, true), None);
    }

    #[test]
    fn what_waits_in_vain_comes_as_it_is() {
        let (mut tracer, now) = (Tracer::default(), Instant::now());
        let unicast = Decided::new(&decision(Verdict::Unicast(1)), 2).encode();
        tracer.take(0, record(What::Decided, (0, 1)), &unicast, now, 9);
        assert_eq!(tracer.next(now, false), None);
        assert!(tracer.next(now + PATIENCE, false).is_some());
        // Dropped before anything was decided.
        let malformed = What::Dropped(DropReason::RxMalformedChain);
        tracer.take(0, record(malformed, (0, 2)), &[], now, 9);
        assert_eq!(tracer.next(now, false).unwrap().decided, None);
    }

    #[test]
    fn no_more_are_open_than_are_wanted() {
        let (mut tracer, now) = (Tracer::default(), Instant::now());
        let unicast = Decided::new(&decision(Verdict::Unicast(1)), 2).encode();
        for number in 0..100 {
            tracer.take(0, record(What::Decided, (0, number)), &unicast, now, 3);
        }
        let all = std::iter::from_fn(|| tracer.next(now, true));
        let numbers: Vec<u32> = all.map(|journey| journey.entered.frame.1).collect();
        assert_eq!(numbers, [0, 1, 2]);
    }
}
