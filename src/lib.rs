//! Pollux: a software switch for virtual machines.

pub mod config;
#[allow(unsafe_code)]
pub mod memory;
pub mod stats;
pub mod switch;
pub mod sync;
#[allow(unsafe_code)]
pub mod sys;
pub mod vhost_user;
pub mod virtio;
pub mod wire;
