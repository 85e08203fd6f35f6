//! One poll thread, views of the switch published by hand, and a slot that changes its tenant
//! between them.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

#[path = "support/guest.rs"]
mod guest;
mod packed_reference;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use guest::{DATA, Driver, Guest, HEADER, features, readable, writable};
use pollux::config::IdlePolicy;
use pollux::poll::{PollShared, Poller};
use pollux::port::{Device, PortShared, QueuePair, Receive, Transmit};
use pollux::switch::PortRef;
use pollux::switch::fdb::{Fdb, FdbConfig};
use pollux::sys::snapshot::{Publisher, snapshots};
use pollux::topology::{PortEntry, Topology};
use pollux::virtio::{ReceiveQueue, TransmitQueue};
use pollux::wire::Mac;

const LIMIT: Duration = Duration::from_secs(20);
const ENTRIES: u16 = 8;

fn mac(n: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 1, n]
}

/// A guest that only sends, or only receives, and its port.
struct Station<'g> {
    guest: &'g Guest,
    driver: Driver<'g>,
    entry: PortEntry,
    /// Receive buffers that have come back.
    used: u64,
}

impl<'g> Station<'g> {
    fn new(guest: &'g Guest, name: &str, slot: u16, generation: u32, sends: bool) -> Station<'g> {
        let mut driver = guest.driver();
        let mut pair = QueuePair::default();
        let (kick, call, enabled) = (None, None, true);
        if sends {
            let queue = Arc::new(TransmitQueue::start(&guest.setup(0)).unwrap());
            pair.transmit = Some(Transmit {
                queue,
                kick,
                call,
                enabled,
            });
        } else {
            for n in 0..u64::from(ENTRIES) {
                driver.post(&[writable(DATA + 2048 * n, 2048)]);
            }
            let queue = Arc::new(ReceiveQueue::start(&guest.setup(0)).unwrap());
            pair.receive = Some(Receive {
                queue,
                call,
                enabled,
            });
        }
        let spec = format!("{name},socket=/nowhere/{name}").parse().unwrap();
        let device = Device {
            memory: guest.map.clone(),
            features: 0,
            numa_node: None,
            pairs: vec![pair],
        };
        let entry = PortEntry {
            shared: PortShared::new(spec, PortRef { slot, generation }).unwrap(),
            device: Some(Arc::new(device)),
        };
        Station {
            guest,
            driver,
            entry,
            used: 0,
        }
    }

    fn reference(&self) -> PortRef {
        self.entry.shared.reference
    }

    /// Sends a frame and waits until it was taken and delivered.
    fn send(&mut self, to: u8, from: u8, tag: u8) {
        let frame = [&mac(to)[..], &mac(from), &[0x88, 0xb5, tag], &[0; 45]].concat();
        self.guest.write(DATA, &[&[0; HEADER][..], &frame].concat());
        self.driver
            .post(&[readable(DATA, (HEADER + frame.len()) as u32)]);
        let deadline = Instant::now() + LIMIT;
        while self.driver.reap().is_none() {
            assert!(Instant::now() < deadline, "a frame is not completed");
            std::thread::yield_now();
        }
    }

    /// Tags of the frames that have come. Buffers are used in order and not posted again.
    fn received(&mut self) -> Vec<u8> {
        let first = self.used;
        self.used += self.driver.reap_all().len() as u64;
        let tag = |n| self.guest.read(DATA + 2048 * n + HEADER as u64 + 14, 1)[0];
        (first..self.used).map(tag).collect()
    }
}

/// The thread under test.
struct Thread {
    shared: Arc<PollShared>,
    publisher: Publisher<Topology>,
    fdb: Arc<Fdb>,
    handle: Option<JoinHandle<()>>,
}

fn view(fdb: &Arc<Fdb>, stations: &[&Station<'_>]) -> Topology {
    let entries: Vec<PortEntry> = stations.iter().map(|s| s.entry.clone()).collect();
    Topology::build(&entries, [Instant::now()].into(), fdb.clone(), |_, _| {
        Some(0)
    })
}

impl Thread {
    fn start(stations: &[&Station<'_>]) -> Thread {
        let fdb = Arc::new(Fdb::new(FdbConfig::default()).unwrap());
        let (publisher, mut readers) = snapshots(view(&fdb, stations), 1);
        let shared = Arc::new(PollShared::new(IdlePolicy::Busy).unwrap());
        let reader = readers.remove(0);
        let poller = Poller::new(shared.clone(), reader, Instant::now()).unwrap();
        Thread {
            shared,
            publisher,
            fdb,
            handle: Some(std::thread::spawn(move || drop(poller.run()))),
        }
    }

    /// Publishes a view of these and waits until the thread works with it.
    fn publish(&mut self, stations: &[&Station<'_>]) {
        let generation = self.publisher.publish(view(&self.fdb, stations));
        let deadline = Instant::now() + LIMIT;
        while !self.publisher.acknowledgements().reached(generation) {
            assert!(Instant::now() < deadline, "the thread does not move on");
            std::thread::yield_now();
        }
        drop(self.publisher.retire());
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let ended = self.handle.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || ended.is_some_and(|end| end.is_ok()));
    }
}

/// A thread that still sees a removed port takes a frame from it after its addresses were
/// forgotten; and, what no thread does but the moment between its check and its writing would
/// allow, an entry of the old tenant stays behind. Neither sends the next tenant of the slot what
/// is not meant for it.
#[test]
fn a_thread_with_the_old_view_teaches_nothing_of_a_removed_port() {
    let guests: Vec<Guest> = (0..4)
        .map(|_| Guest::new(ENTRIES, features(false)))
        .collect();
    let mut old = Station::new(&guests[0], "old", 0, 1, true);
    let mut sender = Station::new(&guests[1], "sender", 1, 1, true);
    let mut witness = Station::new(&guests[2], "witness", 2, 1, false);
    let mut tenant = Station::new(&guests[3], "tenant", 0, 2, false);
    let mut thread = Thread::start(&[&old, &sender, &witness]);
    let address = Mac::from_bytes(mac(7));
    old.send(9, 7, 1);
    assert_eq!(thread.fdb.lookup(0, address), Some(old.reference()));
    assert_eq!(witness.received(), [1]);
    // As `unregister` does it: the addresses go first, then the view.
    thread.fdb.port_removed(old.reference());
    old.send(9, 7, 2);
    assert_eq!(witness.received(), [2], "frames pass in the old view");
    assert_eq!(thread.fdb.lookup(0, address), None, "and teach nothing");

    thread.publish(&[&tenant, &sender, &witness]);
    sender.send(7, 8, 3);
    assert_eq!(
        (witness.received(), tenant.received()),
        (vec![3], vec![3]),
        "a flood"
    );

    // What is left of the old tenant names its generation, too.
    thread
        .fdb
        .insert_static(0, address, old.reference())
        .unwrap();
    sender.send(7, 8, 4);
    assert_eq!(
        (witness.received(), tenant.received()),
        (vec![4], vec![4]),
        "a flood"
    );
    // The tenant's own address is its own.
    thread
        .fdb
        .learn(0, Mac::from_bytes(mac(6)), tenant.reference(), 0);
    sender.send(6, 8, 5);
    assert_eq!((witness.received(), tenant.received()), (vec![], vec![5]));
}

/// Once a view without a port is acknowledged, nothing but the caller's own references holds its
/// rings and memory.
#[test]
fn nothing_of_a_removed_port_is_left_when_its_view_is_retired() {
    let guests: Vec<Guest> = (0..2)
        .map(|_| Guest::new(ENTRIES, features(false)))
        .collect();
    let mut sender = Station::new(&guests[0], "sender", 0, 1, true);
    let mut receiver = Station::new(&guests[1], "receiver", 1, 1, false);
    let mut thread = Thread::start(&[&sender, &receiver]);
    sender.send(9, 7, 1);
    assert_eq!(receiver.received(), [1]);
    let device = receiver.entry.device.as_ref().unwrap();
    let ring = Arc::downgrade(&device.pairs[0].receive.as_ref().unwrap().queue);
    let shared = Arc::downgrade(&receiver.entry.shared);
    thread.publish(&[&sender]);
    drop(receiver);
    assert!(ring.upgrade().is_none() && shared.upgrade().is_none());
    // Nobody is left to receive, and nobody fails over it.
    sender.send(9, 7, 2);
}
