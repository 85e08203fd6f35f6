//! Hooks of tests: stop a producer at a chosen point of a delivery, let another one forestall it,
//! and count what its thread tries.
//!
//! It exists under `cfg(test)` only; a production build has not one instruction of it.

use std::cell::{Cell, RefCell};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::claim::Publish;

/// Where a producer can be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// It has nothing in hand.
    BetweenPasses,
    /// It has its positions, and nothing is written yet.
    Claimed,
    /// The frames are written, and the claim is not committed yet.
    Filled,
    /// It has the token, and the used index still stands where it was.
    Publishing,
}

/// What one thread has tried so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tries {
    pub(crate) claims: u64,
    pub(crate) publishes: u64,
}

#[derive(Debug, Default)]
struct Order {
    /// Stop here.
    at: Option<Point>,
    stopped: bool,
}

/// The test's grip on the producers that it was given to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Brake(Arc<(Mutex<Order>, Condvar)>);

type Rival = Box<dyn FnMut()>;

thread_local! {
    static RIVAL: RefCell<Option<Rival>> = const { RefCell::new(None) };
    static BRAKE: RefCell<Option<Brake>> = const { RefCell::new(None) };
    static TRIES: Cell<Tries> = const { Cell::new(Tries { claims: 0, publishes: 0 }) };
}

impl Brake {
    /// Makes the calling thread obey.
    pub(crate) fn obey(&self) {
        BRAKE.set(Some(self.clone()));
    }

    fn change(&self, change: impl FnOnce(&mut Order)) {
        let (order, changed) = &*self.0;
        change(&mut order.lock().unwrap_or_else(PoisonError::into_inner));
        changed.notify_all();
    }

    /// Whoever obeys stops when it comes to `point` next.
    pub(crate) fn stop_at(&self, point: Point) {
        self.change(|order| order.at = Some(point));
    }

    /// Whether somebody has stopped there.
    pub(crate) fn has_stopped(&self) -> bool {
        let order = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        order.stopped
    }

    /// Lets it go on.
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

/// A producer comes to `point`.
pub(crate) fn at(point: Point) {
    // Taken out of the cell first: who waits must not hold the borrow.
    if let Some(brake) = BRAKE.with_borrow(Clone::clone) {
        brake.pass(point);
    }
}

/// A producer tries to claim.
pub(super) fn claims() {
    TRIES.set(Tries {
        claims: tries().claims + 1,
        ..tries()
    });
}

/// From now on the calling thread runs `rival` between reading where it would claim and claiming
/// there.
pub(crate) fn set_rival(rival: Option<Rival>) {
    RIVAL.set(rival);
}

/// A producer knows what it would claim.
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
    /// For one try to publish, which is counted.
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

/// What the calling thread has tried so far.
pub(crate) fn tries() -> Tries {
    TRIES.get()
}
