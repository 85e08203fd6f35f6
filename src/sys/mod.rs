//! System calls that no safe wrapper offers, each behind a safe function.

pub mod account;
