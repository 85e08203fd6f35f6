//! In test builds, a look at memory after every store of this thread: what another process finds if
//! it is killed there. And a list of the places that it asks for and writes to.

use std::cell::RefCell;
use std::ops::Range;

type Look = Box<dyn FnMut()>;

thread_local! {
    static LOOK: RefCell<Option<Look>> = const { RefCell::new(None) };
    static TOUCHED: RefCell<Option<Touched>> = const { RefCell::new(None) };
}

/// Addresses, in order.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    /// Asked for ahead, to be read or written.
    pub(crate) asked: Vec<usize>,
    /// Copied to.
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

/// Runs something; what it asked for and copied to.
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

/// Runs something, with a look after each of its stores.
pub(crate) fn watched<R>(look: impl FnMut() + 'static, run: impl FnOnce() -> R) -> R {
    LOOK.set(Some(Box::new(look)));
    // Also where something panics.
    let _away = Away;
    run()
}

struct Away;

impl Drop for Away {
    fn drop(&mut self) {
        LOOK.set(None);
    }
}
