//! The report about a region that is not mapped.

use std::fmt;
use std::sync::Arc;

/// A region of a guest's memory that is not mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unusable {
    /// Where the guest sees it.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Why the region is not mapped.
    pub cause: Arc<str>,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (size, unit) = match self.size >> 20 {
            0 => (self.size >> 10, "KiB"),
            size => (size, "MiB"),
        };
        let (at, cause) = (self.guest_addr, &self.cause);
        write!(
            f,
            "guest memory of {size} {unit} at {at:#x} cannot be used: {cause}"
        )
    }
}
