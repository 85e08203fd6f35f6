//! Views of the bytes on the wire. Offsets are constants. One length check is enough, and accessors
//! cannot fail after it.
//!
//! A view borrows plain bytes, so never guest memory. Callers copy the headers once and look at the
//! copy. So the headers that are checked are those that are delivered.

mod ethernet;
mod flow;
mod summary;

pub use ethernet::{EthernetFrame, HEADER_LEN, Mac, MacParseError, VLAN_TAG_LEN, VlanTag};
pub use flow::flow_hash;
pub use summary::summary;
