//! Drivers that misbehave, one misdeed a test, against the device side of both kinds of ring.
//!
//! Every test asserts the outcome, that each chain the device took comes back exactly once with the
//! right length (the drivers in `support/guest.rs` panic at a second return), and that the next
//! good chain passes where the ring lives on. An impossible ring is [`Broken`] instead: nothing
//! more is taken from it, and what was taken still comes back.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../support/guest.rs"]
mod guest;
#[path = "../packed_reference/mod.rs"]
mod packed_reference;

mod available;
mod buffers;
mod links;
mod packed;
mod races;
mod room;
mod tables;

use std::sync::atomic::Ordering;

use guest::*;
use packed_reference::{AVAIL, Desc, EVENT_DESC, INDIRECT, NEXT, USED, WRITE};
use pollux::virtio::chain::{ChainError, MAX_CHAIN, Windows};
use pollux::virtio::{
    Broken, Claim, FullBarrier, NoClaim, ReceiveQueue, RingFeatures, SetupError, Taken,
    TransmitQueue,
};

const SIZE: u16 = 8;
const KINDS: [bool; 2] = [false, true];
/// Addresses of a buffer that is always good.
const GOOD: u64 = DATA + 0x8_0000;
const GOOD_LEN: u32 = 100;
/// A buffer long enough for any frame here.
const ROOM: u32 = 2048;

type Pieces<'m> = Windows<'m, MAX_CHAIN>;

/// Takes what is available, one burst; what was found, in order.
fn take_burst(queue: &TransmitQueue) -> Vec<Taken> {
    let end = queue.available_to();
    let mut found = Vec::new();
    let mut windows = Pieces::new();
    loop {
        windows.clear();
        match take(queue, end, &mut windows) {
            Taken::Nothing => return found,
            taken => found.push(taken),
        }
        assert!(
            found.len() <= usize::from(queue.size()),
            "a pass is bounded by the ring"
        );
    }
}

fn chain(len: u32) -> Taken {
    Taken::Chain { len }
}

/// The bytes of the next chain.
fn take_bytes(queue: &TransmitQueue) -> Vec<u8> {
    let mut windows = Pieces::new();
    let taken = take(queue, queue.available_to(), &mut windows);
    let mut bytes = Vec::new();
    for window in windows.iter() {
        let mut piece = vec![0; window.len()];
        window.read_bytes(0, &mut piece);
        bytes.extend(piece);
    }
    assert_eq!(taken, chain(bytes.len() as u32));
    bytes
}

fn start_transmit(guest: &Guest) -> TransmitQueue {
    TransmitQueue::start(&guest.setup(0x8000)).unwrap()
}

fn start_receive(guest: &Guest) -> ReceiveQueue {
    ReceiveQueue::start(&guest.setup(0x8000)).unwrap()
}

/// Posts a chain and a good one behind it: the first is found to be `expected`, the second passes,
/// both come back once with length 0, and so does a whole further lap.
fn check_transmit(guest: &Guest, expected: Taken, pieces: &[Piece]) {
    let packed = guest.features.packed;
    let queue = start_transmit(guest);
    let mut driver = guest.driver();
    let odd = driver.post(pieces);
    let good = driver.post(&[readable(GOOD, GOOD_LEN)]);
    let found = take_burst(&queue);
    assert_eq!(found, [expected, chain(GOOD_LEN)], "packed: {packed}");
    assert_eq!(driver.reap(), None, "nothing returns before completion");
    queue.complete(queue.position());
    assert_eq!(
        driver.reap_all(),
        [(odd, 0), (good, 0)],
        "packed: {packed}, {expected:?}"
    );
    assert_eq!(queue.broken(), None);
    transmit_lives(guest, &queue, &mut driver);
}

/// A lap and a half of good chains pass.
fn transmit_lives(guest: &Guest, queue: &TransmitQueue, driver: &mut Driver<'_>) {
    for _ in 0..guest.size() / 2 * 3 {
        let id = driver.post(&[readable(GOOD, GOOD_LEN)]);
        assert_eq!(take_burst(queue), [chain(GOOD_LEN)]);
        queue.complete(queue.position());
        assert_eq!(driver.reap_all(), [(id, 0)]);
    }
    assert_eq!(driver.free(), guest.size());
}

fn transmit_refuses(features: RingFeatures, error: ChainError, pieces: &[Piece]) {
    let guest = Guest::new(SIZE, features);
    check_transmit(&guest, Taken::Malformed(error), pieces);
}

/// Posts a chain that no frame may use, then a good buffer: a frame goes into the second, the first
/// comes back with length 0 in its turn.
fn check_receive(guest: &Guest, pieces: &[Piece]) {
    let len = 300;
    let queue = start_receive(guest);
    let mut driver = guest.driver();
    let odd = driver.post(pieces);
    let good = driver.post(&[writable(GOOD, ROOM)]);
    let frame = frame(7, len as usize);
    let mut claim = Claim::new();
    queue.claim([len].into_iter(), &mut claim).unwrap();
    assert_eq!((claim.frames(), claim.bad_buffers()), (1, 1));
    fill(&claim, 0, &frame);
    assert_eq!(driver.reap(), None, "nothing returns before the commit");
    queue.commit(&claim);
    assert_eq!(driver.reap_all(), [(odd, 0), (good, len + 12)]);
    assert_eq!(guest.read(GOOD + HEADER as u64, len), frame);
    receive_lives(guest, &queue, &mut driver);
}

fn receive_lives(guest: &Guest, queue: &ReceiveQueue, driver: &mut Driver<'_>) {
    for tag in 0..guest.size() / 2 * 3 {
        let id = driver.post(&[writable(GOOD, ROOM)]);
        let frame = frame(tag as u8, 64);
        assert_eq!(deliver(queue, std::slice::from_ref(&frame)), (1, None));
        assert_eq!(driver.reap_all(), [(id, 76)]);
        assert_eq!(guest.read(GOOD + HEADER as u64, 64), frame);
    }
    assert_eq!(driver.free(), guest.size());
    assert_eq!(queue.broken(), None);
}

fn receive_refuses(features: RingFeatures, pieces: &[Piece]) {
    check_receive(&Guest::new(SIZE, features), pieces);
}

/// The same misdeed in both directions.
fn both_refuse(
    features: RingFeatures,
    error: ChainError,
    make: impl Fn(fn(u64, u32) -> Piece) -> Vec<Piece>,
) {
    transmit_refuses(features, error, &make(readable));
    receive_refuses(features, &make(writable));
}
