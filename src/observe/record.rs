//! The records that poll threads write into an observer's buffers: a head of fixed size, then bytes
//! of the frame.

use crate::stats::DropReason;
use crate::switch::PortRef;

/// Bytes of a record's head, which precedes the bytes of its frame.
pub const RECORD_HEAD: usize = 32;

/// What happened to the frame of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The frame entered the switch through the port.
    Received,
    /// The frame was delivered into the port.
    Delivered,
    /// The frame was dropped, and the drop is counted at the port.
    Dropped(DropReason),
    /// The switch has decided where the frame goes. The record's bytes begin with a
    /// [`Decided`](super::trace::Decided).
    Decided,
}

/// The head of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Time by the raw clock of `quanta`.
    pub time: u64,
    /// Length of the frame in bytes.
    pub len: u32,
    /// Number of bytes that follow the head.
    pub captured: u32,
    /// The port at which it happened.
    pub port: PortRef,
    /// Queue pair of the port; `None` if the frame reached no queue.
    pub queue: Option<u16>,
    /// What happened.
    pub what: What,
    /// Names the frame among the present frames of one poll thread: the number of its transmit
    /// queue in the thread's plan, and the low bits of its position in that queue.
    pub frame: (u16, u32),
}

impl Record {
    /// Whether this is the frame's first record in a trace: that of its decision, or of its drop
    /// before a decision.
    pub(super) fn begins(&self) -> bool {
        match self.what {
            What::Decided => true,
            What::Dropped(_) => self.captured == 0,
            What::Received | What::Delivered => false,
        }
    }
}

const NO_QUEUE: u16 = u16::MAX;
const RECEIVED: u8 = 0;
const DELIVERED: u8 = 1;
const DROPPED: u8 = 2;
const DECIDED: u8 = 3;

impl Record {
    pub(super) fn encode(&self) -> [u8; RECORD_HEAD] {
        let (what, reason) = match self.what {
            What::Received => (RECEIVED, 0),
            What::Delivered => (DELIVERED, 0),
            What::Dropped(reason) => (DROPPED, reason as u8),
            What::Decided => (DECIDED, 0),
        };
        let mut bytes = [0; RECORD_HEAD];
        bytes[0..8].copy_from_slice(&self.time.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.captured.to_ne_bytes());
        bytes[16..20].copy_from_slice(&self.port.generation.to_ne_bytes());
        bytes[20..22].copy_from_slice(&self.port.slot.to_ne_bytes());
        bytes[22..24].copy_from_slice(&self.queue.unwrap_or(NO_QUEUE).to_ne_bytes());
        bytes[24..28].copy_from_slice(&self.frame.1.to_ne_bytes());
        bytes[28..30].copy_from_slice(&self.frame.0.to_ne_bytes());
        (bytes[30], bytes[31]) = (what, reason);
        bytes
    }

    pub(super) fn decode(bytes: &[u8; RECORD_HEAD]) -> Record {
        let u16_at = |at| u16::from_ne_bytes(part(bytes, at));
        let u32_at = |at| u32::from_ne_bytes(part(bytes, at));
        let queue = u16_at(22);
        let reason = DropReason::ALL[usize::from(bytes[31]).min(DropReason::ALL.len() - 1)];
        Record {
            time: u64::from_ne_bytes(part(bytes, 0)),
            len: u32_at(8),
            captured: u32_at(12),
            port: PortRef {
                slot: u16_at(20),
                generation: u32_at(16),
            },
            queue: (queue != NO_QUEUE).then_some(queue),
            what: match bytes[30] {
                RECEIVED => What::Received,
                DELIVERED => What::Delivered,
                DROPPED => What::Dropped(reason),
                _ => What::Decided,
            },
            frame: (u16_at(28), u32_at(24)),
        }
    }
}

/// Returns `N` bytes from `at` on. The caller knows that `bytes` is long enough.
pub(super) fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[at..at + N]);
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let reasons = DropReason::ALL.into_iter().map(What::Dropped);
        let whats = [What::Received, What::Delivered, What::Decided].into_iter();
        for (n, what) in (0..).zip(whats.chain(reasons)) {
            let record = Record {
                time: u64::MAX - u64::from(n),
                len: 70_000 + n,
                captured: 65_000 - n,
                port: PortRef {
                    slot: 4000,
                    generation: 0x8000_0001 + n,
                },
                queue: (n % 2 == 0).then_some(127),
                what,
                frame: (600, u32::MAX - n),
            };
            assert_eq!(Record::decode(&record.encode()), record);
        }
    }
}
