//! Writes records as a pcapng section: an interface for each port, and blocks with the time in
//! nanoseconds, direction, queue and reason of a drop.

use std::borrow::Cow;
use std::time::Duration;

use pcap_file::pcapng::blocks::ENHANCED_PACKET_BLOCK;
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::blocks::interface_statistics::{
    InterfaceStatisticsBlock, InterfaceStatisticsOption,
};
use pcap_file::pcapng::blocks::section_header::{SectionHeaderBlock, SectionHeaderOption};
use pcap_file::pcapng::{PcapNgWriter, RawBlock};
use pcap_file::{DataLink, Endianness, PcapError};

use super::Observer;
use super::record::{Record, What};
use crate::stats::Direction;
use crate::switch::PortRef;

/// Options of an enhanced packet block.
const OPT_COMMENT: u16 = 1;
const EPB_FLAGS: u16 = 2;
const EPB_QUEUE: u16 = 6;
/// Direction bits of `epb_flags`: inbound and outbound, from the switch's view.
const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;
/// `if_tsresol`: units of 10⁻⁹ s.
const NANOSECONDS: u8 = 9;
/// Type and both lengths of a block.
const BLOCK_FRAME: usize = 12;
/// First byte of `if_filter`: a libpcap expression follows. Our filters are such expressions.
const FILTER_IS_TEXT: u8 = 0;

/// Stands for the port of an interface that belongs to no port.
const NO_PORT: PortRef = PortRef {
    slot: u16::MAX,
    generation: 0,
};

/// A section that is being written. Its bytes collect until they are taken.
pub struct Section {
    writer: PcapNgWriter<Vec<u8>>,
    /// The ports, by the number of their interface.
    interfaces: Vec<PortRef>,
    started: Duration,
    snaplen: u32,
    filter: Vec<u8>,
    /// Buffer for the body of a packet block, used again for each block.
    body: Vec<u8>,
}

impl std::fmt::Debug for Section {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Section({} interfaces)", self.interfaces.len())
    }
}

impl Section {
    /// Begins a section at the time `started`, counted from 1970.
    pub fn new(observer: &Observer, started: Duration) -> Result<Section, PcapError> {
        let application = concat!("pollux ", env!("CARGO_PKG_VERSION"));
        let header = SectionHeaderBlock {
            // Wireshark reads no other byte order from a pipe.
            endianness: Endianness::native(),
            options: vec![SectionHeaderOption::UserApplication(Cow::Borrowed(
                application,
            ))],
            ..SectionHeaderBlock::default()
        };
        let text = observer.spec.filter.text();
        Ok(Section {
            writer: PcapNgWriter::with_section_header(Vec::new(), header)?,
            interfaces: Vec::new(),
            body: Vec::new(),
            started,
            snaplen: observer.spec.snaplen,
            filter: match text {
                "" => Vec::new(),
                text => [&[FILTER_IS_TEXT], text.as_bytes()].concat(),
            },
        })
    }

    /// Returns the number of a port's interface. Writes the interface's description if there is
    /// none yet.
    pub fn interface(
        &mut self,
        port: PortRef,
        name: impl Fn() -> String,
    ) -> Result<u32, PcapError> {
        if let Some(at) = self.interfaces.iter().position(|other| *other == port) {
            return Ok(at as u32);
        }
        let mut options = vec![
            InterfaceDescriptionOption::IfName(name().into()),
            InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
        ];
        if !self.filter.is_empty() {
            let filter = InterfaceDescriptionOption::IfFilter(self.filter.clone().into());
            options.push(filter);
        }
        self.writer.write_pcapng_block(InterfaceDescriptionBlock {
            linktype: DataLink::ETHERNET,
            snaplen: self.snaplen,
            options,
        })?;
        self.interfaces.push(port);
        Ok((self.interfaces.len() - 1) as u32)
    }

    /// Whether a port of `slot` has an interface.
    pub fn knows_slot(&self, slot: u16) -> bool {
        self.interfaces.iter().any(|port| port.slot == slot)
    }

    /// Writes a record with its frame's bytes, at the time `time`, counted from 1970.
    ///
    /// The block's body is put together here, because the crate cannot write `epb_queue`.
    pub fn frame(
        &mut self,
        interface: u32,
        time: Duration,
        record: &Record,
        bytes: &[u8],
    ) -> Result<(), PcapError> {
        let (direction, reason) = match record.what {
            What::Received | What::Decided => (INBOUND, None),
            What::Delivered => (OUTBOUND, None),
            What::Dropped(reason) => match reason.direction() {
                Direction::Rx => (INBOUND, Some(reason.name())),
                Direction::Tx => (OUTBOUND, Some(reason.name())),
            },
        };
        let mut body = std::mem::take(&mut self.body);
        body.clear();
        let time = nanoseconds(time);
        for word in [
            interface,
            (time >> 32) as u32,
            time as u32,
            bytes.len() as u32,
            record.len,
        ] {
            body.extend(word.to_ne_bytes());
        }
        pad(&mut body, bytes);
        if let Some(reason) = reason {
            option(&mut body, OPT_COMMENT, reason.as_bytes());
        }
        option(&mut body, EPB_FLAGS, &direction.to_ne_bytes());
        if let Some(queue) = record.queue {
            option(&mut body, EPB_QUEUE, &u32::from(queue).to_ne_bytes());
        }
        // The option that ends the options.
        body.extend([0; 4]);
        let len = (body.len() + BLOCK_FRAME) as u32;
        self.writer.write_raw_block(&RawBlock {
            type_: ENHANCED_PACKET_BLOCK,
            initial_len: len,
            body: Cow::Borrowed(&body),
            trailer_len: len,
        })?;
        self.body = body;
        Ok(())
    }

    /// Ends the section: writes how many frames each interface has captured and missed, and why the
    /// section ends. `captured` is indexed by interface.
    pub fn finish(
        &mut self,
        observer: &Observer,
        captured: &[u64],
        time: Duration,
        why: &str,
    ) -> Result<(), PcapError> {
        if self.interfaces.is_empty() {
            // Without an interface the reason of the end could not be written.
            self.interface(NO_PORT, || "none".to_string())?;
        }
        let (started, ended) = (halves(self.started), halves(time));
        for (number, port) in self.interfaces.iter().enumerate() {
            let captured = captured.get(number).copied().unwrap_or(0);
            // Missed frames are counted for each slot. If several ports have used the slot, the
            // number is written once, with the last port.
            let later = &self.interfaces[number + 1..];
            let missed = match later.iter().any(|other| other.slot == port.slot) {
                true => 0,
                false => observer.missed_at(port.slot),
            };
            self.writer.write_pcapng_block(InterfaceStatisticsBlock {
                interface_id: number as u32,
                timestamp: ended,
                options: vec![
                    InterfaceStatisticsOption::Comment(Cow::Borrowed(why)),
                    InterfaceStatisticsOption::IsbStartTime(started),
                    InterfaceStatisticsOption::IsbEndTime(ended),
                    InterfaceStatisticsOption::IsbIfRecv(captured + missed),
                    InterfaceStatisticsOption::IsbIfDrop(missed),
                    InterfaceStatisticsOption::IsbUsrDeliv(captured),
                ],
            })?;
        }
        Ok(())
    }

    /// Moves the bytes that have collected to the end of `out`.
    pub fn take(&mut self, out: &mut Vec<u8>) {
        out.append(self.writer.get_mut());
    }
}

/// Appends bytes, and zeros up to a multiple of four.
fn pad(body: &mut Vec<u8>, bytes: &[u8]) {
    body.extend_from_slice(bytes);
    body.resize(body.len().next_multiple_of(4), 0);
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    body.extend(code.to_ne_bytes());
    body.extend((value.len() as u16).to_ne_bytes());
    pad(body, value);
}

/// Returns a time as two 32-bit words, upper half first, as a statistics block has it. The crate
/// writes the words as one number.
fn halves(time: Duration) -> u64 {
    let time = nanoseconds(time);
    if cfg!(target_endian = "little") {
        time.rotate_left(32)
    } else {
        time
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
