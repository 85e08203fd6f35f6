//! Which frames of a burst go to one port, and to which of its receive queues.
//!
//! A hash of the flow chooses the receive queue. Virtio says that a device SHOULD choose the pair
//! from which the guest sends the flow's answers (virtio 1.2 §5.1.6.5.5). That would take a table
//! of flows that is written with every frame, so the switch does not do it.

use arrayvec::ArrayVec;

use super::deliver::{Mask, numbers};
use crate::frame::{BURST_FRAMES, Burst};
use crate::topology::{Egress, EgressQueue};
use crate::wire::flow_hash;

/// Returns the frames `mask`, grouped by the receive queue of each frame's flow. A flow stays in
/// one queue as long as the number of enabled queues does not change.
pub(super) fn steer<'t>(
    port: &'t Egress,
    burst: &Burst<'_>,
    mask: Mask,
) -> ArrayVec<(&'t EgressQueue, Mask), BURST_FRAMES> {
    let mut steered: ArrayVec<(&EgressQueue, Mask), BURST_FRAMES> = ArrayVec::new();
    let queues = port.receive_queues();
    for number in numbers(mask) {
        let hash = flow_hash(burst.frames()[number].head());
        let Some(queue) = queues.get(scale(hash, queues.len())) else {
            continue;
        };
        match steered
            .iter_mut()
            .find(|(other, _)| std::ptr::eq(*other, queue))
        {
            Some((_, frames)) => *frames |= 1 << number,
            None => steered.push((queue, 1 << number)),
        }
    }
    steered
}

/// Maps a hash to a number below `count`, without a division.
pub(super) fn scale(hash: u32, count: usize) -> usize {
    ((u64::from(hash) * count as u64) >> 32) as usize
}

/// Returns the frames whose egress is `slot`.
#[inline(always)]
pub(super) fn matching(egress: &[u16; BURST_FRAMES], slot: u16) -> Mask {
    let numbered = egress.iter().enumerate();
    numbered.fold(0, |mask, (number, at)| {
        mask | Mask::from(*at == slot) << number
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_spread_evenly_over_any_number_of_queues() {
        for count in 1..=128 {
            let mut hits = vec![0; count];
            for n in 0..1024 * count as u64 {
                // Evenly spread hashes: all of the range, in equal steps.
                let hash = (n << 32) / (1024 * count as u64);
                hits[scale(hash as u32, count)] += 1;
            }
            assert!(
                hits.iter().all(|hits| (1020..=1028).contains(hits)),
                "{count}: {hits:?}"
            );
        }
    }
}
