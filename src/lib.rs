//! Pollux: a software switch for virtual machines.
//!
//! Guests attach over vhost-user sockets. Polling threads read each guest's virtqueues straight out
//! of guest memory and copy every frame once, from the sender's buffer into the receiver's. This
//! page is the architecture and the reasons for it; where to go on: `poll/pass.rs` (one turn of a
//! poll thread, `run`), then [`virtio::claim`] (the heart), then [`sys::snapshot`] (how control
//! reaches the data path).
//!
//! # Two promises
//!
//! **No transmit lock.** Any poll thread may deliver into any port at any time, and no thread ever
//! waits for another to do so.
//!
//! **Removal that nobody else feels.** Taking a port away is publishing a view of the switch
//! without it; freeing it happens later, elsewhere, when the last user has let go. No other port
//! loses a frame or stalls when a port is added, removed, rebooted or killed.
//!
//! And a fact: **guests and frontends are hostile.** What they can reach never panics, never blocks
//! a poll thread, and costs nobody but themselves.
//!
//! # Threads
//!
//! | thread | count | does | may block? |
//! |---|---|---|---|
//! | `poll-N` | n, pinned by `--poll-cpus` | passes over the transmit queues it owns; delivers into any port | never: no lock, allocation, channel, log; no system call but one batch of calls a pass, the idle sleep, and a look at its own CPU time once a second and where a pass is long anyway |
//! | `poll-slow` | 1, made when needed | the same for ports whose memory is slow to touch (`sys::pages`) | in page faults of these, never behind a claim of others' |
//! | `session-NAME` | one per connected frontend | the blocking vhost-user conversation, and the commands of its guest's driver | yes, only its own VM waits |
//! | control | 1, an event loop | sockets, reconnection, signals, commands; owns the registry; the only publisher | briefly |
//! | `reaper` | 1 | drops retired views: munmap in steps of 2 MiB, close | yes |
//! | `closer` | 1 | closes sockets that nobody has read to their end, and what their senders put into them | yes |
//! | `api` | 1, and a bounded set of helpers (`api-call`, `api-stream`) | HTTP on a unix socket | yes |
//! | `log` | 1 | writes the log to standard error; all others put their lines into a bounded buffer, and lose those that do not fit | yes |
//!
//! ```text
//!  frontend ──unix socket── session ──newest device──▶ control ──publish──▶ Topology (immutable)
//!                              ▲                          │ ▲                  │ one generation check a burst
//!                              └── wait for generation ───┼─┴── acknowledge ── poll threads (borrow, never own)
//!                                                         └── retired, when all have acknowledged ──▶ reaper
//!  guest A memory ════════════════════════════ one copy ═════════════════════════════▶ guest B memory
//! ```
//!
//! # From control to the data path: one mechanism
//!
//! [`topology::Topology`] is an immutable snapshot: ports, each poll thread's work ready-made, and
//! its generation. Control publishes a new one for every change ([`sys::snapshot`]), which shares
//! the ports and plans that stay as they are with the one before: it stores the pointer, then the
//! generation. A poll thread compares the generation after every burst (one relaxed load of a line
//! that changes only then), settles everything it owes (claims, completions, retries, calls),
//! borrows the new snapshot and acknowledges the generation stored inside it, in a padded word of
//! its own.
//!
//! - Poll threads *borrow*. Control keeps every snapshot until each thread has acknowledged a newer
//!   one, then hands it to the reaper: a poll thread is never the last owner of anything.
//! - A sleeping thread counts as acknowledged: it drops its borrow before it says so. Waking is
//!   "awake", full barrier, look; publishing is store, full barrier, look. One of the two always
//!   sees the other.
//! - Publishing waits for nobody. Only *session* threads wait for acknowledgements, and only where
//!   the protocol demands it (GET_VRING_BASE, memory changes, disable, reset, disconnect). There is
//!   no deadline after which they answer anyway: a thread that has not acknowledged may still write
//!   into that guest's memory.
//! - A session posts its newest device and goes on; control takes the newest of each session once a
//!   turn and publishes once. A port that posts more than 256 at once and 200 a second shares one
//!   publication every 2 ms with all that do: ten thousand SET_VRING_ENABLE delay nobody but their
//!   own guest.
//!
//! # The path of a frame
//!
//! A poll thread handles *bursts*: up to 64 frames or 256 KiB gathered from several of its transmit
//! queues, because what delivery costs is claims, not frames.
//!
//! 1. **Take** ([`virtio::TransmitQueue`]): one acquire load of the available index a queue and
//!    burst; each descriptor is read once into a local copy and checked against the memory map. Its
//!    used element is written at once (noted, in a packed ring), invisible until the chain is
//!    completed. A malformed chain goes back with length 0 in its turn and is counted; an
//!    impossible ring is *broken* until its next start. A chain has up to
//!    [`virtio::chain::MAX_CHAIN`] pieces; after 704 descriptors of chains of several a burst is
//!    closed.
//! 2. **Snapshot the headers** ([`frame`]): the first 128 bytes are copied once. Decisions depend
//!    on that copy only, and that copy is what is delivered, so nobody passes a check with one
//!    source address and delivers another. The sender's virtio-net header is not passed on: the
//!    receiver's is made here.
//! 3. **Decide** ([`switch`]): pure code, told the time: learn, look up, a verdict a frame.
//! 4. **Deliver** (`poll::deliver`), egress by egress: claim, fill, commit, publish. No buffer: one
//!    retry at the end of the pass (none while its driver returns nothing), the sender's later
//!    frames to that port behind it, then the frame is dropped and counted. The sender's ring
//!    always drains.
//! 5. **Complete** the transmit chains whose frames are *published*, in available order. If the
//!    process is killed in between, the guest's next attachment replays the frame instead of losing
//!    it. Behind another thread's open claim a chain waits from pass to pass, and the thread goes
//!    on; it takes over no other topology, for a millisecond at most. After a millisecond the chain
//!    is completed all the same (`completed_early`), and later ones at once until that queue moves:
//!    a process that is killed while a thread has lost its processor there loses those. Waiting for
//!    longer would stop what their senders have for others. The same goes for chains beyond 96
//!    pairs of a sender and such a queue.
//! 6. **Notify** at the end of the pass.
//!
//! # Life of a port
//!
//! A `PortSpec` (plain values) → everything that can fail is built (name, socket, event
//! registration) → `register` publishes it → frontends come and go, each with a session →
//! `unregister` publishes a view without it, frees name and socket path, and returns. Two halves:
//! [`port::PortShared`] (name, counters) may be held by anybody for as long as they like;
//! [`port::Device`] (memory, rings, descriptors of one session) is reachable only from topologies
//! and its session, so no API thread ever runs an munmap. A port's slot is reused, so everything
//! that names a port (FDB entries, sessions, event data) carries its generation or its identity
//! too.
//!
//! # Delivering into a shared receive queue
//!
//! Several poll threads deliver into one receive queue, directly ([`virtio::claim`]):
//!
//! ```text
//! claim    compare-and-swap the private 64-bit position p → p + n, bounded by what the driver made available
//!          and by published + ring size; chains are read before the swap, into private copies
//! fill     copy; write the used elements at positions p .. p + n
//! commit   tag[p] = (p + 1, n), release
//! publish  whoever gets the token makes the unbroken run of committed claims visible: one store of used.idx,
//!          one look at the driver's event; whoever does not get it leaves, for the holder will see its tag
//! ```
//!
//! - The used position *is* the claim position: DPDK's vectorised driver ignores `used.id`, and
//!   QEMU resumes at `used.idx` after a crash, so used entries must stand in available order.
//! - Our own `used.idx` is read once, at ring start, and never again: a guest can rewrite it.
//! - A claim becomes visible whole, so a frame over several mergeable buffers is never seen in
//!   halves.
//! - A lost claim and a full ring are ordinary, counted outcomes. A claim that contradicts the
//!   ring's own state (available index impossibly far ahead) marks the ring broken, once.
//! - The price: a thread descheduled with an open claim, or while it publishes, delays what that
//!   one queue's driver sees; and once for each change of the switch, for a millisecond at most,
//!   what its senders get back, and so what they send to others. No thread waits for it, but for 10
//!   µs before it takes over another topology. So claims are late and small (32 frames, 64 KiB),
//!   one a thread; pin poll threads.
//!
//! **A full ring keeps a share for each sender.** For two laps after a ring had no buffer for
//! somebody, its last eighth is kept back, and each sending port draws on that for at most 1/32 of
//! what the ring delivers (`virtio::share`: one word a sender, touched only while the ring is
//! short). So a port that floods another one cannot shut out a sender of little, on whichever
//! threads. A ring that was never full is first come, first served to the last buffer, and so are
//! senders of much among each other. A ring that makes no progress for 100 ms, as its driver posts
//! fewer buffers than before, gives up what it keeps until more are free at once.
//!
//! # Start of a ring
//!
//! A split ring starts at the `used.idx` found in its memory, whatever SET_VRING_BASE said (a
//! difference is logged): that is exact for QEMU, for cloud-hypervisor (which sends its available
//! index) and for DPDK's virtio-user (which sends 0). A packed ring starts where SET_VRING_BASE
//! says, unless the switch has been away: nothing in its memory says where it stands, so that is
//! kept in a record of its own ([`virtio::redo`]). Every start is a new queue object, and its
//! session calls its driver once: it may be asleep on work that was finished before a restart. No
//! poll thread does, whose other guests would wait. Another call descriptor of a running ring is
//! called, too, once all poll threads have acknowledged it: a call by the one before may not have
//! reached the driver. A ring starts as soon as size, addresses, kick, features and memory are
//! known, in whatever order they came. Frames on a disabled ring are discarded, as the protocol
//! says, but a transmitq that was never told waits for its first SET_VRING_ENABLE: frontends send
//! it last, and a guest's pending frames must survive a restart of the switch.
//!
//! # Guest memory
//!
//! [`memory`] maps memory files only (memfd, tmpfs, hugetlbfs), and leaves out a region in any
//! other. A new memory table shares the mappings of regions that did not change. Guest memory is
//! never a Rust reference: a [`memory::Window`] is place and length in one, with checked copies and
//! atomics. A frontend can truncate its file at any time: a SIGBUS handler puts fresh pages over
//! the hole and marks the guest, whose session is then cut off.
//!
//! # Notifications
//!
//! Guest to switch: suppressed while polling; armed, looked at again, then slept upon. `busy` never
//! sleeps, `adaptive` (default) spins 50 µs first. Kicks are eventfds in an edge-triggered epoll
//! and never read: a frontend could make the read block. Switch to guest: a plain `write` to a call
//! eventfd can be made to block for ever by whoever else holds it, so calls are the completions of
//! kernel AIO requests, one `io_submit` a pass ([`sys::aio`]). A frontend can still make a signal
//! slow by hanging thousands of waiters on it: each batch is timed, and a port whose slow signals
//! have cost 0.5 ms leaves its calls to its session ([`sys::call`]).
//!
//! # Memory that is slow to touch
//!
//! A page fault takes as long as whoever owns the page likes. A poll thread cannot foresee one, so
//! it notices: a pass that was long and had page faults alarms it, and then every step is timed and
//! charged to the port whose memory was touched in it (`poll::watch`). A port that has cost more
//! than 50 ms ([`sys::pages`]) goes to `poll-slow`: that thread owns its transmit queues, and
//! others copy what they have for it into buffers of their own for that thread
//! ([`topology::detour`]). Towards healthy receivers it copies each frame into private memory
//! before it claims anything.
//!
//! # Modules
//!
//! A module may use those in its last column and no other; every row names only rows below it, so
//! there are no cycles. The data path does not know that vhost-user exists; the protocol does not
//! know that a switch exists. `tests/architecture.rs` reads this table. Unsafe code is allowed in
//! `memory` and `sys` only.
//!
//! | module | role | may use |
//! |---|---|---|
//! | `main` | parse, run, exit code | `cli`, `bench`, `config`, `daemon` |
//! | [`cli`] | arguments and client commands | `api`, `bench`, `config`, `log`, `wire` |
//! | [`daemon`] | composition root: control, registry, sessions' glue, reaper | `api`, `bench`, `config`, `log`, `memory`, `observe`, `poll`, `port`, `stats`, `switch`, `sys`, `topology`, `vhost_user`, `wire` |
//! | [`mod@bench`] | the load generator: guests that measure a switch | `config`, `memory`, `virtio` |
//! | [`api`] | HTTP/JSON: types, server, client | `config`, `sys`, `wire` |
//! | [`vhost_user`] | the protocol with one frontend | `memory`, `port`, `sys`, `virtio` |
//! | [`poll`] | poll thread: pass, delivery, idle policy | `config`, `frame`, `memory`, `observe`, `stats`, `switch`, `sys`, `topology`, `virtio`, `wire` |
//! | [`topology`] | the snapshot | `memory`, `observe`, `port`, `stats`, `switch`, `sys`, `virtio` |
//! | [`port`] | a port's two halves | `config`, `memory`, `stats`, `switch`, `sys`, `virtio` |
//! | [`observe`] | captures, traces, mirrors: buffers, filters, formats | `config`, `memory`, `stats`, `switch`, `sync`, `wire` |
//! | [`switch`] | decisions and FDB; no clock, thread or I/O | `stats`, `wire` |
//! | [`frame`] | header snapshot, burst | `memory`, `stats`, `virtio`, `wire` |
//! | [`virtio`] | rings, chains, claims; and the driver's side for `bench` and tests | `memory`, `sync` |
//! | [`memory`] | regions, windows, SIGBUS fence | `sys` |
//! | [`log`] | the log, which nobody waits for | `sys` |
//! | [`sys`] | thin wrappers over Linux; snapshots | `sync` |
//! | [`stats`] | counters, drop reasons | `sync` |
//! | [`config`] | plain values, parsed and checked | – |
//! | [`wire`] | views of header bytes | – |
//! | [`sync`] | the atomics that a model checker replaces | – |
//!
//! # Words
//!
//! *frontend*: the VMM's side of vhost-user; *backend*: us, seen by the protocol. *driver*: code in
//! the guest; *device*: us, seen by the driver. *session*: one conversation with one frontend.
//! *transmitq*, *receiveq*: the virtio names, from the **guest's** view. *rx*, *tx*: always from
//! the **switch's** view; a frame received (rx) comes out of a transmitq. *controlq*: the ring by
//! which a driver commands. *ingress*, *egress*: the ports of one frame. *descriptor, chain, head*:
//! as in virtio. *kick*: driver to device; *call*: device to driver. *claim, fill, commit,
//! publish*: above; to publish is to make visible, to the driver or to poll threads. *window*: a
//! checked place in guest memory. *port*: what the operator made; *uplink*: a port that is no guest
//! (none yet). *observer*: a capture, trace or mirror. *tap, pen, lane*: where a poll thread meets
//! observers, what it writes with, and where. *FDB*: learn, look up, age. *verdict*: unicast,
//! flood, drop. *burst*: up to 64 frames handled together. *pass*: one turn of the poll loop.
//! *generation*: of a topology, or of a port in its slot. *retire, reap*: take out of use, free.
//!
//! # Specifications
//!
//! "virtio" with a section number is OASIS Virtual I/O Device (VIRTIO) version 1.2, July 2022.
//! "vhost-user" is QEMU's `docs/interop/vhost-user.rst` of version 7.2, cited by the names of its
//! sections.
//!
//! # Decisions
//!
//! - **FDB: a key word never changes while a reader may look at it.** Key (VLAN, address) and value
//!   (slot, generation, flags) do not fit one word. Instead of a sequence lock or 128-bit words:
//!   insertion swaps the key from empty, then the value; a move swaps the value; removal has two
//!   steps, a tombstone first, and only after every poll thread has acknowledged a later topology
//!   is the cell empty again. A reader costs two loads and never retries.
//! - **The FDB evicts nobody.** A full table and a port over its quota refuse newcomers, whose
//!   frames are flooded.
//! - **A flow is in the receive queue that its hash says** ([`wire::flow_hash`]), not in the pair
//!   that its guest answers from (virtio 1.2 §5.1.6.5.5 says SHOULD): that would take a table of
//!   flows written with every frame. RSS and HASH_REPORT are not offered: they are configured
//!   through the control queue, which is the VMM's own in vhost-user, and neither QEMU nor
//!   cloud-hypervisor passes that on.
//! - **A transmit queue changes hands in two publications**, the first without an owner: no lock,
//!   no message between poll threads, and the acknowledgement that frees memory also proves that
//!   nobody owns the queue. It stands still until control has seen that. The snapshots have a
//!   reader for each of 32 threads from the start; those without a thread are asleep.
//! - **Packed rings survive a restart of the switch by a file a ring**, in a directory in memory
//!   (`--ring-state`): QEMU keeps no position for them. INFLIGHT_SHMFD would be the protocol's
//!   place for it, but no frontend that has packed rings asks for it for a network device. The
//!   record costs two stores a published run, to memory that no guest can touch, and is believed
//!   only for the same memory file, addresses, size, features and base (`vhost_user::records`).
//!   Without the directory a guest with packed rings stands still after a restart until it resets
//!   its device. The same holds if the switch is killed between forgetting a record at
//!   GET_VRING_BASE and its answer being read.
//! - **The receive queue's memory, not a second copy of its state, holds used elements of split
//!   rings** while a claim is filled: nobody reads them before `used.idx` passes. Packed rings note
//!   them privately, since their flags are what makes them visible.
//! - **`munmap` may run on a session thread**: a session waits until nobody uses its old device,
//!   then drops its own reference; if control has retired the last topology by then, the session is
//!   the last owner. It is never a poll thread and never the API.
//! - **An idle thread wakes for kicks of its own queues and a bell only**; a publication rings the
//!   bell of those threads whose work changed.
//! - **GET_QUEUE_NUM answers at least 2**: QEMU compares it with queue pairs, cloud-hypervisor with
//!   rings. Rings of pairs that are not offered are remembered and never started.
//! - **Observers write into a byte ring for each poll thread** ([`observe`]), made by `rtrb` with
//!   room for every thread there can be. A poll thread has the writing ends only while it works
//!   with a topology, by an exchange of one word each when it takes that over: so an observer can
//!   be in a shared snapshot, and its ring needs neither a lock nor a model of our own. With no
//!   observer a topology has no `taps`, which is tested once a burst, once a claim and at each
//!   drop; nothing is carried in a frame for them.
//! - **A capture reads the sender's memory once more**, instead of the receiver's copy: that one
//!   belongs to the receiver from its publication on. What a hostile sender changes in between is
//!   then different in the capture.
//! - **A mirror's copies wait for the next pass** of the thread that made them, or for the end of
//!   its work with a topology, and have no retry: a mirror of a flood must not hold up the frames
//!   that it is a copy of.
//! - **Filters are our own small language**, tcpdump's as far as it goes: the libraries that
//!   compile the whole of it bind libpcap, which a bare machine does not have.
//! - **The API makes pcapng, the client cuts it into files**: whoever has `curl` has captures, and
//!   a rotation knows blocks only.
//! - **Slow calls are demoted by the port, by cost, for a minute of calm** ([`sys::call`]). Not by
//!   the descriptor or the session, which a frontend renews at will; not at the first slow one,
//!   which may be noise; not for ever.

// Tests share the benches' rig, which names the crate as everybody outside does.
#[cfg(test)]
extern crate self as pollux;

pub mod api;
pub mod bench;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod frame;
pub mod log;
#[allow(unsafe_code)]
pub mod memory;
pub mod observe;
pub mod poll;
pub mod port;
#[cfg(test)]
mod random_tests;
pub mod stats;
pub mod switch;
pub mod sync;
#[allow(unsafe_code)]
pub mod sys;
pub mod topology;
pub mod vhost_user;
pub mod virtio;
pub mod wire;
