//! Guest memory: regions that frontends share, mapped here, and checked places in them.

mod shared;
mod window;

use std::sync::Arc;

pub use shared::SharedMemory;
pub use window::Window;

/// One mapped region. (Filled in by the memory work.)
#[derive(Debug)]
pub struct Region;

/// A window that keeps the region it lies in mapped.
#[derive(Clone, Debug)]
pub struct PinnedWindow {
    _region: Arc<Region>,
}

/// An immutable map of a guest's memory.
#[derive(Debug)]
pub struct GuestMemory;
