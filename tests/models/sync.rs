//! What the production files find under `crate::sync`: loom's atomics, and an `Arc` that runs
//! destructors in time but gives memory back only when the next iteration starts, so that a mutant
//! which looks at a retired view fails a check instead of reading freed memory.

use std::cell::RefCell;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

pub mod atomic {
    pub use loom::sync::atomic::*;
}

struct Counted<T> {
    count: AtomicUsize,
    value: T,
}

pub struct Arc<T>(NonNull<Counted<T>>);

// SAFETY: as for `std::sync::Arc`.
unsafe impl<T: Send + Sync> Send for Arc<T> {}
// SAFETY: as for `std::sync::Arc`.
unsafe impl<T: Send + Sync> Sync for Arc<T> {}

type Free = (*mut u8, fn(*mut u8));

thread_local! {
    // loom runs all threads of a model on the thread of its test.
    static DEAD: RefCell<Vec<Free>> = const { RefCell::new(Vec::new()) };
}

/// Gives back what earlier iterations left.
pub fn start_iteration() {
    for (memory, free) in DEAD.take() {
        free(memory);
    }
}

fn free<T>(memory: *mut u8) {
    // SAFETY: `memory` came from `Box::into_raw` in `Arc::new`; the value was dropped when the
    // count became 0.
    drop(unsafe { Box::from_raw(memory.cast::<Counted<std::mem::MaybeUninit<T>>>()) });
}

impl<T> Arc<T> {
    pub fn new(value: T) -> Self {
        let count = AtomicUsize::new(1);
        let memory = Box::into_raw(Box::new(Counted { count, value }));
        Arc(NonNull::new(memory).unwrap())
    }

    pub fn as_ptr(this: &Self) -> *const T {
        &raw const **this
    }
}

impl<T> Clone for Arc<T> {
    fn clone(&self) -> Self {
        // SAFETY: memory is given back after the iteration only.
        let counted = unsafe { self.0.as_ref() };
        counted.count.fetch_add(1, Ordering::Relaxed);
        Arc(self.0)
    }
}

impl<T> Deref for Arc<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: as in `clone`.
        let counted = unsafe { self.0.as_ref() };
        &counted.value
    }
}

impl<T> Drop for Arc<T> {
    fn drop(&mut self) {
        // SAFETY: as in `clone`.
        let counted = unsafe { self.0.as_ref() };
        if counted.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            let value = (&raw const counted.value).cast_mut();
            // SAFETY: the last owner; the pointer stays valid, as memory.
            unsafe { value.drop_in_place() };
            DEAD.with_borrow_mut(|dead| dead.push((self.0.as_ptr().cast(), free::<T>)));
        }
    }
}

/// crossbeam's cell for values of one word: its `take` and its `store` of a value that needs a
/// destructor are swaps, with acquire and release. The mutex is not looked at by loom, and never
/// contended: threads change in loom's operations only.
pub struct AtomicCell<T> {
    word: atomic::AtomicU64,
    value: std::sync::Mutex<T>,
}

impl<T: Default> AtomicCell<T> {
    pub fn new(value: T) -> Self {
        AtomicCell {
            word: atomic::AtomicU64::new(0),
            value: std::sync::Mutex::new(value),
        }
    }

    fn swap(&self, value: T) -> T {
        self.word.fetch_add(1, atomic::Ordering::AcqRel);
        std::mem::replace(&mut *self.value.lock().unwrap(), value)
    }

    pub fn take(&self) -> T {
        self.swap(T::default())
    }

    pub fn store(&self, value: T) {
        drop(self.swap(value));
    }
}

/// `std::sync::OnceLock`: what is set with release is found with acquire, or not yet.
#[derive(Debug)]
pub struct OnceLock<T> {
    set: atomic::AtomicBool,
    value: std::sync::OnceLock<T>,
}

impl<T> Default for OnceLock<T> {
    fn default() -> Self {
        OnceLock {
            set: atomic::AtomicBool::new(false),
            value: std::sync::OnceLock::new(),
        }
    }
}

impl<T> OnceLock<T> {
    pub fn set(&self, value: T) -> Result<(), T> {
        self.value.set(value)?;
        self.set.store(true, atomic::Ordering::Release);
        Ok(())
    }

    pub fn get(&self) -> Option<&T> {
        let set = self.set.load(atomic::Ordering::Acquire);
        set.then(|| self.value.get()).flatten()
    }
}

/// A plain value that threads hand to each other: loom fails the model if two accesses are not
/// ordered.
pub struct Shared<T>(loom::cell::Cell<T>);

// SAFETY: loom runs one thread at a time and fails the model when accesses race.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T: Copy> Shared<T> {
    pub fn new(value: T) -> Self {
        Shared(loom::cell::Cell::new(value))
    }

    pub fn get(&self) -> T {
        self.0.get()
    }

    pub fn set(&self, value: T) {
        self.0.set(value);
    }
}
