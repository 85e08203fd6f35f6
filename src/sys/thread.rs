//! Threads of our own.

use std::io;
use std::thread::{Builder, JoinHandle};

use super::refused::{Wanted, refused};

/// Starts a thread that has a name. Where none is to be had, that is an answer: nothing panics, and
/// what `body` owns is dropped here.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let thread = Builder::new().name(name.into());
    thread
        .spawn(body)
        .map_err(|error| refused(Wanted::Thread, error))
}
