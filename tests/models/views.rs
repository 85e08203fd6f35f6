//! (b) Views are published, acknowledged and retired while readers fall asleep and wake; (c) a
//! transmit queue goes from one poll thread to another as control hands it over. Included once for
//! every `snapshot.rs` and `handover.rs`.

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use loom::thread::{self, ThreadId};

use super::handover::{HandOver, Place};
use super::snapshot::{Reader, snapshots};
use crate::sync::Shared;
use crate::view_models::{MoveFault, ReadFault};

/// What a view refers to: guest memory, say.
struct Object {
    /// Cleared by the destructor; loom fails the model if a reader's look is not ordered before
    /// that.
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
                // SAFETY: retired views stay valid memory until the next iteration
                // (`crate::sync::Arc`).
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
            // What a session answers then: the guest may reuse its rings. Races with a reader that
            // still looks.
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

/// Who owns the queue, as control writes it into a view.
type Plan = Option<usize>;

/// A poll thread, from its waking until it sleeps: `Poller::serve` in small.
fn poll(reader: &mut Reader<Plan>, queue: &Queue, fault: MoveFault) {
    let me = reader.index();
    loop {
        let plan = reader.borrow();
        if *plan != Some(me) {
            // Without work: asleep until control rings the bell.
            drop(plan);
            reader.sleep();
            return;
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
            return;
        }
        // The view is stored before its generation: until both are, there is nothing to do but to
        // look again.
        thread::yield_now();
    }
}

/// Control orders the queue from the first poll thread to each of `targets` in turn, each order
/// before the one before it is carried out, as `Registry::move_queues`, `publish` and
/// `finish_moves` do. The second poll thread wakes once meanwhile, for some other reason. In the
/// end the bell wakes whoever owns the queue.
pub fn hand_over(fault: MoveFault, targets: &[usize]) {
    let queue = Arc::new(Queue {
        next: Shared::new(0),
        available: AtomicU64::new(0),
        kicks_wanted: AtomicBool::new(false),
        kicked: AtomicBool::new(false),
    });
    let mut place = Place::On(0);
    let threads = targets.iter().max().unwrap() + 1;
    let (mut publisher, readers) = snapshots::<Plan>(place.owner(), threads);
    let mut readers = readers.into_iter();
    let awake: Vec<_> = readers
        .by_ref()
        .take(2)
        .map(|mut reader| {
            let queue = queue.clone();
            thread::spawn(move || {
                poll(&mut reader, &queue, fault);
                reader
            })
        })
        .collect();
    let driver = {
        let queue = queue.clone();
        thread::spawn(move || {
            queue.offer();
            queue.offer();
        })
    };
    let mut under_way = Vec::new();
    for to in targets {
        assert!(place.leave_for(*to), "it is elsewhere");
        under_way.push(HandOver::new(*to));
        let generation = publisher.publish(place.owner());
        for step in &mut under_way {
            step.published(generation);
        }
    }
    let acknowledgements = publisher.acknowledgements();
    let mut arrived = 0;
    for step in under_way {
        while !step.is_free(|generation| acknowledgements.reached(generation)) {
            thread::yield_now();
        }
        arrived += usize::from(step.arrive(&mut place));
        publisher.publish(place.owner());
    }
    let ended = awake.into_iter().map(|thread| thread.join().unwrap());
    let mut all: Vec<_> = ended.chain(readers).collect();
    for reader in &mut all {
        poll(reader, &queue, fault);
    }
    driver.join().unwrap();
    drop(all);
    let last = *targets.last().unwrap();
    assert_eq!((arrived, place), (1, Place::On(last)), "it arrives once");
    let taken = queue.next.get();
    assert!(
        taken == queue.available() || queue.kicked.load(Ordering::Acquire),
        "the new owner sleeps on work, and no kick came"
    );
}
