//! Observers: captures, traces and mirrors, each an object of its own.
//!
//! A port does not know its observers. An [`Observer`] has its own filter, buffers, counters and
//! lifetime. Up to `MAX_OBSERVERS` observers may look at one port, and they do not affect each
//! other. Observers are added and removed like ports: by publishing a topology with or without
//! them. The last reference belongs to the reaper or to the reader.
//!
//! - A poll thread that finds no observer in its topology tests one word a burst.
//! - Each observer has a [`Feed`] for every poll thread that there can ever be: counters, and a
//!   bounded buffer that this thread alone writes, without waiting. What does not fit is counted as
//!   missed. Buffers are reserved when the observer is made. So a poll thread allocates nothing,
//!   not even for a thread that is added later.
//! - A poll thread takes its pens (the writing ends) out of the feeds when it adopts a topology,
//!   and puts them back before it acknowledges another one. That costs an exchange of one word for
//!   each pen, and nothing for each frame. So an observer can be in a shared snapshot without a
//!   lock.
//! - The buffers are those of `rtrb`: one writer, one reader, wait-free. `pen.rs`, which is
//!   model-checked, decides who has the pens and when a reader has seen everything. Observers share
//!   nothing with earlier or later ones.
//!
//! A capture reads a frame's bytes from the sender's memory, except for the first 128: there a
//! private copy exists, which is also what is delivered. It does not read the receiver's copy,
//! which belongs to the receiver from its publication on. If a guest writes to a frame after it has
//! sent it, capture and delivery may differ. Reading the frame once more would not tell which is
//! right.

mod feed;
mod filter;
pub mod mirror;
pub mod pcapng;
pub mod pen;
mod record;
mod time;
pub mod trace;

use std::sync::Arc;

use crossbeam_utils::CachePadded;

use crate::config::{MAX_OBSERVERS, ObserveDirection};
use crate::stats::MAX_POLL_THREADS;
use crate::switch::PortRef;
use pen::Ending;

pub use feed::{Content, Counts, Feed, Pen, Reader, write_whole};
pub use filter::{Filter, FilterError};
pub use record::{RECORD_HEAD, Record, What};
pub use time::{WallClock, since_1970};

/// What an observer does with the frames that it sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Hands the frames to a reader as they pass.
    Capture,
    /// Hands the frames that are dropped to a reader, with the reason.
    Drops,
    /// Tells a reader what becomes of each frame that enters.
    Trace,
    /// Sends copies of the frames to a port.
    Mirror(PortRef),
}

impl Kind {
    /// Returns the word for the kind in the API.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Capture => "capture",
            Kind::Drops => "drops",
            Kind::Trace => "trace",
            Kind::Mirror(_) => "mirror",
        }
    }
}

/// What an observer looks at, and how.
#[derive(Clone, Debug)]
pub struct ObserverSpec {
    /// What the observer does with the frames.
    pub kind: Kind,
    /// The ports to look at. `None`: all ports, later ones included.
    pub ports: Option<Box<[PortRef]>>,
    /// Which frames of these ports. A drop is rx if it is counted at the frame's ingress port,
    /// otherwise tx.
    pub direction: ObserveDirection,
    /// Most bytes that are kept of each frame.
    pub snaplen: u32,
    /// Which of these frames are kept.
    pub filter: Filter,
}

impl ObserverSpec {
    fn covers(&self, port: PortRef) -> bool {
        self.ports
            .as_ref()
            .is_none_or(|ports| ports.contains(&port))
    }
}

/// A capture, trace or mirror.
#[derive(Debug)]
pub struct Observer {
    /// What the observer looks at, and how.
    pub spec: ObserverSpec,
    feeds: Box<[CachePadded<Feed>]>,
    ending: Ending,
}

impl Observer {
    /// Makes a capture or trace, and its reader. `threads` are the existing poll threads. Their
    /// buffers are touched now, so that these threads take no page faults later.
    pub fn with_reader(
        spec: ObserverSpec,
        threads: impl Iterator<Item = usize> + Clone,
    ) -> (Arc<Observer>, Reader) {
        let mut consumers = Vec::with_capacity(MAX_POLL_THREADS);
        let feeds = (0..MAX_POLL_THREADS).map(|thread| {
            let is_there = threads.clone().any(|there| there == thread);
            let (feed, consumer) = Feed::ring(&spec, is_there);
            consumers.push(consumer);
            CachePadded::new(feed)
        });
        let feeds = feeds.collect();
        let ending = Ending::default();
        let observer = Arc::new(Observer {
            spec,
            feeds,
            ending,
        });
        (observer, Reader::new(consumers))
    }

    /// Makes a mirror. `threads` as for [`with_reader`](Self::with_reader).
    pub fn mirror(
        spec: ObserverSpec,
        threads: impl Iterator<Item = usize> + Clone,
    ) -> Arc<Observer> {
        let feeds = (0..MAX_POLL_THREADS).map(|thread| {
            let is_there = threads.clone().any(|there| there == thread);
            CachePadded::new(Feed::mirror(&spec, is_there))
        });
        let feeds = feeds.collect();
        let ending = Ending::default();
        Arc::new(Observer {
            spec,
            feeds,
            ending,
        })
    }

    /// Returns the feed of a poll thread.
    #[inline]
    pub fn feed(&self, thread: usize) -> &Feed {
        &self.feeds[thread]
    }

    /// Returns the sums over all feeds. They are exact once no poll thread has the observer any
    /// more.
    pub fn counts(&self) -> Counts {
        let feeds = self.feeds.iter();
        feeds.fold(Counts::default(), |sum, feed| sum + feed.counts())
    }

    /// Returns the number of frames of the port in `slot` that did not fit into the buffers.
    pub fn missed_at(&self, slot: u16) -> u64 {
        self.feeds.iter().map(|feed| feed.missed_at(slot)).sum()
    }

    /// Notes that the observer is no longer in the topology, from `generation` on. If called twice,
    /// the first reason stays.
    pub fn end(&self, reason: impl Into<String>, generation: u64) {
        self.ending.set(reason.into(), generation);
    }

    /// Whether the observer was taken out of the topology. Poll threads may still write to it.
    pub fn has_ended(&self) -> bool {
        self.ending.is_set()
    }

    /// Returns why the observer has ended, once no poll thread writes to it any more; before that
    /// `None`. `reached` tells whether all poll threads have acknowledged a generation.
    pub fn settled_end(&self, reached: impl FnOnce(u64) -> bool) -> Option<&str> {
        self.ending.settled(reached)
    }
}

/// Which observers want which frames of one port: one bit for each observer, by its number in
/// [`Observers`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// Frames that enter.
    pub rx: u32,
    /// Frames that leave.
    pub tx: u32,
    /// Drops counted on entry.
    pub rx_drops: u32,
    /// Drops counted on the way out.
    pub tx_drops: u32,
    /// The way of frames that enter, for traces.
    pub trace: u32,
}

/// The observers of one topology.
#[derive(Debug)]
pub struct Observers {
    /// By number.
    pub all: Box<[Arc<Observer>]>,
    by_slot: Box<[Interest]>,
    /// The mirrors: one bit for each number.
    pub mirrors: u32,
    /// Whether there is a trace, which wants to know what is decided.
    pub traces: bool,
}

impl Observers {
    /// What poll threads need to know; `None` without observers. At most [`MAX_OBSERVERS`] are
    /// looked at.
    pub fn build(
        observers: &[Arc<Observer>],
        ports: impl Iterator<Item = PortRef>,
    ) -> Option<Observers> {
        if observers.is_empty() {
            return None;
        }
        let observers = &observers[..observers.len().min(MAX_OBSERVERS)];
        let mut by_slot = Vec::new();
        for port in ports {
            let slot = usize::from(port.slot);
            if by_slot.len() <= slot {
                by_slot.resize(slot + 1, Interest::default());
            }
            by_slot[slot] = interest(observers, port);
        }
        let with = |kind: fn(&Kind) -> bool| {
            let numbered = (0_u32..).zip(observers);
            let them = numbered.filter(|(_, observer)| kind(&observer.spec.kind));
            them.fold(0, |bits, (number, _)| bits | 1 << number)
        };
        Some(Observers {
            mirrors: with(|kind| matches!(kind, Kind::Mirror(_))),
            traces: with(|kind| matches!(kind, Kind::Trace)) != 0,
            all: observers.into(),
            by_slot: by_slot.into(),
        })
    }

    /// Returns which observers want which frames of the port in `slot`.
    #[inline]
    pub fn interest(&self, slot: u16) -> Interest {
        self.by_slot
            .get(usize::from(slot))
            .copied()
            .unwrap_or_default()
    }
}

fn interest(observers: &[Arc<Observer>], port: PortRef) -> Interest {
    let mut interest = Interest::default();
    for (number, observer) in observers.iter().enumerate() {
        let spec = &observer.spec;
        if !spec.covers(port) {
            continue;
        }
        let when = |wanted: bool| u32::from(wanted) << number;
        let (rx, tx) = (when(spec.direction.rx()), when(spec.direction.tx()));
        match spec.kind {
            Kind::Capture | Kind::Mirror(_) => {
                interest.rx |= rx;
                interest.tx |= tx;
            }
            Kind::Drops => {
                interest.rx_drops |= rx;
                interest.tx_drops |= tx;
            }
            Kind::Trace => interest.trace |= when(true),
        }
    }
    interest
}

#[cfg(test)]
mod tests;
