//! Shares of a receive ring that is short of buffers.
//!
//! With first come, first served alone, a sender that floods a slow receiver takes every buffer the
//! moment it is free, and a sender of few frames finds none. So for two laps after a ring had no
//! buffer for somebody, the ring's last eighth is kept back. Each sending port draws from that at
//! most one part in 32 of what the ring delivers.
//!
//! - A sender's draw is counted in positions of the ring, which is the clock here. So a slower
//!   receiver means smaller shares, and an idle receiver costs nobody anything.
//! - A ring that was never full is first come, first served to the last buffer. So are senders of
//!   many frames among each other.
//! - A ring that makes no progress for [`STUCK`], because its driver posts fewer buffers than
//!   before, gives up what it keeps, until more buffers are free at once.
//!
//! Everything is relaxed and approximate. Two threads that count at the same time may lose one of
//! the counts. Ports whose slots are equal modulo [`SOURCES`] share a share.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::ReceiveQueue;

/// Number of shares. Ports whose slots are equal modulo this number have one share.
const SOURCES: usize = 256;
/// One part in `KEPT` of the buffers is kept back.
const KEPT: u64 = 8;
/// A sender may draw from the kept buffers one part in `SHARE` of what the ring delivers.
const SHARE: u64 = 32;
/// Number of laps for which a sender can save its share, for frames that come in clumps. So it
/// never has more than what is kept back.
const SAVED: u64 = SHARE / KEPT;
/// A ring that makes no progress for so long gives up what it keeps. Its driver posts fewer buffers
/// than it once did, or stands still. More is kept again once more buffers are free at once.
const STUCK: Duration = Duration::from_millis(100);
/// Most time without progress that is counted between two refusals. Beyond it, the poll thread
/// itself may have lost its CPU, and found the ring as it had left it. With a lower limit, a sender
/// that sends a frame now and then would wait long.
const WATCHED: Duration = Duration::from_millis(20);

/// The state of one receive queue's shares.
#[derive(Debug)]
pub(super) struct Shares {
    size: u64,
    /// The ring is short while its position is before this one; 0 if the ring is not short.
    short_until: AtomicU64,
    /// Most buffers that were free at once. A packed ring does not tell, so at first it is assumed
    /// to have all its buffers free.
    most: AtomicU32,
    /// Position at the last refusal while buffers were kept back, when that refusal was
    /// (nanoseconds after `made`), and for how many nanoseconds the position has not changed.
    stuck_at: AtomicU64,
    refused_at: AtomicU64,
    stuck_for: AtomicU64,
    /// Where the free buffers ended when the retry at the end of a pass last failed.
    failed_at: AtomicU64,
    made: Instant,
    /// By sender: the position at which the sender has paid for all that it drew.
    paid_at: Box<[AtomicU64]>,
}

impl Shares {
    pub(super) fn new(size: u16, packed: bool) -> Self {
        Shares {
            size: u64::from(size),
            short_until: AtomicU64::new(0),
            most: AtomicU32::new(if packed { size.into() } else { 0 }),
            stuck_at: AtomicU64::new(u64::MAX),
            refused_at: AtomicU64::new(0),
            stuck_for: AtomicU64::new(0),
            failed_at: AtomicU64::new(u64::MAX),
            made: Instant::now(),
            paid_at: (0..SOURCES).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Notes that `free` buffers are free.
    #[inline(always)]
    pub(super) fn see(&self, free: u64) {
        if free > u64::from(self.most.load(Ordering::Relaxed)) {
            self.most.store(free as u32, Ordering::Relaxed);
        }
    }

    /// Whether senders are held to their shares at `position`.
    #[inline(always)]
    pub(super) fn is_short(&self, position: impl FnOnce() -> u64) -> bool {
        let until = self.short_until.load(Ordering::Relaxed);
        until != 0 && position() < until
    }

    /// Returns the number of buffers that are kept back.
    pub(super) fn kept(&self) -> u64 {
        u64::from(self.most.load(Ordering::Relaxed)).min(self.size) / KEPT
    }

    /// Returns how many of the kept buffers a sender may have at `position`.
    pub(super) fn credit(&self, source: u16, position: u64) -> u64 {
        let paid = self.paid_at(source).load(Ordering::Relaxed);
        let saved = SAVED * self.size.max(SHARE);
        (position + saved).saturating_sub(paid.max(position)) / SHARE
    }

    /// Charges a sender for `buffers` of the kept buffers.
    pub(super) fn draw(&self, source: u16, position: u64, buffers: u64) {
        let paid = self.paid_at(source);
        let from = paid.load(Ordering::Relaxed).max(position);
        paid.store(from + buffers * SHARE, Ordering::Relaxed);
    }

    fn paid_at(&self, source: u16) -> &AtomicU64 {
        &self.paid_at[usize::from(source) % SOURCES]
    }

    /// Notes that a sender found no buffer at `position`, while `free` buffers are kept back. The
    /// ring is short for the next two laps, unless it stands still.
    #[cold]
    pub(super) fn refused(&self, position: u64, free: u64) {
        if free > 0 && self.is_stuck(position) {
            self.most.store(free as u32, Ordering::Relaxed);
            self.short_until.store(0, Ordering::Relaxed);
            return;
        }
        // Not stored at every refusal, because other threads read this line.
        if self.short_until.load(Ordering::Relaxed) < position + self.size {
            self.short_until
                .store(position + 2 * self.size, Ordering::Relaxed);
        }
    }

    fn is_stuck(&self, position: u64) -> bool {
        let now = self.made.elapsed();
        let before = self.refused_at.swap(nanos(now), Ordering::Relaxed);
        let watched = now
            .saturating_sub(Duration::from_nanos(before))
            .min(WATCHED);
        // Acquire pairs with the release below: a thread that finds the new position also finds the
        // time reset.
        if self.stuck_at.load(Ordering::Acquire) != position {
            self.stuck_for.store(0, Ordering::Relaxed);
            self.stuck_at.store(position, Ordering::Release);
            return false;
        }
        let stuck = self.stuck_for.load(Ordering::Relaxed) + nanos(watched);
        self.stuck_for.store(stuck, Ordering::Relaxed);
        stuck >= nanos(STUCK)
    }

    /// Notes that the retry at the end of a pass failed while the free buffers ended at `end`.
    pub(super) fn retry_failed(&self, end: u64) {
        self.failed_at.store(end, Ordering::Relaxed);
    }

    /// Whether the driver has posted any buffer since a retry last failed.
    pub(super) fn is_worth_a_retry(&self, end: u64) -> bool {
        self.failed_at.load(Ordering::Relaxed) != end
    }
}

/// Returns a time in nanoseconds. 64 bits hold 584 years.
fn nanos(time: Duration) -> u64 {
    time.as_nanos() as u64
}

/// How senders share a ring that is short of buffers.
impl ReceiveQueue {
    /// Whether the ring had no buffer for a sender within the last two laps. Senders are then held
    /// to their shares.
    #[inline(always)]
    pub fn is_short(&self) -> bool {
        self.shares.is_short(|| self.claims.next())
    }

    /// Returns the number of buffers that are kept back while the ring is short.
    pub fn kept(&self) -> u64 {
        self.shares.kept()
    }

    /// Returns how many of the kept buffers a sending port may have now.
    pub fn credit(&self, source: u16) -> u64 {
        self.shares.credit(source, self.claims.next())
    }

    /// Charges a sending port for `buffers` of the kept buffers.
    pub fn draw(&self, source: u16, buffers: u64) {
        self.shares.draw(source, self.claims.next(), buffers);
    }

    /// Notes that a sending port found no buffer. The ring is short from now on.
    #[cold]
    pub fn refused(&self) {
        let position = self.claims.next();
        // Behind an open claim the driver sees no used buffer, and so posts none. Then the ring
        // stands still because of a poll thread, and gives up nothing.
        let open = self.published() != position;
        let free = if open {
            0
        } else {
            self.end_of_free().saturating_sub(position)
        };
        self.shares.refused(position, free);
    }

    /// Notes that the retry at the end of a pass found no buffer either.
    #[cold]
    pub fn retry_failed(&self) {
        self.shares.retry_failed(self.end_of_free());
    }

    /// Whether the driver has posted any buffer since a retry last failed.
    pub fn is_worth_a_retry(&self) -> bool {
        self.shares.is_worth_a_retry(self.end_of_free())
    }

    pub(super) fn end_of_free(&self) -> u64 {
        let position = self.claims.next();
        let end = position + self.claims.room(position);
        self.ring.free_to(position, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_draws_one_part_in_32_and_the_rest_is_kept() {
        let shares = Shares::new(256, false);
        shares.see(200);
        shares.see(100);
        assert_eq!(shares.kept(), 25);
        assert!(!shares.is_short(|| 0));
        shares.refused(1000, 0);
        assert!(shares.is_short(|| 1511) && !shares.is_short(|| 1512));
        assert_eq!(shares.credit(1, 1000), 32);
        shares.draw(1, 1000, 29);
        assert_eq!((shares.credit(1, 1000), shares.credit(2, 1000)), (3, 32));
        // More than the credit, over several buffers: a debt.
        shares.draw(1, 1000, 11);
        assert_eq!(
            [1000, 1256, 1288, 9999].map(|at| shares.credit(1, at)),
            [0, 0, 1, 32]
        );
    }

    #[test]
    fn small_rings_keep_little_and_give_everyone_something() {
        let shares = Shares::new(4, false);
        shares.see(4);
        assert_eq!((shares.kept(), shares.credit(0, 0)), (0, 4));
    }

    #[test]
    fn a_ring_that_stands_still_gives_up_what_it_keeps() {
        let mut shares = Shares::new(256, true);
        let looks = STUCK.div_duration_f64(WATCHED) as u64;
        let mut refuse = |position, times| {
            for _ in 0..times {
                shares.made -= WATCHED;
                shares.refused(position, 30);
            }
            (shares.is_short(|| position), shares.kept())
        };
        assert_eq!(refuse(300, looks), (true, 32));
        // Progress in between.
        assert_eq!(refuse(301, looks), (true, 32));
        assert_eq!(refuse(301, 1), (false, 3));
    }

    #[test]
    fn a_thread_that_was_away_does_not_take_the_ring_for_one_that_stands_still() {
        let mut shares = Shares::new(256, true);
        for _ in 0..4 {
            shares.refused(300, 30);
            shares.made -= 10 * STUCK;
        }
        assert_eq!((shares.is_short(|| 300), shares.kept()), (true, 32));
    }
}
