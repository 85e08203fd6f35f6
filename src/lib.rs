//! Pollux: a software switch for virtual machines.

pub mod bench;
pub mod config;
#[allow(unsafe_code)]
pub mod memory;
pub mod sync;
pub mod virtio;
