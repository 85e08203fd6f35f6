//! Guest memory in the API, if there is something to report.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A region of guest memory that a frontend has shared and the switch cannot use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnusableMemory {
    /// Where the guest sees it.
    pub guest_address: u64,
    /// Its length.
    pub bytes: u64,
    /// Why it cannot be used.
    pub cause: String,
}
