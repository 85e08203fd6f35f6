//! (e) An observer comes with a view and goes with another one, while poll threads write into its
//! feeds, a client reads from them or is killed, queues change hands and poll threads end. Included
//! once for every `pen.rs` and `snapshot.rs`.
//!
//! Checked: a feed has one writer; every frame that a poll thread saw with the observer in its view
//! is captured or missed, and a client that reads to the end has read each captured one, once and
//! in order, and knows the final counts; nobody reaches the observer after the acknowledgement;
//! each end of a ring is dropped once, and none on a poll thread.
//!
//! The ring of a feed is a model of `rtrb`'s, with room for one frame.

use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering as Plain};
use std::sync::{Arc, Mutex};

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread::{self, JoinHandle, ThreadId};

use super::counter::Counter;
use super::handover::{HandOver, Place as Owner};
use super::pen::{Ending, Held, Place, take_to_the_end};
use super::snapshot::{Acknowledgements, Publisher, Reader, snapshots};
use crate::observer_models::{Fault, Scenario, Step};
use crate::sync::{Arc as Counted, Shared};

/// What all threads of a run know. Not what is checked: none of it orders anything.
struct Scene {
    scenario: Scenario,
    /// Next frame of each transmit queue; written by its owner.
    queues: Vec<Shared<u64>>,
    poll_threads: Mutex<Vec<ThreadId>>,
    /// Ends of rings that were dropped.
    ends: AtomicUsize,
    /// Set when nobody may reach the observer any more.
    settled: Shared<bool>,
    /// Set by its destructor.
    destroyed: Shared<bool>,
    /// Dropped references to the observer, for their order.
    dropped: AtomicU64,
}

impl Scene {
    fn end_dropped(&self) {
        if !std::thread::panicking() {
            self.not_on_a_poll_thread();
            self.ends.fetch_add(1, Plain::Relaxed);
        }
    }

    fn not_on_a_poll_thread(&self) {
        let me = thread::current().id();
        let poll_threads = self.poll_threads.lock().unwrap();
        assert!(!poll_threads.contains(&me), "dropped on a poll thread");
    }
}

struct Ring {
    frame: Shared<(usize, u64)>,
    written: AtomicU64,
    read: AtomicU64,
}

/// The writing end: a pen.
struct Pen {
    ring: Arc<Ring>,
    scene: Arc<Scene>,
    /// Written at every use: two writers that are not in order fail the model.
    next: Shared<u64>,
}

impl Pen {
    fn push(&mut self, frame: (usize, u64)) -> bool {
        let next = self.next.get();
        let has_room = next - self.ring.read.load(Ordering::Acquire) < 1;
        if has_room {
            self.ring.frame.set(frame);
            self.ring.written.store(next + 1, Ordering::Release);
        }
        self.next.set(next + u64::from(has_room));
        has_room
    }
}

impl Drop for Pen {
    fn drop(&mut self) {
        self.scene.end_dropped();
    }
}

/// The reading end.
struct Consumer {
    ring: Arc<Ring>,
    scene: Arc<Scene>,
    next: u64,
}

impl Consumer {
    fn pop(&mut self) -> Option<(usize, u64)> {
        (self.ring.written.load(Ordering::Acquire) > self.next).then(|| {
            let frame = self.ring.frame.get();
            self.next += 1;
            self.ring.read.store(self.next, Ordering::Release);
            frame
        })
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.scene.end_dropped();
    }
}

struct Feed {
    pen: Place<Pen>,
    captured: Counter,
    missed: Counter,
}

struct Observer {
    scene: Arc<Scene>,
    feeds: Vec<Feed>,
    ending: Ending,
}

impl Observer {
    /// As `Observer::with_reader`.
    fn with_reader(scene: &Arc<Scene>) -> (User, Vec<Consumer>) {
        let mut consumers = Vec::new();
        let feeds = (0..scene.scenario.threads).map(|_| {
            let ring = Arc::new(Ring {
                frame: Shared::new((0, 0)),
                written: AtomicU64::new(0),
                read: AtomicU64::new(0),
            });
            consumers.push(Consumer {
                ring: ring.clone(),
                scene: scene.clone(),
                next: 0,
            });
            let pen = Pen {
                ring,
                scene: scene.clone(),
                next: Shared::new(0),
            };
            Feed {
                pen: Place::new(pen),
                captured: Counter::default(),
                missed: Counter::default(),
            }
        });
        let observer = Observer {
            feeds: feeds.collect(),
            scene: scene.clone(),
            ending: Ending::default(),
        };
        (User(Counted::new(observer)), consumers)
    }

    /// Captured and missed.
    fn counts(&self) -> [u64; 2] {
        let sum = |of: fn(&Feed) -> &Counter| self.feeds.iter().map(|feed| of(feed).get()).sum();
        [sum(|feed| &feed.captured), sum(|feed| &feed.missed)]
    }

    /// As `Feed::write`, and `Recorder::write` where there is no pen.
    fn write(&self, feed: usize, held: &mut Held<'_, Pen>, frame: (usize, u64)) {
        let feed = &self.feeds[feed];
        let kept = held.pen.as_mut().is_some_and(|pen| pen.push(frame));
        let counter = if kept { &feed.captured } else { &feed.missed };
        counter.add(1);
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.scene.not_on_a_poll_thread();
            self.scene.destroyed.set(true);
        }
    }
}

/// A counted reference: whoever drops the last one comes after all who dropped one before.
#[derive(Clone)]
struct User(Counted<Observer>);

impl Deref for User {
    type Target = Observer;

    fn deref(&self) -> &Observer {
        &self.0
    }
}

impl Drop for User {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.0.scene.dropped.fetch_add(1, Ordering::AcqRel);
        }
    }
}

/// A topology: who owns each transmit queue, and who looks on.
struct View {
    owners: Vec<Option<usize>>,
    observer: Option<User>,
}

/// A poll thread: each turn is `Poller::serve` with one frame of each queue. Returns how many
/// frames were observed.
fn poll(reader: &mut Reader<View>, scene: &Scene) -> u64 {
    scene
        .poll_threads
        .lock()
        .unwrap()
        .push(thread::current().id());
    let me = reader.index();
    let mut observed = 0;
    for turn in 0..scene.scenario.turns {
        let view = reader.borrow();
        let mut recorder = view.observer.as_ref().map(|observer| {
            // Before anything of it is looked at: what a mutant finds here may be gone.
            assert!(!scene.destroyed.get(), "reachable after its destructor");
            let feed = match scene.scenario.fault {
                Fault::OneFeed => 0,
                _ => me,
            };
            (observer, feed, observer.feeds[feed].pen.take())
        });
        for (queue, owner) in view.owners.iter().enumerate() {
            if *owner != Some(me) {
                continue;
            }
            let number = scene.queues[queue].get();
            scene.queues[queue].set(number + 1);
            if let Some((observer, feed, held)) = &mut recorder {
                assert!(!scene.settled.get(), "written to after its end");
                observer.write(*feed, held, (queue, number));
                observed += 1;
            }
        }
        drop(recorder);
        drop(view);
        if turn % 2 == 0 {
            reader.sleep();
        }
    }
    reader.sleep();
    observed
}

/// The client and what serves it: `CaptureStream`.
struct Client {
    scene: Arc<Scene>,
    observer: User,
    consumers: Vec<Consumer>,
    acknowledgements: Acknowledgements<View>,
    read: Vec<(usize, u64)>,
    /// What it said at its end.
    counts: Option<[u64; 2]>,
}

impl Client {
    /// As `CaptureStream::read`; false once all is said.
    fn look(&mut self) -> bool {
        let end = |client: &mut Client| {
            let reached = |generation| client.acknowledgements.reached(generation);
            let end = client.observer.ending.settled(reached);
            end.map(str::to_string)
        };
        let end = take_to_the_end(self, end, |client| {
            for consumer in &mut client.consumers {
                client.read.extend(std::iter::from_fn(|| consumer.pop()));
            }
            false
        });
        if end.is_some() {
            self.scene.settled.set(true);
            self.counts = Some(self.observer.counts());
        }
        end.is_none()
    }

    fn run(mut self) -> Option<Client> {
        let Scenario { looks, killed, .. } = self.scene.scenario;
        for _ in 0..looks {
            if !self.look() {
                break;
            }
            thread::yield_now();
        }
        (!killed).then_some(self)
    }
}

/// Control: the only publisher.
struct Control {
    scene: Arc<Scene>,
    publisher: Publisher<View>,
    owners: Vec<Owner>,
    observer: Option<User>,
    threads: Vec<JoinHandle<(Reader<View>, u64)>>,
    /// Frames that were observed by poll threads that have ended.
    observed: u64,
}

impl Control {
    fn publish(&mut self) -> u64 {
        let generation = self.publisher.publish(View {
            owners: self.owners.iter().map(|owner| owner.owner()).collect(),
            observer: self.observer.clone(),
        });
        // The reaper.
        drop(self.publisher.retire());
        generation
    }

    fn start(&self, mut reader: Reader<View>) -> JoinHandle<(Reader<View>, u64)> {
        let scene = self.scene.clone();
        thread::spawn(move || {
            let observed = poll(&mut reader, &scene);
            (reader, observed)
        })
    }

    fn step(&mut self, step: Step, observer: &User) {
        match step {
            Step::Attach => {
                self.observer = Some(observer.clone());
                self.publish();
            }
            Step::Remove => {
                let gone = self.observer.take().unwrap();
                let generation = self.publish();
                gone.ending.set("stopped".to_string(), generation);
            }
            Step::Move(to) => {
                assert!(self.owners[0].leave_for(to));
                let mut step = HandOver::new(to);
                step.published(self.publish());
                let acknowledgements = self.publisher.acknowledgements();
                while !step.is_free(|generation| acknowledgements.reached(generation)) {
                    thread::yield_now();
                }
                assert!(step.arrive(&mut self.owners[0]));
                self.publish();
            }
            Step::Replace => {
                let (reader, observed) = self.threads.remove(0).join().unwrap();
                self.observed += observed;
                let successor = self.start(reader);
                self.threads.insert(0, successor);
            }
        }
    }
}

pub fn run(scenario: &Scenario) {
    let scene = Arc::new(Scene {
        scenario: *scenario,
        queues: (0..scenario.threads).map(|_| Shared::new(0)).collect(),
        poll_threads: Mutex::default(),
        ends: AtomicUsize::new(0),
        settled: Shared::new(false),
        destroyed: Shared::new(false),
        dropped: AtomicU64::new(0),
    });
    let owners: Vec<Owner> = (0..scenario.threads).map(Owner::On).collect();
    let first = View {
        owners: owners.iter().map(|owner| owner.owner()).collect(),
        observer: None,
    };
    let (publisher, readers) = snapshots(first, scenario.threads);
    let mut control = Control {
        scene: scene.clone(),
        publisher,
        owners,
        observer: None,
        threads: Vec::new(),
        observed: 0,
    };
    control.threads = readers
        .into_iter()
        .map(|reader| control.start(reader))
        .collect();
    let (observer, consumers) = Observer::with_reader(&scene);
    let client = Client {
        scene: scene.clone(),
        observer: observer.clone(),
        consumers,
        acknowledgements: control.publisher.acknowledgements(),
        read: Vec::new(),
        counts: None,
    };
    let client = thread::spawn(move || client.run());
    for step in scenario.steps {
        control.step(*step, &observer);
    }

    let Control {
        mut publisher,
        threads,
        mut observed,
        ..
    } = control;
    for thread in threads {
        let (reader, own) = thread.join().unwrap();
        observed += own;
        drop(reader);
    }
    drop(publisher.retire());
    assert!(!publisher.has_retained(), "everything old is retired");
    let [captured, missed] = observer.counts();
    assert_eq!(captured + missed, observed, "captured and missed");
    drop(observer);
    if let Some(mut client) = client.join().unwrap() {
        while client.counts.is_none() {
            client.look();
        }
        let read = std::mem::take(&mut client.read);
        assert_eq!(client.counts, Some([captured, missed]), "final counts");
        assert_eq!(read.len() as u64, captured, "every captured frame is read");
        for queue in 0..scenario.threads {
            let of_queue: Vec<u64> = read
                .iter()
                .filter(|frame| frame.0 == queue)
                .map(|frame| frame.1)
                .collect();
            let once = of_queue.is_sorted_by(|one, next| one < next);
            assert!(once || scenario.steps.contains(&Step::Move(1)), "in order");
        }
    }
    assert!(scene.destroyed.get(), "it goes with its last user");
    let ends = scene.ends.load(Plain::Relaxed);
    assert_eq!(ends, 2 * scenario.threads, "each end once");
}
