//! Starting threads.

use std::io;
use std::thread::{Builder, JoinHandle};

use super::refused::{Wanted, refused};

/// Starts a thread with a name. If the system refuses a thread, this returns an error and does not
/// panic. What `body` owns is dropped then.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let thread = Builder::new().name(name.into());
    thread
        .spawn(body)
        .map_err(|error| refused(Wanted::Thread, error))
}
