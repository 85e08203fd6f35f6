//! Counts and reports addresses that move between ports.
//!
//! An address that moves once has migrated. An address that keeps moving is used by two guests, and
//! each of them misses frames. `port show` names it until it has been quiet for a minute.

use std::time::{Duration, Instant};

use super::control::Control;
use super::pace::Pace;
use crate::api::types::{EventKind, MovingAddress};
use crate::switch::fdb::Move;
use crate::wire::Mac;

/// Lines about moves to one port: this many at once, then one every `LINE_EVERY`. An address in use
/// at two ports can move with every other frame, without end.
const LINES: u32 = 5;
const LINE_EVERY: Duration = Duration::from_secs(60);
/// Moves after which an address is said to keep moving. Two moves can be a migration that was
/// undone.
const OFTEN: u64 = 3;
/// An address that has not moved for this long has settled.
const SETTLED: Duration = Duration::from_secs(60);

/// The addresses that move to and from one port.
#[derive(Debug)]
pub(super) struct Stations {
    pace: Pace,
    /// The address that has moved last, or the one that keeps moving.
    newest: Option<Station>,
}

#[derive(Debug)]
struct Station {
    mac: Mac,
    /// Name of the port that the address moves from or to.
    other: String,
    moves: u64,
    last: Instant,
}

impl Stations {
    /// The state of a new port.
    pub(super) fn new(now: Instant) -> Self {
        Stations {
            pace: Pace::new(LINES, LINE_EVERY, now),
            newest: None,
        }
    }

    fn note(&mut self, moved: &Move, other: &str, now: Instant) {
        let before = self.newest.take().filter(|station| !station.settled(now));
        let other = other.to_string();
        self.newest = Some(match before {
            Some(station) if station.mac == moved.mac => Station {
                moves: station.moves + moved.times,
                last: now,
                other,
                ..station
            },
            // `port show` names this address, so it stays.
            Some(station) if station.moves >= OFTEN.max(moved.times) => station,
            _ => Station {
                mac: moved.mac,
                other,
                moves: moved.times,
                last: now,
            },
        });
    }

    /// Returns the address that keeps moving between this port and another one, if any.
    pub(super) fn moving(&self, now: Instant) -> Option<MovingAddress> {
        let station = self.newest.as_ref()?;
        let moving = station.moves >= OFTEN && !station.settled(now);
        moving.then(|| MovingAddress {
            mac: station.mac,
            other_port: station.other.clone(),
            moves: station.moves,
            last_seconds: now.saturating_duration_since(station.last).as_secs_f64(),
        })
    }
}

impl Station {
    fn settled(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last) >= SETTLED
    }
}

impl Control {
    /// Once a second: reports and counts the moves since the last look, of all ports.
    pub(super) fn look_at_moves(&mut self, now: Instant) {
        for moved in self.registry.fdb.take_moves() {
            let [from, to] = [moved.from, moved.to].map(|port| self.registry.names.of(port));
            for (port, other) in [(moved.from, &to), (moved.to, &from)] {
                if let Some(record) = self.registry.find_reference(port) {
                    record.stations.note(&moved, other, now);
                }
            }
            self.tell_of_move(&moved, &from, now);
        }
    }

    fn tell_of_move(&mut self, moved: &Move, from: &str, now: Instant) {
        let Some(record) = self.registry.find_reference(moved.to) else {
            return;
        };
        if !record.stations.pace.admits(now) {
            return;
        }
        let Move { mac, times, .. } = moved;
        let mut text = format!("{mac} has moved here from {from}");
        if *times > 1 {
            text +=
                &format!(", and moved {times} times within a second: is the address there twice?");
        }
        let missing = record.stations.pace.take_refused();
        if missing > 0 {
            text += &format!(" ({missing} such events were not shown)");
        }
        self.report.port(&record.shared, EventKind::MacMoved, text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::switch::PortRef;

    const PORTS: [PortRef; 2] = [port(0), port(1)];

    const fn port(slot: u16) -> PortRef {
        PortRef {
            slot,
            generation: 1,
        }
    }

    fn moved(last: u64, times: u64) -> Move {
        Move {
            mac: Mac::from_bits(last),
            from: PORTS[0],
            to: PORTS[1],
            times,
        }
    }

    #[test]
    fn an_address_keeps_moving_from_the_third_move_until_a_minute_after_its_last() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut stations = Stations::new(start);
        stations.note(&moved(1, 2), "other", at(0));
        assert_eq!(stations.moving(at(0)), None);
        stations.note(&moved(1, 1), "other", at(50));
        // An address that moves once does not hide the one that keeps moving.
        stations.note(&moved(2, 1), "third", at(55));
        let moving = stations.moving(at(60)).unwrap();
        assert_eq!((moving.mac, moving.moves), (Mac::from_bits(1), 3));
        assert_eq!(
            (moving.other_port.as_str(), moving.last_seconds),
            ("other", 10.0)
        );
        assert_eq!(stations.moving(at(110)), None);
        // After it has settled, the count begins at zero.
        stations.note(&moved(1, 2), "other", at(111));
        assert_eq!(stations.moving(at(111)), None);
    }
}
