//! A vhost-user backend of nothing but rust-vmm's crates: a wire between two ports, for
//! comparisons.
//!
//!     cargo run --release --example stock -- CPU SOCKET SOCKET
//!
//! `VhostUserDaemon` speaks to the frontends, `virtio_queue` walks the rings. What can be done well
//! with these crates is done: one pinned thread polls both directions and asks for no kicks, frames
//! are taken in bursts through the crate's iterator, buffers are reused, memory is looked up once a
//! burst, and each ring is signalled once a burst, if its driver wants that. There is no switching.
//! Every frame is copied twice, because the crates offer no way from one guest's memory into
//! another's.

use std::collections::VecDeque;
use std::error::Error;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use pollux::virtio::NET_HDR_SIZE;
use rustix::thread::{CpuSet, sched_setaffinity};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Failure = Box<dyn Error + Send + Sync>;

/// VIRTIO_F_VERSION_1, and the bit that says that vhost-user has protocol features.
const FEATURES: u64 = 1 << 32 | 1 << 30;
const BURST: usize = 32;
const MAX_FRAME: usize = 65_562;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// One port.
struct Port {
    memory: Memory,
    /// Its rings, from the first kick on.
    rings: OnceLock<Vec<VringRwLock>>,
    exit: (EventConsumer, EventNotifier),
}

impl VhostUserBackend for Port {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        Ok(())
    }

    fn handle_event(
        &self,
        _event: u16,
        _set: EventSet,
        rings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        self.rings.get_or_init(|| rings.to_vec());
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some((self.exit.0.try_clone().ok()?, self.exit.1.try_clone().ok()?))
    }
}

/// Frames on their way from one port to the other.
struct Wire {
    buffer: Vec<u8>,
    /// Bounds in `buffer` of the frames of a burst.
    frames: VecDeque<(usize, usize)>,
}

impl Wire {
    fn new() -> Wire {
        Wire {
            buffer: vec![0; BURST * MAX_FRAME],
            frames: VecDeque::new(),
        }
    }

    /// One burst; says whether there was any frame.
    fn turn(&mut self, from: &Port, to: &Port) -> Result<bool, Failure> {
        let (Some(source), Some(target)) = (from.rings.get(), to.rings.get()) else {
            return Ok(false);
        };
        let any = self.take(&source[TRANSMIT], &from.memory)?;
        if any {
            self.deliver(&target[RECEIVE], &to.memory)?;
        }
        Ok(any)
    }

    fn take(&mut self, ring: &VringRwLock, memory: &Memory) -> Result<bool, Failure> {
        let memory = memory.memory();
        let mut state = ring.get_mut();
        let queue = state.get_queue_mut();
        if !queue.ready() {
            return Ok(false);
        }
        queue.disable_notification(&*memory)?;
        let mut heads = [0; BURST];
        let mut count = 0;
        let mut at = 0;
        self.frames.clear();
        for chain in queue.iter(&*memory)?.take(BURST) {
            heads[count] = chain.head_index();
            count += 1;
            let start = at;
            for descriptor in chain.readable() {
                let end = at + descriptor.len() as usize;
                let place = self.buffer.get_mut(at..end).ok_or("a frame is too long")?;
                memory.read_slice(place, descriptor.addr())?;
                at = end;
            }
            self.frames.push_back((start, at));
        }
        for head in &heads[..count] {
            queue.add_used(&*memory, *head, 0)?;
        }
        let signal = count > 0 && queue.needs_notification(&*memory)?;
        drop(state);
        if signal {
            ring.signal_used_queue()?;
        }
        Ok(count > 0)
    }

    fn deliver(&mut self, ring: &VringRwLock, memory: &Memory) -> Result<(), Failure> {
        let memory = memory.memory();
        let mut state = ring.get_mut();
        let queue: &mut Queue = state.get_queue_mut();
        let mut used = [(0, 0); BURST];
        let mut count = 0;
        for chain in queue.iter(&*memory)?.take(self.frames.len()) {
            let head = chain.head_index();
            let Some((start, end)) = self.frames.pop_front() else {
                break;
            };
            let frame = &mut self.buffer[start..end];
            // The receiver's header: no offloads, one buffer.
            frame[..NET_HDR_SIZE].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            let mut rest = &frame[..];
            for descriptor in chain.writable() {
                let (now, later) = rest.split_at(rest.len().min(descriptor.len() as usize));
                memory.write_slice(now, descriptor.addr())?;
                rest = later;
            }
            used[count] = (head, (end - start) as u32);
            count += 1;
        }
        for (head, len) in &used[..count] {
            queue.add_used(&*memory, *head, *len)?;
        }
        let signal = count > 0 && queue.needs_notification(&*memory)?;
        drop(state);
        if signal {
            ring.signal_used_queue()?;
        }
        Ok(())
    }
}

/// Serves one frontend. What it has left stays as it is: the process is started afresh for another
/// one.
fn serve(port: &Arc<Port>, socket: &str) -> Result<(), Failure> {
    let mut listener = Listener::new(socket, true)?;
    let mut daemon = VhostUserDaemon::new("stock".into(), port.clone(), port.memory.clone())
        .map_err(|error| format!("{error:?}"))?;
    daemon
        .start(&mut listener)
        .map_err(|error| format!("{error:?}"))?;
    // An error is how this crate says that the frontend has left.
    let _ = daemon.wait();
    Ok(())
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [cpu, sockets @ ..] = &arguments[..] else {
        return Err("usage: stock CPU SOCKET SOCKET".into());
    };
    let cpu: usize = cpu.parse()?;
    let ports = sockets.iter().map(|_| {
        Ok(Arc::new(Port {
            memory: Memory::new(GuestMemoryMmap::new()),
            rings: OnceLock::new(),
            exit: new_event_consumer_and_notifier(EventFlag::NONBLOCK)?,
        }))
    });
    let ports: Vec<Arc<Port>> = ports.collect::<io::Result<_>>()?;
    let [one, other] = &ports[..] else {
        return Err("two sockets are needed".into());
    };
    for (port, socket) in ports.iter().zip(sockets) {
        let (port, socket) = (port.clone(), socket.clone());
        std::thread::spawn(move || {
            if let Err(error) = serve(&port, &socket) {
                eprintln!("{socket}: {error}");
                std::process::exit(1);
            }
        });
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set)?;
    let mut wires = [Wire::new(), Wire::new()];
    loop {
        let busy = wires[0].turn(one, other)? | wires[1].turn(other, one)?;
        if !busy && one.rings.get().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
