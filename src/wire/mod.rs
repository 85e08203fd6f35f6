//! Views of the bytes on the wire: offsets as constants, one length check, accessors that cannot
//! fail afterwards.
//!
//! A view borrows plain bytes and therefore never guest memory: callers copy the headers out once
//! and look at the copy, so that what was checked is what is delivered.

mod ethernet;
mod flow;
mod summary;

pub use ethernet::{EthernetFrame, HEADER_LEN, Mac, MacParseError, VLAN_TAG_LEN, VlanTag};
pub use flow::flow_hash;
pub use summary::summary;
