//! Buffers in two regions, and receive rings with too little room for a frame.

use crate::common::guest::{Guest, GuestOptions, RECEIVE, Ram};
use crate::common::scene::{SINK, Scene, VICTIM, next};
use crate::common::traffic::{frame, mac};
use crate::common::wait_for;
use crate::{counters, packed, split};
use pollux::bench::frontend::Region;

/// A guest attached with its memory in three regions, which meet inside its first transmit buffer
/// and its second receive buffer.
fn attach_in_regions(guest: &mut Guest<'_>, scene: &Scene) {
    let whole = guest.region();
    let memory = guest.memory().address() as u64;
    let offset = |address: u64, into: u64| (address + into).next_multiple_of(4096) - memory;
    let transmit = guest.transmit_memory(0).address() as u64;
    let receive = guest.receive_memory(1).address() as u64;
    let mut cuts = [0, offset(receive, 1), offset(transmit, 1), whole.len];
    cuts.sort_unstable();
    let regions: Vec<Region> = cuts
        .windows(2)
        .map(|cut| Region {
            guest_address: whole.guest_address + cut[0],
            len: cut[1] - cut[0],
            user_address: whole.user_address + cut[0],
            offset: cut[0],
            ..whole
        })
        .collect();
    assert!(
        offset(receive, 1) < receive - memory + 2000,
        "a receive buffer is cut"
    );
    assert!(
        offset(transmit, 1) < transmit - memory + 4000,
        "a transmit buffer is cut"
    );
    let mut frontend = guest.negotiate(scene.victim()).unwrap();
    let queues = [0, 1].map(|which| guest.queue(which));
    frontend.start(guest.order(), &regions, &queues).unwrap();
    guest.frontend = Some(frontend);
}

#[test]
fn frames_pass_through_buffers_that_lie_in_two_regions() {
    let scene = Scene::new();
    let options = GuestOptions {
        receive_len: 3000,
        ..split()
    };
    let sink_ram = Ram::new(options);
    let mut sink = Guest::new(&sink_ram);
    scene.attach_sink(&mut sink);
    for packed in [false, true] {
        let ram = Ram::new(GuestOptions { packed, ..options });
        let mut guest = Guest::new(&ram);
        attach_in_regions(&mut guest, &scene);
        scene.wait_until_running(VICTIM);
        // `next` looks at every byte. The first transmit buffer is cut, and the second receive
        // buffer.
        guest.send(&frame(mac(4), mac(3), 1, 4000));
        assert_eq!(next(&mut sink, 3), 1);
        for number in 2..5 {
            sink.send(&frame(mac(3), mac(4), number, 2900));
            assert_eq!(next(&mut guest, 4), number);
        }
        assert_eq!(counters(&scene, VICTIM), []);
        guest.detach();
        wait_for("the session's end", || {
            scene.daemon.state(VICTIM).0 == "waiting"
        });
    }
    assert_eq!(counters(&scene, SINK), []);
    drop(sink);
    scene.finish();
}

/// A guest with four short receive buffers, all posted.
fn small(options: GuestOptions) -> GuestOptions {
    GuestOptions {
        entries: 4,
        receive_len: 256,
        ..options
    }
}

#[test]
fn a_frame_for_more_buffers_than_the_ring_has_is_egress_too_long_and_the_next_one_arrives() {
    for options in [split(), packed()] {
        let scene = Scene::new();
        let rams = [Ram::new(split()), Ram::new(small(options))];
        let (mut sink, mut guest) = (Guest::new(&rams[0]), Guest::new(&rams[1]));
        scene.attach_sink(&mut sink);
        scene.attach_victim(&mut guest, &mut sink);
        for turn in 0..3 {
            // Header and frame take four buffers and a byte of a fifth, then four buffers.
            sink.send(&frame(mac(3), mac(4), 1, 4 * 256 - 12 + 1));
            wait_for("the drop", || {
                scene.daemon.dropped(VICTIM, "tx", "egress_too_long") == turn + 1
            });
            sink.send(&frame(mac(3), mac(4), 2, 4 * 256 - 12));
            assert_eq!(next(&mut guest, 4), 2);
        }
        let expected = [("egress_too_long".to_string(), 3)];
        assert_eq!(counters(&scene, VICTIM), expected);
        drop((sink, guest));
        scene.finish();
    }
}

#[test]
fn a_frame_for_more_buffers_than_are_posted_is_egress_ring_full_and_nothing_of_it_is_seen() {
    for options in [split(), packed()] {
        let scene = Scene::new();
        let rams = [Ram::new(split()), Ram::new(small(options))];
        let (mut sink, mut guest) = (Guest::new(&rams[0]), Guest::new(&rams[1]));
        scene.attach_sink(&mut sink);
        scene.attach_victim(&mut guest, &mut sink);
        for turn in 0..3 {
            // One of the four is used, and the driver does not post it again.
            sink.send(&frame(mac(3), mac(4), 1, 100));
            let used = guest.returned(RECEIVE);
            sink.send(&frame(mac(3), mac(4), 2, 4 * 256 - 12));
            wait_for("the drop", || {
                scene.daemon.dropped(VICTIM, "tx", "egress_ring_full") == turn + 1
            });
            // The three others hold the next frame, from their first byte on.
            sink.send(&frame(mac(3), mac(4), 3, 3 * 256 - 12));
            guest.post_receive(used.token);
            assert_eq!(next(&mut guest, 4), 3);
        }
        let expected = [("egress_ring_full".to_string(), 3)];
        assert_eq!(counters(&scene, VICTIM), expected);
        drop((sink, guest));
        scene.finish();
    }
}
