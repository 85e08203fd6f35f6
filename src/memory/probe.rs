//! Only in test builds. Lets a test look at memory after every store of this thread, as another
//! process finds it if this one is killed there. Also lists the places that the thread prefetches
//! and writes to.

use std::cell::RefCell;
use std::ops::Range;

type Look = Box<dyn FnMut()>;

thread_local! {
    static LOOK: RefCell<Option<Look>> = const { RefCell::new(None) };
    static TOUCHED: RefCell<Option<Touched>> = const { RefCell::new(None) };
}

/// Addresses that were touched, in order.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    /// Places that were prefetched, for reading or writing.
    pub(crate) asked: Vec<usize>,
    /// Ranges that were written by a copy.
    pub(crate) written: Vec<Range<usize>>,
}

/// Every prefetch calls this.
pub(crate) fn asked(at: usize) {
    TOUCHED.with_borrow_mut(|touched| {
        if let Some(touched) = touched {
            touched.asked.push(at);
        }
    });
}

/// Every copy into guest memory calls this.
pub(crate) fn wrote(at: usize, len: usize) {
    TOUCHED.with_borrow_mut(|touched| {
        if let Some(touched) = touched {
            touched.written.push(at..at + len);
        }
    });
}

/// Runs `run`, and returns what it has prefetched and copied to.
pub(crate) fn touched(run: impl FnOnce()) -> Touched {
    TOUCHED.set(Some(Touched::default()));
    run();
    TOUCHED.take().unwrap_or_default()
}

/// Every store calls this.
pub(crate) fn stored() {
    LOOK.with_borrow_mut(|look| {
        if let Some(look) = look {
            look();
        }
    });
}

/// Runs `run`, and calls `look` after each of its stores.
pub(crate) fn watched<R>(look: impl FnMut() + 'static, run: impl FnOnce() -> R) -> R {
    LOOK.set(Some(Box::new(look)));
    // Removes `look` again, even if `run` panics.
    let _away = Away;
    run()
}

struct Away;

impl Drop for Away {
    fn drop(&mut self) {
        LOOK.set(None);
    }
}
