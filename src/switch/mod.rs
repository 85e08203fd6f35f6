//! Decides for each frame through which port it leaves.
//!
//! The code here gets the time as a parameter and does no I/O. Poll threads call it for each frame.
//! The control thread maintains the forwarding data base.

pub mod fdb;
pub mod forward;

/// Most ports of one switch: slots are numbered 0 to `MAX_SLOTS` − 1.
pub const MAX_SLOTS: usize = 4096;

/// One registration of a port.
///
/// A slot is used again after its port was removed. The generation tells the ports of one slot
/// apart. The generations of one slot only grow (compared modulo 2^32, starting below 2^31).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortRef {
    /// The port's place in the topology.
    pub slot: u16,
    /// Number of the registration in that slot.
    pub generation: u32,
}
