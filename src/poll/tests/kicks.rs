//! When drivers are asked for kicks: while their poll thread sleeps, and never while it polls.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::config::IdlePolicy;
use crate::sys::eventfd::KickFd;

/// For whatever should happen soon; the machine may be busy.
const LIMIT: Duration = Duration::from_secs(60);

/// Rings of both kinds, with the event index and without.
fn kinds() -> impl Iterator<Item = RingFeatures> {
    let each = [(false, false), (false, true), (true, false), (true, true)];
    each.into_iter().map(|(packed, event_idx)| RingFeatures {
        event_idx,
        ..features(packed)
    })
}

/// What the device says of kicks in the ring `which` of a guest: its flags, and its event.
#[derive(Clone, Copy)]
struct Wish<'m> {
    area: Window<'m>,
    features: RingFeatures,
}

impl<'m> Wish<'m> {
    fn of(ram: &'m SharedMemory, which: usize, features: RingFeatures) -> Self {
        let layout = RingLayout::new(ENTRIES, features.packed);
        let area = ram.window(which * RING + layout.used, layout.used_len);
        Wish {
            area: area.unwrap(),
            features,
        }
    }

    fn word(&self, at: usize) -> u16 {
        self.area.load_u16(at, Ordering::SeqCst)
    }

    /// No kicks. A split ring with the event index has no such flag: it is silent once its event
    /// has passed.
    fn is_silent(&self) -> bool {
        match (self.features.packed, self.features.event_idx) {
            (false, false) => self.word(0) == 1,
            (false, true) => self.word(0) == 0,
            (true, _) => self.word(2) == 1,
        }
    }

    /// A kick for the chain behind the first `sent`, each of one descriptor.
    fn is_armed(&self, sent: u64) -> bool {
        let size = u64::from(ENTRIES);
        let lap = u16::from((sent / size).is_multiple_of(2));
        match (self.features.packed, self.features.event_idx) {
            (false, false) => self.word(0) == 0,
            (false, true) => self.word(0) == 0 && self.word(self.area.len() - 2) == sent as u16,
            (true, false) => self.word(2) == 0,
            (true, true) => self.word(2) == 2 && self.word(0) == (sent % size) as u16 | lap << 15,
        }
    }
}

#[test]
fn a_thread_that_polls_wants_no_kicks_however_many_frames_there_are_or_are_not() {
    for features in kinds() {
        let rams = rams::<2>();
        let mut vms = vms_with(&rams, features);
        let topology = topology(&vms, 1, |_| 0);
        let (_publisher, shared, poller) = poller(topology, IdlePolicy::Busy);
        let wishes = [0, 1].map(|which| Wish::of(&rams[0], which, features));
        let event = wishes[1].word(wishes[1].area.len() - 2);
        let (mut sent, mut came, mut idle, mut kicks) = (0, 0, 0, 0);
        let begun = Instant::now();
        poller.run_with(|| {
            assert!(
                wishes.iter().all(Wish::is_silent),
                "{features:?}, {sent} sent"
            );
            came += vms[1].take(usize::MAX);
            vms[1].give_back();
            if sent < 5000 {
                sent += vms[0].send(1, 60, 16);
                kicks += u32::from(vms[0].transmit.needs_kick());
            } else if came == sent {
                idle += 1;
            }
            let stuck = begun.elapsed() > LIMIT;
            assert!(!stuck, "{came} of {sent} frames have come");
            shared.stop.store(idle == 1000, Ordering::Relaxed);
        });
        let split_event = features.event_idx && !features.packed;
        // The event in cleared memory is that of the first chain, whoever wrote it.
        assert_eq!(kicks, u32::from(split_event), "{features:?}");
        if split_event {
            assert_eq!(wishes[1].word(wishes[1].area.len() - 2), event);
        }
        assert_eq!(shared.stats.sleeps.get(), 0);
    }
}

/// Lets a guest kick; returns its descriptor.
pub(super) fn give_kick(vm: &mut Vm<'_>) -> OwnedFd {
    let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    let kick = KickFd::new(File::from(event.try_clone().unwrap())).unwrap();
    let mut pairs = vm.device.pairs.clone();
    pairs[0].transmit.as_mut().unwrap().kick = Some(Arc::new(kick));
    vm.device = Arc::new(Device {
        memory: vm.device.memory.clone(),
        features: 0,
        numa_node: None,
        pairs,
    });
    event
}

/// Ends a thread, also when an assertion fails.
struct Stop<'s>(&'s PollShared);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
        self.0.sleeper.wake();
    }
}

fn wait_for(mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < LIMIT);
        std::thread::yield_now();
    }
}

#[test]
fn a_thread_that_sleeps_wants_one_kick_and_none_after_it_has_woken() {
    for features in kinds() {
        let rams = rams::<2>();
        let mut vms = vms_with(&rams, features);
        let kicks: Vec<OwnedFd> = vms.iter_mut().map(give_kick).collect();
        let topology = topology(&vms, 1, |_| 0);
        let idle = IdlePolicy::Adaptive(Duration::from_micros(50));
        let (_publisher, shared, poller) = poller(topology, idle);
        for kick in &kicks {
            shared.sleeper.add_kick(kick, 1).unwrap();
        }
        let [received, wish] = [0, 1].map(|which| Wish::of(&rams[0], which, features));
        let stats = &shared.stats;
        std::thread::scope(|scope| {
            let _stop = Stop(&shared);
            // Between any two passes of a thread that is awake.
            scope.spawn(move || poller.run_with(|| assert!(wish.is_silent(), "{features:?}")));
            let mut sent = 0;
            for turn in 1..=300 {
                // Nobody else wakes it, so it sleeps from here on.
                wait_for(|| stats.sleeps.get() == turn);
                assert!(wish.is_armed(sent), "{features:?}, {sent} sent");
                assert!(received.is_silent(), "{features:?}");
                let frames = vms[0].send(1, 60, 1 + turn as usize % 40);
                assert!(vms[0].transmit.needs_kick(), "{features:?}, {sent} sent");
                rustix::io::write(&kicks[0], &1_u64.to_ne_bytes()).unwrap();
                let mut came = 0;
                wait_for(|| {
                    came += vms[1].take(usize::MAX);
                    came == frames
                });
                vms[1].give_back();
                sent += frames as u64;
            }
            wait_for(|| stats.sleeps.get() == 301);
            assert_eq!(stats.wakeups.get(), 300);
        });
    }
}
