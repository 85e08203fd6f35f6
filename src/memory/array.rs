//! Arrays of words in guest memory. Alignment and length are checked when an array is made, so that
//! an access costs one comparison. Rings are made of arrays. Memory at an address that a guest
//! gives goes through a [`Window`].

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::window::{prefetch, prefetch_write};
use super::{PinnedWindow, Region, Window};

/// A little-endian word of guest memory. Implemented for 16, 32 and 64 bits.
pub trait Word: Copy + sealed::Word {}

impl<T: Copy + sealed::Word> Word for T {}

mod sealed {
    use super::Ordering;

    pub trait Word {
        /// # Safety
        /// `place` must be aligned and mapped; everybody on our side accesses it atomically.
        unsafe fn load(place: *mut Self, order: Ordering) -> Self;
        /// # Safety
        /// As for `load`.
        unsafe fn store(place: *mut Self, value: Self, order: Ordering);
    }
}

macro_rules! word {
    ($word:ty, $atomic:ty) => {
        impl sealed::Word for $word {
            #[inline(always)]
            unsafe fn load(place: *mut Self, order: Ordering) -> Self {
                // SAFETY: aligned, mapped, and accessed atomically on our side, as the caller
                // promises; races with the guest are hardware accesses.
                let word = unsafe { <$atomic>::from_ptr(place) };
                Self::from_le(word.load(order))
            }

            #[inline(always)]
            unsafe fn store(place: *mut Self, value: Self, order: Ordering) {
                // SAFETY: as in `load`.
                let word = unsafe { <$atomic>::from_ptr(place) };
                word.store(value.to_le(), order);
            }
        }
    };
}

word!(u16, AtomicU16);
word!(u32, AtomicU32);
word!(u64, AtomicU64);

/// The words of a piece of guest memory, as many as fit. The array keeps them mapped.
pub struct PinnedArray<T> {
    start: NonNull<T>,
    count: usize,
    /// Keeps the words mapped.
    _region: Arc<Region>,
    words: PhantomData<T>,
}

// SAFETY: address and length of a place in a region, which is Send and Sync and lives as long;
// every access is atomic.
unsafe impl<T: Word> Send for PinnedArray<T> {}
// SAFETY: as for Send.
unsafe impl<T: Word> Sync for PinnedArray<T> {}

impl<T: Word> PinnedArray<T> {
    /// Returns the words of `place`; `None` if they would not be aligned.
    pub fn new(place: &PinnedWindow) -> Option<Self> {
        let start = place.start().cast::<T>();
        start.is_aligned().then(|| PinnedArray {
            start,
            count: place.len() / size_of::<T>(),
            _region: Arc::clone(place.region()),
            words: PhantomData,
        })
    }

    /// Returns the array as a value. A loop that stores keeps the value in registers. With a
    /// reference it would load pointer and length again after each store.
    #[inline(always)]
    pub fn array(&self) -> Array<'_, T> {
        Array {
            start: self.start,
            count: self.count,
            place: PhantomData,
        }
    }

    /// Loads a word. Panics outside the array, because indices come from our own code.
    #[inline(always)]
    pub fn load(&self, index: usize, order: Ordering) -> T {
        self.array().load(index, order)
    }

    /// Loads two neighbouring words. Loads the second word first, with `order`, then the first
    /// word, relaxed. Panics outside the array.
    #[inline(always)]
    pub fn load_two(&self, index: usize, order: Ordering) -> [T; 2] {
        self.array().load_two(index, order)
    }

    /// Stores a word. Panics outside the array.
    #[inline(always)]
    pub fn store(&self, index: usize, value: T, order: Ordering) {
        self.array().store(index, value, order);
    }

    /// Stores two neighbouring words, the second word first. Panics outside the array.
    #[inline(always)]
    pub fn store_two(&self, index: usize, values: [T; 2], order: Ordering) {
        self.array().store_two(index, values, order);
    }

    /// Prefetches the cache line of a word, for reading.
    #[inline(always)]
    pub fn prefetch(&self, index: usize) {
        prefetch(self.array().place(index));
    }

    /// Prefetches the cache line of a word, for writing: no other core keeps the line.
    #[inline(always)]
    pub fn prefetch_write(&self, index: usize) {
        prefetch_write(self.array().place(index));
    }

    /// Returns the whole array as a window, for accesses of other sizes.
    #[inline(always)]
    pub fn window(&self) -> Window<'_> {
        // SAFETY: `count` words from `start` on are inside the mapping (`new`), which the borrow
        // keeps; no Rust reference to guest memory exists anywhere.
        unsafe { Window::from_raw(self.start.cast(), self.count * size_of::<T>()) }
    }
}

/// The words of a [`PinnedArray`].
#[derive(Clone, Copy, Debug)]
pub struct Array<'a, T> {
    start: NonNull<T>,
    count: usize,
    place: PhantomData<&'a T>,
}

impl<T: Word> Array<'_, T> {
    #[inline(always)]
    fn place(self, index: usize) -> *mut T {
        assert!(index < self.count, "access outside the array");
        // SAFETY: index < count, so the word is inside the place of `PinnedArray::new`, which the
        // borrow keeps mapped.
        unsafe { self.start.as_ptr().add(index) }
    }

    /// Returns the places of the word at `index` and of the next word.
    #[inline(always)]
    fn two(self, index: usize) -> [*mut T; 2] {
        let second = self.place(index + 1);
        // SAFETY: `second` is at least one word behind `start`.
        [unsafe { second.sub(1) }, second]
    }

    /// [`PinnedArray::load`].
    #[inline(always)]
    pub fn load(self, index: usize, order: Ordering) -> T {
        // SAFETY: `place` is inside the mapping, and aligned as `start` is.
        unsafe { T::load(self.place(index), order) }
    }

    /// [`PinnedArray::load_two`].
    #[inline(always)]
    pub fn load_two(self, index: usize, order: Ordering) -> [T; 2] {
        let [first, second] = self.two(index);
        // SAFETY: as in `load`.
        let second = unsafe { T::load(second, order) };
        // SAFETY: as in `load`.
        [unsafe { T::load(first, Ordering::Relaxed) }, second]
    }

    /// [`PinnedArray::store`].
    #[inline(always)]
    pub fn store(self, index: usize, value: T, order: Ordering) {
        // SAFETY: as in `load`.
        unsafe { T::store(self.place(index), value, order) }
        #[cfg(test)]
        super::probe::stored();
    }

    /// [`PinnedArray::store_two`].
    #[inline(always)]
    pub fn store_two(self, index: usize, values: [T; 2], order: Ordering) {
        let [first, second] = self.two(index);
        // SAFETY: as in `load`.
        unsafe { T::store(second, values[1], order) }
        #[cfg(test)]
        super::probe::stored();
        // SAFETY: as in `load`.
        unsafe { T::store(first, values[0], order) }
        #[cfg(test)]
        super::probe::stored();
    }
}

impl<T> std::fmt::Debug for PinnedArray<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PinnedArray({} words)", self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::FaultMark;
    use crate::sys::memfd;
    use Ordering::Relaxed;

    fn place(offset: u64, len: u64) -> PinnedWindow {
        let file = memfd::create("array", 4096).unwrap();
        let all = PinnedWindow::map(&file, 0, 4096, &FaultMark::new()).unwrap();
        PinnedWindow::new(all.region(), offset, len).unwrap()
    }

    #[test]
    fn words_are_little_endian_and_counted_whole() {
        let place = place(8, 15);
        let words = PinnedArray::<u32>::new(&place).unwrap();
        words.store(2, 0x0403_0201, Relaxed);
        assert_eq!(words.load(2, Relaxed), 0x0403_0201);
        let mut bytes = [0; 4];
        place.window().read_bytes(8, &mut bytes);
        assert_eq!(bytes, [1, 2, 3, 4]);
        assert_eq!(words.window().len(), 12);
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn a_word_that_is_not_whole_is_outside() {
        let words = PinnedArray::<u32>::new(&place(8, 15)).unwrap();
        words.load(3, Relaxed);
    }

    #[test]
    fn words_are_aligned() {
        assert!(PinnedArray::<u64>::new(&place(4, 16)).is_none());
        assert!(PinnedArray::<u32>::new(&place(4, 16)).is_some());
    }
}
