//! Hooks of tests: they stop a producer at a chosen point of a delivery, let another producer
//! forestall it, and count what its thread tries.
//!
//! The hooks exist under `cfg(test)` only. A production build has not one instruction of them.

use std::cell::{Cell, RefCell};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::claim::Publish;

/// Where a producer can be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// The producer has nothing in hand.
    BetweenPasses,
    /// The producer has claimed positions, and nothing is written yet.
    Claimed,
    /// The frames are written, and the claim is not committed yet.
    Filled,
    /// The producer has the token, and has not stored the used index yet.
    Publishing,
}

/// How often one thread has tried to claim and to publish so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tries {
    pub(crate) claims: u64,
    pub(crate) publishes: u64,
}

#[derive(Debug, Default)]
struct Order {
    /// The point at which to stop.
    at: Option<Point>,
    stopped: bool,
}

/// With a brake a test stops the producers that obey it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Brake(Arc<(Mutex<Order>, Condvar)>);

type Rival = Box<dyn FnMut()>;

thread_local! {
    static RIVAL: RefCell<Option<Rival>> = const { RefCell::new(None) };
    static BRAKE: RefCell<Option<Brake>> = const { RefCell::new(None) };
    static TRIES: Cell<Tries> = const { Cell::new(Tries { claims: 0, publishes: 0 }) };
}

impl Brake {
    /// Makes the calling thread obey this brake.
    pub(crate) fn obey(&self) {
        BRAKE.set(Some(self.clone()));
    }

    fn change(&self, change: impl FnOnce(&mut Order)) {
        let (order, changed) = &*self.0;
        change(&mut order.lock().unwrap_or_else(PoisonError::into_inner));
        changed.notify_all();
    }

    /// Makes each thread that obeys stop when it next comes to `point`.
    pub(crate) fn stop_at(&self, point: Point) {
        self.change(|order| order.at = Some(point));
    }

    /// Whether a thread has stopped.
    pub(crate) fn has_stopped(&self) -> bool {
        let order = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        order.stopped
    }

    /// Lets stopped threads go on.
    pub(crate) fn release(&self) {
        self.change(|order| *order = Order::default());
    }

    fn pass(&self, point: Point) {
        let (order, changed) = &*self.0;
        let mut order = order.lock().unwrap_or_else(PoisonError::into_inner);
        order.stopped |= order.at == Some(point);
        while order.at == Some(point) {
            order = changed.wait(order).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// To be called by a producer that comes to `point`. Waits there if the thread's brake says so.
pub(crate) fn at(point: Point) {
    // Cloned out of the cell first, because a thread that waits must not hold the borrow.
    if let Some(brake) = BRAKE.with_borrow(Clone::clone) {
        brake.pass(point);
    }
}

/// Counts one try to claim.
pub(super) fn claims() {
    TRIES.set(Tries {
        claims: tries().claims + 1,
        ..tries()
    });
}

/// From now on the calling thread runs `rival` in each of its claims, after reading the position
/// and before claiming it.
pub(crate) fn set_rival(rival: Option<Rival>) {
    RIVAL.set(rival);
}

/// To be called by a producer that knows what it would claim. Runs the rival.
pub(super) fn planned() {
    RIVAL.with_borrow_mut(|rival| {
        if let Some(rival) = rival {
            rival();
        }
    });
}

/// A receive ring whose publishers can be stopped. (Transmit rings publish, too, but have one
/// owner.)
pub(super) struct Watched<'r, R>(&'r R);

impl<'r, R: Publish> Watched<'r, R> {
    /// Wraps `ring` for one try to publish, which is counted.
    pub(super) fn new(ring: &'r R) -> Self {
        TRIES.set(Tries {
            publishes: tries().publishes + 1,
            ..tries()
        });
        Watched(ring)
    }
}

impl<R: Publish> Publish for Watched<'_, R> {
    fn publish(&self, from: u64, to: u64) {
        at(Point::Publishing);
        self.0.publish(from, to);
    }

    fn wants_call(&self, from: u64, to: u64) -> bool {
        self.0.wants_call(from, to)
    }
}

/// Returns how often the calling thread has tried so far.
pub(crate) fn tries() -> Tries {
    TRIES.get()
}
