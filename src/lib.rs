//! Pollux: a software switch for virtual machines.

pub mod api;
pub mod bench;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod frame;
#[allow(unsafe_code)]
pub mod memory;
pub mod poll;
pub mod port;
pub mod stats;
pub mod switch;
pub mod sync;
#[allow(unsafe_code)]
pub mod sys;
pub mod topology;
pub mod vhost_user;
pub mod virtio;
pub mod wire;
