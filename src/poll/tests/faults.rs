//! Memory that goes away while a poll thread works with it.

use super::*;
use crate::frame::HEAD_BYTES;
use crate::memory::fence;

/// The shortest Ethernet frame, without its checksum.
const MIN_FRAME: usize = 60;
/// Where the sender's memory ends: the heads of its frames lie before, the rest behind.
const CUT: usize = TRANSMIT + 8192;

/// Posts a frame that lies across `CUT`, with its head before it.
fn send_across(vm: &mut Vm<'_>, to: u16, len: u32) {
    let head = NET_HDR_SIZE + HEAD_BYTES;
    let offset = CUT - head;
    let bytes = [[0; NET_HDR_SIZE].as_slice(), &mac(to), &mac(vm.slot())].concat();
    let window = vm.ram.window(offset, head).unwrap();
    window.write_bytes(0, &[0xee; NET_HDR_SIZE + HEAD_BYTES]);
    window.write_bytes(0, &bytes);
    let buffer = Buffer::readable(BASE + offset as u64, NET_HDR_SIZE as u32 + len);
    assert!(vm.transmit.post_one(buffer, 0));
    vm.transmit.publish();
}

/// Bytes of the next used buffer.
fn received(vm: &mut Vm<'_>) -> Vec<u8> {
    let used = vm.receive.reap().unwrap();
    let offset = 2 * RING + used.token as usize * BUFFER;
    let mut bytes = vec![0; used.len as usize];
    let window = vm.ram.window(offset, bytes.len()).unwrap();
    window.read_bytes(0, &mut bytes);
    bytes
}

/// Of one burst, frames whose payload was gone when it was copied, short ones and some over several
/// buffers, between frames of another sender.
#[test]
fn frames_whose_payload_has_gone_arrive_as_zeros_and_those_of_others_whole() {
    fence::install().unwrap();
    for packed in [false, true] {
        let sender = SharedMemory::create(RAM, false).unwrap();
        let rams = [sender, ram(), ram(), ram()];
        let mut vms = vms(&rams, packed);
        let topology = topology(&vms, 1, |_| 0);
        let mut tools = Threads::new(1);
        let mut passes = tools.passes(&topology);
        send_across(&mut vms[0], 3, 1000);
        send_across(&mut vms[0], 3, 5000);
        for other in [1, 2] {
            assert_eq!(vms[other].send(3, 300, 2), 2);
        }
        rams[0].file().set_len(CUT as u64).unwrap();
        passes[0].run(0, || true);
        assert!(vms[0].device.memory.faulted());

        let mut blank = vec![0; NET_HDR_SIZE + MIN_FRAME];
        let mut frames = Vec::new();
        while vms[3].queue().published() > frames.len() as u64 {
            let bytes = received(&mut vms[3]);
            frames.push(bytes);
        }
        for buffers in [1, 3] {
            blank[10] = buffers;
            assert_eq!(frames.remove(0), blank, "first of {buffers} buffers");
            for _ in 1..buffers {
                let rest = frames.remove(0);
                assert!(
                    rest.len() <= blank.len() && rest.iter().all(|byte| *byte == 0),
                    "{rest:x?}"
                );
            }
        }
        for other in [1, 1, 2, 2] {
            let frame = frames.remove(0);
            assert_eq!(frame.len(), NET_HDR_SIZE + 300);
            assert_eq!(frame[NET_HDR_SIZE + 6..][..6], mac(other));
        }
        assert!(frames.is_empty());
        assert_eq!(vms[3].queue().broken(), None);
        assert_eq!(vms[3].receive.fault(), None);
        // Nothing more is taken from the one, and everything from the others.
        send_across(&mut vms[0], 3, 60);
        assert_eq!(vms[1].send(3, 300, 1), 1);
        passes[0].run(0, || true);
        assert_eq!(received(&mut vms[3])[NET_HDR_SIZE + 6..][..6], mac(1));
        assert!(vms[3].receive.reap().is_none());
    }
}

#[test]
fn frames_whose_head_has_gone_are_counted_and_come_to_nobody() {
    fence::install().unwrap();
    for (packed, beside_others) in [(false, true), (false, false), (true, true), (true, false)] {
        let sender = SharedMemory::create(RAM, false).unwrap();
        let rams = [sender, ram(), ram()];
        let mut vms = vms(&rams, packed);
        let topology = topology(&vms, 1, |_| 0);
        let mut tools = Threads::new(1);
        let mut passes = tools.passes(&topology);
        assert_eq!(vms[0].send(2, 60, 5), 5);
        if beside_others {
            assert_eq!(vms[1].send(2, 60, 5), 5);
        }
        rams[0].file().set_len(TRANSMIT as u64).unwrap();
        passes[0].run(0, || true);
        vms[2].take(usize::MAX);
        assert_eq!(vms[2].from[..2], [0, if beside_others { 5 } else { 0 }]);
        assert_eq!(vms[0].drops(DropReason::RxMemoryFault), 5);
        assert_eq!(vms[1].drops(DropReason::RxMemoryFault), 0);
    }
}

#[test]
fn frames_for_memory_that_has_gone_are_counted_where_they_go() {
    fence::install().unwrap();
    for packed in [false, true] {
        let receiver = SharedMemory::create(RAM, false).unwrap();
        let rams = [receiver, ram(), ram()];
        let mut vms = vms(&rams, packed);
        let topology = topology(&vms, 1, |_| 0);
        let mut tools = Threads::new(1);
        let mut passes = tools.passes(&topology);
        rams[0].file().set_len(2 * RING as u64).unwrap();
        assert_eq!(vms[1].send(0, 300, 5), 5);
        assert_eq!(vms[2].send(1, 300, 5), 5);
        passes[0].run(0, || true);
        assert_eq!(vms[0].drops(DropReason::EgressMemoryFault), 5);
        assert_eq!(vms[1].take(usize::MAX), 5);
        assert_eq!(vms[1].drops(DropReason::EgressMemoryFault), 0);
        // Their sender has its buffers again.
        assert_eq!(std::iter::from_fn(|| vms[1].transmit.reap()).count(), 5);
    }
}
