//! Publish, acknowledge, retire: how control hands immutable views to the poll threads.
//!
//! There is one publisher and a fixed number of readers. This is read-copy-update, with `Arc` as
//! the reference count. It is the only way by which control changes what a poll thread does.
//!
//! - The publisher stores the pointer to a new view, then its generation.
//! - A reader compares the generation after each burst: one relaxed load of a cache line that
//!   changes with a publication only.
//! - A reader *borrows* the current view and acknowledges the generation stored inside that view,
//!   in a padded word of its own. It clones nothing, drops nothing and waits for nobody.
//! - The publisher keeps each view until every reader has acknowledged a newer one or sleeps. So a
//!   reader is never the last owner of anything.
//! - Publishing waits for nobody.
//!
//! A sleeping reader counts as acknowledged. It drops its borrow *before* it stores `ASLEEP`;
//! otherwise a dead guest's memory would stay mapped for hours. A reader that wakes stores "awake",
//! then a full barrier, then loads the view. The publisher stores the view, then a full barrier,
//! then loads the reader's word. So either the publisher sees the reader awake and waits for its
//! acknowledgement, or the reader sees the new view.
//!
//! The daemon makes a reader for each of its 32 possible poll threads at the start. Readers without
//! a thread are asleep. So a poll thread can be added without any change here.
//!
//! The atomics come from `crate::sync`, so that the model checker runs this file unchanged.

use std::collections::VecDeque;
use std::ops::Deref;

use crossbeam_utils::CachePadded;

use crate::sync::Arc;
use crate::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};

/// Acknowledgement of a reader that holds no view.
const ASLEEP: u64 = u64::MAX;
/// Acknowledgement of a reader that has just woken and not borrowed yet.
const AWAKE: u64 = 0;

struct View<T> {
    /// Starts at 1, so that it never equals `AWAKE`.
    generation: u64,
    value: T,
}

struct Shared<T> {
    current: AtomicPtr<View<T>>,
    /// Generation of `current`; stored after it, so readers can poll this one word.
    generation: CachePadded<AtomicU64>,
    acknowledged: Box<[CachePadded<AtomicU64>]>,
    /// Readers that can still borrow.
    readers: AtomicUsize,
}

/// The publishing side; there is one.
pub struct Publisher<T> {
    shared: Arc<Shared<T>>,
    /// Views that some reader may still borrow, oldest first; the last is the current one.
    retained: VecDeque<Arc<View<T>>>,
}

/// A reader's side, owned by its thread.
pub struct Reader<T> {
    shared: Arc<Shared<T>>,
    index: usize,
}

/// Watches acknowledgements from any thread.
pub struct Acknowledgements<T> {
    shared: Arc<Shared<T>>,
}

/// A borrowed view; nothing it refers to goes away while it lives.
pub struct Borrowed<'r, T> {
    view: &'r View<T>,
    shared: &'r Shared<T>,
}

/// A view that nobody borrows any more; dropping it may free a lot, so do that where time does not
/// matter.
pub struct Retired<T>(#[allow(dead_code, reason = "held to be dropped")] Arc<View<T>>);

impl<T> std::fmt::Debug for Publisher<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Publisher({} views retained)", self.retained.len())
    }
}

impl<T> std::fmt::Debug for Reader<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reader({})", self.index)
    }
}

impl<T> std::fmt::Debug for Acknowledgements<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Acknowledgements({} readers)",
            self.shared.acknowledged.len()
        )
    }
}

impl<T> std::fmt::Debug for Retired<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Retired")
    }
}

impl<T> std::fmt::Debug for Borrowed<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Borrowed(generation {})", self.view.generation)
    }
}

/// A publisher with its first view (generation 1), and `readers` readers, all asleep.
pub fn snapshots<T: Send + Sync>(first: T, readers: usize) -> (Publisher<T>, Vec<Reader<T>>) {
    let view = Arc::new(View {
        generation: 1,
        value: first,
    });
    let shared = Arc::new(Shared {
        current: AtomicPtr::new(Arc::as_ptr(&view).cast_mut()),
        generation: CachePadded::new(AtomicU64::new(1)),
        acknowledged: (0..readers)
            .map(|_| CachePadded::new(AtomicU64::new(ASLEEP)))
            .collect(),
        readers: AtomicUsize::new(readers),
    });
    let readers = (0..readers)
        .map(|index| Reader {
            shared: shared.clone(),
            index,
        })
        .collect();
    (
        Publisher {
            shared,
            retained: VecDeque::from([view]),
        },
        readers,
    )
}

impl<T: Send + Sync> Publisher<T> {
    /// The current view.
    pub fn current(&self) -> &T {
        let last = self
            .retained
            .back()
            .expect("the current view is always retained");
        &last.value
    }

    /// Generation of the current view.
    pub fn generation(&self) -> u64 {
        self.retained.back().map_or(0, |view| view.generation)
    }

    /// Makes `value` the current view and returns its generation. Waits for nobody.
    pub fn publish(&mut self, value: T) -> u64 {
        let generation = self.generation() + 1;
        let view = Arc::new(View { generation, value });
        // Release: a reader that loads the pointer sees the view complete. The generation follows,
        // so that a reader which sees it finds at least this view.
        self.shared
            .current
            .store(Arc::as_ptr(&view).cast_mut(), Ordering::Release);
        self.shared.generation.store(generation, Ordering::Release);
        self.retained.push_back(view);
        // Pairs with the barrier in `Reader::wake`.
        fence(Ordering::SeqCst);
        generation
    }

    /// Takes out the views that no reader can borrow any more.
    pub fn retire(&mut self) -> Vec<Retired<T>> {
        let oldest = oldest_acknowledged(&self.shared);
        let mut retired = Vec::new();
        while self.retained.len() > 1 && self.retained[0].generation < oldest {
            retired.extend(self.retained.pop_front().map(Retired));
        }
        retired
    }

    /// Whether views wait for readers to let go.
    pub fn has_retained(&self) -> bool {
        self.retained.len() > 1
    }

    /// Watches acknowledgements from other threads.
    pub fn acknowledgements(&self) -> Acknowledgements<T> {
        Acknowledgements {
            shared: self.shared.clone(),
        }
    }
}

fn oldest_acknowledged<T>(shared: &Shared<T>) -> u64 {
    // Pairs with the release of each acknowledgement: what the reader did with older views happened
    // before.
    shared
        .acknowledged
        .iter()
        .map(|word| word.load(Ordering::Acquire))
        .min()
        .unwrap_or(ASLEEP)
}

impl<T: Send + Sync> Acknowledgements<T> {
    /// Whether every reader sleeps or works on `generation` or a later view.
    pub fn reached(&self, generation: u64) -> bool {
        oldest_acknowledged(&self.shared) >= generation
    }

    /// What reader `index` acknowledged: a generation, or `None` while it sleeps.
    pub fn of(&self, index: usize) -> Option<u64> {
        let word = self.shared.acknowledged.get(index)?.load(Ordering::Acquire);
        (word != ASLEEP).then_some(word)
    }

    /// Generation of the current view.
    pub fn current(&self) -> u64 {
        self.shared.generation.load(Ordering::Acquire)
    }
}

impl<T> Clone for Acknowledgements<T> {
    fn clone(&self) -> Self {
        Acknowledgements {
            shared: self.shared.clone(),
        }
    }
}

impl<T: Send + Sync> Reader<T> {
    fn word(&self) -> &AtomicU64 {
        &self.shared.acknowledged[self.index]
    }

    /// Number of this reader.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Borrows the current view and acknowledges it. The exclusive borrow of the reader makes sure
    /// that no older view is held: acknowledging before letting go of the old view does not
    /// compile.
    pub fn borrow(&mut self) -> Borrowed<'_, T> {
        if self.word().load(Ordering::Relaxed) == ASLEEP {
            self.word().store(AWAKE, Ordering::Relaxed);
            // Pairs with the barrier in `Publisher::publish`.
            fence(Ordering::Release);
        }
        let current = self.shared.current.load(Ordering::Acquire);
        // SAFETY: `current` points into an Arc<View> that the publisher retains until this reader's
        // word is greater than its generation. The word is at most the generation acknowledged
        // below while the borrow lives (`&mut self` forbids another borrow or a sleep meanwhile),
        // or AWAKE until then.
        let view = unsafe { &*current };
        self.word().store(view.generation, Ordering::Release);
        Borrowed {
            view,
            shared: &self.shared,
        }
    }

    /// Says that this reader holds no view and will not for a while. The next [`Reader::borrow`]
    /// ends it.
    pub fn sleep(&mut self) {
        self.word().store(ASLEEP, Ordering::Release);
    }
}

impl<T> Drop for Reader<T> {
    fn drop(&mut self) {
        self.shared.acknowledged[self.index].store(ASLEEP, Ordering::Release);
        // Release: whatever was borrowed is let go before the publisher may free it.
        self.shared.readers.fetch_sub(1, Ordering::Release);
    }
}

impl<T> Drop for Publisher<T> {
    /// A reader that is left may still borrow the current view, so it is leaked rather than freed
    /// under it. Whoever owns both ends the readers first.
    fn drop(&mut self) {
        if self.shared.readers.load(Ordering::Acquire) != 0 {
            self.retained.drain(..).for_each(std::mem::forget);
        }
    }
}

impl<T> Borrowed<'_, T> {
    /// Whether no newer view has been published: one relaxed load of a line that changes only then.
    #[inline(always)]
    pub fn is_current(&self) -> bool {
        self.shared.generation.load(Ordering::Relaxed) == self.view.generation
    }

    /// Generation of this view.
    pub fn generation(&self) -> u64 {
        self.view.generation
    }
}

impl<T> Deref for Borrowed<'_, T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        &self.view.value
    }
}
