//! Pollux: a software switch for virtual machines.

pub mod api;
pub mod cli;
pub mod config;
#[allow(unsafe_code)]
pub mod memory;
pub mod sync;
#[allow(unsafe_code)]
pub mod sys;
pub mod virtio;
