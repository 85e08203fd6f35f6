//! Words that belong to the switch alone: on the heap, or in a file that outlives the process.

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::PinnedWindow;

/// An array of words. Clones share the words.
#[derive(Clone)]
pub struct Words {
    start: NonNull<AtomicU64>,
    len: usize,
    /// Keeps the words at their address.
    _owner: Owner,
}

#[derive(Clone)]
enum Owner {
    Heap { _words: Arc<[AtomicU64]> },
    File { _window: PinnedWindow },
}

// SAFETY: the address of words that are atomic, and of which the owner, Send itself, is never
// touched.
unsafe impl Send for Words {}
// SAFETY: as for Send.
unsafe impl Sync for Words {}

impl Words {
    /// Makes `len` words on the heap, all zero.
    pub fn zeroed(len: usize) -> Self {
        let words: Arc<[AtomicU64]> = (0..len).map(|_| AtomicU64::new(0)).collect();
        Words {
            start: NonNull::from(&words[..]).cast(),
            len,
            _owner: Owner::Heap { _words: words },
        }
    }

    /// Returns the words of a mapped file, which no guest may have mapped. Bytes at the end that do
    /// not fill a word are left out.
    pub fn mapped(window: PinnedWindow) -> Self {
        let start = window.start().cast();
        assert!(start.is_aligned(), "files are mapped at pages");
        Words {
            start,
            len: window.len() / size_of::<AtomicU64>(),
            _owner: Owner::File { _window: window },
        }
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    #[inline(always)]
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `start` is aligned, and `len` words from there on live as long as the owner,
        // which `self` keeps. Whoever else has the file mapped writes whole words, as we do:
        // atomics are all that is ever made of them.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Words({})", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::FaultMark;
    use crate::sys::memfd;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering;

    #[test]
    fn clones_are_the_same_words() {
        let words = Words::zeroed(3);
        let clone = words.clone();
        words[2].store(7, Ordering::Relaxed);
        drop(words);
        assert_eq!(clone.len(), 3);
        assert_eq!(clone[2].load(Ordering::Relaxed), 7);
    }

    #[test]
    fn what_is_written_stays_in_the_file() {
        let file = memfd::create("words", 4096).unwrap();
        let window = PinnedWindow::map(&file, 0, 20, &FaultMark::new()).unwrap();
        let words = Words::mapped(window);
        assert_eq!(words.len(), 2);
        words[1].store(0x1234, Ordering::Relaxed);
        drop(words);
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 8).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), 0x1234);
    }
}
