//! What hostile guests cost others, counted in passes: no other load on the machine changes that.

use super::*;

/// Guest address of memory that is no ring's.
const PLACE: u64 = BASE + TRANSMIT as u64;

/// What a hostile pair of guests does before each pass.
type Deed = fn(&mut [Vm<'_>]);
/// The counter that says so.
type Counted = fn(&[Vm<'_>]) -> u64;

fn malformed(vms: &[Vm<'_>]) -> u64 {
    vms[0].drops(DropReason::RxMalformedChain)
}

fn too_long(vms: &[Vm<'_>]) -> u64 {
    vms[0].drops(DropReason::RxTooLong)
}

fn full(vms: &[Vm<'_>]) -> u64 {
    vms[1].drops(DropReason::EgressRingFull)
}

fn bad_buffers(vms: &[Vm<'_>]) -> u64 {
    vms[1].port.stats.sum().bad_buffers
}

/// Posts as many readable buffers as there is room for.
fn post(vm: &mut Vm<'_>, address: u64, len: u32) {
    while vm.transmit.reap().is_some() {}
    while vm.transmit.post_one(Buffer::readable(address, len), 0) {}
    vm.transmit.publish();
}

/// Posts every receive buffer that has come back, as something else.
fn post_again(vm: &mut Vm<'_>, buffer: Buffer) {
    while let Some(used) = vm.receive.reap() {
        assert!(vm.receive.post_one(buffer, used.token));
    }
    vm.receive.publish();
}

#[test]
fn whatever_hostile_guests_post_a_bystanders_frame_arrives_in_the_pass_after_it_was_sent() {
    let deeds: [(&str, Counted, Deed); 6] = [
        ("chains in a hole", malformed, |vms| {
            post(&mut vms[0], 0, 100)
        }),
        ("empty chains", malformed, |vms| post(&mut vms[0], PLACE, 0)),
        ("chains that are too long", too_long, |vms| {
            post(&mut vms[0], PLACE, MAX_FRAME + 1000);
        }),
        (
            "the longest frames for a receiver that returns nothing",
            full,
            |vms| {
                vms[0].send(1, MAX_FRAME, ALL);
            },
        ),
        ("frames for buffers of one byte", bad_buffers, |vms| {
            vms[0].send(1, 60, ALL);
            post_again(&mut vms[1], Buffer::writable(PLACE, 1));
        }),
        ("frames for buffers in a hole", bad_buffers, |vms| {
            vms[0].send(1, 60, ALL);
            post_again(&mut vms[1], Buffer::writable(0, 2048));
        }),
    ];
    for packed in [false, true] {
        for (what, counted, deed) in deeds {
            let rams = rams::<4>();
            let mut vms = vms(&rams, packed);
            let topology = topology(&vms, 1, |_| 0);
            let mut tools = Threads::new(1);
            let mut passes = tools.passes(&topology);
            for turn in 0..500 {
                deed(&mut vms);
                assert_eq!(vms[2].send(3, 60, 1), 1);
                passes[0].run(0, || true);
                let came = vms[3].take(usize::MAX);
                assert_eq!(came, 1, "{what}, packed: {packed}, pass {turn}");
                vms[3].give_back();
            }
            assert_eq!(vms[3].from[2], 500);
            // From the first passes on, in which there were good buffers, each of them.
            let counted = counted(&vms);
            assert!(counted >= 450, "{what}, packed: {packed}: {counted}");
            for vm in &vms[..2] {
                assert_eq!((vm.transmit.fault(), vm.receive.fault()), (None, None));
            }
        }
    }
}
