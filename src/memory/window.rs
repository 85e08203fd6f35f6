//! A checked place in memory that the guest shares.
//!
//! A [`Window`] is a pointer and a length in one value. So an access is always checked against the
//! length that was validated with the pointer. Guest memory never becomes a Rust reference to plain
//! data: the guest writes to it at any time, so only copies and atomic accesses are allowed.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, compiler_fence};

/// Integers that [`Window::atomics`] makes.
pub trait Atomic: sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

macro_rules! atomic {
    ($($integer:ty),*) => { $(impl sealed::Sealed for $integer {} impl Atomic for $integer {})* };
}
atomic!(AtomicU16, AtomicU32, AtomicU64);

/// Bytes of a cache line.
const LINE: usize = 64;

/// A piece of guest memory: where it is mapped here, and how many bytes were checked.
///
/// All offsets and lengths are in bytes. The fixed-size accessors panic outside the window: their
/// offsets come from our own code, never from the guest. Offsets from the guest go through
/// [`Window::sub`], which returns `None` outside the window.
#[derive(Clone, Copy)]
pub struct Window<'m> {
    ptr: NonNull<u8>,
    len: usize,
    memory: PhantomData<&'m ()>,
}

// SAFETY: a window is only an address range; every access through it is a volatile copy or atomic,
// which any thread may do while the mapping lives ('m, established in `Window::from_raw`).
unsafe impl Send for Window<'_> {}
// SAFETY: as for Send: no access needs exclusive use.
unsafe impl Sync for Window<'_> {}

impl std::fmt::Debug for Window<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Window({} bytes)", self.len)
    }
}

impl<'m> Window<'m> {
    /// Makes a window of `len` bytes at `ptr`.
    ///
    /// # Safety
    /// `[ptr, ptr + len)` must stay mapped readable and writable for `'m`, and nobody may hold a
    /// Rust reference to any byte of it.
    #[inline(always)]
    pub unsafe fn from_raw(ptr: NonNull<u8>, len: usize) -> Self {
        Window {
            ptr,
            len,
            memory: PhantomData,
        }
    }

    /// A window of length 0.
    pub const EMPTY: Window<'m> = Window {
        ptr: NonNull::dangling(),
        len: 0,
        memory: PhantomData,
    };

    /// Length in bytes.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the address of the window, for alignment tests, prefetching and look-ups. It is
    /// never dereferenced.
    #[inline(always)]
    pub fn address(&self) -> usize {
        self.ptr.as_ptr() as usize
    }

    /// Returns the part `[offset, offset + len)`, or `None` if it is not inside this window.
    #[inline(always)]
    pub fn sub(&self, offset: usize, len: usize) -> Option<Window<'m>> {
        if offset > self.len || len > self.len - offset {
            return None;
        }
        // SAFETY: offset ≤ self.len, so the result stays inside (or one past) the mapping of
        // `from_raw`.
        let ptr = unsafe { self.ptr.add(offset) };
        Some(Window {
            ptr,
            len,
            memory: PhantomData,
        })
    }

    /// Returns the part after the first `offset` bytes, or `None` if there are fewer.
    #[inline(always)]
    pub fn behind(&self, offset: usize) -> Option<Window<'m>> {
        self.sub(offset, self.len.checked_sub(offset)?)
    }

    /// Copies `to.len()` bytes from guest memory at `offset`. Panics outside the window.
    #[inline(always)]
    pub fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        assert!(
            offset <= self.len && to.len() <= self.len - offset,
            "read outside the window"
        );
        // SAFETY: offset ≤ self.len, checked above.
        let src = unsafe { self.ptr.as_ptr().add(offset) };
        // SAFETY: source in the mapping (checked above), target a Rust slice: they cannot overlap,
        // since no Rust reference to guest memory exists (`from_raw`). A guest that writes
        // meanwhile makes the bytes arbitrary, which is what callers expect of them anyway.
        unsafe { std::ptr::copy_nonoverlapping(src, to.as_mut_ptr(), to.len()) }
        // The local copy must not change later. Without this fence the compiler might read guest
        // memory again where the local copy is used.
        compiler_fence(Ordering::AcqRel);
    }

    /// Copies `from` into guest memory at `offset`. Panics outside the window.
    #[inline(always)]
    pub fn write_bytes(&self, offset: usize, from: &[u8]) {
        assert!(
            offset <= self.len && from.len() <= self.len - offset,
            "write outside the window"
        );
        // SAFETY: offset ≤ self.len, checked above.
        let dst = unsafe { self.ptr.as_ptr().add(offset) };
        // SAFETY: as in `read_bytes`, with the roles exchanged.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), dst, from.len()) }
        #[cfg(test)]
        super::probe::wrote(dst.addr(), from.len());
        #[cfg(test)]
        super::probe::stored();
    }

    /// Copies the first `len` bytes of `from` to the start of this window. Panics if one of the
    /// windows is shorter.
    ///
    /// The two windows may overlap: a guest may send a buffer to itself through a shared file. So
    /// the copy works as `memmove` does.
    #[inline(always)]
    pub fn copy_from(&self, from: &Window<'_>, len: usize) {
        assert!(
            len <= self.len && len <= from.len,
            "copy outside the window"
        );
        // SAFETY: both ranges are inside live mappings, checked above; `copy` allows overlap.
        unsafe { std::ptr::copy(from.ptr.as_ptr(), self.ptr.as_ptr(), len) }
        #[cfg(test)]
        super::probe::wrote(self.address(), len);
        #[cfg(test)]
        super::probe::stored();
    }

    /// Returns the window as a slice of atomics, for loops that cannot afford one check for each
    /// access. Bytes at the end that do not fill an atomic are left out. Panics if the window is
    /// not aligned for `T`.
    pub fn atomics<T: Atomic>(&self) -> &'m [T] {
        assert!(
            self.address().is_multiple_of(align_of::<T>()),
            "unaligned access"
        );
        // SAFETY: inside the mapping, which lives for 'm, and aligned; atomics may be shared with
        // whoever else writes to the memory, and any bytes are valid ones.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().cast(), self.len / size_of::<T>()) }
    }

    #[inline(always)]
    fn place<T>(&self, offset: usize) -> *mut T {
        assert!(
            offset <= self.len && size_of::<T>() <= self.len - offset,
            "access outside the window"
        );
        // SAFETY: offset ≤ self.len, checked above.
        let place = unsafe { self.ptr.as_ptr().add(offset) };
        assert!(
            place.addr().is_multiple_of(align_of::<T>()),
            "unaligned access"
        );
        place.cast()
    }

    #[inline(always)]
    fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: `place` checked bounds and alignment; the mapping lives for 'm; every access to
        // these words from our side is atomic, and races with the guest are hardware accesses.
        unsafe { AtomicU16::from_ptr(self.place(offset)) }
    }

    #[inline(always)]
    fn atomic_u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as in `atomic_u16`.
        unsafe { AtomicU32::from_ptr(self.place(offset)) }
    }

    #[inline(always)]
    fn atomic_u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as in `atomic_u16`.
        unsafe { AtomicU64::from_ptr(self.place(offset)) }
    }

    /// Atomic little-endian load of 16 bits; `offset` must be aligned and inside.
    #[inline(always)]
    pub fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        u16::from_le(self.atomic_u16(offset).load(order))
    }

    /// Atomic little-endian store of 16 bits; `offset` must be aligned and inside.
    #[inline(always)]
    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        self.atomic_u16(offset).store(value.to_le(), order);
        #[cfg(test)]
        super::probe::stored();
    }

    /// Atomic little-endian load of 32 bits; `offset` must be aligned and inside.
    #[inline(always)]
    pub fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        u32::from_le(self.atomic_u32(offset).load(order))
    }

    /// Atomic little-endian store of 32 bits; `offset` must be aligned and inside.
    #[inline(always)]
    pub fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.atomic_u32(offset).store(value.to_le(), order);
        #[cfg(test)]
        super::probe::stored();
    }

    /// Atomic little-endian load of 64 bits; `offset` must be aligned and inside.
    #[inline(always)]
    pub fn load_u64(&self, offset: usize, order: Ordering) -> u64 {
        u64::from_le(self.atomic_u64(offset).load(order))
    }

    /// Atomic little-endian store of 64 bits; `offset` must be aligned and inside.
    #[inline(always)]
    pub fn store_u64(&self, offset: usize, value: u64, order: Ordering) {
        self.atomic_u64(offset).store(value.to_le(), order);
        #[cfg(test)]
        super::probe::stored();
    }

    /// Writes to every page without changing a byte, so that all pages are mapped for writing. A
    /// page that the file does not have yet is made. Returns the number of pages.
    pub fn touch(&self) -> usize {
        let page = rustix::param::page_size();
        let (mut at, mut pages) = (0, 0);
        while at < self.len {
            // SAFETY: at < self.len, so inside the mapping.
            let byte = unsafe { self.ptr.as_ptr().add(at) };
            // SAFETY: a byte is always aligned, the mapping lives for 'm, and the access is atomic.
            let byte = unsafe { AtomicU8::from_ptr(byte) };
            // The processor counts this as a write whether or not the byte is 0. The byte keeps its
            // value.
            let _ = byte.compare_exchange(0, 0, Ordering::Relaxed, Ordering::Relaxed);
            pages += 1;
            at += page - (self.address() + at) % page;
        }
        pages
    }

    /// Reads a byte of every page, until `go_on` returns false. A page that the file does not have
    /// yet is made.
    pub fn touch_to_read(&self, mut go_on: impl FnMut() -> bool) {
        let page = rustix::param::page_size();
        let mut at = 0;
        while at < self.len && go_on() {
            // SAFETY: at < self.len, so inside the mapping.
            let byte = unsafe { self.ptr.as_ptr().add(at) };
            // SAFETY: a byte is always aligned, the mapping lives for 'm, and the access is atomic.
            let byte = unsafe { AtomicU8::from_ptr(byte) };
            std::hint::black_box(byte.load(Ordering::Relaxed));
            at += page - (self.address() + at) % page;
        }
    }

    /// Prefetches the cache line at `offset`, for reading.
    ///
    /// Callers stay inside the window. The release profile does not check that: a prefetch
    /// of a place outside changes nothing that a program can see.
    #[inline(always)]
    pub fn prefetch(&self, offset: usize) {
        debug_assert!(offset < self.len, "prefetch outside the window");
        prefetch(self.ptr.as_ptr().wrapping_add(offset));
    }

    /// Prefetches the cache line at `offset` for writing: no other core keeps the line. See
    /// [`Window::prefetch`].
    #[inline(always)]
    pub fn prefetch_write(&self, offset: usize) {
        debug_assert!(offset < self.len, "prefetch outside the window");
        prefetch_write(self.ptr.as_ptr().wrapping_add(offset));
    }

    /// Prefetches all cache lines of the window for writing. The window must not be empty.
    #[inline(always)]
    pub fn prefetch_write_all(&self) {
        for line in (0..self.len).step_by(LINE) {
            prefetch_write(self.ptr.as_ptr().wrapping_add(line));
        }
        // The last line, which is one more if the window does not start at a line.
        self.prefetch_write(self.len.wrapping_sub(1));
    }
}

/// Prefetches the cache line at `place`, for reading.
#[inline(always)]
pub(super) fn prefetch<T>(place: *const T) {
    #[cfg(test)]
    super::probe::asked(place.addr());
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch has no architectural effect, whatever the address.
        unsafe { _mm_prefetch(place.cast::<i8>(), _MM_HINT_T0) }
    }
}

/// Prefetches the cache line at `place`, for writing.
#[inline(always)]
pub(super) fn prefetch_write<T>(place: *const T) {
    #[cfg(test)]
    super::probe::asked(place.addr());
    #[cfg(target_arch = "x86_64")]
    // The intrinsic becomes a prefetch for reading on the default target. Processors that do not
    // know the instruction do nothing.
    // SAFETY: a prefetch has no architectural effect, whatever the address.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) place, options(nostack, preserves_flags));
    }
}

/// Several windows, one after the other. The first window, which is mostly the only one, is kept
/// apart from the others.
#[derive(Clone, Copy, Debug)]
pub struct Pieces<'a, 'm> {
    first: Window<'m>,
    more: &'a [Window<'m>],
}

impl<'a, 'm> Pieces<'a, 'm> {
    /// No bytes.
    pub const NONE: Self = Pieces::new(Window::EMPTY, &[]);

    /// Pieces of `first` and `more`, in this order.
    #[inline(always)]
    pub const fn new(first: Window<'m>, more: &'a [Window<'m>]) -> Self {
        Pieces { first, more }
    }

    /// Returns all windows in order. The first window is left out if it is empty.
    #[inline(always)]
    pub fn iter(&self) -> impl Iterator<Item = Window<'m>> + Clone + use<'a, 'm> {
        let first = (!self.first.is_empty()).then_some(self.first);
        first.into_iter().chain(self.more.iter().copied())
    }
}
