//! Races with the guest, and with its frontend.

use std::time::Instant;

use super::*;
use crate::common::traffic::{Mac, read};

/// Frames of the victim that a guest has received: those to its own address, and others.
fn judged(guest: &mut Guest<'_>, own: Mac) -> (u64, u64) {
    let (mut right, mut wrong) = (0, 0);
    while let Some(bytes) = guest.try_receive() {
        match read(&bytes) {
            label if label.from != mac(3) => {}
            label if label.to == own => right += 1,
            _ => wrong += 1,
        }
    }
    (right, wrong)
}

#[test]
fn a_frame_is_delivered_as_it_was_judged() {
    scene_of(5, |scene, sink| {
        let other_ram = Ram::new(GuestOptions::default());
        let mut other = Guest::new(&other_ram);
        other.attach(&scene.daemon.sockets()[4]);
        scene.wait_until_running("p4");
        other.send(&frame(mac(4), mac(5), 1, 100));
        wait_for("the other's address", || sink.try_receive().is_some());
        let ram = Ram::new(GuestOptions::default());
        let mut guest = Guest::new(&ram);
        scene.attach_victim(&mut guest, sink);
        // The sink's address is known from here on.
        scene.reaches(&mut guest, sink, 1);
        while other.try_receive().is_some() {}
        let stop = AtomicBool::new(false);
        let wrong = std::thread::scope(|scope| {
            let stop = &stop;
            // The last byte of the destination: the sink's address, and the other's.
            let places: Vec<_> = (0..256).map(|token| guest.transmit_memory(token)).collect();
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for to in [mac(5), mac(4)] {
                        places
                            .iter()
                            .for_each(|place| place.write_bytes(12 + 5, &to[5..]));
                    }
                }
            });
            let (mut right, mut wrong) = (0, 0);
            let deadline = Instant::now() + LIMIT;
            while right < 2_000 && Instant::now() < deadline {
                guest.try_send(&frame(mac(4), mac(3), 1, 100));
                for (good, bad) in [judged(sink, mac(4)), judged(&mut other, mac(5))] {
                    (right, wrong) = (right + good, wrong + bad);
                }
            }
            stop.store(true, Ordering::Relaxed);
            assert!(right > 100, "{right}");
            wrong
        });
        assert_eq!(wrong, 0, "frames went where they were not addressed to");
        guest.detach();
        last_end(scene);
        while sink.try_receive().is_some() {}
        other.detach();
        wait_for("the other's end", || {
            scene.daemon.state("p4").0 == "waiting"
        });
    });
}

#[test]
fn notification_words_that_flip_stall_nobody() {
    for options in kinds() {
        with_victim(options, |scene, guest, sink| {
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let stop = &stop;
                let words = [RECEIVE, TRANSMIT].map(|which| {
                    let available = guest.areas(which).available;
                    // Flags and used_event of a split ring; both words of a packed one.
                    let event = if options.packed {
                        2
                    } else {
                        available.len() - 2
                    };
                    (available, event)
                });
                scope.spawn(move || {
                    let mut value = 1_u16;
                    while !stop.load(Ordering::Relaxed) {
                        for (available, event) in words {
                            available.store_u16(0, value & 3, Ordering::Relaxed);
                            available.store_u16(event, value, Ordering::Relaxed);
                        }
                        value = value.wrapping_mul(25_173).wrapping_add(13_849);
                    }
                });
                for number in 0..300 {
                    scene.passes(guest, sink, number);
                    scene.reaches(guest, sink, number);
                }
                stop.store(true, Ordering::Relaxed);
            });
        });
    }
}

/// Ways to stop rings in the middle of a burst; when they are answered, guest memory is the guest's
/// alone.
#[derive(Clone, Copy, Debug)]
enum StopBy {
    GetVringBase,
    DisableFirst,
    ResetDevice,
}

fn stop_rings(frontend: &Frontend, how: StopBy) {
    match how {
        StopBy::GetVringBase => {
            frontend.get_vring_base(0).unwrap();
            frontend.get_vring_base(1).unwrap();
        }
        StopBy::DisableFirst => drop(frontend.stop(&[0, 1]).unwrap()),
        StopBy::ResetDevice => frontend.tell(FrontendReq::RESET_DEVICE, &[], &[]).unwrap(),
    }
}

#[test]
fn nothing_is_written_to_a_guest_whose_rings_are_stopped() {
    for options in kinds() {
        for how in [
            StopBy::GetVringBase,
            StopBy::DisableFirst,
            StopBy::ResetDevice,
        ] {
            with_victim(options, |scene, guest, sink| {
                let mut frontend = guest.frontend.take().unwrap();
                let protocol = frontend.get_protocol_features().unwrap();
                frontend.set_protocol_features(protocol).unwrap();
                let stop = AtomicBool::new(false);
                let region = guest.memory();
                std::thread::scope(|scope| {
                    let (stop, sink) = (&stop, &mut *sink);
                    scope.spawn(move || {
                        let mut number = 0;
                        while !stop.load(Ordering::Relaxed) {
                            number += u64::from(sink.try_send(&frame(mac(3), mac(4), number, 300)));
                            while sink.try_receive().is_some() {}
                        }
                    });
                    wait_for("frames at the victim", || {
                        guest.try_send(&frame(mac(4), mac(3), 1, 100));
                        guest.try_receive().is_some()
                    });
                    stop_rings(&frontend, how);
                    let copy = || {
                        let mut bytes = vec![0; region.len()];
                        region.read_bytes(0, &mut bytes);
                        bytes
                    };
                    let stopped = copy();
                    scene.bystanders.go_on(200);
                    assert!(stopped == copy(), "packed: {}, {how:?}", options.packed);
                    stop.store(true, Ordering::Relaxed);
                });
                guest.frontend = Some(frontend);
            });
        }
    }
}
