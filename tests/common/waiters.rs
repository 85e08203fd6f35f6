//! Waiters on a descriptor, so many that signalling it is slow.

use std::os::fd::AsRawFd;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Hangs `count * count` epoll waiters on a descriptor, as any holder of it can. They go with the
/// result.
pub(crate) fn hang_waiters(on: &EventFd, count: usize) -> (Vec<EventFd>, Vec<Epoll>) {
    // Epoll tells registrations apart by descriptor number, so few descriptors make many waiters.
    let names = (0..count).map(|_| on.try_clone().expect("a descriptor"));
    let names: Vec<EventFd> = names.collect();
    let beds: Vec<Epoll> = (0..count)
        .map(|_| Epoll::new().expect("an epoll"))
        .collect();
    for bed in &beds {
        for name in &names {
            let event = EpollEvent::new(EventSet::IN, 0);
            bed.ctl(ControlOperation::Add, name.as_raw_fd(), event)
                .expect("a waiter");
        }
    }
    (names, beds)
}
