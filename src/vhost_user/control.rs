//! When a session looks for commands in its guest's controlq.
//!
//! No poll thread ever looks for commands, because a command may wait for all poll threads. The
//! session watches the kick descriptor as poll threads watch theirs: edge-triggered in an epoll,
//! and without reading it. Other owners of the descriptor could make a read block. A driver that
//! kicks or commands without end delays only itself. It gets `TURNS` turns at once, then one a
//! millisecond, with at most `COMMANDS` commands each. The frontend's messages are served in
//! between.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Gone;
use super::device::DeviceState;
use crate::sys::epoll::Sleeper;
use crate::sys::eventfd::KickFd;

/// Most commands that are answered in one turn of the session.
const COMMANDS: usize = 16;
/// Turns that may follow each other without a pause.
const TURNS: u32 = 64;
/// Time after which one more turn is allowed.
const TURN: Duration = Duration::from_millis(1);

/// The session's part in its guest's controlq.
pub(super) struct Control {
    watched: Option<(Arc<KickFd>, Sleeper)>,
    /// Whether there may be commands.
    due: bool,
    left: u32,
    refilled: Instant,
}

impl Control {
    pub(super) fn new(now: Instant) -> Self {
        Control {
            watched: None,
            due: false,
            left: TURNS,
            refilled: now,
        }
    }

    /// Answers commands, if there may be any. Returns how long to wait before the next turn, if
    /// there may be more commands.
    pub(super) fn serve(
        &mut self,
        device: &mut DeviceState,
        now: Instant,
    ) -> Result<Option<Duration>, Gone> {
        let changed = device.take_controlq_changed();
        if changed {
            self.watch(device.controlq_kick());
        }
        self.due |= changed && device.controlq_kick().is_some();
        if !self.due {
            return Ok(None);
        }
        if !self.may(now) {
            return Ok(Some(TURN));
        }
        self.due = device.serve_controlq(COMMANDS)?;
        Ok(self.due.then_some(Duration::ZERO))
    }

    /// Returns the descriptor that becomes readable when the driver kicks. Returns `None` while
    /// commands wait for their turn.
    pub(super) fn bell(&self) -> Option<BorrowedFd<'_>> {
        let (_, sleeper) = self.watched.as_ref().filter(|_| !self.due)?;
        Some(sleeper.as_fd())
    }

    /// The driver has kicked: takes the event out of the epoll, and notes that there may be
    /// commands.
    pub(super) fn kicked(&mut self) {
        if let Some((_, sleeper)) = &self.watched {
            sleeper.sleep(Some(Duration::ZERO), |_| {});
        }
        self.due = true;
    }

    /// No message and no kick came for a while. The controlq may have no kick descriptor, or its
    /// epoll could not be made. So the session looks for commands all the same.
    pub(super) fn idle(&mut self, device: &DeviceState) {
        self.due |= device.controlq_kick().is_some();
    }

    fn watch(&mut self, kick: Option<Option<Arc<KickFd>>>) {
        let kick = kick.flatten();
        let same = |watched: &Arc<KickFd>| kick.as_ref().is_some_and(|k| Arc::ptr_eq(k, watched));
        if self.watched.as_ref().is_some_and(|(kick, _)| same(kick)) {
            return;
        }
        // Closing the old epoll also removes the old descriptor from it.
        self.watched = kick.and_then(|kick| {
            let sleeper = Sleeper::new().ok()?;
            sleeper.add_kick(&*kick, 0).ok()?;
            Some((kick, sleeper))
        });
    }

    fn may(&mut self, now: Instant) -> bool {
        let more = now.duration_since(self.refilled).as_millis() / TURN.as_millis();
        if more > 0 {
            let more = u32::try_from(more).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(more).min(TURNS);
            self.refilled = now;
        }
        let may = self.left > 0;
        self.left -= u32::from(may);
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_without_end_gets_a_turn_a_millisecond() {
        let begun = Instant::now();
        let mut control = Control::new(begun);
        let turns = |control: &mut Control, at: Duration| {
            (0..1000).filter(|_| control.may(begun + at)).count()
        };
        assert_eq!(turns(&mut control, Duration::ZERO), 64);
        assert_eq!(turns(&mut control, TURN / 2), 0);
        assert_eq!(turns(&mut control, 10 * TURN), 10);
        assert_eq!(turns(&mut control, Duration::from_secs(9)), 64);
    }
}
