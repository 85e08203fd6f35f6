//! A capture as its client receives it: pcapng blocks, written to files or printed as lines.
//!
//! The API sends pcapng, and the client cuts it into files. So `curl` alone is enough for a
//! capture, and the rotation only needs to recognise blocks.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionOption;
use pcap_file::pcapng::blocks::interface_statistics::InterfaceStatisticsOption;
use pcap_file::pcapng::{Block, PcapNgParser};
use serde_json::json;

use super::Failure;
use super::text::{escape, print, timestamp_ns, unprinted};
use crate::wire;

/// Block types.
const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const PACKET: u32 = 6;
/// `epb_queue`.
const EPB_QUEUE: u16 = 6;
/// Longest block in bytes: a frame and its options.
const MAX_BLOCK: usize = 1 << 20;

/// The destination of a capture.
#[derive(Debug)]
pub(super) enum Sink {
    /// Lines for people, or JSON.
    Lines { json: bool },
    /// Standard output, as pcapng.
    Stdout,
    /// Files, as pcapng.
    Files(Files),
}

/// A capture file, and the numbered files that follow when it is full.
#[derive(Debug)]
pub(super) struct Files {
    path: PathBuf,
    file: File,
    written: u64,
    /// Bytes after which the next file begins.
    limit: Option<u64>,
    /// Number of files that are kept, the newest.
    keep: Option<u64>,
    /// Number of the current file.
    number: u64,
}

impl Files {
    pub(super) fn create(
        path: &Path,
        limit: Option<u64>,
        keep: Option<u64>,
    ) -> Result<Files, Failure> {
        // The file is truncated only at the first write, because the capture may still be refused.
        let options = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        let file = options.map_err(|error| Failure::file(&format!("write to {path:?}"), &error))?;
        Ok(Files {
            path: path.to_path_buf(),
            file,
            written: 0,
            limit,
            keep,
            number: 0,
        })
    }

    /// Returns the name of the file with this number. The first file has the given name, the others
    /// end in `.1`, `.2` and so on.
    fn name(&self, number: u64) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        if number > 0 {
            name.push(format!(".{number}"));
        }
        name.into()
    }

    fn is_full(&self, more: usize) -> bool {
        let after = self.written + more as u64;
        self.limit.is_some_and(|limit| after > limit)
    }

    fn next(&mut self, head: &[u8]) -> io::Result<()> {
        self.number += 1;
        self.file = File::create(self.name(self.number))?;
        self.written = 0;
        if let Some(oldest) = self.keep.and_then(|keep| self.number.checked_sub(keep)) {
            // Errors are ignored: somebody may have removed the file.
            let _ = std::fs::remove_file(self.name(oldest));
        }
        self.write(head)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.written == 0 {
            // Errors are ignored: a pipe has no length.
            let _ = self.file.set_len(0);
        }
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

/// A capture while it is received.
pub(super) struct Blocks {
    sink: Sink,
    pending: Vec<u8>,
    /// The section header and the interface blocks, to begin the following files with.
    head: Vec<u8>,
    parser: Option<Box<PcapNgParser>>,
    /// Bytes collected for the next write to a file.
    out: Vec<u8>,
    /// Number of frames received.
    pub(super) frames: u64,
    /// Number of frames for which the daemon had no room, as reported at the end.
    pub(super) missed: u64,
    /// Why the capture has ended, as the daemon reports.
    pub(super) ended: Option<String>,
}

impl Blocks {
    pub(super) fn new(sink: Sink) -> Blocks {
        Blocks {
            sink,
            pending: Vec::new(),
            head: Vec::new(),
            parser: None,
            out: Vec::new(),
            frames: 0,
            missed: 0,
            ended: None,
        }
    }

    /// Handles the bytes that have come. Whole blocks are written, a partial block waits for the
    /// rest.
    pub(super) fn take(&mut self, chunk: &[u8]) -> Result<(), Failure> {
        self.pending.extend_from_slice(chunk);
        let pending = std::mem::take(&mut self.pending);
        let mut rest = &pending[..];
        while let Some(len) = word(rest, 4).map(|len| len as usize) {
            if !(12..=MAX_BLOCK).contains(&len) {
                return Err(garbled());
            }
            let Some((block, later)) = rest.split_at_checked(len) else {
                break;
            };
            self.block(block)?;
            rest = later;
        }
        self.pending = rest.to_vec();
        self.flush()
    }

    fn block(&mut self, raw: &[u8]) -> Result<(), Failure> {
        let kind = word(raw, 0).unwrap_or_default();
        if kind == SECTION {
            let (_, parser) = PcapNgParser::new(raw).map_err(|_| garbled())?;
            self.parser = Some(Box::new(parser));
        }
        if kind == SECTION || kind == INTERFACE {
            self.head.extend_from_slice(raw);
        }
        if kind == PACKET {
            self.frames += 1;
        }
        match &mut self.sink {
            Sink::Files(files) if kind == PACKET && files.is_full(self.out.len() + raw.len()) => {
                let out = std::mem::take(&mut self.out);
                let written = files.write(&out);
                written
                    .and_then(|()| files.next(&self.head))
                    .map_err(|error| self.unwritten(&error))?;
                self.out.extend_from_slice(raw);
            }
            Sink::Files(_) | Sink::Stdout => self.out.extend_from_slice(raw),
            Sink::Lines { .. } => {}
        }
        let is_line = matches!(self.sink, Sink::Lines { .. });
        if kind != SECTION && (kind != PACKET || is_line) {
            self.parse(raw)?;
        }
        Ok(())
    }

    fn parse(&mut self, raw: &[u8]) -> Result<(), Failure> {
        let parser = self.parser.as_mut().ok_or_else(garbled)?;
        let (_, block) = parser.next_block(raw).map_err(|_| garbled())?;
        match block {
            Block::EnhancedPacket(packet) => {
                let mut options = parser
                    .interfaces()
                    .get(packet.interface_id as usize)
                    .into_iter()
                    .flat_map(|interface| &interface.options);
                let port = options.find_map(|option| match option {
                    InterfaceDescriptionOption::IfName(name) => Some(name.to_string()),
                    _ => None,
                });
                let port = port.unwrap_or_default();
                let line = match self.sink {
                    Sink::Lines { json: true } => in_json(&packet, &port),
                    _ => in_words(&packet, &port),
                };
                self.out.extend_from_slice(line.as_bytes());
            }
            Block::InterfaceStatistics(statistics) => {
                for option in &statistics.options {
                    match option {
                        InterfaceStatisticsOption::Comment(why) => {
                            self.ended = Some(why.to_string());
                        }
                        InterfaceStatisticsOption::IsbIfDrop(missed) => self.missed += missed,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Writes everything collected. The reader of a pipe waits for it.
    fn flush(&mut self) -> Result<(), Failure> {
        if self.out.is_empty() {
            return Ok(());
        }
        let out = std::mem::take(&mut self.out);
        match &mut self.sink {
            Sink::Lines { .. } => print(&String::from_utf8_lossy(&out))?,
            Sink::Stdout => {
                let mut stdout = io::stdout().lock();
                let written = stdout.write_all(&out).and_then(|()| stdout.flush());
                written.map_err(unprinted)?;
            }
            Sink::Files(files) => {
                let written = files.write(&out);
                written.map_err(|error| self.unwritten(&error))?;
            }
        }
        Ok(())
    }

    fn unwritten(&self, error: &io::Error) -> Failure {
        match &self.sink {
            // The file is a pipe, and its reader has left.
            Sink::Files(_) if error.kind() == io::ErrorKind::BrokenPipe => Failure::reader_left(),
            Sink::Files(files) => Failure::internal(format!(
                "cannot write to {:?}: {error}; the capture ends after about {} frames",
                files.name(files.number),
                self.frames
            )),
            _ => Failure::internal(error.to_string()),
        }
    }
}

fn garbled() -> Failure {
    Failure::internal("the daemon sends something that is no capture")
}

/// Returns the 32-bit word at an offset, in native byte order. The daemon runs on the same machine.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

/// Returns the direction, the queue and the drop reason of a frame.
fn particulars(packet: &EnhancedPacketBlock<'_>) -> (&'static str, Option<u32>, Option<String>) {
    let (mut direction, mut queue, mut dropped) = ("-", None, None);
    for option in &packet.options {
        match option {
            EnhancedPacketOption::Flags(flags) => {
                direction = if flags & 3 == 1 { "rx" } else { "tx" };
            }
            EnhancedPacketOption::Comment(reason) => dropped = Some(reason.to_string()),
            EnhancedPacketOption::Unknown(option) if option.code == EPB_QUEUE => {
                queue = word(&option.value, 0);
            }
            _ => {}
        }
    }
    (direction, queue, dropped)
}

fn in_words(packet: &EnhancedPacketBlock<'_>, port: &str) -> String {
    let (direction, queue, dropped) = particulars(packet);
    let queue = queue.map_or_else(String::new, |queue| format!(":{queue}"));
    let dropped = dropped.map_or_else(String::new, |reason| format!(" dropped: {reason},"));
    let line = format!(
        "{} {port}{queue} {direction}{dropped} {}",
        timestamp_ns(packet.timestamp),
        wire::summary(&packet.data, packet.original_len)
    );
    format!("{}\n", escape(&line))
}

fn in_json(packet: &EnhancedPacketBlock<'_>, port: &str) -> String {
    let (direction, queue, dropped) = particulars(packet);
    let bytes = packet.data.iter().map(|byte| format!("{byte:02x}"));
    let frame = json!({
        "time": packet.timestamp.as_secs_f64(),
        "port": port,
        "queue": queue,
        "direction": direction,
        "dropped": dropped,
        "length": packet.original_len,
        "summary": wire::summary(&packet.data, packet.original_len),
        "bytes": bytes.collect::<String>(),
    });
    format!("{frame}\n")
}
