//! Rings that cannot be, and what heals them.

use std::sync::atomic::Ordering;

use pollux::virtio::driver::DESC_NEXT;
use serde_json::Value;

use crate::common::events::Events;
use crate::common::guest::{Guest, GuestOptions, RECEIVE, Ram, TRANSMIT};
use crate::common::scene::{Scene, VICTIM};
use crate::common::traffic::{frame, mac};
use crate::common::wait_for;
use crate::{ENTRIES, INDEX, NEXT, packed, split};

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
    /// Does it to a ring all of whose chains are with the driver (transmitq), or with the device
    /// (receiveq).
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
            Impossible::Endless => "a chain has no end within 256 descriptors",
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

fn cure<'m>(scene: &Scene, guest: &mut Guest<'m>, ram: &'m Ram, cure: Cure) {
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
            // Until the switch has let go of the rings it may write to them.
            wait_for("the session's end", || {
                scene.daemon.state(VICTIM).0 == "waiting"
            });
            scene.daemon.settle();
            *guest = Guest::new(ram);
            return guest.attach(scene.victim());
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
    let records = scene.daemon.records();
    assert_eq!(records.len(), if options.packed { 2 } else { 0 });
    let events = Events::of(&scene.daemon);
    wait_for("the transmit buffers", || guest.in_flight() == 0);
    how.commit(&guest, which);
    if which == RECEIVE {
        // It is looked at when a frame comes. Flooded frames count nowhere, so the first one may
        // pass.
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
    cure(&scene, &mut guest, &rams[1], by);
    scene.wait_until_running(VICTIM);
    scene.passes(&mut guest, &mut sink, 10);
    scene.reaches(&mut guest, &mut sink, 11);
    let told = events.messages(VICTIM, "ring_broken");
    assert_eq!(told.len(), 1, "{what}: {told:?}");
    scene.daemon.assert_logged(&told[0]);
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
fn an_endless_chain_breaks_a_packed_transmitq_until_the_device_is_reset() {
    breaks_and_heals(packed(), TRANSMIT, Impossible::Endless, Cure::ResetDevice);
}

#[test]
fn an_endless_chain_breaks_a_packed_transmitq_until_the_frontend_reconnects() {
    breaks_and_heals(packed(), TRANSMIT, Impossible::Endless, Cure::Reconnect);
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

#[test]
fn an_endless_chain_breaks_a_packed_receiveq_until_the_device_is_reset() {
    breaks_and_heals(packed(), RECEIVE, Impossible::Endless, Cure::ResetDevice);
}

#[test]
fn an_endless_chain_breaks_a_packed_receiveq_until_the_frontend_reconnects() {
    breaks_and_heals(packed(), RECEIVE, Impossible::Endless, Cure::Reconnect);
}
