//! Every start of a ring calls its driver once: it may be asleep on work that was finished before.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, RECEIVE, Ram, TRANSMIT};
use common::traffic::{Exchange, frame, mac};
use common::wait_for;
use pollux::bench::frontend::{Order, Region};
use pollux::memory::SharedMemory;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const RINGS: [usize; 2] = [RECEIVE, TRANSMIT];

/// Calls of a ring since the last look.
fn calls(guest: &Guest<'_>, which: usize) -> u64 {
    guest.calls[which].read().unwrap_or(0)
}

/// Waits until both rings were called, and no more than `most` times each.
fn assert_called(daemon: &Daemon, guest: &Guest<'_>, most: u64, what: &str) {
    let mut sums = [0; 2];
    wait_for(&format!("the calls after {what}"), || {
        for which in RINGS {
            sums[which] += calls(guest, which);
        }
        sums.iter().all(|sum| *sum > 0)
    });
    // Once poll threads use the newest descriptors, a session makes the last calls before it
    // answers anything else.
    daemon.settle();
    guest.frontend.as_ref().unwrap().get_features().unwrap();
    for which in RINGS {
        sums[which] += calls(guest, which);
        assert!(
            sums[which] <= most,
            "{} calls of ring {which} after {what}",
            sums[which]
        );
    }
}

/// Each way in which rings start, for one kind of guest; it wants no calls otherwise.
fn every_start_calls(options: GuestOptions) {
    let daemon = Daemon::start(&DaemonOptions {
        ports: 2,
        ..DaemonOptions::default()
    });
    let rams = [Ram::new(options), Ram::new(GuestOptions::default())];
    let (mut guest, mut other) = (Guest::new(&rams[0]), Guest::new(&rams[1]));
    other.attach(&daemon.sockets()[1]);
    guest.attach(&daemon.sockets()[0]);
    // QEMU's order has the call descriptor set twice, and a new descriptor is called, too.
    let most = if options.order == Order::Qemu { 2 } else { 1 };
    assert_called(&daemon, &guest, most, "an attachment");

    for turn in 0..3 {
        let mut frontend = guest.frontend.take().unwrap();
        frontend.stop(&[0, 1]).unwrap();
        guest.start(&mut frontend).unwrap();
        guest.frontend = Some(frontend);
        assert_called(&daemon, &guest, most, &format!("restart {turn}"));
    }

    guest.detach();
    guest.attach(&daemon.sockets()[0]);
    assert_called(&daemon, &guest, most, "a reconnection");

    // Another region: all rings move over to a new map.
    let more = SharedMemory::create(4096, true).unwrap();
    let regions = [guest.region(), Region::whole(&more, 1 << 40)];
    let frontend = guest.frontend.as_ref().unwrap();
    frontend.set_mem_table(&regions).unwrap();
    assert_called(&daemon, &guest, 1, "new memory");

    for which in RINGS {
        guest.calls[which] = EventFd::new(EFD_NONBLOCK).unwrap();
        let frontend = guest.frontend.as_ref().unwrap();
        frontend
            .set_vring_call(which as u32, &guest.calls[which])
            .unwrap();
    }
    assert_called(&daemon, &guest, 1, "new call descriptors");

    // Nothing else calls a driver that wants no calls: not frames, and no change of another port.
    let mut exchange = Exchange::new(vec![guest, other], 1, &[(0, 1), (1, 0)], 8, 100);
    exchange.meet();
    exchange.exchange(200);
    exchange.drain();
    exchange.guests[1].detach();
    daemon.settle();
    assert_eq!(RINGS.map(|which| calls(&exchange.guests[0], which)), [0, 0]);
    drop(exchange);
    daemon.stop();
}

#[test]
fn every_start_of_a_split_ring_calls_its_driver_once() {
    every_start_calls(GuestOptions::default());
}

#[test]
fn every_start_of_a_packed_ring_calls_its_driver_once() {
    every_start_calls(GuestOptions {
        packed: true,
        order: Order::CloudHypervisor,
        ..GuestOptions::default()
    });
}

#[test]
fn rings_are_called_when_their_daemon_comes_back() {
    let options = DaemonOptions {
        ports: 1,
        ..DaemonOptions::default()
    };
    let mut daemon = Daemon::start(&options);
    let ram = Ram::new(GuestOptions::cloud_hypervisor());
    let mut guest = Guest::new(&ram);
    guest.attach(&daemon.sockets()[0]);
    assert_called(&daemon, &guest, 1, "the first start");
    guest.send(&frame(mac(1), mac(2), 1, 64));
    daemon = Daemon::start_in(daemon.kill(), &options);
    for which in RINGS {
        calls(&guest, which);
    }
    guest.detach();
    guest.attach(&daemon.sockets()[0]);
    assert_called(&daemon, &guest, 1, "the second start");
    wait_for("the buffer", || guest.in_flight() == 0);
    drop(guest);
    daemon.stop();
}

#[test]
fn a_sleeping_poll_thread_looks_at_a_ring_whose_kick_is_taken_away() {
    let daemon = Daemon::start(&DaemonOptions {
        ports: 2,
        ..DaemonOptions::default()
    });
    let rams = [(); 2].map(|()| Ram::new(GuestOptions::default()));
    let (mut guest, mut other) = (Guest::new(&rams[0]), Guest::new(&rams[1]));
    guest.attach(&daemon.sockets()[0]);
    other.attach(&daemon.sockets()[1]);
    let asleep = || {
        let threads = daemon.poll_threads();
        let mut threads = threads.as_array().unwrap().iter();
        threads.all(|thread| thread["state"] == "asleep")
    };
    wait_for("the poll thread to sleep", asleep);
    // Bit 8: there is no descriptor, the ring is to be polled from now on.
    let none = (TRANSMIT as u64 | 1 << 8).to_le_bytes();
    let frontend = guest.frontend.as_ref().unwrap();
    frontend
        .tell(FrontendReq::SET_VRING_KICK, &none, &[])
        .unwrap();
    daemon.settle();
    guest.send(&frame(mac(2), mac(1), 7, 100));
    wait_for("the frame", || other.try_receive().is_some());
    daemon.stop();
}
