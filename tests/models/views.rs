//! (b) Views are published, acknowledged and retired while readers fall asleep and wake; (c) a transmit queue goes
//! from one poll thread to another by two publications. Included once for every `snapshot.rs`.

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use loom::thread::{self, ThreadId};

use super::snapshot::{Reader, snapshots};
use crate::sync::Shared;
use crate::view_models::{MoveFault, ReadFault};

/// What a view refers to: guest memory, say.
struct Object {
    /// Cleared by the destructor; loom fails the model if a reader's look is not ordered before that.
    alive: Shared<bool>,
    /// Written by the guest once the acknowledgement was reached.
    rings: Shared<u64>,
    drops: std::sync::atomic::AtomicU32,
    control: ThreadId,
}

struct Handle(Arc<Object>);

impl Drop for Handle {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let object = &*self.0;
        assert_eq!(
            thread::current().id(),
            object.control,
            "readers drop nothing"
        );
        object.alive.set(false);
        object.drops.fetch_add(1, Ordering::Relaxed);
    }
}

fn look(handle: &Handle) {
    assert!(handle.0.alive.get(), "reachable after its destructor");
    assert_eq!(
        handle.0.rings.get(),
        0,
        "reachable after the acknowledgement"
    );
}

fn read(mut reader: Reader<Handle>, fault: ReadFault, borrows: usize) -> Reader<Handle> {
    for turn in 0..borrows {
        let borrowed = reader.borrow();
        look(&borrowed);
        let kept: *const Handle = &raw const *borrowed;
        drop(borrowed);
        if turn % 2 == 0 {
            reader.sleep();
            if fault == ReadFault::KeepsItsBorrow {
                // SAFETY: retired views stay valid memory until the next iteration (`crate::sync::Arc`).
                look(unsafe { &*kept });
            }
        }
    }
    reader
}

pub fn publish_and_retire(readers: usize, publications: usize, fault: ReadFault) {
    let control = thread::current().id();
    let objects: Vec<Arc<Object>> = (0..=publications)
        .map(|_| {
            Arc::new(Object {
                alive: Shared::new(true),
                rings: Shared::new(0),
                drops: Default::default(),
                control,
            })
        })
        .collect();
    let mut handles = objects.iter().map(|object| Handle(object.clone()));
    let (mut publisher, sleepers) = snapshots(handles.next().unwrap(), readers);
    let threads: Vec<_> = sleepers
        .into_iter()
        .map(|reader| thread::spawn(move || read(reader, fault, 3)))
        .collect();
    for handle in handles {
        let generation = publisher.publish(handle);
        if publisher.acknowledgements().reached(generation) {
            // What a session answers then: the guest may reuse its rings. Races with a reader that still looks.
            for object in &objects[..generation as usize - 1] {
                object.rings.set(generation);
            }
        }
        drop(publisher.retire());
    }
    let readers: Vec<_> = threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect();
    drop(readers);
    drop(publisher.retire());
    assert!(!publisher.has_retained(), "everything old is retired");
    drop(publisher);
    for object in objects {
        assert_eq!(object.drops.load(Ordering::Relaxed), 1);
    }
}

/// A transmit queue and its driver's side, with what stands for epoll.
struct Queue {
    /// Next position to take; written by the owner only.
    next: Shared<u64>,
    available: AtomicU64,
    kicks_wanted: AtomicBool,
    /// The kick eventfd became readable since the last wake-up.
    kicked: AtomicBool,
}

impl Queue {
    fn available(&self) -> u64 {
        self.available.load(Ordering::Acquire)
    }

    fn offer(&self) {
        let idx = self.available.load(Ordering::Relaxed);
        self.available.store(idx + 1, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.kicks_wanted.load(Ordering::Relaxed) {
            self.kicked.swap(true, Ordering::AcqRel);
        }
    }

    fn want_kicks(&self, wanted: bool) {
        self.kicks_wanted.store(wanted, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

/// Who owns the queue.
type Plan = Option<usize>;

/// A poll thread, from its waking until it sleeps: `Poller::serve` in small.
fn poll(mut reader: Reader<Plan>, queue: &Queue, fault: MoveFault) -> Reader<Plan> {
    let me = reader.index();
    loop {
        let plan = reader.borrow();
        if *plan != Some(me) {
            // Without work: asleep until control rings the bell.
            drop(plan);
            reader.sleep();
            return reader;
        }
        queue.kicked.swap(false, Ordering::AcqRel);
        queue.want_kicks(false);
        let quiet = loop {
            let (next, available) = (queue.next.get(), queue.available());
            if next != available {
                queue.next.set(next + 1);
            }
            if !plan.is_current() {
                break false;
            }
            if next == available {
                queue.want_kicks(true);
                if fault == MoveFault::NoSecondLook || queue.available() == queue.next.get() {
                    break true;
                }
                queue.want_kicks(false);
            }
        };
        drop(plan);
        if quiet {
            reader.sleep();
            return reader;
        }
    }
}

/// Control moves the queue from the first reader to the second, which it then runs as the second poll thread.
pub fn hand_over(fault: MoveFault) {
    let queue = Arc::new(Queue {
        next: Shared::new(0),
        available: AtomicU64::new(0),
        kicks_wanted: AtomicBool::new(false),
        kicked: AtomicBool::new(false),
    });
    let (mut publisher, readers) = snapshots::<Plan>(Some(0), 2);
    let [first, second] = readers.try_into().unwrap();
    let old = {
        let queue = queue.clone();
        thread::spawn(move || poll(first, &queue, fault))
    };
    let driver = {
        let queue = queue.clone();
        thread::spawn(move || {
            queue.offer();
            queue.offer();
        })
    };
    if fault != MoveFault::OnePublication {
        let generation = publisher.publish(None);
        let acknowledgements = publisher.acknowledgements();
        while !acknowledgements.reached(generation) {
            thread::yield_now();
        }
    }
    publisher.publish(Some(1));
    let second = poll(second, &queue, fault);
    let first = old.join().unwrap();
    driver.join().unwrap();
    drop((first, second));
    let taken = queue.next.get();
    assert!(
        taken == queue.available() || queue.kicked.load(Ordering::Acquire),
        "the new owner sleeps on work, and no kick came"
    );
}
