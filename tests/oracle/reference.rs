//! Another implementation of the device: `virtio_queue::Queue` for split rings, `packed_reference`
//! for packed ones.

use std::collections::VecDeque;

use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::Random;
use crate::guest::*;
use crate::packed_reference::{Device, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, Place};

/// The other implementation of the device.
pub(crate) enum Reference<'g> {
    Split {
        queue: Box<Queue>,
        memory: GuestMemoryMmap,
        taken: VecDeque<u16>,
    },
    Packed {
        device: Device<'g>,
        taken: VecDeque<(u16, u16)>,
    },
}

impl<'g> Reference<'g> {
    pub(crate) fn new(guest: &'g Guest, base: u16) -> Self {
        if guest.features.packed {
            let place = Place {
                slot: base & 0x7fff,
                wrap: base & 0x8000 != 0,
            };
            return Reference::Packed {
                device: Device::new(guest.areas(), place),
                taken: VecDeque::new(),
            };
        }
        let file = |offset| FileOffset::new(guest.memory.file().try_clone().unwrap(), offset);
        let len = LEN as usize;
        let memory = GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(START), len, Some(file(LEN))),
            (GuestAddress(SEAM), len, Some(file(0))),
        ])
        .unwrap();
        let (descriptors, available, used) = guest.places();
        let mut queue = Queue::new(guest.size()).unwrap();
        queue.set_size(guest.size());
        queue
            .try_set_desc_table_address(GuestAddress(descriptors))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(available))
            .unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        queue.set_event_idx(guest.features.event_idx);
        queue.set_next_avail(base);
        queue.set_next_used(base);
        queue.set_ready(true);
        queue.disable_notification(&memory).unwrap();
        Reference::Split {
            queue: Box::new(queue),
            memory,
            taken: VecDeque::new(),
        }
    }

    /// Takes a chain: the addresses and lengths of its buffers.
    pub(crate) fn take(&mut self, guest: &'g Guest) -> Option<Vec<(u64, u32)>> {
        match self {
            Reference::Split {
                queue,
                memory,
                taken,
            } => {
                let chain = queue.pop_descriptor_chain(&*memory)?;
                taken.push_back(chain.head_index());
                Some(chain.map(|d| (d.addr().0, d.len())).collect())
            }
            Reference::Packed { device, taken } => {
                let chain = device.pop(|addr, len| guest.at(addr, len))?;
                taken.push_back((chain.id, chain.span));
                Some(chain.buffers)
            }
        }
    }

    /// Returns the oldest chains with these lengths; whether the driver wants a call.
    pub(crate) fn complete(&mut self, lens: &[u32], event_idx: bool) -> bool {
        match self {
            Reference::Split {
                queue,
                memory,
                taken,
            } => {
                for (head, &len) in taken.drain(..lens.len()).zip(lens) {
                    queue.add_used(&*memory, head, len).unwrap();
                }
                queue.needs_notification(&*memory).unwrap()
            }
            Reference::Packed { device, taken } => {
                let chains = taken.drain(..lens.len()).zip(lens);
                let chains: Vec<(u16, u16, u32)> =
                    chains.map(|((id, span), &len)| (id, span, len)).collect();
                device.complete(&chains, event_idx)
            }
        }
    }

    /// Asks for kicks; whether something is available already.
    pub(crate) fn arm(&mut self) -> bool {
        match self {
            Reference::Split { queue, memory, .. } => queue.enable_notification(&*memory).unwrap(),
            Reference::Packed { device, .. } => device.has_available(),
        }
    }

    pub(crate) fn disarm(&mut self) {
        if let Reference::Split { queue, memory, .. } = self {
            queue.disable_notification(&*memory).unwrap();
        }
    }

    /// What GET_VRING_BASE would say of the next position to take.
    pub(crate) fn next(&self) -> u16 {
        match self {
            Reference::Split { queue, .. } => queue.next_avail(),
            Reference::Packed { device, .. } => device.next().word(),
        }
    }
}

/// Both drivers ask to be called somewhere around the next used element, or not at all.
pub(crate) fn set_event(guest: &Guest, drivers: &mut [Driver<'_>; 2], random: &mut Random) {
    let size = guest.size();
    if guest.features.packed {
        let used = drivers[0].packed().used();
        let place = used.after(random.below(2 * u64::from(size)).min(500) as u16, size);
        let flags = [EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC, EVENT_DESC][random.below(4) as usize];
        for driver in drivers {
            driver.packed().set_event(place.word(), flags);
        }
    } else if guest.features.event_idx {
        let idx = drivers[0].split().idx;
        let event = idx
            .wrapping_sub(size)
            .wrapping_add(random.below(2 * u64::from(size)) as u16);
        for driver in drivers {
            driver.split().set_event(event);
        }
    }
}

/// Both drivers post the same chain: in a packed ring with any buffer id, in a split one at any
/// descriptors.
pub(crate) fn post_both(
    drivers: &mut [Driver<'_>; 2],
    pieces: &[Piece],
    random: &mut Random,
) -> u16 {
    let [ours, theirs] = drivers;
    match (ours, theirs) {
        (Driver::Packed(ours), Driver::Packed(theirs)) => {
            let ids = ours.free_ids();
            let id = ids[random.below(ids.len() as u64) as usize];
            ours.post(id, pieces);
            theirs.post(id, pieces);
            id
        }
        (Driver::Split(ours), Driver::Split(theirs)) => {
            let by = random.below(u64::from(ours.free())) as usize;
            ours.rotate_free(by);
            theirs.rotate_free(by);
            theirs.post(pieces);
            ours.post(pieces)
        }
        _ => panic!("rings of two kinds"),
    }
}

/// The bytes of a ring that both devices write alike, without what ours notes ahead: used elements
/// of chains that are not returned yet (split), and the area where it asks for kicks (packed; the
/// reference never does).
pub(crate) fn common_bytes(guest: &Guest, unreturned: std::ops::Range<u64>) -> Vec<u8> {
    let mut bytes = guest.ring_bytes();
    if guest.features.packed {
        bytes.truncate(16 * usize::from(guest.size()));
        return bytes;
    }
    let elements = (guest.places().2 - START) as usize + ENTRIES;
    for position in unreturned {
        let at = elements + 8 * (position % u64::from(guest.size())) as usize;
        bytes[at..at + 8].fill(0);
    }
    bytes
}
