//! Linux in QEMU, and the pings in a closed loop that a scripted guest exchanges with it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::guest::Guest;
use super::pause;
use super::process::Process;

/// Addresses of Linux and of the scripted guest.
pub(crate) const LINUX: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
pub(crate) const OURS: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
pub(crate) const LINUX_IP: [u8; 4] = [10, 0, 0, 1];
pub(crate) const OUR_IP: [u8; 4] = [10, 0, 0, 2];
/// Ethernet, IP, ICMP echo.
pub(crate) const HEADERS: usize = 42;
/// Addresses that pings come from, in turn: a flow each, so that several receive queues of Linux
/// are used.
const FLOWS: u64 = 16;
/// QEMU's own event for a buffer that it has used.
const THROWN_AWAY: &str = "virtqueue_fill";
/// A guest without hardware virtualisation is slow, also to boot.
pub(crate) const LIMIT: Duration = Duration::from_secs(180);

/// A QEMU guest and the directory to talk to it through.
#[derive(Debug)]
pub(crate) struct Linux {
    process: Process,
    dir: PathBuf,
}

/// How to start one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinuxOptions {
    pub(crate) packed: bool,
    pub(crate) mergeable: bool,
    /// Queue pairs, and as many CPUs.
    pub(crate) queues: u16,
    /// Of its rings.
    pub(crate) entries: u16,
    /// Its firmware loads it from the network; it may reboot.
    pub(crate) netboot: bool,
    /// Its backend will be away: it is not told that its link goes then, and what QEMU throws away
    /// is counted.
    pub(crate) lone: bool,
    /// Its card is one from before virtio 1.0.
    pub(crate) legacy: bool,
}

impl Default for LinuxOptions {
    fn default() -> Self {
        LinuxOptions {
            packed: false,
            mergeable: true,
            queues: 1,
            entries: 256,
            netboot: false,
            lone: false,
            legacy: false,
        }
    }
}

/// A script in the folder `qemu`.
pub(crate) fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("qemu")
        .join(name)
}

/// An address as text.
pub(crate) fn name(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl Linux {
    /// Starts one, with `dir` to talk to it through; it is not ready yet. `QEMU` names another
    /// program than the system's.
    pub(crate) fn start(dir: &Path, socket: &Path, options: &LinuxOptions) -> Linux {
        Linux::start_with(dir, socket, options, &[])
    }

    /// The same with further arguments of QEMU.
    pub(crate) fn start_with(
        dir: &Path,
        socket: &Path,
        options: &LinuxOptions,
        more: &[&str],
    ) -> Linux {
        Linux::start_by(
            &mut Command::new(script("guest")),
            dir,
            socket,
            options,
            more,
        )
    }

    /// The same by a command of one's own, which has an environment for instance.
    pub(crate) fn start_by(
        command: &mut Command,
        dir: &Path,
        socket: &Path,
        options: &LinuxOptions,
        more: &[&str],
    ) -> Linux {
        command.arg("--dir").arg(dir);
        command.arg("--socket").arg(socket);
        command.args(["--mac", &name(LINUX)]);
        command.args(["--queues", &options.queues.to_string()]);
        command.args(["--entries", &options.entries.to_string()]);
        command.args(["--mrg-rxbuf", if options.mergeable { "on" } else { "off" }]);
        if options.packed {
            command.arg("--packed");
        }
        if options.netboot {
            command.arg("--netboot");
        }
        command.arg("--");
        if options.lone {
            command.args(["-global", "virtio-net-pci.status=off"]);
            command.args(["-trace", THROWN_AWAY]);
        }
        if options.legacy {
            command.args(["-global", "virtio-net-pci.disable-modern=on"]);
            command.args(["-global", "virtio-net-pci.disable-legacy=off"]);
        }
        command.args(more);
        Linux {
            process: Process::spawn("qemu/guest", command),
            dir: dir.to_path_buf(),
        }
    }

    /// Runs a command in the guest, once it has booted; what it prints.
    pub(crate) fn ask(&self, command: &str) -> String {
        let seconds = LIMIT.as_secs().to_string();
        let asked = Command::new(script("ask"))
            .args(["--timeout", &seconds])
            .arg(&self.dir)
            .arg(command)
            .output()
            .expect("qemu/ask runs");
        assert!(
            asked.status.success(),
            "{command}: {}{}{}",
            String::from_utf8_lossy(&asked.stdout),
            String::from_utf8_lossy(&asked.stderr),
            self.process.words()
        );
        String::from_utf8(asked.stdout).expect("text")
    }

    /// Gives its card addresses, and those of the scripted guest.
    pub(crate) fn configure(&self) {
        self.ask(&format!(
            "ip link set eth0 mtu 9000 up && ip address add 10.0.0.1/24 dev eth0 && \
             for n in $(seq 2 {}); do arp -s 10.0.0.$n {} || exit 1; done",
            FLOWS + 1,
            name(OURS)
        ));
    }

    /// What its card has counted under these names.
    pub(crate) fn counters<const N: usize>(&self, names: [&str; N]) -> [u64; N] {
        let text = self.ask("counters");
        let words: Vec<&str> = text.split_whitespace().collect();
        names.map(|name| {
            let at = words.iter().position(|word| *word == name);
            let value = at.and_then(|at| words.get(at + 1));
            let value = value.unwrap_or_else(|| panic!("no {name} in {text}"));
            value.parse().expect("a number")
        })
    }

    /// Frames that each of its receive queues has had, of those that it uses.
    pub(crate) fn received_by_queue(&self) -> Vec<u64> {
        let text = self.ask("ethtool -S eth0");
        let words: Vec<&str> = text.split_whitespace().collect();
        let of = |n: usize| {
            let name = format!("rx_queue_{n}_packets:");
            let at = words.iter().position(|word| *word == name)?;
            words.get(at + 1)?.parse().ok()
        };
        (0..).map_while(of).collect()
    }

    /// Frames of the guest that QEMU has taken itself, and thrown away: it does so while it has no
    /// backend ("discard the tx queue data when link down", since 2.10).
    pub(crate) fn thrown_away(&self) -> u64 {
        let log = std::fs::read_to_string(self.dir.join("vmm.log")).expect("QEMU's log");
        let taken = log.lines().filter(|line| line.contains(THROWN_AWAY));
        // Answers in the control queue have a byte.
        taken.filter(|line| line.contains(" len 0 ")).count() as u64
    }

    /// Ends it by a reboot, in a moment; it is asked next when it has booted again.
    pub(crate) fn reboot(&self) {
        self.ask("(sleep 1; reboot -f) >/dev/null 2>&1 &");
        std::fs::remove_file(self.dir.join("ready")).expect("it was ready");
    }

    /// Ends QEMU as its user would.
    pub(crate) fn quit(mut self) {
        self.process.signal(Signal::TERM);
        let status = self.process.wait(LIMIT);
        assert!(status.is_some(), "QEMU stays{}", self.process.words());
    }

    /// A file that whoever loads it from the network needs.
    pub(crate) fn boot_file(&self, name: &str) -> Vec<u8> {
        let file = self.dir.join(name);
        std::fs::read(&file).unwrap_or_else(|error| panic!("{file:?}: {error}"))
    }
}

/// Numbered pings of a scripted guest, of which each must be answered, in order within its flow,
/// with what it said.
#[derive(Debug)]
pub(crate) struct Echo<'m> {
    pub(crate) guest: Guest<'m>,
    size: usize,
    /// Pings on their way at most. Linux drops answers beyond what its ICMP socket may hold, about
    /// ten of 9000 bytes.
    window: u64,
    pub(crate) sent: u64,
    pub(crate) answered: u64,
    /// Answers that came again.
    pub(crate) repeated: u64,
    /// Pings that were sent again.
    pub(crate) resent: u64,
    /// By flow, the ping whose answer is next.
    next: Vec<u64>,
    last: Instant,
}

impl<'m> Echo<'m> {
    pub(crate) fn new(guest: Guest<'m>) -> Echo<'m> {
        Echo {
            guest,
            size: 100,
            window: 4,
            sent: 0,
            answered: 0,
            repeated: 0,
            resent: 0,
            next: (0..FLOWS).collect(),
            last: Instant::now(),
        }
    }

    /// Length of the frames from now on; nothing is on its way.
    pub(crate) fn set_size(&mut self, size: usize) {
        self.size = size;
    }

    /// Time without an answer does not count up to here.
    pub(crate) fn forgive_silence(&mut self) {
        self.last = Instant::now();
    }

    /// Sends and receives until `count` more are answered; others are on their way then.
    pub(crate) fn run(&mut self, count: u64) {
        let until = self.answered + count;
        self.forgive_silence();
        while self.answered < until {
            while self.sent - self.answered < self.window && self.send() {}
            self.turn();
        }
    }

    /// Sends `count` pings and waits until all that were ever sent are answered.
    pub(crate) fn exchange(&mut self, count: u64) {
        let until = self.sent + count;
        self.forgive_silence();
        while self.answered < until {
            while self.sent < until && self.sent - self.answered < self.window && self.send() {}
            self.turn();
        }
    }

    /// Waits until all that were sent are answered.
    pub(crate) fn drain(&mut self) {
        self.exchange(0);
    }

    /// After the daemon was away: pings whose answer does not come, as QEMU has
    /// [thrown it away](Linux::thrown_away), are sent again.
    pub(crate) fn recover(&mut self) {
        let mut quiet = Instant::now();
        while self.answered < self.sent && quiet.elapsed() < Duration::from_secs(1) {
            if self.receive() {
                quiet = Instant::now();
            }
            pause();
        }
        let missing = self.sent - self.answered;
        assert!(missing <= self.window, "{missing} pings have no answer");
        let mut again: Vec<u64> = Vec::new();
        for next in &self.next {
            again.extend((*next..self.sent).step_by(FLOWS as usize));
        }
        assert_eq!(again.len() as u64, missing);
        for number in again {
            self.guest.send(&echo_request(self.size, number));
            self.resent += 1;
        }
        self.forgive_silence();
    }

    fn send(&mut self) -> bool {
        let sent = self.guest.try_send(&echo_request(self.size, self.sent));
        self.sent += u64::from(sent);
        sent
    }

    fn turn(&mut self) {
        if !self.receive() {
            assert!(
                self.last.elapsed() < LIMIT / 3,
                "{} bytes: {} of {} pings answered, next {:?}",
                self.size,
                self.answered,
                self.sent,
                self.next
            );
            pause();
        }
    }

    /// Takes the answers that have come; whether there were any.
    pub(crate) fn receive(&mut self) -> bool {
        let mut any = false;
        while let Some(frame) = self.guest.try_receive() {
            any = true;
            assert!(frame.len() >= HEADERS, "{frame:02x?}");
            let flow = usize::from(frame[33].wrapping_sub(OUR_IP[3]));
            let next = self.next.get_mut(flow).expect("one of our addresses");
            // Its number, from the sixteen bits that an answer has: the next one's, or that of one
            // before it.
            let before = (*next as u16).wrapping_sub(u16::from_be_bytes([frame[40], frame[41]]));
            let number = next.checked_sub(u64::from(before));
            let number = number.unwrap_or_else(|| panic!("ping {next} is lost: {frame:02x?}"));
            let expected = reply_to(&echo_request(self.size, number), &frame);
            assert!(
                frame == expected,
                "{} bytes: no answer to ping {number}, {next} is next: {frame:02x?}",
                self.size
            );
            if before > 0 {
                assert!(u64::from(before) < 1024 * FLOWS, "ping {next} is lost");
                self.repeated += 1;
                continue;
            }
            *next += FLOWS;
            self.answered += 1;
            self.last = Instant::now();
        }
        any
    }
}

/// The address that a ping comes from.
fn our_ip(number: u64) -> [u8; 4] {
    [10, 0, 0, OUR_IP[3] + (number % FLOWS) as u8]
}

/// An Ethernet frame with a packet of this IP protocol, from an address of ours to one of its.
pub(crate) fn ip_frame(protocol: u8, from: [u8; 4], to: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut frame = [&LINUX[..], &OURS[..], &[8, 0]].concat();
    let total = 20 + payload.len() as u16;
    let mut ip = [
        &[0x45, 0][..],
        &total.to_be_bytes(),
        &[0, 0, 0x40, 0, 64, protocol, 0, 0],
        &from,
        &to,
    ]
    .concat();
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(ip);
    frame.extend(payload);
    frame
}

/// An ICMP echo request of `size` bytes with a number, and bytes that follow from it.
pub(crate) fn echo_request(size: usize, number: u64) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0, 0x50, 0x4c];
    icmp.extend((number as u16).to_be_bytes());
    icmp.extend((HEADERS..size).map(|at| (number as usize * 31 + at * 7) as u8));
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    ip_frame(1, our_ip(number), LINUX_IP, &icmp)
}

/// What Linux must answer to `request`: the addresses change places, the kind of message and its
/// sum change. The IP header's number and time to live are its own affair.
fn reply_to(request: &[u8], answer: &[u8]) -> Vec<u8> {
    let mut reply = request.to_vec();
    reply[..6].copy_from_slice(&OURS);
    reply[6..12].copy_from_slice(&LINUX);
    reply[26..30].copy_from_slice(&LINUX_IP);
    reply[30..34].copy_from_slice(&request[26..30]);
    for own in [15..16, 18..23] {
        reply[own.clone()].copy_from_slice(&answer[own]);
    }
    reply[24..26].fill(0);
    let sum = checksum(&reply[14..34]);
    reply[24..26].copy_from_slice(&sum.to_be_bytes());
    reply[34] = 0;
    reply[36..38].fill(0);
    let sum = checksum(&reply[34..]);
    reply[36..38].copy_from_slice(&sum.to_be_bytes());
    reply
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
