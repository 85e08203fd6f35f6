//! Chains on a transmitq that are no frame.

use std::sync::atomic::Ordering;

use pollux::virtio::driver::{Buffer, DESC_INDIRECT, DESC_NEXT, RingAreas};

use crate::common::guest::{Guest, GuestOptions, Ram, TRANSMIT};
use crate::common::scene::{SINK, Scene, VICTIM, next};
use crate::common::traffic::{frame, mac};
use crate::common::wait_for;
use crate::{FLAGS, HEADER, LEN, LONG, MALFORMED, NEXT, SHORT, counters, packed, split};

/// A chain that is no frame, and the reason that it is counted under.
struct Misdeed {
    what: &'static str,
    reason: &'static str,
    buffers: Vec<Buffer>,
    spoil: Box<SpoilHead>,
}

/// Rewrites the chain with this head.
type SpoilHead = dyn FnOnce(&RingAreas<'_>, u16);

fn misdeed(what: &'static str, reason: &'static str, buffers: Vec<Buffer>) -> Misdeed {
    let spoil = Box::new(|_: &RingAreas<'_>, _| {});
    Misdeed {
        what,
        reason,
        buffers,
        spoil,
    }
}

/// Buffers that are wrong in either kind of ring.
fn bad_buffers(guest: &Guest<'_>) -> Vec<Misdeed> {
    let (at, len) = guest.transmit_buffer(0);
    let readable = Buffer::readable;
    let several = |count| (0..count).map(|n| readable(guest.transmit_buffer(n).0, len));
    vec![
        misdeed(
            "a buffer in a hole",
            MALFORMED,
            vec![readable(guest.hole(), 100)],
        ),
        misdeed(
            "a buffer that ends in a hole",
            MALFORMED,
            vec![readable(guest.hole() - 50, 100)],
        ),
        misdeed(
            "a buffer below all memory",
            MALFORMED,
            vec![readable(0, 100)],
        ),
        misdeed(
            "a buffer whose end wraps",
            MALFORMED,
            vec![readable(u64::MAX - 10, 100)],
        ),
        misdeed("a buffer of 4 GiB", MALFORMED, vec![readable(at, u32::MAX)]),
        misdeed(
            "a writable buffer",
            MALFORMED,
            vec![Buffer::writable(at, 100)],
        ),
        misdeed(
            "a readable buffer behind a writable one",
            MALFORMED,
            vec![Buffer::writable(at, 50), readable(at, 100)],
        ),
        misdeed(
            "a bad buffer behind a good one",
            MALFORMED,
            vec![readable(at, 100), readable(guest.hole(), 100)],
        ),
        misdeed("no byte at all", MALFORMED, vec![readable(at, 0); 3]),
        misdeed(
            "an empty buffer in a hole",
            MALFORMED,
            vec![readable(guest.hole(), 0)],
        ),
        misdeed(
            "less than a header",
            MALFORMED,
            vec![readable(at, HEADER - 1)],
        ),
        misdeed(
            "a header and nothing else",
            SHORT,
            vec![readable(at, HEADER)],
        ),
        misdeed(
            "less than an Ethernet header",
            SHORT,
            vec![readable(at, HEADER + 13)],
        ),
        misdeed("more than any frame has", LONG, several(7).collect()),
    ]
}

/// Links and tables that are wrong in a split ring.
fn bad_links(guest: &Guest<'_>) -> Vec<Misdeed> {
    let (at, _) = guest.transmit_buffer(0);
    let entries = 256;
    // Rewrites flags and next of the head, whose one buffer is good.
    let link = |what, flags: u16, to: fn(u16) -> u16| Misdeed {
        spoil: Box::new(move |ring, head| {
            let head = usize::from(head) * 16;
            ring.descriptors
                .store_u16(head + FLAGS, flags, Ordering::Relaxed);
            let next = to(head as u16 / 16);
            ring.descriptors
                .store_u16(head + NEXT, next, Ordering::Relaxed);
        }),
        ..misdeed(what, MALFORMED, vec![Buffer::readable(at, 100)])
    };
    let empty_loop = Misdeed {
        spoil: Box::new(|ring, head| {
            let head = usize::from(head) * 16;
            ring.descriptors.store_u32(head + LEN, 0, Ordering::Relaxed);
            let next = (head / 16) as u16;
            ring.descriptors
                .store_u16(head + FLAGS, DESC_NEXT, Ordering::Relaxed);
            ring.descriptors
                .store_u16(head + NEXT, next, Ordering::Relaxed);
        }),
        ..misdeed(
            "a loop of empty buffers",
            MALFORMED,
            vec![Buffer::readable(at, 0)],
        )
    };
    let whole_ring = Misdeed {
        spoil: Box::new(|ring, head| {
            let mut last = usize::from(head);
            for _ in 1..ring.size {
                last = usize::from(
                    ring.descriptors
                        .load_u16(last * 16 + NEXT, Ordering::Relaxed),
                );
            }
            ring.descriptors
                .store_u16(last * 16 + FLAGS, DESC_NEXT, Ordering::Relaxed);
        }),
        ..misdeed(
            "a next behind the last legal hop",
            MALFORMED,
            vec![Buffer::readable(at, 0); entries as usize],
        )
    };
    // A table in a transmit buffer, as the head's only buffer.
    let table = |what, len: u32, entries: &[(u64, u32, u16, u16)]| {
        let memory = guest.transmit_memory(1);
        for (n, (addr, len, flags, next)) in entries.iter().enumerate() {
            memory.store_u64(16 * n, *addr, Ordering::Relaxed);
            memory.store_u32(16 * n + LEN, *len, Ordering::Relaxed);
            memory.store_u16(16 * n + FLAGS, *flags, Ordering::Relaxed);
            memory.store_u16(16 * n + NEXT, *next, Ordering::Relaxed);
        }
        let place = guest.transmit_buffer(1).0;
        Misdeed {
            spoil: Box::new(|ring, head| {
                let at = usize::from(head) * 16 + FLAGS;
                ring.descriptors
                    .store_u16(at, DESC_INDIRECT, Ordering::Relaxed);
            }),
            ..misdeed(what, MALFORMED, vec![Buffer::readable(place, len)])
        }
    };
    let (good, next, inner) = (100, DESC_NEXT, DESC_INDIRECT);
    vec![
        link("a next outside of the table", DESC_NEXT, |_| 256),
        link("a next far outside", DESC_NEXT, |_| u16::MAX),
        link("a loop", DESC_NEXT, |head| head),
        empty_loop,
        whole_ring,
        link("a table with a next", DESC_INDIRECT | DESC_NEXT, |head| {
            head
        }),
        table("a table without an entry", 0, &[]),
        table("a table of a part of an entry", 17, &[(at, good, 0, 0)]),
        table("a table of 65535 entries", 16 * 65535, &[(at, good, 0, 0)]),
        table("a table of 4 GiB", 0xffff_fff0, &[(at, good, 0, 0)]),
        table(
            "a table in a table",
            16,
            &[(guest.transmit_buffer(2).0, 16, inner, 0)],
        ),
        table(
            "a table that loops",
            32,
            &[(at, good, next, 1), (at, good, next, 0)],
        ),
        table("a table that leads outside", 32, &[(at, good, next, 2)]),
        Misdeed {
            spoil: Box::new(move |ring, head| {
                let head = usize::from(head) * 16;
                ring.descriptors
                    .store_u16(head + FLAGS, DESC_INDIRECT, Ordering::Relaxed);
            }),
            ..misdeed(
                "a table in a hole",
                MALFORMED,
                vec![Buffer::readable(guest.hole(), 16 * entries)],
            )
        },
    ]
}

/// Each chain comes back with length 0, moves its counter and no other, and the frame behind it
/// passes.
fn chains_cost_nobody(options: GuestOptions, misdeeds: fn(&Guest<'_>) -> Vec<Misdeed>) {
    let scene = Scene::new();
    let rams = [Ram::new(split()), Ram::new(options)];
    let (mut sink, mut guest) = (Guest::new(&rams[0]), Guest::new(&rams[1]));
    scene.attach_sink(&mut sink);
    scene.attach_victim(&mut guest, &mut sink);
    let count = misdeeds(&guest).len();
    for n in 0..count {
        // Made one by one: they use the same memory.
        let Misdeed {
            what,
            reason,
            buffers,
            spoil,
        } = misdeeds(&guest).swap_remove(n);
        wait_for("the transmit buffers", || guest.in_flight() == 0);
        let before = counters(&scene, VICTIM);
        let token = guest.post_raw(&buffers, spoil);
        let used = guest.returned(TRANSMIT);
        assert_eq!((used.token, used.len), (token, 0), "{what}");
        scene.passes(&mut guest, &mut sink, 1 + n as u64);
        let moved: Vec<(String, u64)> = counters(&scene, VICTIM)
            .into_iter()
            .filter(|counter| !before.contains(counter))
            .collect();
        let was = before.iter().find(|(name, _)| name == reason);
        let expected = (reason.to_string(), was.map_or(0, |(_, n)| *n) + 1);
        assert_eq!(moved, [expected], "{what}");
        assert_eq!(scene.daemon.state(VICTIM).0, "running", "{what}");
    }
    assert_eq!(counters(&scene, SINK), []);
    drop((sink, guest));
    scene.finish();
}

#[test]
fn a_bad_buffer_in_a_split_transmitq_costs_its_own_frame_only() {
    chains_cost_nobody(split(), bad_buffers);
}

#[test]
fn a_bad_buffer_in_a_packed_transmitq_costs_its_own_frame_only() {
    chains_cost_nobody(packed(), bad_buffers);
}

#[test]
fn a_bad_link_or_table_in_a_transmitq_costs_its_own_frame_only() {
    chains_cost_nobody(split(), bad_links);
}

#[test]
fn reserved_flags_of_a_split_descriptor_mean_nothing_and_its_frame_passes() {
    let scene = Scene::new();
    let rams = [Ram::new(split()), Ram::new(split())];
    let (mut sink, mut guest) = (Guest::new(&rams[0]), Guest::new(&rams[1]));
    scene.attach_sink(&mut sink);
    scene.attach_victim(&mut guest, &mut sink);
    wait_for("the transmit buffers", || guest.in_flight() == 0);
    let memory = guest.transmit_memory(0);
    memory.write_bytes(0, &[0; HEADER as usize]);
    memory.write_bytes(HEADER as usize, &frame(mac(4), mac(3), 7, 100));
    let buffer = Buffer::readable(guest.transmit_buffer(0).0, HEADER + 100);
    let token = guest.post_raw(&[buffer], |ring, head| {
        let at = usize::from(head) * 16 + FLAGS;
        ring.descriptors.store_u16(at, !7, Ordering::Relaxed);
    });
    assert_eq!(next(&mut sink, 3), 7);
    let used = guest.returned(TRANSMIT);
    assert_eq!((used.token, used.len), (token, 0));
    assert_eq!(counters(&scene, VICTIM), []);
    drop((sink, guest));
    scene.finish();
}
