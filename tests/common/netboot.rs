//! What a network card's firmware needs to load Linux: addresses (DHCP, RFC 2131) and files (TFTP,
//! RFC 1350, with the options of RFC 2347 to 2349). One client, whose frames go nowhere else.

use super::linux::{LINUX, LINUX_IP, OUR_IP, OURS, ip_frame};

/// The script that iPXE fetches first.
const SCRIPT: &str = "boot.ipxe";
const BROADCAST_IP: [u8; 4] = [255; 4];
/// Ports, and ours for all transfers.
const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
const TFTP: u16 = 69;
const TRANSFER: u16 = 1069;
/// Bytes of a block that a client does not ask otherwise for.
const BLOCK: usize = 512;

/// Serves files by name.
#[derive(Debug)]
pub(crate) struct BootServer {
    files: Vec<(String, Vec<u8>)>,
    /// The file under way, and bytes of its blocks.
    transfer: Option<(usize, usize)>,
    /// Addresses given.
    pub(crate) leases: u32,
    /// By file, transfers whose last block was acknowledged.
    pub(crate) loaded: Vec<u32>,
}

impl BootServer {
    /// For a kernel with its initramfs and command line.
    pub(crate) fn new(kernel: Vec<u8>, initramfs: Vec<u8>, cmdline: &str) -> BootServer {
        let url = |name: &str| {
            let [a, b, c, d] = OUR_IP;
            format!("tftp://{a}.{b}.{c}.{d}/{name}")
        };
        let (kernel_url, initramfs_url) = (url("kernel"), url("initramfs"));
        let script = format!(
            "#!ipxe\nkernel {kernel_url} initrd=initramfs {}\ninitrd {initramfs_url}\nboot\n",
            cmdline.trim()
        );
        let files = vec![
            (SCRIPT.to_string(), script.into_bytes()),
            ("kernel".to_string(), kernel),
            ("initramfs".to_string(), initramfs),
        ];
        BootServer {
            loaded: vec![0; files.len()],
            files,
            transfer: None,
            leases: 0,
        }
    }

    /// The answer to a frame of the client, if it gets one.
    pub(crate) fn answer(&mut self, frame: &[u8]) -> Option<Vec<u8>> {
        assert_eq!(
            frame[6..12],
            LINUX,
            "a frame of somebody else: {frame:02x?}"
        );
        match frame[12..14] {
            [8, 6] => arp(frame),
            [8, 0] if frame[23] == 17 => self.udp(&frame[26..30], &frame[34..]),
            _ => None,
        }
    }

    fn udp(&mut self, from: &[u8], packet: &[u8]) -> Option<Vec<u8>> {
        let word = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
        let (port, data) = (word(0), packet.get(8..usize::from(word(4)))?);
        match word(2) {
            DHCP_SERVER => self.lease(data),
            TFTP => {
                let answer = self.open(data)?;
                Some(udp(TRANSFER, from.try_into().ok()?, port, &answer))
            }
            TRANSFER => {
                let answer = self.next_block(data)?;
                Some(udp(TRANSFER, from.try_into().ok()?, port, &answer))
            }
            _ => None,
        }
    }

    /// An offer, or its confirmation.
    fn lease(&mut self, request: &[u8]) -> Option<Vec<u8>> {
        let kind = match dhcp_option(request.get(240..)?, 53)?.first()? {
            1 => 2,
            3 => {
                self.leases += 1;
                5
            }
            _ => return None,
        };
        println!("firmware: DHCP message, answered by one of kind {kind}");
        let mut reply = vec![0; 240];
        reply[..4].copy_from_slice(&[2, 1, 6, 0]);
        // Transaction, and flags; address of the client, of the server; its card; the file; the
        // cookie.
        reply[4..12].copy_from_slice(&request[4..12]);
        reply[16..20].copy_from_slice(&LINUX_IP);
        reply[20..24].copy_from_slice(&OUR_IP);
        reply[28..44].copy_from_slice(&request[28..44]);
        reply[108..108 + SCRIPT.len()].copy_from_slice(SCRIPT.as_bytes());
        reply[236..].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
        reply.extend([53, 1, kind, 54, 4]);
        reply.extend(OUR_IP);
        reply.extend([51, 4, 0, 0, 0x0e, 0x10, 1, 4, 255, 255, 255, 0, 255]);
        Some(udp(DHCP_SERVER, BROADCAST_IP, DHCP_CLIENT, &reply))
    }

    /// A read request: what it asks for is acknowledged, or the first block if that is nothing.
    fn open(&mut self, request: &[u8]) -> Option<Vec<u8>> {
        let text = request.strip_prefix(&[0, 1])?.strip_suffix(&[0])?;
        let mut words = text.split(|byte| *byte == 0);
        let wanted = String::from_utf8_lossy(words.next()?);
        println!("firmware: asks for {wanted}");
        let file = self.files.iter().position(|file| file.0 == wanted);
        let Some(file) = file else {
            return Some([&[0, 5, 0, 1][..], b"no such file", &[0]].concat());
        };
        let len = self.files[file].1.len();
        // The mode.
        words.next()?;
        let (mut block, mut granted) = (BLOCK, vec![0, 6]);
        while let (Some(name), Some(value)) = (words.next(), words.next()) {
            let value = match name {
                b"blksize" => {
                    block = String::from_utf8_lossy(value).parse().ok()?;
                    block
                }
                b"tsize" => len,
                _ => continue,
            };
            granted.extend([name, &[0], value.to_string().as_bytes(), &[0]].concat());
        }
        self.transfer = Some((file, block));
        if granted.len() > 2 {
            Some(granted)
        } else {
            self.block(1)
        }
    }

    /// What follows an acknowledged block.
    fn next_block(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        let [0, 4, high, low] = message else {
            return None;
        };
        let acknowledged = usize::from(u16::from_be_bytes([*high, *low]));
        let (file, block) = self.transfer?;
        if acknowledged * block > self.files[file].1.len() {
            self.loaded[file] += 1;
            self.transfer = None;
        }
        self.block(acknowledged + 1)
    }

    fn block(&self, number: usize) -> Option<Vec<u8>> {
        let (file, block) = self.transfer?;
        let bytes = self.files[file].1.get((number - 1) * block..)?;
        let number = u16::try_from(number).ok()?.to_be_bytes();
        let bytes = &bytes[..bytes.len().min(block)];
        Some([&[0, 3][..], &number, bytes].concat())
    }
}

/// Who has our address.
fn arp(request: &[u8]) -> Option<Vec<u8>> {
    if request.get(20..22)? != [0, 1] || request.get(38..42)? != OUR_IP {
        return None;
    }
    let mut reply = [&LINUX[..], &OURS, &request[12..20], &[0, 2]].concat();
    reply.extend([&OURS[..], &OUR_IP, &request[22..32]].concat());
    reply.resize(60, 0);
    Some(reply)
}

fn udp(from: u16, ip: [u8; 4], port: u16, data: &[u8]) -> Vec<u8> {
    let len = 8 + data.len() as u16;
    // Without a checksum, as IPv4 allows.
    let mut packet = [from, port, len, 0].map(u16::to_be_bytes).concat();
    packet.extend(data);
    ip_frame(17, OUR_IP, ip, &packet)
}

fn dhcp_option(mut options: &[u8], wanted: u8) -> Option<&[u8]> {
    loop {
        match options {
            [0, rest @ ..] => options = rest,
            [255, ..] | [] | [_] => return None,
            [kind, len, rest @ ..] => {
                let value = rest.get(..usize::from(*len))?;
                if *kind == wanted {
                    return Some(value);
                }
                options = &rest[value.len()..];
            }
        }
    }
}
