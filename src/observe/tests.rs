use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketOption;
use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionOption;
use pcap_file::pcapng::blocks::interface_statistics::InterfaceStatisticsOption;
use pcap_file::pcapng::{Block, PcapNgParser};

use super::pcapng::Section;
use super::*;
use crate::config::MAX_SNAPLEN;
use crate::memory::{Pieces, SharedMemory, Window};
use crate::stats::DropReason;

const PORT: PortRef = PortRef {
    slot: 2,
    generation: 9,
};
const OTHER: PortRef = PortRef {
    slot: 3,
    generation: 1,
};

fn spec(kind: Kind, ports: Option<Vec<PortRef>>, direction: ObserveDirection) -> ObserverSpec {
    ObserverSpec {
        kind,
        ports: ports.map(Into::into),
        direction,
        snaplen: MAX_SNAPLEN,
        filter: Filter::default(),
    }
}

fn record(number: u64, captured: usize) -> Record {
    Record {
        time: number,
        len: captured as u32,
        captured: captured as u32,
        port: PORT,
        queue: Some(1),
        what: What::Received,
        frame: (0, number as u32),
    }
}

/// The byte at a place of a frame.
fn pattern(number: u64, at: usize) -> u8 {
    (number as usize * 13 + at * 7) as u8
}

#[test]
fn what_one_thread_writes_another_reads_whole_and_the_rest_is_counted() {
    const FRAMES: u64 = 60_000;
    let capture = spec(Kind::Capture, Some(vec![PORT]), ObserveDirection::Both);
    let (observer, mut reader) = Observer::with_reader(capture, std::iter::once(4));
    let memory = SharedMemory::create(64 << 10, true).unwrap();
    let over = AtomicBool::new(false);
    let (mut seen, mut last) = (0, None);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let feed = observer.feed(4);
            let mut held = feed.take();
            assert!(feed.take().pen.is_none());
            let pen = held.pen.as_mut().unwrap();
            for number in 0..FRAMES {
                let len = 14 + (number as usize * 97) % 3000;
                let bytes: Vec<u8> = (0..len).map(|at| pattern(number, at)).collect();
                let (head, rest) = bytes.split_at(len.min(128));
                let window = memory.window(0, rest.len().max(1)).unwrap();
                let window = window.sub(0, rest.len()).unwrap();
                window.write_bytes(0, rest);
                let rest = [window];
                let content = Content {
                    head,
                    payload: Pieces::new(Window::EMPTY, &rest),
                    len: len as u32,
                };
                assert_eq!(content.available(), len);
                feed.write(pen, &record(number, len), &[], &content);
            }
            drop(held);
            over.store(true, Ordering::Release);
        });
        let mut bytes = Vec::new();
        loop {
            let was_over = over.load(Ordering::Acquire);
            while let Some((thread, record)) = reader.next(&mut bytes) {
                assert_eq!((thread, record.len as usize), (4, bytes.len()));
                assert!(last.is_none_or(|last| last < record.time));
                last = Some(record.time);
                let damaged = (0..bytes.len()).find(|at| bytes[*at] != pattern(record.time, *at));
                assert_eq!(damaged, None, "frame {}", record.time);
                seen += 1;
            }
            if was_over {
                break;
            }
            // Now and then it is too slow.
            if seen % 7 == 0 {
                std::thread::sleep(Duration::from_millis(3));
            }
        }
    });
    let counts = observer.counts();
    assert_eq!(counts.captured, seen);
    assert_eq!(counts.captured + counts.missed, FRAMES);
    assert_eq!(observer.missed_at(PORT.slot), counts.missed);
    assert!(observer.feed(4).take().pen.is_some());
}

#[test]
fn the_oldest_record_of_all_threads_comes_first() {
    let capture = spec(Kind::Capture, Some(vec![PORT]), ObserveDirection::Both);
    let (observer, mut reader) = Observer::with_reader(capture, std::iter::empty());
    let content = Content {
        head: &[5; 60],
        payload: Pieces::NONE,
        len: 60,
    };
    for (thread, times) in [(0, [1, 4, 5]), (31, [2, 3, 6])] {
        let feed = observer.feed(thread);
        let mut held = feed.take();
        let pen = held.pen.as_mut().unwrap();
        for time in times {
            feed.write(pen, &record(time, 60), &[], &content);
        }
    }
    let mut bytes = Vec::new();
    let order = std::iter::from_fn(|| reader.next(&mut bytes).map(|(_, record)| record.time));
    assert_eq!(order.collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
}

#[test]
fn each_port_has_the_observers_that_want_something_of_it() {
    let (both, rx) = (ObserveDirection::Both, ObserveDirection::Rx);
    let specs = [
        spec(Kind::Capture, None, both),
        spec(Kind::Capture, Some(vec![PORT]), rx),
        spec(Kind::Drops, Some(vec![OTHER]), both),
        spec(Kind::Trace, Some(vec![PORT]), rx),
        spec(Kind::Mirror(OTHER), Some(vec![PORT]), ObserveDirection::Tx),
        spec(
            Kind::Capture,
            Some(vec![PortRef {
                generation: 8,
                ..PORT
            }]),
            both,
        ),
    ];
    let observers = specs.map(|spec| Observer::mirror(spec, std::iter::empty()));
    assert!(Observers::build(&[], [PORT].into_iter()).is_none());
    let observers = Observers::build(&observers, [PORT, OTHER].into_iter()).unwrap();
    assert_eq!((observers.mirrors, observers.traces), (1 << 4, true));
    let interest = |rx, tx, rx_drops, tx_drops, trace| Interest {
        rx,
        tx,
        rx_drops,
        tx_drops,
        trace,
    };
    assert_eq!(
        observers.interest(2),
        interest(0b11, 0b1_0001, 0, 0, 0b1000)
    );
    assert_eq!(observers.interest(3), interest(1, 1, 0b100, 0b100, 0));
    assert_eq!(observers.interest(0), Interest::default());
    assert_eq!(observers.interest(900), Interest::default());
}

#[test]
fn a_section_says_all_that_is_known_of_a_frame() {
    let filtered = ObserverSpec {
        filter: Filter::compile("tcp or arp").unwrap(),
        ..spec(Kind::Drops, Some(vec![PORT]), ObserveDirection::Both)
    };
    let observer = Observer::mirror(filtered, std::iter::empty());
    observer.feed(3).miss(PORT.slot);
    let start = Duration::new(1_800_000_000, 1);
    let mut section = Section::new(&observer, start).unwrap();
    let interface = section.interface(PORT, || "vm1".to_string()).unwrap();
    assert_eq!(
        section.interface(PORT, || unreachable!()).unwrap(),
        interface
    );
    let dropped = Record {
        len: 9000,
        what: What::Dropped(DropReason::EgressRingFull),
        ..record(7, 5)
    };
    let time = Duration::new(1_800_000_000, 123_456_789);
    section
        .frame(interface, time, &dropped, &[1, 2, 3, 4, 5])
        .unwrap();
    let end = Duration::new(1_800_000_001, 7);
    section.finish(&observer, &[4], end, "stopped").unwrap();
    let mut bytes = Vec::new();
    section.take(&mut bytes);
    let (rest, mut parser) = PcapNgParser::new(&bytes).unwrap();
    let (rest, block) = parser.next_block(rest).unwrap();
    let Block::InterfaceDescription(described) = block else {
        panic!("{block:?}");
    };
    let options = &described.options;
    assert!(options.contains(&InterfaceDescriptionOption::IfName("vm1".into())));
    assert!(options.contains(&InterfaceDescriptionOption::IfTsResol(9)));
    let filter = InterfaceDescriptionOption::IfFilter(b"\0tcp or arp"[..].into());
    assert!(options.contains(&filter));
    let (rest, block) = parser.next_block(rest).unwrap();
    let Block::EnhancedPacket(packet) = block else {
        panic!("{block:?}");
    };
    assert_eq!((packet.interface_id, packet.timestamp), (0, time));
    assert_eq!(
        (packet.original_len, &packet.data[..]),
        (9000, &[1, 2, 3, 4, 5][..])
    );
    assert_eq!(
        packet.options[..2],
        [
            EnhancedPacketOption::Comment("egress_ring_full".into()),
            EnhancedPacketOption::Flags(2)
        ]
    );
    let EnhancedPacketOption::Unknown(queue) = &packet.options[2] else {
        panic!("{packet:?}");
    };
    assert_eq!(
        (queue.code, &queue.value[..]),
        (6, &1_u32.to_ne_bytes()[..])
    );
    let (rest, block) = parser.next_block(rest).unwrap();
    let Block::InterfaceStatistics(statistics) = block else {
        panic!("{block:?}");
    };
    assert!(rest.is_empty());
    // The upper half comes first, in whichever byte order.
    let nanoseconds = |time: Duration| {
        let time = time.as_nanos() as u64;
        let words = [(time >> 32) as u32, time as u32].map(u32::to_ne_bytes);
        u64::from_ne_bytes(words.concat().try_into().unwrap())
    };
    assert_eq!(statistics.timestamp, nanoseconds(end));
    assert_eq!(
        statistics.options,
        [
            InterfaceStatisticsOption::Comment("stopped".into()),
            InterfaceStatisticsOption::IsbStartTime(nanoseconds(start)),
            InterfaceStatisticsOption::IsbEndTime(nanoseconds(end)),
            InterfaceStatisticsOption::IsbIfRecv(5),
            InterfaceStatisticsOption::IsbIfDrop(1),
            InterfaceStatisticsOption::IsbUsrDeliv(4),
        ]
    );
}

#[test]
fn what_a_slot_has_missed_is_said_once() {
    let capture = spec(Kind::Capture, None, ObserveDirection::Both);
    let observer = Observer::mirror(capture, std::iter::empty());
    observer.feed(3).miss(PORT.slot);
    let later = PortRef {
        generation: PORT.generation + 1,
        ..PORT
    };
    let now = Duration::new(1_800_000_000, 1);
    let mut section = Section::new(&observer, now).unwrap();
    section.interface(PORT, || "vm1".to_string()).unwrap();
    assert!(section.knows_slot(PORT.slot) && !section.knows_slot(OTHER.slot));
    section.interface(later, || "vm1".to_string()).unwrap();
    section.finish(&observer, &[0, 0], now, "stopped").unwrap();
    assert_eq!(missed(&mut section), [0, 1]);
    // Without any port there is still somebody to say why it ends.
    let mut empty = Section::new(&observer, now).unwrap();
    empty.finish(&observer, &[], now, "stopped").unwrap();
    assert_eq!(missed(&mut empty), [0]);
}

/// What the statistics of a section say.
fn missed(section: &mut Section) -> Vec<u64> {
    let mut bytes = Vec::new();
    section.take(&mut bytes);
    let (mut rest, mut parser) = PcapNgParser::new(&bytes).unwrap();
    let mut missed = Vec::new();
    while !rest.is_empty() {
        let (after, block) = parser.next_block(rest).unwrap();
        if let Block::InterfaceStatistics(statistics) = block {
            let drops = statistics.options.iter().filter_map(|option| match option {
                InterfaceStatisticsOption::IsbIfDrop(drops) => Some(*drops),
                _ => None,
            });
            missed.extend(drops);
        }
        rest = after;
    }
    missed
}

#[test]
fn a_trace_counts_the_steps_that_it_missed_at_any_port() {
    let trace = spec(Kind::Trace, Some(vec![PORT]), ObserveDirection::Rx);
    let (observer, _reader) = Observer::with_reader(trace, std::iter::empty());
    observer.feed(0).miss(OTHER.slot);
    observer.feed(0).miss(PORT.slot);
    assert_eq!(observer.counts().missed, 2);
}
