//! Journeys: numbered frames from pcap files go in at one virtio-user port and come out at another,
//! into pcap files, in both directions at once; then the files are compared. Each frame once,
//! unchanged, in order within its flow. Each transmit queue has flows of its own, and a flow must
//! come out of one receive queue.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::backend::{Backend, Carried};
use super::frames::{Plan, assert_same, flow, read_pcap, write_pcap};
use super::testpmd::{Testpmd, TestpmdOptions, VirtioUser, counter};
use super::{short_tempdir, socket_path, wait_for_within};

/// Flows of each transmit queue.
const FLOWS: u16 = 7;

/// Bytes of the virtio-net header.
const HEADER: usize = 12;

/// What travels, and how.
#[derive(Clone, Debug)]
pub(crate) struct Journey {
    pub(crate) port: VirtioUser,
    /// The lengths to draw from.
    pub(crate) sizes: Vec<usize>,
    /// Frames in each direction that may be on their way without overrunning a receive ring; the
    /// next batch starts when all have arrived.
    pub(crate) batch: u32,
    pub(crate) batches: u32,
    /// Descriptors that the sender uses: what waits in a transmit queue must fit into the receive
    /// queue behind it.
    pub(crate) txd: u16,
    /// Frames that testpmd takes and gives in one turn.
    pub(crate) burst: u16,
    /// Bytes of a receive buffer, 128 of them headroom; `None` is the default, 2176.
    pub(crate) mbuf_size: Option<usize>,
    pub(crate) limit: Duration,
}

impl Journey {
    /// Makes the journey. `arrived` looks at the running testpmd and backend first.
    pub(crate) fn run(&self, attached: impl FnOnce(&Testpmd, &Backend)) {
        assert!(self.batches <= 10, "DPDK has no more ports");
        let plans = [0, 1].map(|n: u8| Plan {
            to: [0x52, 0x54, 0, 0, 0, 2 - n],
            from: [0x52, 0x54, 0, 0, 0, 1 + n],
            flows: FLOWS * self.port.queues,
            count: self.batch * self.batches,
            sizes: self.sizes.clone(),
        });
        let sent = plans.map(|plan| plan.frames());
        let files = short_tempdir();
        for (n, frames) in sent.iter().enumerate() {
            for (turn, batch) in frames.chunks(self.batch as usize).enumerate() {
                for queue in 0..self.port.queues {
                    let own = batch
                        .iter()
                        .filter(|frame| flow(frame) % self.port.queues == queue);
                    let own: Vec<_> = own.cloned().collect();
                    write_pcap(&self.file(files.path(), "in", n, turn, queue), &own);
                }
            }
        }
        let (mut testpmd, backend) = self.start(files.path());
        attached(&testpmd, &backend);
        let ports = port_numbers(&mut testpmd);
        self.forward(&mut testpmd, &backend, &ports);
        // Both ports have sent frames of the same lengths.
        backend.assert_carried(&self.carried(&sent[0]));
        testpmd.close_ports();
        testpmd.quit();
        for (n, frames) in sent.iter().enumerate() {
            assert_same(frames, &self.arrived(files.path(), 1 - n));
        }
        backend.stop();
    }

    /// What these frames are for each port that sends and receives them.
    fn carried(&self, frames: &[Vec<u8>]) -> Carried {
        // The header goes into the headroom.
        let room = self.mbuf_size.unwrap_or(2176) - 128;
        let mut carried = Carried {
            frames: frames.len() as u64,
            sent: [0; 2],
            received: 0,
        };
        for frame in frames {
            let mbufs = frame.len().div_ceil(room) as u64;
            // The header of several has a descriptor of its own.
            let direct = if mbufs == 1 { 1 } else { mbufs + 1 };
            carried.sent[0] += 1;
            carried.sent[1] += direct;
            carried.received += (frame.len() + HEADER).div_ceil(room + HEADER) as u64;
        }
        carried
    }

    /// What came out of a port, one receive queue after the other; no flow out of several.
    fn arrived(&self, files: &Path, port: usize) -> Vec<Vec<u8>> {
        let (mut all, mut flows, mut used) = (Vec::new(), HashSet::new(), 0);
        for queue in 0..self.port.queues {
            let turns = 0..self.batches as usize;
            let frames =
                turns.flat_map(|turn| read_pcap(&self.file(files, "out", port, turn, queue)));
            let frames: Vec<_> = frames.collect();
            let own: HashSet<u16> = frames.iter().map(|frame| flow(frame)).collect();
            assert!(flows.is_disjoint(&own), "a flow is in two queues");
            flows.extend(&own);
            used += u16::from(!own.is_empty());
            all.extend(frames);
        }
        // A single frame is in one of them.
        assert!(
            used == self.port.queues || all.len() == 1,
            "{used} queues were used"
        );
        all
    }

    fn file(&self, dir: &Path, name: &str, port: usize, turn: usize, queue: u16) -> PathBuf {
        dir.join(format!("{name}{port}-{turn}-{queue}.pcap"))
    }

    /// testpmd with both virtio ports and a pcap port for each of them and each batch, attached to
    /// a backend.
    fn start(&self, files: &Path) -> (Testpmd, Backend) {
        let dir = short_tempdir();
        let sockets = [0, 1].map(|n| socket_path(dir.path(), n));
        let mut vdevs: Vec<String> = (0..2).map(|n| self.port.vdev(n, &sockets[n])).collect();
        for turn in 0..self.batches as usize {
            for n in 0..2 {
                let mut vdev = format!("net_pcap{}", 2 * turn + n);
                for queue in 0..self.port.queues {
                    vdev += &format!(
                        ",rx_pcap={},tx_pcap={}",
                        self.file(files, "in", n, turn, queue).display(),
                        self.file(files, "out", n, turn, queue).display()
                    );
                }
                vdevs.push(vdev);
            }
        }
        let mut args = vec![format!("--burst={}", self.burst)];
        // The command line could ask for scattering on all ports only, and pcap has no such
        // offload.
        args.push("--disable-device-start".into());
        if let Some(size) = self.mbuf_size {
            args.push(format!("--mbuf-size={size}"));
            // They need memory; every receive ring of both ports holds its entries.
            let posted = 2 * u32::from(self.port.queues) * u32::from(self.port.queue_size);
            args.push(format!("--total-num-mbufs={}", 8192.max(posted + 4096)));
        }
        let options = TestpmdOptions {
            vdevs,
            forward_mode: "io",
            queues: self.port.queues,
            txd: self.txd,
            rxd: self.port.queue_size,
            args,
        };
        let (mut testpmd, backend) = if self.port.server {
            // It listens on its first socket and opens the second once the first is connected.
            let mut testpmd = Testpmd::spawn(&options);
            let backend = Backend::connecting(dir, 2, self.port.queues);
            testpmd.wait_ready();
            (testpmd, backend)
        } else {
            let backend = Backend::listening_in(dir, 2, self.port.queues);
            (Testpmd::start(&options), backend)
        };
        if self.mbuf_size.is_some_and(|size| size < 2176) {
            for n in &port_numbers(&mut testpmd).0 {
                testpmd.command(&format!("port config {n} rx_offload scatter on"));
            }
        }
        testpmd.command("port start all");
        backend.wait_ready(2);
        (testpmd, backend)
    }

    /// Sends the batches, one after the other.
    fn forward(&self, testpmd: &mut Testpmd, backend: &Backend, ports: &(Vec<usize>, Vec<usize>)) {
        let (virtio, pcap) = ports;
        // A full transmit queue makes the sender wait, not drop.
        testpmd.command("set fwd io retry");
        testpmd.command("set burst tx delay 10 retry 1000000");
        for (turn, files) in pcap.chunks(2).enumerate() {
            // In pairs: the first virtio port with its files, the second one with its own.
            testpmd.command(&format!(
                "set portlist {},{},{},{}",
                virtio[0], files[0], virtio[1], files[1]
            ));
            testpmd.command("start");
            let wanted = u64::from(self.batch) * (turn as u64 + 1);
            wait_for_within(self.limit, "all frames of a journey", || {
                let stats = testpmd.stats();
                let arrived = |n: &usize| counter(&stats[*n], "RX-packets") >= wanted;
                let all = virtio.iter().all(arrived);
                // Else it would only be seen that something does not come.
                backend.assert_no_drops();
                all
            });
            testpmd.stop_forwarding();
            let stats = testpmd.stats();
            for n in virtio.iter().chain(files) {
                for error in ["TX-errors", "RX-missed", "RX-errors", "RX-nombuf"] {
                    assert_eq!(counter(&stats[*n], error), 0, "testpmd's port {n}: {error}");
                }
            }
            for n in virtio {
                // One too many would count, too.
                for count in ["RX-packets", "TX-packets"] {
                    assert_eq!(counter(&stats[*n], count), wanted, "port {n}: {count}");
                }
            }
        }
    }
}

/// Which ports are virtio-user's and which are pcap's, by their names: DPDK numbers them in the
/// order it likes.
fn port_numbers(testpmd: &mut Testpmd) -> (Vec<usize>, Vec<usize>) {
    let summary = testpmd.command("show port summary all");
    let of = |driver: &str| -> Vec<usize> {
        let mut found: Vec<(usize, usize)> = Vec::new();
        for line in summary.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let names = words.iter().filter_map(|word| word.strip_prefix(driver));
            let name = names.filter_map(|rest| rest.parse().ok()).next();
            if let (Some(name), Some(port)) = (name, words.first()) {
                found.push((name, port.parse().expect("a port's number")));
            }
        }
        found.sort_unstable();
        found.into_iter().map(|(_, port)| port).collect()
    };
    let found = (of("net_virtio_user"), of("net_pcap"));
    assert!(found.0.len() == 2 && found.1.len() >= 2, "{summary}");
    found
}
