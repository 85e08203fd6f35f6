//! Frames that wait in a ring while the switch is away, or while its frontend talks, are not lost.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

mod common;

use common::daemon::{Daemon, DaemonOptions};
use common::guest::{Guest, GuestOptions, RECEIVE, Ram, TRANSMIT};
use common::scene::next;
use common::traffic::{Exchange, attach, frame, mac};
use common::wait_for;
use pollux::bench::frontend::{Frontend, Order, Queue, Region};
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::EventFd;

const RINGS: [usize; 2] = [RECEIVE, TRANSMIT];

/// Attaches as DPDK's virtio-user in server mode does. `started` is called between the last kick
/// and the first enable.
fn attach_as_virtio_user(guest: &mut Guest<'_>, daemon: &Daemon, started: impl FnOnce()) {
    let mut frontend = guest.negotiate(&daemon.sockets()[0]).unwrap();
    for which in RINGS {
        frontend.set_vring_enable(which as u32, false).unwrap();
        frontend.get_vring_base(which as u32).unwrap();
    }
    frontend.set_features(frontend.features()).unwrap();
    frontend.set_mem_table(&[guest.region()]).unwrap();
    for queue in RINGS.map(|which| guest.queue(which)) {
        let size = u32::from(queue.size);
        frontend.set_vring_call(queue.index, queue.call).unwrap();
        frontend.set_vring_num(queue.index, size).unwrap();
        frontend.set_vring_base(queue.index, 0).unwrap();
        frontend.set_vring_addr(&queue).unwrap();
        frontend.set_vring_kick(queue.index, queue.kick).unwrap();
    }
    started();
    for which in RINGS {
        frontend.set_vring_enable(which as u32, true).unwrap();
    }
    guest.frontend = Some(frontend);
}

#[test]
fn frames_wait_for_a_frontend_that_disables_its_rings_first() {
    let daemon = Daemon::start(&DaemonOptions {
        ports: 2,
        ..DaemonOptions::default()
    });
    let ram = Ram::new(GuestOptions::default());
    let mut sink = Guest::new(&ram);
    sink.attach(&daemon.sockets()[1]);
    for round in 0..20 {
        let ram = Ram::new(GuestOptions::default());
        let mut guest = Guest::new(&ram);
        for number in 0..8 {
            guest.send(&frame(mac(2), mac(1), 8 * round + number, 100));
        }
        attach_as_virtio_user(&mut guest, &daemon, || {
            // In every second round poll threads have seen the started ring before it is enabled.
            if round % 2 == 0 {
                daemon.settle();
            }
        });
        for number in 0..8 {
            assert_eq!(next(&mut sink, 1), 8 * round + number);
        }
        wait_for("the buffers", || guest.in_flight() == 0);
        guest.detach();
        wait_for("the end of the session", || {
            daemon.state("p0").0 == "waiting"
        });
    }
    assert_eq!(daemon.drops("p0"), []);
    daemon.stop();
}

/// A frontend on a thread of its own, and what it has told its device already.
struct Again {
    frontend: Frontend,
    region: Region,
    /// Index, size, and the user addresses of descriptors, available and used.
    rings: [(u32, u16, [u64; 3]); 2],
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
}

impl Again {
    fn of(guest: &mut Guest<'_>) -> Again {
        let rings = RINGS.map(|which| {
            let ring = guest.queue(which);
            let places = [ring.descriptors, ring.available, ring.used];
            (ring.index, ring.size, places)
        });
        let copy = |event: &EventFd| event.try_clone().unwrap();
        Again {
            rings,
            region: guest.region(),
            kicks: guest.kicks.each_ref().map(copy),
            calls: guest.calls.each_ref().map(copy),
            frontend: guest.frontend.take().unwrap(),
        }
    }

    /// Says one of those things again.
    fn say(&mut self, turn: usize) -> &'static str {
        let which = turn % 2;
        let (index, size, [descriptors, available, used]) = self.rings[which];
        let queue = Queue {
            index,
            size,
            descriptors,
            available,
            used,
            base: 0,
            kick: &self.kicks[which],
            call: &self.calls[which],
        };
        let frontend = &mut self.frontend;
        let (name, said) = match turn / 2 % MESSAGES {
            0 => ("ENABLE 1", frontend.set_vring_enable(index, true)),
            1 => ("CALL", frontend.set_vring_call(index, queue.call)),
            2 => ("KICK", frontend.set_vring_kick(index, queue.kick)),
            3 => ("ERR", frontend.set_vring_err(index, queue.call)),
            4 => ("NUM", frontend.set_vring_num(index, size.into())),
            5 => ("ADDR", frontend.set_vring_addr(&queue)),
            6 => ("MEM_TABLE", frontend.set_mem_table(&[self.region])),
            7 => ("FEATURES", frontend.set_features(frontend.features())),
            8 => ("OWNER", frontend.set_owner()),
            9 => (
                "RESET_OWNER",
                frontend.tell(FrontendReq::RESET_OWNER, &[], &[]),
            ),
            _ => ("GET_FEATURES", frontend.get_features().map(drop)),
        };
        said.unwrap_or_else(|error| panic!("{name}: {error}"));
        name
    }
}

/// Different messages of [`Again::say`].
const MESSAGES: usize = 11;

fn messages_that_change_nothing(options: GuestOptions) {
    let daemon = Daemon::start(&DaemonOptions {
        ports: 2,
        ..DaemonOptions::default()
    });
    let rams = [(); 2].map(|()| Ram::new(options));
    let guests = attach(&daemon, &rams, 0);
    let mut exchange = Exchange::new(guests, 1, &[(0, 1), (1, 0)], 32, 200);
    exchange.meet();
    let mut again = Again::of(&mut exchange.guests[0]);
    let talk = std::thread::spawn(move || {
        let mut said: Vec<_> = (0..100 * MESSAGES).map(|turn| again.say(turn)).collect();
        said.sort_unstable();
        said.dedup();
        (said.len(), again)
    });
    // Frames are on their way in both directions all the time.
    while !talk.is_finished() {
        exchange.exchange(64);
    }
    let (said, again) = talk.join().unwrap();
    assert_eq!(said, MESSAGES);
    exchange.guests[0].frontend = Some(again.frontend);
    exchange.exchange(64);
    exchange.drain();
    for port in ["p0", "p1"] {
        let drops = daemon.drops(port);
        let drops: Vec<_> = drops.iter().filter(|(_, count)| *count > 0).collect();
        assert!(drops.is_empty(), "{port}: {drops:?}");
    }
    drop(exchange);
    daemon.stop();
}

#[test]
fn messages_that_change_nothing_cost_no_frame() {
    messages_that_change_nothing(GuestOptions::default());
}

#[test]
fn messages_that_change_nothing_cost_no_frame_in_packed_rings() {
    messages_that_change_nothing(GuestOptions {
        packed: true,
        order: Order::CloudHypervisor,
        ..GuestOptions::default()
    });
}
