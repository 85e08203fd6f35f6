//! DPDK's `dpdk-testpmd` on its prompt, with virtio-user ports: an independent virtio driver.
//!
//! It runs with hugepages where 512 MB of them are free, else with ordinary shared memory: the
//! frontend's rings and buffers look the same to the backend, only the rate differs.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::cpus;
use super::process::Process;

const PROMPT: &str = "testpmd> ";
/// A server port waits for the backend before the prompt appears, so the first wait is generous.
const START_LIMIT: Duration = Duration::from_secs(30);
const COMMAND_LIMIT: Duration = Duration::from_secs(20);

/// A virtio-user port: which of the driver's paths it takes is decided by these options.
#[derive(Debug, Clone)]
pub(crate) struct VirtioUser {
    pub(crate) queues: u16,
    pub(crate) queue_size: u16,
    pub(crate) mergeable: bool,
    pub(crate) in_order: bool,
    pub(crate) packed: bool,
    pub(crate) vectorized: bool,
    /// The driver listens, the backend connects.
    pub(crate) server: bool,
}

impl Default for VirtioUser {
    fn default() -> Self {
        VirtioUser {
            queues: 1,
            queue_size: 1024,
            mergeable: false,
            in_order: false,
            packed: false,
            vectorized: false,
            server: false,
        }
    }
}

impl VirtioUser {
    /// The `--vdev` argument of port `n`, with the address [`mac`]`(n)`.
    pub(crate) fn vdev(&self, n: usize, socket: &Path) -> String {
        format!(
            "net_virtio_user{n},path={},mac={},queues={},queue_size={},mrg_rxbuf={},in_order={},\
             packed_vq={},vectorized={}{}",
            socket.display(),
            mac(n),
            self.queues,
            self.queue_size,
            u8::from(self.mergeable),
            u8::from(self.in_order),
            u8::from(self.packed),
            u8::from(self.vectorized),
            if self.server { ",server=1" } else { "" }
        )
    }
}

/// The address of the virtio-user port `n`.
pub(crate) fn mac(n: usize) -> String {
    format!("52:54:00:00:00:{:02x}", n + 1)
}

/// How to start testpmd.
#[derive(Debug, Clone)]
pub(crate) struct TestpmdOptions {
    /// `--vdev` arguments; testpmd forwards between the first and second, third and fourth, ….
    pub(crate) vdevs: Vec<String>,
    /// `mac`, `io`, `rxonly`, `txonly`, `flowgen`, `5tswap`, ….
    pub(crate) forward_mode: &'static str,
    pub(crate) queues: u16,
    pub(crate) txd: u16,
    pub(crate) rxd: u16,
    /// Further arguments behind the `--`.
    pub(crate) args: Vec<String>,
}

impl Default for TestpmdOptions {
    fn default() -> Self {
        TestpmdOptions {
            vdevs: Vec::new(),
            forward_mode: "mac",
            queues: 1,
            txd: 1024,
            rxd: 1024,
            args: Vec::new(),
        }
    }
}

/// Counters of one port, by testpmd's names (`RX-packets`, `rx_q0_size_64_packets`, …).
pub(crate) type Counters = HashMap<String, u64>;

/// A running testpmd; killed on drop.
#[derive(Debug)]
pub(crate) struct Testpmd {
    process: Process,
    /// How much of the output has been read.
    seen: usize,
}

impl Testpmd {
    /// Starts it without waiting: ports that listen hold it up until a backend connects.
    pub(crate) fn spawn(options: &TestpmdOptions) -> Testpmd {
        static INSTANCE: AtomicU32 = AtomicU32::new(0);
        let instance = INSTANCE.fetch_add(1, Ordering::Relaxed);
        let (helper, poller) = cpus();
        // Its standard output would come in blocks through a pipe, without the prompt's order.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "dpdk-testpmd", "--main-lcore", "0", "--lcores"]);
        command.arg(format!("0@{helper},1@{poller}"));
        command.args(["--no-pci", "--iova-mode", "va", "--file-prefix"]);
        command.arg(format!("plx{}-{instance}", std::process::id()));
        if hugepages_free_mb() >= 512 {
            // One region, one file: a frontend may share at most eight.
            command.args(["--in-memory", "--single-file-segments", "-m", "512"]);
        } else {
            // In one file, too; DPDK refuses `--in-memory` beside it.
            command.args(["--no-huge", "-m", "1024"]);
        }
        for vdev in &options.vdevs {
            command.arg("--vdev").arg(vdev);
        }
        // Which paths the driver takes, and why not others; those with AVX-512 want to be asked
        // for.
        command.arg("--log-level=pmd.net.virtio.*:info");
        command.arg("--force-max-simd-bitwidth=512");
        // Frames that wait in a ring at a start belong to the test: no flushing.
        command.args(["--", "-i", "--nb-cores=1", "--no-flush-rx"]);
        command.arg(format!("--forward-mode={}", options.forward_mode));
        command.arg(format!("--rxq={0}", options.queues));
        command.arg(format!("--txq={0}", options.queues));
        command.arg(format!("--txd={}", options.txd));
        command.arg(format!("--rxd={}", options.rxd));
        command.arg("--total-num-mbufs=32768").args(&options.args);
        Testpmd {
            process: Process::spawn("testpmd", &mut command),
            seen: 0,
        }
    }

    /// Starts it and waits for the prompt.
    pub(crate) fn start(options: &TestpmdOptions) -> Testpmd {
        let mut testpmd = Testpmd::spawn(options);
        testpmd.wait_ready();
        testpmd
    }

    /// Waits for the first prompt: all ports are negotiated and started.
    pub(crate) fn wait_ready(&mut self) {
        self.prompt("its start", START_LIMIT);
    }

    fn prompt(&mut self, what: &str, limit: Duration) -> String {
        match self.process.out.wait(PROMPT, self.seen, limit) {
            Some(answer) => {
                self.seen += answer.len();
                answer
            }
            None => panic!("no prompt after {what}{}", self.process.words()),
        }
    }

    /// Types a command, returns what it printed.
    pub(crate) fn command(&mut self, text: &str) -> String {
        self.process.write(&format!("{text}\n"));
        let answer = self.prompt(text, COMMAND_LIMIT);
        for refusal in [
            "Bad arguments",
            "Command not found",
            "Ambiguous command",
            "Not all ports",
        ] {
            assert!(
                !answer.contains(refusal),
                "{text}: {answer}{}",
                self.process.words()
            );
        }
        answer
    }

    /// Whether the driver has chosen vectorised paths to receive and to send, by its own words; the
    /// same on all ports.
    pub(crate) fn vectorized(&self) -> [bool; 2] {
        let log = self.process.out.text() + &self.process.err.text();
        ["Rx", "Tx"].map(|direction| {
            let named = format!(" {direction} path on port");
            let chosen = log
                .lines()
                .filter(|line| line.contains("virtio: using ") && line.contains(&named));
            let mut vectors = chosen.map(|line| line.contains("vectorized"));
            let first = vectors.next();
            let first = first.unwrap_or_else(|| panic!("no{named}: {log}"));
            assert!(vectors.all(|other| other == first), "{direction}: {log}");
            first
        })
    }

    /// Closes all ports, and checks that every mbuf is free again: the rings gave back each once,
    /// or have it still, and then the driver takes it out of them.
    pub(crate) fn close_ports(&mut self) {
        self.command("port stop all");
        self.command("port close all");
        let dump = self.command("dump_mempool");
        let sum = |wanted: &[&str]| -> u64 {
            let lines = dump.lines().filter_map(|line| line.trim().split_once('='));
            let counts = lines.filter(|(name, _)| wanted.contains(name));
            let counts: Vec<u64> = counts.map(|(_, count)| count.parse().unwrap()).collect();
            assert!(!counts.is_empty(), "no {wanted:?} in {dump}");
            counts.iter().sum()
        };
        let free = sum(&["common_pool_count", "total_cache_count"]);
        assert_eq!(free, sum(&["populated_size"]), "free mbufs, all: {dump}");
    }

    /// `show port stats all`: for each port `RX-packets`, `RX-bytes`, `TX-errors`, ….
    pub(crate) fn stats(&mut self) -> Vec<Counters> {
        per_port(
            &self.command("show port stats all"),
            "NIC statistics for port",
        )
    }

    /// `show port xstats all`: for each port `rx_good_packets`, `rx_q0_size_64_packets`, ….
    pub(crate) fn xstats(&mut self) -> Vec<Counters> {
        per_port(
            &self.command("show port xstats all"),
            "NIC extended statistics for port",
        )
    }

    /// `stop`: for each port `RX-dropped`, `TX-dropped` and so on since the start.
    pub(crate) fn stop_forwarding(&mut self) -> Vec<Counters> {
        let answer = self.command("stop");
        let ports = answer.split("Accumulated").next().unwrap_or_default();
        per_port(ports, "Forward statistics for port")
    }

    /// `quit`: the ports detach in order, files are complete.
    pub(crate) fn quit(mut self) {
        self.process.write("quit\n");
        let status = self.process.wait(COMMAND_LIMIT);
        let code = status.and_then(|status| status.code());
        assert_eq!(code, Some(0), "quit{}", self.process.words());
    }

    /// SIGKILL, as a frontend dies.
    pub(crate) fn kill(self) {}
}

fn per_port(text: &str, heading: &str) -> Vec<Counters> {
    let ports: Vec<Counters> = text.split(heading).skip(1).map(counters).collect();
    assert!(!ports.is_empty(), "no {heading:?} in {text}");
    ports
}

/// Every `name: number` of a text.
fn counters(text: &str) -> Counters {
    let words: Vec<&str> = text.split_whitespace().collect();
    words
        .windows(2)
        .filter_map(|pair| {
            let name = pair[0].strip_suffix(':')?;
            Some((name.to_string(), pair[1].parse().ok()?))
        })
        .collect()
}

/// A counter that must be there.
pub(crate) fn counter(port: &Counters, name: &str) -> u64 {
    *port
        .get(name)
        .unwrap_or_else(|| panic!("no counter {name} in {port:?}"))
}

pub(crate) fn hugepages_free_mb() -> u64 {
    std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok())
        .map_or(0, |pages| pages * 2)
}
