//! A driver's commands (virtio 1.2 §5.1.6.5), and how the device answers them.
//!
//! A command is answered with OK if the device then does what the command asks for, and with an
//! error otherwise. Filters are best effort in virtio: a device may pass more frames than its
//! driver asked for (notes in §5.1.6.5.1 to §5.1.6.5.3). A port passes every frame that is sent to
//! it: it learns addresses and looks at no VLAN of a frame. So modes that let more frames pass, and
//! filters, are both answered with OK.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET,
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_CTRL_VLAN,
    VIRTIO_NET_CTRL_VLAN_ADD, VIRTIO_NET_CTRL_VLAN_DEL, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

/// The answer to a command that holds.
pub(super) const OK: u8 = VIRTIO_NET_OK as u8;
/// The answer to every other command.
pub(super) const ERR: u8 = VIRTIO_NET_ERR as u8;
/// Length of an Ethernet address in bytes.
const ADDRESS: usize = 6;
/// Number of VLAN identifiers (12 bits).
const VLANS: u16 = 4096;

/// What a command that is answered with OK changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing: the device does already what the command asks for.
    None,
    /// Frames go to the first so many queue pairs.
    Pairs(u16),
}

/// Reads a command. `features` are those that the driver has acknowledged; `pairs` is the highest
/// number of queue pairs that it may ask for. Returns `None` if the command is to be answered with
/// an error.
pub(super) fn read(command: &[u8], features: u64, pairs: u16) -> Option<Change> {
    let (&[class, kind], data) = command.split_first_chunk()?;
    let has = |feature: u32| (features & (1 << feature) != 0).then_some(());
    match (class.into(), kind.into()) {
        (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI) => {
            has(VIRTIO_NET_F_CTRL_RX)?;
            matches!(data, [0 | 1]).then_some(Change::None)
        }
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
            has(VIRTIO_NET_F_CTRL_RX)?;
            // The unicast table, then the multicast table (§5.1.6.5.2).
            behind_table(behind_table(data)?)?
                .is_empty()
                .then_some(Change::None)
        }
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
            has(VIRTIO_NET_F_CTRL_MAC_ADDR)?;
            // Frames to the new address reach the driver in any case: they are flooded until the
            // switch has learned the address. But with VIRTIO_NET_F_MAC the driver reads its
            // address in the configuration space, which must then have the new address. The
            // configuration space is the frontend's.
            let unicast = matches!(data, [first, ..] if first & 1 == 0);
            let can = data.len() == ADDRESS && unicast && has(VIRTIO_NET_F_MAC).is_none();
            can.then_some(Change::None)
        }
        (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD | VIRTIO_NET_CTRL_VLAN_DEL) => {
            has(VIRTIO_NET_F_CTRL_VLAN)?;
            (number(data)? < VLANS).then_some(Change::None)
        }
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            has(VIRTIO_NET_F_MQ)?;
            let wanted = number(data)?;
            (1..=pairs)
                .contains(&wanted)
                .then_some(Change::Pairs(wanted))
        }
        // The command's feature is not offered, or the command is unknown.
        _ => None,
    }
}

fn number(data: &[u8]) -> Option<u16> {
    <[u8; 2]>::try_from(data).ok().map(u16::from_le_bytes)
}

/// Skips a table: its number of addresses (32 bits) and the addresses. Returns the bytes after the
/// table, or `None` if `data` is too short.
fn behind_table(data: &[u8]) -> Option<&[u8]> {
    let (count, addresses) = data.split_first_chunk()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    addresses.get(count.checked_mul(ADDRESS)?..)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = 1 << 17 | 1 << 18 | 1 << 19 | 1 << 22 | 1 << 23;

    #[test]
    fn commands_hold_or_fail() {
        let table = |first: u32, second: u32, addresses: usize| {
            let first_len = 6 * first as usize;
            let mut bytes = [&[1, 0], &first.to_le_bytes()[..], &vec![2; first_len]].concat();
            bytes.extend(second.to_le_bytes());
            bytes.extend(vec![3; 6 * addresses]);
            bytes
        };
        let holds: [(&[u8], u64); 13] = [
            (&[0, 0, 1], 18),
            (&[0, 0, 0], 18),
            (&[0, 1, 1], 18),
            (&[0, 1, 0], 18),
            (&table(0, 0, 0), 18),
            (&table(1, 0, 0), 18),
            (&table(3, 600, 600), 18),
            (&[1, 1, 2, 0, 0, 0, 0, 9], 23),
            (&[2, 0, 0, 0], 19),
            (&[2, 0, 0xff, 0x0f], 19),
            (&[2, 1, 7, 0], 19),
            (&[4, 0, 1, 0], 22),
            (&[4, 0, 8, 0], 22),
        ];
        for (command, needs) in holds {
            let change = match command {
                [4, 0, pairs, 0] => Change::Pairs((*pairs).into()),
                _ => Change::None,
            };
            assert_eq!(read(command, ALL, 8), Some(change), "{command:x?}");
            // Not without its feature, nor cut short or followed by more.
            assert_eq!(read(command, ALL & !(1 << needs), 8), None);
            for len in 0..command.len() {
                assert_eq!(read(&command[..len], ALL, 8), None, "{command:x?} {len}");
            }
            assert_eq!(read(&[command, &[0]].concat(), ALL, 8), None);
        }
        let fails: [&[u8]; 20] = [
            &[],
            &[0],
            &[0, 0, 2],
            // Modes that keep frames away are not offered.
            &[0, 2, 1],
            &[0, 3, 1],
            &[0, 4, 1],
            &[0, 5, 1],
            &table(0, 2, 1),
            &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
            &[1, 1, 3, 0, 0, 0, 0, 9],
            &[1, 2, 0, 0, 0, 0, 0, 0],
            &[2, 0, 0, 0x10],
            &[2, 2, 0, 0],
            &[3, 0],
            &[4, 0, 0, 0],
            &[4, 0, 9, 0],
            &[4, 1, 1, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[6, 0, 0, 0],
            &[0xff, 0xff],
        ];
        for command in fails {
            assert_eq!(read(command, ALL, 8), None, "{command:x?}");
        }
        // An address that the driver reads back would be the old one.
        assert_eq!(read(&[1, 1, 2, 0, 0, 0, 0, 9], ALL | 1 << 5, 8), None);
    }
}
