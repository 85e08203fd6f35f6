//! Counters of ports and poll threads.
//!
//! Each poll thread writes only its own block, which is padded to whole cache lines. So to count is
//! a relaxed load, an addition and a relaxed store, without a locked instruction or a shared line
//! on the data path. API and metrics add the blocks up. A sum that is taken while frames flow is a
//! few frames old, and its parts may be of different instants.
//!
//! A dropped frame is a normal, counted outcome. Every drop has exactly one [`DropReason`] and is
//! counted at one port: at the ingress port if the frame never got a destination, at the egress
//! port if one destination did not get the frame. *rx* and *tx* are always meant from the switch's
//! view.

use std::collections::BTreeMap;
use std::time::Duration;

use crossbeam_utils::CachePadded;
use serde::{Deserialize, Serialize};

mod counter;

pub use counter::Counter;

/// Most poll threads. Each port has one block of counters for each of them.
pub const MAX_POLL_THREADS: usize = 32;

/// Which port a drop is counted at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// At the port through which the frame entered the switch.
    Rx,
    /// At the port through which the frame should have left.
    Tx,
}

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $direction:ident;)*) => {
        /// Why a frame went no further.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum DropReason {
            $($(#[$doc])* $variant,)*
        }

        impl DropReason {
            /// Every reason, in the order of their numbers.
            pub const ALL: [DropReason; [$($name),*].len()] = [$(DropReason::$variant),*];

            /// The name in metrics and the API.
            pub const fn name(self) -> &'static str {
                match self { $(DropReason::$variant => $name,)* }
            }

            /// Which port the drop is counted at.
            pub const fn direction(self) -> Direction {
                match self { $(DropReason::$variant => Direction::$direction,)* }
            }
        }
    };
}

// One row a reason, so that name, direction and `ALL` cannot fall out of step.
drop_reasons! {
    /// The descriptor chain breaks a rule of the ring: index or range out of bounds, a loop, wrong
    /// direction, too short for the virtio-net header. Or it has more than 1024 buffers.
    RxMalformedChain = "rx_malformed_chain", Rx;
    /// Shorter than an Ethernet header (14 bytes).
    RxShortFrame = "rx_short_frame", Rx;
    /// Longer than the switch takes from any guest.
    RxTooLong = "rx_too_long", Rx;
    /// The sender's memory could not be read: its file was truncated, or its file system is full.
    RxMemoryFault = "rx_memory_fault", Rx;
    /// The sender's buffer is in guest memory that the switch cannot map.
    RxMemoryUnusable = "rx_memory_unusable", Rx;
    /// The sender's memory is slow to touch. The poll thread that found this did not read the
    /// frame.
    RxMemorySlow = "rx_memory_slow", Rx;
    /// Multicast, broadcast or zero source address.
    RxBadSource = "rx_bad_source", Rx;
    /// The destination is behind the port that the frame came from.
    SamePort = "same_port", Rx;
    /// Destination 01-80-C2-00-00-00 to -0F, which bridges do not forward.
    LinkLocalFiltered = "link_local_filtered", Rx;
    /// Flooded, but no other port could take it.
    NoDestination = "no_destination", Rx;
    /// Taken from a ring that is started but disabled: read and discarded, as vhost-user demands.
    RxDisabledQueue = "rx_disabled_queue", Rx;
    /// The receive queue has no free buffer, and had none at the end of the pass either.
    EgressRingFull = "egress_ring_full", Tx;
    /// Other poll threads claimed buffers of the receive queue first, too many times in a row.
    EgressContended = "egress_contended", Tx;
    /// Longer than the receiver's buffers or its ring can ever take.
    EgressTooLong = "egress_too_long", Tx;
    /// No receive queue of the port is started and enabled in the view of the switch in which the
    /// frame was decided: the port is not ready yet, or was disabled, or its frontend is about to
    /// disconnect. Once the frontend has gone, the port's stations are unknown, and frames to them
    /// are flooded. The same holds for a port that was removed.
    EgressNotReady = "egress_not_ready", Tx;
    /// The receive queue's ring is broken. Nothing is delivered into it until its next start.
    EgressRingBroken = "egress_ring_broken", Tx;
    /// The receiver's memory could not be written: its file was truncated, or its file system is
    /// full.
    EgressMemoryFault = "egress_memory_fault", Tx;
    /// The receiver's memory is slow to touch, and the thread that serves such ports has fallen
    /// behind.
    EgressMemorySlow = "egress_memory_slow", Tx;
}

/// What one poll thread counted at one port.
#[derive(Debug, Default)]
pub struct PortCounters {
    /// Well-formed frames that entered the switch, dropped ones included.
    pub rx_frames: Counter,
    /// Bytes of these frames, without virtio-net headers.
    pub rx_bytes: Counter,
    /// Frames delivered into the port.
    pub tx_frames: Counter,
    /// Bytes of these frames, without virtio-net headers.
    pub tx_bytes: Counter,
    /// Receive buffers returned unused: a malformed chain, or one too small for any frame.
    pub bad_buffers: Counter,
    /// Those bad buffers that are in guest memory which the switch cannot map.
    pub unusable_buffers: Counter,
    drops: [Counter; DropReason::ALL.len()],
}

impl PortCounters {
    /// Counts `n` frames dropped for `reason`.
    #[inline]
    pub fn dropped(&self, reason: DropReason, n: u64) {
        self.drops[reason as usize].add(n);
    }

    /// Frames dropped for `reason`.
    #[inline]
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize].get()
    }
}

/// A port's counters: one padded block for each poll thread.
#[derive(Debug)]
pub struct PortStats {
    threads: Box<[CachePadded<PortCounters>]>,
}

impl Default for PortStats {
    fn default() -> Self {
        PortStats {
            threads: (0..MAX_POLL_THREADS)
                .map(|_| CachePadded::default())
                .collect(),
        }
    }
}

impl PortStats {
    /// Makes a port's counters, all zero.
    pub fn new() -> PortStats {
        PortStats::default()
    }

    /// Returns the block of poll thread `thread`. Only that thread may write to it.
    ///
    /// # Panics
    ///
    /// If `thread` is [`MAX_POLL_THREADS`] or more: the configuration allows no such thread.
    #[inline]
    pub fn thread(&self, thread: usize) -> &PortCounters {
        &self.threads[thread]
    }

    /// Returns the sums over all poll threads.
    pub fn sum(&self) -> PortTotals {
        let mut totals = PortTotals::default();
        for block in &self.threads {
            totals.rx_frames += block.rx_frames.get();
            totals.rx_bytes += block.rx_bytes.get();
            totals.tx_frames += block.tx_frames.get();
            totals.tx_bytes += block.tx_bytes.get();
            totals.bad_buffers += block.bad_buffers.get();
            totals.unusable_buffers += block.unusable_buffers.get();
        }
        for reason in DropReason::ALL {
            let n = self.threads.iter().map(|block| block.drops(reason)).sum();
            match reason.direction() {
                Direction::Rx => totals.rx_dropped += n,
                Direction::Tx => totals.tx_dropped += n,
            }
            totals.drops.insert(reason.name().to_string(), n);
        }
        totals
    }
}

/// A port's numbers at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PortTotals {
    /// Well-formed frames that entered the switch here, whatever became of them.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames delivered into this port.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Receive buffers returned unused.
    pub bad_buffers: u64,
    /// Those of them that are in guest memory which the switch cannot map.
    pub unusable_buffers: u64,
    /// Drops counted on entry, all reasons.
    pub rx_dropped: u64,
    /// Drops counted on the way out, all reasons.
    pub tx_dropped: u64,
    /// Drops by reason; every reason is present.
    pub drops: BTreeMap<String, u64>,
}

/// Buckets of a power of two of a [`Histogram`]: its error is one eighth at most.
const BUCKETS_PER_DOUBLING: usize = 8;
/// Buckets of a [`Histogram`]: up to two hours in nanoseconds.
pub const HISTOGRAM_BUCKETS: usize = 40 * BUCKETS_PER_DOUBLING;

/// Counts values by their highest four bits. Each power of two from 8 on has eight buckets. The
/// last bucket counts all larger values, too. A histogram has one writer.
#[derive(Debug)]
pub struct Histogram {
    buckets: [Counter; HISTOGRAM_BUCKETS],
    max: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            buckets: std::array::from_fn(|_| Counter::default()),
            max: Counter::default(),
        }
    }
}

impl Histogram {
    /// Counts one value.
    #[inline]
    pub fn record(&self, value: u64) {
        // Below 16 every value has a bucket of its own.
        let shift = (u64::BITS - value.leading_zeros()).saturating_sub(4);
        let bucket = BUCKETS_PER_DOUBLING * shift as usize + (value >> shift) as usize;
        self.buckets[bucket.min(HISTOGRAM_BUCKETS - 1)].add(1);
        self.max.raise_to(value);
    }

    /// Returns the largest value that bucket `i` counts; `None` for the last bucket, which has no
    /// bound.
    pub fn upper_bound(i: usize) -> Option<u64> {
        let shift = (i / BUCKETS_PER_DOUBLING).saturating_sub(1);
        let first = i - BUCKETS_PER_DOUBLING * shift;
        (i + 1 < HISTOGRAM_BUCKETS).then(|| ((first as u64 + 1) << shift) - 1)
    }

    /// Returns the counts of all buckets.
    pub fn counts(&self) -> [u64; HISTOGRAM_BUCKETS] {
        std::array::from_fn(|i| self.buckets[i].get())
    }

    /// Returns the largest value that was recorded.
    pub fn max(&self) -> u64 {
        self.max.get()
    }
}

/// A poll thread's own counters. Only this thread writes them, in every pass. So they have cache
/// lines of their own: two, because processors fetch lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ThreadStats {
    /// Turns of the poll loop.
    pub passes: Counter,
    /// Passes that found no work.
    pub idle_passes: Counter,
    /// Nanoseconds spent in passes that found work.
    pub busy_ns: Counter,
    /// Nanoseconds spent polling, with or without work, without sleeps.
    pub total_ns: Counter,
    /// Frames taken from transmit queues.
    pub frames: Counter,
    /// Bursts in which the frames were handled.
    pub bursts: Counter,
    /// Times the thread went to sleep.
    pub sleeps: Counter,
    /// Times it was woken.
    pub wakeups: Counter,
    /// Topologies that the thread has adopted.
    pub topologies: Counter,
    /// Calls made to drivers.
    pub calls: Counter,
    /// Calls that the kernel refused.
    pub calls_refused: Counter,
    /// Times chains were completed although an earlier claim of another thread was still open.
    pub completed_early: Counter,
    /// Page faults in guests' memory that were slow: see `poll::watch`.
    pub slow_faults: Counter,
    /// Nanoseconds that these faults took.
    pub slow_faults_ns: Counter,
    /// Nanoseconds in passes during which the thread was descheduled, as far as it noticed: see
    /// `poll`.
    pub off_cpu_ns: Counter,
    /// Lengths of the passes that found work, in nanoseconds on the CPU.
    pub pass_ns: Histogram,
    /// Lengths of the passes that began with adopting a topology, with or without work. They are
    /// not in `pass_ns`.
    pub takeover_ns: Histogram,
    /// Times from the publication of a topology to its acknowledgement, while the thread was awake,
    /// in nanoseconds.
    pub acknowledge_ns: Histogram,
}

impl ThreadStats {
    /// Counts a topology that was adopted. `after` is the time since the publication of this
    /// topology, or of an earlier one that was skipped.
    pub fn acknowledged(&self, after: Duration) {
        self.topologies.add(1);
        let ns = u64::try_from(after.as_nanos()).unwrap_or(u64::MAX);
        self.acknowledge_ns.record(ns);
    }

    /// Counts a pass of `ns` nanoseconds. `takes_over`: the pass began with adopting a topology.
    #[inline]
    pub fn pass(&self, ns: u64, found_work: bool, takes_over: bool) {
        self.passes.add(1);
        self.total_ns.add(ns);
        if found_work {
            self.busy_ns.add(ns);
        } else {
            self.idle_passes.add(1);
        }
        if takes_over {
            self.takeover_ns.record(ns);
        } else if found_work {
            self.pass_ns.record(ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_number_and_snake_case_name() {
        let mut names = std::collections::HashSet::new();
        for (i, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, i);
            assert!(names.insert(reason.name()));
            assert!(
                reason
                    .name()
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b == b'_')
            );
        }
    }

    #[test]
    fn the_sum_adds_the_blocks_of_all_threads() {
        let stats = PortStats::new();
        stats.thread(0).rx_frames.add(2);
        stats.thread(MAX_POLL_THREADS - 1).rx_frames.add(3);
        stats.thread(1).dropped(DropReason::EgressRingFull, 4);
        stats.thread(2).dropped(DropReason::EgressContended, 1);
        stats.thread(2).dropped(DropReason::SamePort, 7);
        let totals = stats.sum();
        assert_eq!(totals.rx_frames, 5);
        assert_eq!((totals.rx_dropped, totals.tx_dropped), (7, 5));
        assert_eq!(totals.drops["egress_ring_full"], 4);
        assert_eq!(totals.drops["rx_bad_source"], 0);
        assert_eq!(totals.drops.len(), DropReason::ALL.len());
    }

    #[test]
    fn a_port_costs_well_below_64_kib_of_counters() {
        assert!(size_of::<CachePadded<PortCounters>>() * MAX_POLL_THREADS <= 16 << 10);
    }

    #[test]
    fn values_land_in_the_bucket_whose_bound_covers_them() {
        for value in
            (0..5_000).chain((12..43).flat_map(|bit| [(1 << bit) - 1, 1 << bit, 3 << (bit - 1)]))
        {
            let histogram = Histogram::default();
            histogram.record(value);
            let at = histogram.counts().iter().position(|n| *n == 1).unwrap();
            let (bound, below) = (Histogram::upper_bound(at), at.checked_sub(1));
            assert!(bound.is_none_or(|bound| bound >= value && bound - value <= value / 8));
            assert!(
                below
                    .and_then(Histogram::upper_bound)
                    .is_none_or(|bound| bound < value)
            );
        }
        let histogram = Histogram::default();
        histogram.record(u64::MAX);
        assert_eq!(histogram.counts()[HISTOGRAM_BUCKETS - 1], 1);
        assert_eq!(Histogram::upper_bound(HISTOGRAM_BUCKETS - 1), None);
        // A second is within range.
        assert!(Histogram::upper_bound(HISTOGRAM_BUCKETS - 2).unwrap() > 3_600_000_000_000);
        assert_eq!(histogram.max(), u64::MAX);
    }

    #[test]
    fn idle_passes_do_not_count_as_busy() {
        let stats = ThreadStats::default();
        stats.pass(100, true, false);
        stats.pass(900, false, false);
        assert_eq!((stats.passes.get(), stats.idle_passes.get()), (2, 1));
        assert_eq!((stats.busy_ns.get(), stats.total_ns.get()), (100, 1000));
        assert_eq!(stats.pass_ns.max(), 100);
    }
}
