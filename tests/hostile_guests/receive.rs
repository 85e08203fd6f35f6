//! Chains on a receiveq that no frame may use.

use std::sync::atomic::Ordering;

use pollux::virtio::driver::{DESC_INDIRECT, DESC_NEXT, RingAreas};

use crate::common::guest::{Guest, GuestOptions, RECEIVE, Ram};
use crate::common::scene::{Scene, VICTIM, next};
use crate::common::traffic::{frame, mac};
use crate::common::wait_for;
use crate::{FLAGS, LEN, NEXT, packed, split};

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
        for (what, len) in [
            ("a table without an entry", 0),
            ("a part of an entry", 15),
            ("an entry and a byte", 17),
            ("1025 entries", 16 * 1025),
            ("a table of 4 GiB", 0xffff_fff0),
        ] {
            bad_receive_buffer(&scene, &mut sink, options, what, |_, ring| {
                set_flags(ring, &options, |flags| flags | DESC_INDIRECT);
                ring.descriptors.store_u32(LEN, len, Ordering::Relaxed);
            });
        }
        let what = "a table in a table";
        bad_receive_buffer(&scene, &mut sink, options, what, |guest, ring| {
            set_flags(ring, &options, |flags| flags | DESC_INDIRECT);
            ring.descriptors.store_u32(LEN, 16, Ordering::Relaxed);
            let (inner, at) = (guest.transmit_buffer(1).0, guest.transmit_buffer(0).0);
            ring.descriptors.store_u64(0, at, Ordering::Relaxed);
            let table = guest.transmit_memory(0);
            table.store_u64(0, inner, Ordering::Relaxed);
            table.store_u32(LEN, 16, Ordering::Relaxed);
            let flags = if options.packed { NEXT } else { FLAGS };
            table.store_u16(flags, DESC_INDIRECT | 2, Ordering::Relaxed);
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
