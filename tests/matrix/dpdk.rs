//! A cell of DPDK's virtio-user: numbered frames of all lengths between two of its ports.

use std::time::Duration;

use crate::assert_negotiated;
use crate::cells::Cell;
use crate::common::backend::Backend;
use crate::common::journey::Journey;
use crate::common::testpmd::{Testpmd, VirtioUser};

/// Receive buffers that a frame of 9000 bytes takes where they are mergeable.
const MOST_BUFFERS: u16 = 5;
/// testpmd's least number of transmit descriptors.
const LEAST_TXD: u16 = 32;
/// What the vectorised driver may leave unposted of a split receive ring, and posts in one turn.
const REARM: u16 = 32;
/// Frames in each direction.
const FRAMES: u32 = 4000;

pub(crate) fn run(cell: &Cell) {
    journey(cell).run(|testpmd, backend| attached(cell, testpmd, backend));
}

/// Frames stream where what waits in the sender's rings and what testpmd adds in two turns fit one
/// of the receiver's: then none can be dropped, however late the switch is and however flows are
/// spread. With few entries they go in batches that fit the ring; so they do where a frame may take
/// several buffers, of which testpmd takes fewer in a turn than it sends.
fn journey(cell: &Cell) -> Journey {
    let (entries, queues) = (cell.entries, cell.queues);
    let (batch, batches) = match cell.refusal() {
        Some(_) => (1, 1),
        None if cell.mergeable => (u32::from(entries / MOST_BUFFERS), 10),
        None if entries < 4 * queues * LEAST_TXD => (u32::from(entries - REARM), 10),
        None => (FRAMES, 1),
    };
    Journey {
        port: VirtioUser {
            queues,
            queue_size: entries,
            mergeable: cell.mergeable,
            in_order: cell.in_order,
            packed: cell.packed,
            vectorized: cell.vectorized,
            server: cell.client,
        },
        sizes: cell.sizes().to_vec(),
        batch,
        batches,
        txd: LEAST_TXD.max(entries / (4 * queues)),
        // The vectorised driver takes eight at least.
        burst: (entries / (16 * queues)).clamp(8, 32),
        // A buffer that holds the longest frame, unless frames may span several.
        mbuf_size: (!cell.mergeable).then_some(9600),
        limit: Duration::from_secs(30),
    }
}

fn attached(cell: &Cell, testpmd: &Testpmd, backend: &Backend) {
    let vectors = testpmd.vectorized();
    assert_eq!(vectors, cell.vectors(), "vectorised: receiving, sending");
    if let Backend::Pollux(daemon) = backend {
        for name in ["p0", "p1"] {
            assert_negotiated(cell, &daemon.port(name));
        }
    }
}
