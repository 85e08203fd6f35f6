//! In test builds, a look at memory after every store of this thread: what another process finds if it is killed there.

use std::cell::RefCell;

type Look = Box<dyn FnMut()>;

thread_local! {
    static LOOK: RefCell<Option<Look>> = const { RefCell::new(None) };
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
