//! Guests that misuse their rings, attached to a running daemon.
//!
//! What a ring makes of each misdeed is tested in `hostile_rings.rs`; here is what comes of it: one counter moves, the
//! buffer comes back, the next good frame passes, and bystanders lose nothing.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

#[path = "../common/mod.rs"]
mod common;

use std::sync::atomic::Ordering;

use common::events::Events;
use common::guest::{Guest, GuestOptions, RECEIVE, Ram, TRANSMIT};
use common::scene::{SINK, Scene, VICTIM, next};
use common::traffic::{frame, mac};
use common::wait_for;
use pollux::virtio::driver::{Buffer, DESC_INDIRECT, DESC_NEXT, RingAreas};
use serde_json::Value;

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

// ---- chains on the transmitq -------------------------------------------------------------------------

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
        misdeed(
            "more buffers than any frame has",
            MALFORMED,
            vec![readable(at, 8); 65],
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

/// Each chain comes back with length 0, moves its counter and no other, and the frame behind it passes.
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

// ---- chains on the receiveq --------------------------------------------------------------------------

/// Rewrites the first buffer that a receiveq will use.
type Spoil = fn(&Guest<'_>, &RingAreas<'_>);

fn set_flags(ring: &RingAreas<'_>, options: &GuestOptions, change: impl FnOnce(u16) -> u16) {
    let at = if options.packed { NEXT } else { FLAGS };
    let flags = ring.descriptors.load_u16(at, Ordering::Relaxed);
    ring.descriptors
        .store_u16(at, change(flags), Ordering::Relaxed);
}

#[test]
fn a_bad_receive_buffer_comes_back_unused_and_the_frame_takes_the_next_one() {
    let scene = Scene::new();
    let sink_ram = Ram::new(split());
    let mut sink = Guest::new(&sink_ram);
    scene.attach_sink(&mut sink);
    let spoils: [(&str, Spoil); 6] = [
        ("in a hole", |guest, ring| {
            ring.descriptors
                .store_u64(0, guest.hole(), Ordering::Relaxed);
        }),
        ("ends in a hole", |guest, ring| {
            ring.descriptors
                .store_u64(0, guest.hole() - 100, Ordering::Relaxed);
        }),
        ("wraps", |_, ring| {
            ring.descriptors
                .store_u64(0, u64::MAX - 10, Ordering::Relaxed);
        }),
        ("too short for a header", |_, ring| {
            ring.descriptors.store_u32(LEN, 11, Ordering::Relaxed);
        }),
        ("empty", |_, ring| {
            ring.descriptors.store_u32(LEN, 0, Ordering::Relaxed);
        }),
        ("4 GiB", |_, ring| {
            ring.descriptors.store_u32(LEN, u32::MAX, Ordering::Relaxed);
        }),
    ];
    for options in [split(), packed()] {
        for (what, spoil) in spoils {
            bad_receive_buffer(&scene, &mut sink, options, what, |guest, ring| {
                spoil(guest, ring);
            });
        }
        bad_receive_buffer(&scene, &mut sink, options, "readable", |_, ring| {
            set_flags(ring, &options, |flags| flags & !2);
        });
        bad_receive_buffer(&scene, &mut sink, options, "a bad table", |_, ring| {
            set_flags(ring, &options, |flags| flags | DESC_INDIRECT);
            ring.descriptors.store_u32(LEN, 15, Ordering::Relaxed);
        });
    }
    bad_receive_buffer(&scene, &mut sink, split(), "a bad next", |_, ring| {
        set_flags(ring, &split(), |flags| flags | DESC_NEXT);
        ring.descriptors.store_u16(NEXT, 256, Ordering::Relaxed);
    });
    drop(sink);
    scene.finish();
}

fn bad_receive_buffer(
    scene: &Scene,
    sink: &mut Guest<'_>,
    options: GuestOptions,
    what: &str,
    spoil: impl FnOnce(&Guest<'_>, &RingAreas<'_>),
) {
    let ram = Ram::new(options);
    let mut guest = Guest::new(&ram);
    let before = scene.daemon.port(VICTIM)["statistics"]["bad_buffers"].clone();
    spoil(&guest, &guest.areas(RECEIVE));
    guest.attach(scene.victim());
    scene.wait_until_running(VICTIM);
    // Longer than one buffer: a chain is read no further than a frame needs.
    sink.send(&frame(mac(3), mac(4), 7, 3000));
    let used = guest.returned(RECEIVE);
    assert_eq!(used.len, 0, "{what}");
    // Its memory is good, whatever the ring said.
    guest.post_receive(used.token);
    assert_eq!(next(&mut guest, 4), 7, "{what}");
    scene.reaches(&mut guest, sink, 8);
    let statistics = &scene.daemon.port(VICTIM)["statistics"];
    let moved = statistics["bad_buffers"].as_u64().unwrap() - before.as_u64().unwrap();
    assert_eq!(moved, 1, "{what}");
    assert_eq!(statistics["tx"]["drops"], serde_json::json!({}), "{what}");
    guest.detach();
    wait_for("the session's end", || {
        scene.daemon.state(VICTIM).0 == "waiting"
    });
}

// ---- impossible rings --------------------------------------------------------------------------------

/// What a driver does to a ring that cannot be.
#[derive(Clone, Copy, Debug)]
enum Impossible {
    /// The available index is a ring and one ahead.
    IndexAhead,
    /// It moves back behind what was taken.
    IndexBack,
    /// An entry names a descriptor that there is not.
    Head,
    /// A packed chain without an end.
    Endless,
}

impl Impossible {
    /// Does it to a ring all of whose chains are with the driver (transmitq), or with the device (receiveq).
    fn commit(self, guest: &Guest<'_>, which: usize) {
        let ring = guest.areas(which);
        let (available, size) = (ring.available, ring.size);
        let index = available.load_u16(INDEX, Ordering::Relaxed);
        let set = |index| available.store_u16(INDEX, index, Ordering::Release);
        match self {
            Impossible::IndexAhead => set(index.wrapping_add(size + 1)),
            // What the device has taken may be all of it, and is at least a frame.
            Impossible::IndexBack => set(index.wrapping_sub(size + 1)),
            Impossible::Head => {
                for entry in 0..usize::from(size) {
                    available.store_u16(ENTRIES + 2 * entry, size, Ordering::Relaxed);
                }
                set(index.wrapping_add(u16::from(which == TRANSMIT)));
            }
            Impossible::Endless => {
                // Whatever lap it is: both are written, the one that is available has no end.
                for slot in 0..usize::from(size) {
                    let at = slot * 16 + NEXT;
                    let flags = ring.descriptors.load_u16(at, Ordering::Relaxed);
                    let next = if which == TRANSMIT {
                        // In the first lap: available, not used.
                        1 << 7 | DESC_NEXT
                    } else {
                        flags | DESC_NEXT
                    };
                    ring.descriptors.store_u16(at, next, Ordering::Release);
                }
            }
        }
        guest.kick(which);
    }

    fn words(self) -> &'static str {
        match self {
            Impossible::IndexAhead | Impossible::IndexBack => "available index is",
            Impossible::Head => "available entry names descriptor 256 in a ring of 256",
            Impossible::Endless => "a chain has no end in a ring of 256",
        }
    }
}

/// How a ring is started anew.
#[derive(Clone, Copy, Debug)]
enum Cure {
    /// The driver resets its device: GET_VRING_BASE, and everything again.
    Reset,
    /// RESET_DEVICE.
    ResetDevice,
    Reconnect,
}

fn cure<'m>(guest: &mut Guest<'m>, ram: &'m Ram, cure: Cure, socket: &std::path::Path) {
    use vhost::vhost_user::message::FrontendReq;
    let mut frontend = guest.frontend.take().unwrap();
    match cure {
        Cure::Reset => drop(frontend.stop(&[0, 1]).unwrap()),
        Cure::ResetDevice => {
            let protocol = frontend.get_protocol_features().unwrap();
            frontend.set_protocol_features(protocol).unwrap();
            frontend.tell(FrontendReq::RESET_DEVICE, &[], &[]).unwrap();
        }
        Cure::Reconnect => {
            guest.frontend = Some(frontend);
            guest.detach();
            *guest = Guest::new(ram);
            return guest.attach(socket);
        }
    }
    // The driver begins anew in the same memory.
    *guest = Guest::new(ram);
    guest.start(&mut frontend).unwrap();
    guest.frontend = Some(frontend);
}

fn broken_reason(port: &Value, ring: usize) -> Option<String> {
    let reason = &port["session"]["rings"][ring]["broken_reason"];
    reason.as_str().map(str::to_string)
}

/// Breaks a ring, checks what is said of it and what still works, and heals it.
fn breaks_and_heals(options: GuestOptions, which: usize, how: Impossible, by: Cure) {
    let what = format!("{how:?} on ring {which}, then {by:?}");
    println!("{what}");
    let scene = Scene::new();
    let rams = [Ram::new(split()), Ram::new(options)];
    let (mut sink, mut guest) = (Guest::new(&rams[0]), Guest::new(&rams[1]));
    scene.attach_sink(&mut sink);
    scene.attach_victim(&mut guest, &mut sink);
    let events = Events::of(&scene.daemon);
    wait_for("the transmit buffers", || guest.in_flight() == 0);
    how.commit(&guest, which);
    if which == RECEIVE {
        // It is looked at when a frame comes. Flooded frames count nowhere, so the first one may pass.
        sink.send(&frame(mac(3), mac(4), 1, 100));
    }
    wait_for("the port to be broken", || {
        scene.daemon.state(VICTIM).0 == "broken"
    });
    let (_, reason) = scene.daemon.state(VICTIM);
    let ring = ["receiveq 0", "transmitq 0"][which];
    assert!(
        reason.starts_with(&format!("ring broken: {ring}: ")),
        "{what}: {reason}"
    );
    assert!(reason.contains(how.words()), "{what}: {reason}");
    let port = scene.daemon.port(VICTIM);
    assert!(
        broken_reason(&port, which).unwrap().contains(how.words()),
        "{port}"
    );
    assert_eq!(broken_reason(&port, 1 - which), None, "{port}");
    let shown = scene.daemon.try_pollux(&["port", "show", VICTIM]).1;
    assert!(
        shown.contains("ring broken") && shown.contains(ring),
        "{shown}"
    );
    // Whatever it does with that ring now, the other one goes on.
    if which == TRANSMIT {
        scene.reaches(&mut guest, &mut sink, 2);
    } else {
        scene.passes(&mut guest, &mut sink, 2);
        let before = scene.daemon.dropped(VICTIM, "tx", "egress_ring_broken");
        sink.send(&frame(mac(3), mac(4), 3, 100));
        wait_for("the drop", || {
            scene.daemon.dropped(VICTIM, "tx", "egress_ring_broken") == before + 1
        });
    }
    events.wait(VICTIM, "ring_broken");
    cure(&mut guest, &rams[1], by, scene.victim());
    scene.wait_until_running(VICTIM);
    scene.passes(&mut guest, &mut sink, 10);
    scene.reaches(&mut guest, &mut sink, 11);
    let told = events.messages(VICTIM, "ring_broken");
    assert_eq!(told.len(), 1, "{what}: {told:?}");
    assert_eq!(scene.daemon.log().matches(&told[0]).count(), 1, "{what}");
    drop((sink, guest));
    scene.finish();
}

#[test]
fn an_impossible_available_index_breaks_the_transmitq_until_the_driver_resets() {
    breaks_and_heals(split(), TRANSMIT, Impossible::IndexAhead, Cure::Reset);
}

#[test]
fn an_available_index_that_moves_back_breaks_the_transmitq_until_the_device_is_reset() {
    breaks_and_heals(split(), TRANSMIT, Impossible::IndexBack, Cure::ResetDevice);
}

#[test]
fn an_impossible_head_breaks_the_transmitq_until_the_frontend_reconnects() {
    breaks_and_heals(split(), TRANSMIT, Impossible::Head, Cure::Reconnect);
}

#[test]
fn an_endless_chain_breaks_a_packed_transmitq_until_the_driver_resets() {
    breaks_and_heals(packed(), TRANSMIT, Impossible::Endless, Cure::Reset);
}

#[test]
fn an_impossible_available_index_breaks_the_receiveq_until_the_driver_resets() {
    breaks_and_heals(split(), RECEIVE, Impossible::IndexAhead, Cure::Reset);
}

#[test]
fn an_available_index_that_moves_back_breaks_the_receiveq_until_the_device_is_reset() {
    breaks_and_heals(split(), RECEIVE, Impossible::IndexBack, Cure::ResetDevice);
}

#[test]
fn an_impossible_head_breaks_the_receiveq_until_the_frontend_reconnects() {
    breaks_and_heals(split(), RECEIVE, Impossible::Head, Cure::Reconnect);
}

#[test]
fn an_endless_chain_breaks_a_packed_receiveq_until_the_driver_resets() {
    breaks_and_heals(packed(), RECEIVE, Impossible::Endless, Cure::Reset);
}
