//! (d) A session that enables or disables its rings against the removal of its port. Included once
//! for every `mailbox.rs`; the lock around it stands here as in `daemon/link.rs`.
//!
//! The rule: sessions post devices into a mailbox, under its lock, and only while the port is
//! registered; control is one thread, owns the publisher, and takes posts out under the same lock.
//! `unregister` publishes the view without the port, then marks the mailbox gone and empties it in
//! one step. So from the acknowledgement of that view on, no later one has the port again, and a
//! session that was answered knows that nobody touches its rings.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use loom::sync::Mutex;
use loom::thread;

use super::mailbox::Mailbox;
use super::snapshot::{Acknowledgements, Publisher, Reader, snapshots};
use crate::removal_models::Fault;
use crate::sync::Shared;

/// A port's rings and memory.
struct Device {
    /// False once the port's memory may go.
    alive: Arc<Shared<bool>>,
    /// Written by the guest once its frontend was told that the rings are stopped.
    rings: Arc<Shared<u64>>,
    destroyed: Arc<AtomicU32>,
}

impl Device {
    /// A device, and how often its destructor has run.
    fn new() -> (Device, Arc<AtomicU32>) {
        let destroyed = Arc::new(AtomicU32::new(0));
        let device = Device {
            alive: Arc::new(Shared::new(true)),
            rings: Arc::new(Shared::new(0)),
            destroyed: destroyed.clone(),
        };
        (device, destroyed)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.destroyed.fetch_add(1, Relaxed);
    }
}

type View = Option<Arc<Device>>;
type Letters = Mutex<Mailbox<Arc<Device>>>;

/// The session disables its rings, and answers the frontend.
fn disable(mailbox: &Letters, rings: &Shared<u64>, acknowledgements: &Acknowledgements<View>) {
    let (post, _) = mailbox.lock().unwrap().post(None);
    let generation = loop {
        if let Some(generation) = mailbox.lock().unwrap().answer(post) {
            break generation;
        }
        thread::yield_now();
    };
    while !acknowledgements.reached(generation) {
        thread::yield_now();
    }
    // Races with a poll thread that still has them.
    rings.set(1);
}

/// A poll thread: two passes, asleep in between.
fn poll(mut reader: Reader<View>) -> Reader<View> {
    for _ in 0..2 {
        let view = reader.borrow();
        if let Some(device) = view.as_ref() {
            assert!(device.alive.get(), "a removed port came back");
            assert_eq!(device.rings.get(), 0, "rings that were stopped");
        }
        drop(view);
        reader.sleep();
    }
    reader
}

/// One turn of control's loop: a post becomes part of the next view.
fn turn(mailbox: &Letters, publisher: &mut Publisher<View>) {
    let post = mailbox.lock().unwrap().take();
    if let Some((post, device)) = post {
        let generation = publisher.publish(device);
        mailbox.lock().unwrap().published(post, generation);
    }
}

/// Control takes the port out of the view, and says so.
fn unregister(mailbox: &Letters, publisher: &mut Publisher<View>) -> u64 {
    let generation = publisher.publish(None);
    mailbox.lock().unwrap().port_gone(generation);
    generation
}

/// The end of both: no view has the port, and nothing is left of it.
fn end(
    mut publisher: Publisher<View>,
    poller: thread::JoinHandle<Reader<View>>,
    destroyed: &AtomicU32,
) {
    assert!(publisher.current().is_none(), "a removed port came back");
    drop(poller.join().unwrap());
    drop(publisher.retire());
    let count = destroyed.load(Relaxed);
    assert_eq!(count, 1, "its destructor ran once");
}

/// A session enables its rings while its port is removed.
pub fn remove(fault: Fault) {
    let (device, destroyed) = Device::new();
    let alive = device.alive.clone();
    let mailbox = Arc::new(Letters::new(Mailbox::default()));
    let (mut publisher, readers) = snapshots::<View>(None, 1);
    let [reader] = readers.try_into().unwrap();
    let session = {
        let mailbox = mailbox.clone();
        thread::spawn(move || mailbox.lock().unwrap().post(Some(Arc::new(device))))
    };
    let poller = thread::spawn(move || poll(reader));

    turn(&mailbox, &mut publisher);
    let stale = match fault {
        Fault::StaleTurn => mailbox.lock().unwrap().take(),
        Fault::None => None,
    };
    let generation = unregister(&mailbox, &mut publisher);
    let acknowledgements = publisher.acknowledgements();
    while !acknowledgements.reached(generation) {
        thread::yield_now();
    }
    // Nobody touches the port's memory any more; this write races with whoever does.
    alive.set(false);
    drop(publisher.retire());
    if let Some((_, device)) = stale {
        publisher.publish(device);
    }
    turn(&mailbox, &mut publisher);

    session.join().unwrap();
    turn(&mailbox, &mut publisher);
    end(publisher, poller, &destroyed);
}

/// A session disables its rings, with or without its port.
pub fn stop() {
    let (device, destroyed) = Device::new();
    let rings = device.rings.clone();
    let mailbox = Arc::new(Letters::new(Mailbox::default()));
    let (mut publisher, readers) = snapshots::<View>(None, 1);
    let [reader] = readers.try_into().unwrap();
    let acknowledgements = publisher.acknowledgements();
    mailbox.lock().unwrap().post(Some(Arc::new(device)));
    turn(&mailbox, &mut publisher);
    let session = {
        let mailbox = mailbox.clone();
        thread::spawn(move || disable(&mailbox, &rings, &acknowledgements))
    };
    let poller = thread::spawn(move || poll(reader));

    turn(&mailbox, &mut publisher);
    unregister(&mailbox, &mut publisher);
    session.join().unwrap();
    end(publisher, poller, &destroyed);
}
