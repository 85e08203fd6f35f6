//! (d) A session that enables its rings against the removal of its port.
//!
//! The rule: sessions post devices into a mailbox, under its lock, and only while the port is registered; control is one
//! thread, owns the publisher, and takes posts out under the same lock. `unregister` marks the port gone and empties the mailbox in one
//! step. So from the acknowledgement of the view without the port on, no later view has it again.

use std::sync::Arc;

use loom::sync::Mutex;
use loom::thread;

use crate::explore;
use crate::production::snapshot::{Publisher, Reader, snapshots};
use crate::sync::Shared;

/// What goes wrong on purpose.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// The session looks whether the port is registered, and posts later.
    PostUnchecked,
    /// Control applies what it took out before the removal.
    StaleTurn,
}

struct Mailbox {
    registered: bool,
    post: Option<Device>,
}

/// A port's rings and memory.
struct Device {
    /// False once the port's memory may go.
    alive: Arc<Shared<bool>>,
    destroyed: Arc<std::sync::atomic::AtomicU32>,
}

impl Drop for Device {
    fn drop(&mut self) {
        self.destroyed
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

type View = Option<Arc<Device>>;

fn session(mailbox: &Mutex<Mailbox>, device: Device, fault: Fault) {
    if fault == Fault::PostUnchecked {
        if mailbox.lock().unwrap().registered {
            mailbox.lock().unwrap().post = Some(device);
        }
        return;
    }
    let mut mailbox = mailbox.lock().unwrap();
    if mailbox.registered {
        mailbox.post = Some(device);
    }
}

/// A poll thread: three passes, asleep in between.
fn poll(mut reader: Reader<View>) -> Reader<View> {
    for _ in 0..2 {
        let view = reader.borrow();
        if let Some(device) = view.as_ref() {
            assert!(device.alive.get(), "a removed port came back");
        }
        drop(view);
        reader.sleep();
    }
    reader
}

/// One turn of control's loop: a post becomes part of the next view.
fn turn(mailbox: &Mutex<Mailbox>, publisher: &mut Publisher<View>) {
    let post = mailbox.lock().unwrap().post.take();
    if let Some(device) = post {
        publisher.publish(Some(Arc::new(device)));
    }
}

fn remove(fault: Fault) {
    let alive = Arc::new(Shared::new(true));
    let destroyed = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let mailbox = Arc::new(Mutex::new(Mailbox {
        registered: true,
        post: None,
    }));
    let device = Device {
        alive: alive.clone(),
        destroyed: destroyed.clone(),
    };
    let (mut publisher, readers) = snapshots::<View>(None, 1);
    let [reader] = readers.try_into().unwrap();
    let session = {
        let mailbox = mailbox.clone();
        thread::spawn(move || session(&mailbox, device, fault))
    };
    let poller = thread::spawn(move || poll(reader));

    turn(&mailbox, &mut publisher);
    let stale = match fault {
        Fault::StaleTurn => mailbox.lock().unwrap().post.take(),
        _ => None,
    };
    // unregister:
    let pending = {
        let mut mailbox = mailbox.lock().unwrap();
        mailbox.registered = false;
        mailbox.post.take()
    };
    drop(pending);
    let generation = publisher.publish(None);
    let acknowledgements = publisher.acknowledgements();
    while !acknowledgements.reached(generation) {
        thread::yield_now();
    }
    // Nobody touches the port's memory any more; this write races with whoever does.
    alive.set(false);
    drop(publisher.retire());
    if let Some(device) = stale {
        publisher.publish(Some(Arc::new(device)));
    }
    turn(&mailbox, &mut publisher);

    session.join().unwrap();
    turn(&mailbox, &mut publisher);
    assert!(publisher.current().is_none(), "a removed port came back");
    drop(poller.join().unwrap());
    drop(publisher.retire());
    let count = destroyed.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(count, 1, "its destructor ran once");
}

#[test]
fn a_removed_port_does_not_come_back() {
    explore(2, || remove(Fault::None));
}

#[test]
#[should_panic(expected = "came back")]
fn mutant_the_session_posts_unchecked() {
    explore(2, || remove(Fault::PostUnchecked));
}

#[test]
#[should_panic(expected = "came back")]
fn mutant_control_applies_a_stale_turn() {
    explore(2, || remove(Fault::StaleTurn));
}
