//! Rings that are set up in odd ways.

use super::*;

#[test]
fn a_driver_that_wants_more_queues_than_there_are_keeps_those_that_it_has() {
    with_victim(GuestOptions::default(), |scene, guest, sink| {
        let frontend = guest.frontend.as_ref().unwrap();
        let queue = guest.queue(RECEIVE);
        frontend.set_vring_num(2, 256).unwrap();
        frontend
            .set_vring_addr(&pollux::bench::frontend::Queue { index: 2, ..queue })
            .unwrap();
        frontend.set_vring_kick(2, &guest.kicks[RECEIVE]).unwrap();
        wait_for("the event", || {
            scene
                .daemon
                .log()
                .contains("receiveq 1 not started: more queue pairs")
        });
        // Beyond the rings that exist at all, it is told so.
        assert!(frontend.set_vring_num(7, 256).is_err());
        scene.passes(guest, sink, 1);
        scene.reaches(guest, sink, 2);
    });
}

#[test]
fn a_device_with_one_ring_is_served_in_one_direction() {
    for options in kinds() {
        scene(|scene, sink| {
            for which in [RECEIVE, TRANSMIT] {
                let ram = Ram::new(options);
                let mut guest = Guest::new(&ram);
                let mut frontend = guest.negotiate(scene.victim()).unwrap();
                frontend.set_features(frontend.features()).unwrap();
                frontend.set_mem_table(&[guest.region()]).unwrap();
                guest.start_ring(&frontend, which).unwrap();
                guest.frontend = Some(frontend);
                scene.daemon.settle();
                for number in 0..100 {
                    if which == TRANSMIT {
                        scene.passes(&mut guest, sink, number);
                    } else {
                        scene.reaches(&mut guest, sink, number);
                    }
                }
                guest.detach();
                last_end(scene);
            }
        });
    }
}

#[test]
fn both_rings_in_one_place_harm_nobody() {
    for options in kinds() {
        scene(|scene, sink| {
            let ram = Ram::new(options);
            let mut guest = Guest::new(&ram);
            let mut frontend = guest.negotiate(scene.victim()).unwrap();
            frontend.set_features(frontend.features()).unwrap();
            frontend.set_mem_table(&[guest.region()]).unwrap();
            let transmit = guest.queue(TRANSMIT);
            for queue in [guest.queue(RECEIVE), guest.queue(TRANSMIT)] {
                // The receive ring where the transmit ring is, and its used ring twice.
                let queue = pollux::bench::frontend::Queue {
                    descriptors: transmit.descriptors,
                    available: transmit.available,
                    used: transmit.used,
                    ..queue
                };
                frontend.set_vring_num(queue.index, 256).unwrap();
                frontend.set_vring_base(queue.index, queue.base).unwrap();
                frontend.set_vring_addr(&queue).unwrap();
                frontend.set_vring_kick(queue.index, queue.kick).unwrap();
                frontend.set_vring_enable(queue.index, true).unwrap();
            }
            guest.frontend = Some(frontend);
            for number in 0..300 {
                // What comes of it is the guest's own affair; it looks at nothing of what comes
                // back.
                if number < 100 {
                    guest.send_blindly(&frame(mac(4), mac(3), number, 100), &[]);
                }
                sink.try_send(&frame(mac(3), mac(4), number, 100));
                while sink.try_receive().is_some() {}
            }
            scene.bystanders.go_on(200);
            guest.detach();
            last_end(scene);
            while sink.try_receive().is_some() {}
        });
    }
}

#[test]
fn frames_in_a_transmitq_that_is_disabled_are_taken_and_go_nowhere() {
    for options in kinds() {
        with_victim(options, |scene, guest, sink| {
            for number in 0..3 {
                let frontend = guest.frontend.take().unwrap();
                frontend.set_vring_enable(TRANSMIT as u32, false).unwrap();
                scene.daemon.settle();
                for discarded in 0..100 {
                    guest.send(&frame(mac(4), mac(3), 1 << 40 | discarded, 100));
                }
                wait_for("the buffers", || guest.in_flight() == 0);
                // The other direction goes on.
                scene.reaches(guest, sink, number);
                frontend.set_vring_enable(TRANSMIT as u32, true).unwrap();
                guest.frontend = Some(frontend);
                scene.daemon.settle();
                // Nothing of what was discarded comes before this one.
                scene.passes(guest, sink, number);
            }
        });
    }
}
