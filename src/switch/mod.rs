//! What the switch decides: for each frame, which port it leaves through.
//!
//! Everything here is told the time and does no I/O; poll threads call it for each frame, the
//! control thread maintains the forwarding data base.

pub mod fdb;
pub mod forward;

/// Most ports of one switch: slots are numbered 0 to `MAX_SLOTS` − 1.
pub const MAX_SLOTS: usize = 4096;

/// One registration of a port.
///
/// A slot is used again after its port was removed; the generation tells the tenants apart. The
/// generations of one slot only grow (compared modulo 2^32, starting below 2^31).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortRef {
    /// The port's place in the topology.
    pub slot: u16,
    /// Which registration in that place.
    pub generation: u32,
}
