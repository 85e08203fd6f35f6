//! The production files as they stand, and the models over them.

#[allow(dead_code, reason = "not everything has a model")]
#[path = "../../src/virtio/claim.rs"]
pub mod claim;
#[allow(dead_code, reason = "not everything has a model")]
#[path = "../../src/stats/counter.rs"]
pub mod counter;
#[path = "delivery.rs"]
pub mod delivery;
#[allow(dead_code, reason = "not everything has a model")]
#[path = "../../src/daemon/handover.rs"]
pub mod handover;
#[allow(dead_code, reason = "not everything has a model")]
#[path = "../../src/daemon/mailbox.rs"]
pub mod mailbox;
#[path = "observers.rs"]
pub mod observers;
#[allow(dead_code, reason = "not everything has a model")]
#[path = "../../src/observe/pen.rs"]
pub mod pen;
#[path = "removal.rs"]
pub mod removal;
#[allow(dead_code, reason = "not everything has a model")]
#[path = "../../src/sys/snapshot.rs"]
pub mod snapshot;
#[path = "views.rs"]
pub mod views;
