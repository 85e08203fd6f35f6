//! Chains and indirect tables that no driver may post, in a packed transmitq.
//!
//! The driver is `packed_reference`'s, which writes what it is told: the load generator's holds the
//! head of a chain back until it is published, and nobody could spoil that.

use std::sync::atomic::Ordering;

use pollux::virtio::driver::{DESC_INDIRECT, DESC_NEXT};

use crate::common::guest::{Guest, GuestOptions, Ram, TRANSMIT};
use crate::common::scene::{SINK, Scene, VICTIM, next};
use crate::common::traffic::{frame, mac};
use crate::common::wait_for;
use crate::guest::{Piece, indirect, readable, writable};
use crate::packed_reference::{Driver, Element, Place};
use crate::{HEADER, LONG, MALFORMED, counters, packed, split};

/// Bytes of a descriptor.
const ENTRY: usize = 16;

/// A guest's transmitq and a driver that writes what it likes.
struct RawTransmit<'g, 'm> {
    guest: &'g Guest<'m>,
    driver: Driver<'m>,
    posted: usize,
}

impl<'g, 'm> RawTransmit<'g, 'm> {
    fn new(guest: &'g Guest<'m>) -> Self {
        RawTransmit {
            guest,
            driver: Driver::new(guest.areas(TRANSMIT), Place::FIRST),
            posted: 0,
        }
    }

    /// Posts a chain under one buffer id or another.
    fn post(&mut self, pieces: &[Piece]) -> u16 {
        let ids = self.driver.free_ids();
        let id = ids[self.posted * 37 % ids.len()];
        self.posted += 1;
        self.driver.post(id, pieces);
        self.guest.kick(TRANSMIT);
        id
    }

    fn returned(&mut self) -> Element {
        let mut element = None;
        wait_for("the chain to come back", || {
            element = self.driver.reap();
            element.is_some()
        });
        element.unwrap()
    }

    /// A good frame, which arrives.
    fn passes(&mut self, sink: &mut Guest<'_>, number: u64, flags: u16) {
        let memory = self.guest.transmit_memory(0);
        let len = 100;
        memory.write_bytes(0, &[0; HEADER as usize]);
        memory.write_bytes(HEADER as usize, &frame(mac(4), mac(3), number, len));
        let mut piece = readable(self.guest.transmit_buffer(0).0, HEADER + len as u32);
        piece.flags |= flags;
        let id = self.post(&[piece]);
        assert_eq!(next(sink, 3), number, "a frame of the victim");
        let element = self.returned();
        assert_eq!((element.id, element.len), (id, 0));
    }

    /// Writes a table into a transmit buffer; returns the descriptor for it.
    fn table(&self, token: u32, entries: &[Piece]) -> Piece {
        let memory = self.guest.transmit_memory(token);
        for (n, piece) in entries.iter().enumerate() {
            memory.store_u64(ENTRY * n, piece.addr, Ordering::Relaxed);
            let rest = u64::from(piece.len) | u64::from(piece.flags) << 48;
            memory.store_u64(ENTRY * n + 8, rest, Ordering::Relaxed);
        }
        let at = self.guest.transmit_buffer(token).0;
        indirect(at, (ENTRY * entries.len()) as u32)
    }
}

/// What is posted, and the counter that it moves.
type Misdeed = (&'static str, &'static str, Vec<Piece>);

/// Tables that are wrong in a packed ring, or stand where none may. Each call writes them anew.
fn bad_tables(raw: &RawTransmit<'_, '_>) -> Vec<Misdeed> {
    let guest = raw.guest;
    let (at, len) = guest.transmit_buffer(0);
    let good = readable(at, 100);
    let (hole, wraps) = (guest.hole(), u64::MAX - 10);
    // They are used one after the other, and may not share their memory.
    let table = |token, entries: &[Piece]| raw.table(token, entries);
    let of_length = |len| {
        let mut piece = table(1, &[good; 257]);
        piece.len = len;
        vec![piece]
    };
    let inner = table(2, &[good]);
    let several: Vec<Piece> = (0..7)
        .map(|n| readable(guest.transmit_buffer(20 + n).0, len))
        .collect();
    let mut next_and_table = table(3, &[good]);
    next_and_table.flags |= DESC_NEXT;
    vec![
        ("a table without an entry", MALFORMED, of_length(0)),
        ("a part of an entry", MALFORMED, of_length(15)),
        ("an entry and a byte", MALFORMED, of_length(17)),
        ("1025 entries", MALFORMED, of_length(16 * 1025)),
        ("65535 entries", MALFORMED, of_length(16 * 65535)),
        ("a table of 4 GiB", MALFORMED, of_length(0xffff_fff0)),
        ("a table in a hole", MALFORMED, vec![indirect(hole, 32)]),
        (
            "a table that ends in a hole",
            MALFORMED,
            vec![indirect(hole - 16, 32)],
        ),
        (
            "a table whose end wraps",
            MALFORMED,
            vec![indirect(wraps, 32)],
        ),
        (
            "a table in a table",
            MALFORMED,
            vec![table(4, &[good, inner])],
        ),
        ("a table with a next", MALFORMED, vec![next_and_table, good]),
        (
            "a table behind a buffer",
            MALFORMED,
            vec![good, table(5, &[good])],
        ),
        (
            "an entry in a hole",
            MALFORMED,
            vec![table(6, &[good, readable(hole, 100)])],
        ),
        (
            "an entry whose end wraps",
            MALFORMED,
            vec![table(7, &[readable(wraps, 100), good])],
        ),
        (
            "nothing but empty entries",
            MALFORMED,
            vec![table(8, &[readable(hole, 0); 256])],
        ),
        (
            "a writable buffer behind a good one",
            MALFORMED,
            vec![good, writable(at, 100)],
        ),
        (
            "a table of more than any frame has",
            LONG,
            vec![table(9, &several)],
        ),
    ]
}

#[test]
fn a_bad_table_in_a_packed_transmitq_costs_its_own_frame_only() {
    let scene = Scene::new();
    let short = GuestOptions {
        entries: 64,
        ..packed()
    };
    let rams = [Ram::new(split()), Ram::new(short)];
    let (mut sink, mut guest) = (Guest::new(&rams[0]), Guest::new(&rams[1]));
    scene.attach_sink(&mut sink);
    guest.attach(scene.victim());
    scene.wait_until_running(VICTIM);
    let mut raw = RawTransmit::new(&guest);
    raw.passes(&mut sink, 0, 0);
    let misdeeds = bad_tables(&raw);
    // More descriptors than the ring has: each is tried in laps of either kind.
    for turn in 0..4 {
        for (n, (what, reason, pieces)) in misdeeds.iter().enumerate() {
            let before = scene.daemon.dropped(VICTIM, "rx", reason);
            let all: u64 = counters(&scene, VICTIM).iter().map(|(_, n)| n).sum();
            let id = raw.post(pieces);
            let element = raw.returned();
            assert_eq!((element.id, element.len), (id, 0), "{what}");
            assert!(!element.written, "{what}");
            raw.passes(&mut sink, 1 + turn * 100 + n as u64, 0);
            let moved = scene.daemon.dropped(VICTIM, "rx", reason) - before;
            let all = counters(&scene, VICTIM).iter().map(|(_, n)| n).sum::<u64>() - all;
            assert_eq!((moved, all), (1, 1), "{what}");
        }
        assert_eq!(scene.daemon.state(VICTIM).0, "running");
    }
    assert_eq!(counters(&scene, SINK), []);
    drop((sink, guest));
    scene.finish();
}

#[test]
fn reserved_flags_of_a_packed_descriptor_mean_nothing_and_its_frame_passes() {
    let scene = Scene::new();
    let rams = [Ram::new(split()), Ram::new(packed())];
    let (mut sink, mut guest) = (Guest::new(&rams[0]), Guest::new(&rams[1]));
    scene.attach_sink(&mut sink);
    guest.attach(scene.victim());
    scene.wait_until_running(VICTIM);
    let mut raw = RawTransmit::new(&guest);
    // All but NEXT, WRITE and INDIRECT, and the two that say whose the descriptor is.
    raw.passes(&mut sink, 0, 0x7f78);
    let direct = readable(guest.transmit_buffer(0).0, HEADER + 100);
    let mut entry = direct;
    // In a table the other two mean nothing either.
    entry.flags |= !(DESC_NEXT | DESC_INDIRECT | 2);
    let memory = guest.transmit_memory(0);
    memory.write_bytes(HEADER as usize, &frame(mac(4), mac(3), 1, 100));
    let table = raw.table(1, &[entry]);
    raw.post(&[table]);
    assert_eq!(next(&mut sink, 3), 1);
    assert_eq!(raw.returned().len, 0);
    assert_eq!(counters(&scene, VICTIM), []);
    drop((sink, guest));
    scene.finish();
}
