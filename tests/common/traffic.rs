//! Numbered frames between scripted guests in closed loops: every one must arrive, intact and in
//! order.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::daemon::Daemon;
use super::guest::{Guest, GuestOptions, Ram};
use super::{pause, wait_for};

/// An Ethernet address.
pub(crate) type Mac = [u8; 6];

pub(crate) const BROADCAST: Mac = [0xff; 6];
/// IEEE 802 local experimental ethertype.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
/// Addresses, type, sequence number.
const LEAST: usize = 22;
/// The number of frames that are outside of the sequence.
const HELLO: u64 = u64::MAX;
/// Closed loops in which nothing arrives for so long have lost a frame. Tests share their CPUs.
const STALL: Duration = Duration::from_secs(20);

/// The address of the guest `n`.
pub(crate) fn mac(n: u8) -> Mac {
    [0x52, 0x54, 0, 0, 1, n]
}

/// A frame of `len` bytes with a number, whose payload follows from it.
pub(crate) fn frame(to: Mac, from: Mac, sequence: u64, len: usize) -> Vec<u8> {
    let mut frame = [&to[..], &from[..], &ETHERTYPE[..], &sequence.to_le_bytes()].concat();
    frame.extend((LEAST..len).map(|at| pattern(sequence, at)));
    frame
}

fn pattern(sequence: u64, at: usize) -> u8 {
    (sequence as usize * 31 + at * 7) as u8
}

/// What a frame says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    pub(crate) to: Mac,
    pub(crate) from: Mac,
    pub(crate) sequence: u64,
}

/// Reads and checks a frame of [`frame`].
pub(crate) fn read(frame: &[u8]) -> Label {
    assert!(frame.len() >= LEAST, "a frame of {} bytes", frame.len());
    assert_eq!(frame[12..14], ETHERTYPE, "a frame that nobody sent");
    let bytes = |range: std::ops::Range<usize>| frame[range].try_into().expect("that many bytes");
    let number: [u8; 8] = frame[14..LEAST].try_into().expect("eight bytes");
    let sequence = u64::from_le_bytes(number);
    let damaged = (LEAST..frame.len()).find(|at| frame[*at] != pattern(sequence, *at));
    assert_eq!(damaged, None, "byte of frame {sequence}");
    Label {
        to: bytes(0..6),
        from: bytes(6..12),
        sequence,
    }
}

/// Frames one way between two guests.
#[derive(Clone, Debug)]
pub(crate) struct Flow {
    from: usize,
    to: usize,
    /// Frames on their way at most.
    window: u64,
    len: usize,
    met: bool,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    pub(crate) duplicates: u64,
}

/// Guests in this thread and the flows between them; guest `n` has the address `mac(first + n)`.
#[derive(Debug)]
pub(crate) struct Exchange<'m> {
    pub(crate) guests: Vec<Guest<'m>>,
    pub(crate) flows: Vec<Flow>,
    first: u8,
    by_label: HashMap<(Mac, Mac), usize>,
    /// A frame may come twice: its switch was killed between delivery and completion.
    pub(crate) may_repeat: bool,
    last_progress: Instant,
}

impl<'m> Exchange<'m> {
    /// Flows are `(from, to)`, as positions in `guests`.
    pub(crate) fn new(
        guests: Vec<Guest<'m>>,
        first: u8,
        flows: &[(usize, usize)],
        window: u64,
        len: usize,
    ) -> Exchange<'m> {
        let name = |n: usize| mac(first + n as u8);
        Exchange {
            by_label: flows
                .iter()
                .enumerate()
                .map(|(n, (from, to))| ((name(*from), name(*to)), n))
                .collect(),
            flows: flows
                .iter()
                .map(|&(from, to)| Flow {
                    from,
                    to,
                    window,
                    len,
                    met: false,
                    sent: 0,
                    received: 0,
                    duplicates: 0,
                })
                .collect(),
            guests,
            first,
            may_repeat: false,
            last_progress: Instant::now(),
        }
    }

    fn mac(&self, n: usize) -> Mac {
        mac(self.first + n as u8)
    }

    /// Window and frame length of all flows from now on; nothing is on its way.
    pub(crate) fn set(&mut self, window: u64, len: usize) {
        for flow in &mut self.flows {
            (flow.window, flow.len) = (window, len);
        }
    }

    /// Frames that have arrived.
    pub(crate) fn received(&self) -> u64 {
        self.flows.iter().map(|flow| flow.received).sum()
    }

    /// Time without a frame does not count up to here.
    pub(crate) fn forgive_silence(&mut self) {
        self.last_progress = Instant::now();
    }

    /// Everyone receives, and sends up to the windows.
    pub(crate) fn turn(&mut self) {
        let came = self.receive();
        let mut sent = false;
        for n in 0..self.flows.len() {
            sent |= self.fill_window(n);
        }
        if !came && !sent {
            pause();
        }
    }

    fn fill_window(&mut self, n: usize) -> bool {
        let mut any = false;
        loop {
            let flow = &self.flows[n];
            if flow.sent - flow.received >= flow.window {
                return any;
            }
            let (from, to) = (flow.from, flow.to);
            let frame = frame(self.mac(to), self.mac(from), flow.sent, flow.len);
            if !self.guests[from].try_send(&frame) {
                return any;
            }
            self.flows[n].sent += 1;
            any = true;
        }
    }

    /// Takes what has come; fails on loss, disorder and long silence.
    fn receive(&mut self) -> bool {
        let mut any = false;
        for at in 0..self.guests.len() {
            while let Some(bytes) = self.guests[at].try_receive() {
                let label = read(&bytes);
                let flow = self.by_label.get(&(label.from, label.to));
                // Frames for others, flooded before the switch has learned where these are.
                let Some(flow) = flow.map(|n| &mut self.flows[*n]) else {
                    continue;
                };
                if flow.to != at {
                    continue;
                }
                if label.sequence == HELLO {
                    flow.met = true;
                    continue;
                }
                assert_eq!(bytes.len(), flow.len, "length of {label:?}");
                if label.sequence < flow.received && self.may_repeat {
                    flow.duplicates += 1;
                    continue;
                }
                assert_eq!(label.sequence, flow.received, "loss or disorder: {flow:?}");
                flow.received += 1;
                any = true;
            }
        }
        if any {
            self.last_progress = Instant::now();
        }
        let flows = &self.flows;
        assert!(
            self.last_progress.elapsed() < STALL,
            "nothing has arrived for {STALL:?}: {flows:#?}"
        );
        any
    }

    /// Takes what has come; whether a sender has a buffer back whose frame has not.
    pub(crate) fn is_ahead(&mut self) -> bool {
        self.receive();
        (0..self.flows.len()).any(|n| {
            let from = self.flows[n].from;
            let in_flight = u64::from(self.guests[from].in_flight());
            self.flows[n].sent > self.flows[n].received + in_flight
        })
    }

    /// Receives until nothing is on its way.
    pub(crate) fn drain(&mut self) {
        while self.flows.iter().any(|flow| flow.received < flow.sent) {
            if !self.receive() {
                pause();
            }
        }
        self.wait_for_transmit_buffers();
    }

    fn wait_for_transmit_buffers(&mut self) {
        let guests = &mut self.guests;
        wait_for("every transmit buffer to come back", || {
            guests.iter_mut().all(|guest| guest.in_flight() == 0)
        });
    }

    /// Sends on every flow until something arrives there: an attachment is answered before it
    /// carries frames.
    pub(crate) fn meet(&mut self) {
        let mut silent: Vec<usize> = (0..self.flows.len()).collect();
        wait_for("the first frames", || {
            for &n in &silent {
                let flow = &self.flows[n];
                let (from, to) = (flow.from, flow.to);
                let hello = frame(self.mac(to), self.mac(from), HELLO, LEAST);
                self.guests[from].try_send(&hello);
            }
            self.receive();
            silent.retain(|&n| !self.flows[n].met);
            silent.is_empty()
        });
        // Those that were not waited for must not fill a small ring.
        self.wait_for_transmit_buffers();
        self.receive();
    }

    /// Turns until `frames` more have arrived.
    pub(crate) fn exchange(&mut self, frames: u64) {
        let until = self.received() + frames;
        while self.received() < until {
            self.turn();
        }
    }
}

/// A guest on each port, from `first` on.
pub(crate) fn attach<'m>(
    daemon: &Daemon,
    rams: impl IntoIterator<Item = &'m Ram>,
    first: usize,
) -> Vec<Guest<'m>> {
    let guests = attach_to(&daemon.sockets()[first..], rams);
    daemon.settle();
    guests
}

/// A guest on each of these sockets.
pub(crate) fn attach_to<'m>(
    sockets: &[PathBuf],
    rams: impl IntoIterator<Item = &'m Ram>,
) -> Vec<Guest<'m>> {
    let attached = rams.into_iter().zip(sockets);
    attached
        .map(|(ram, socket)| {
            let mut guest = Guest::new(ram);
            guest.attach(socket);
            guest
        })
        .collect()
}

/// Bystanders on the first two ports, and on the next two guests in these memories that know each
/// other: `mac(3)` and `mac(4)`. Nothing is on its way.
pub(crate) fn acquainted<'m>(
    daemon: &Daemon,
    rams: [&'m Ram; 2],
) -> (Bystanders, Guest<'m>, Guest<'m>) {
    let bystanders = Bystanders::start([&daemon.sockets()[0], &daemon.sockets()[1]]);
    let guests = attach(daemon, rams, 2);
    let mut exchange = Exchange::new(guests, 3, &[(0, 1), (1, 0)], 8, 300);
    exchange.meet();
    exchange.exchange(50);
    exchange.drain();
    // Greetings that were not waited for.
    for guest in &mut exchange.guests {
        while guest.try_receive().is_some() {}
    }
    let other = exchange.guests.pop().expect("the second");
    (bystanders, exchange.guests.pop().expect("the first"), other)
}

/// Two guests on a thread of their own that exchange frames for as long as they live, and must not
/// lose one.
#[derive(Debug)]
pub(crate) struct Bystanders {
    stop: Arc<AtomicBool>,
    progress: Arc<AtomicU64>,
    thread: Option<JoinHandle<u64>>,
}

impl Bystanders {
    /// Attaches them as `mac(1)` and `mac(2)`; they know each other when this returns.
    pub(crate) fn start(sockets: [&Path; 2]) -> Bystanders {
        let (stop, progress) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let sockets = sockets.map(Path::to_path_buf);
        let (own_stop, own_progress) = (stop.clone(), progress.clone());
        let thread = std::thread::spawn(move || run(&sockets, &own_stop, &own_progress));
        let bystanders = Bystanders {
            stop,
            progress,
            thread: Some(thread),
        };
        bystanders.go_on(100);
        bystanders
    }

    /// Frames exchanged so far.
    pub(crate) fn frames(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    /// Where frames exchanged are counted.
    pub(crate) fn progress(&self) -> Arc<AtomicU64> {
        self.progress.clone()
    }

    /// Waits until they have exchanged so many more frames.
    pub(crate) fn go_on(&self, frames: u64) {
        let until = self.progress.load(Ordering::Relaxed) + frames;
        wait_for("the bystanders' frames", || {
            assert!(
                !self
                    .thread
                    .as_ref()
                    .is_some_and(|thread| thread.is_finished()),
                "the bystanders have failed"
            );
            self.progress.load(Ordering::Relaxed) >= until
        });
    }

    /// Stops them; every frame that they sent has arrived. Returns how many.
    pub(crate) fn finish(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("finished once");
        thread.join().expect("the bystanders lost nothing")
    }
}

impl Drop for Bystanders {
    fn drop(&mut self) {
        // A test that fails must not leave them polling.
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn run(sockets: &[PathBuf; 2], stop: &AtomicBool, progress: &AtomicU64) -> u64 {
    let rams = [(); 2].map(|()| Ram::new(GuestOptions::default()));
    let guests = rams.iter().zip(sockets).map(|(ram, socket)| {
        let mut guest = Guest::new(ram);
        guest.attach(socket);
        guest
    });
    let mut exchange = Exchange::new(guests.collect(), 1, &[(0, 1), (1, 0)], 8, 200);
    exchange.meet();
    while !stop.load(Ordering::Relaxed) {
        exchange.turn();
        progress.store(exchange.received(), Ordering::Relaxed);
    }
    exchange.drain();
    exchange.received()
}
