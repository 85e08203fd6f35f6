//! The log. No thread waits until its lines are written.
//!
//! A thread that logs puts a line into a bounded buffer, and the log's own thread writes the lines
//! to standard error. If the reader of standard error stands still, only the log's thread waits. If
//! the reader has gone, or the disk is full, only lines are lost. Lost lines are counted. A line
//! tells their number at the place where they are missing, once lines can be written again.
//!
//! The non-blocking writer of `tracing-appender` is not used. It does not count lines that it
//! failed to write. At its end it prints to standard error itself, which blocks or panics exactly
//! where the log must not.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::event::{PollFd, PollFlags, poll};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer as Formatted;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

use crate::sys::{signal, thread};

/// Most lines that wait to be written.
const LINES: usize = 2048;
/// How long the end of the process waits for its last lines.
const LAST_LINES: Duration = Duration::from_secs(1);
/// How long a thread that panics waits until its message is written. The message may be the last
/// one of the process.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// The log of this process.
static LOG: OnceLock<Log> = OnceLock::new();

/// Numbers of lines that were lost.
#[derive(Debug, Default)]
struct Lost {
    /// Lines for which the buffer had no room.
    refused: AtomicU64,
    /// Lines that could not be written.
    failed: AtomicU64,
}

/// What the log's thread receives.
enum Item {
    Line {
        text: Box<[u8]>,
        /// Number of lines before this one for which there was no room.
        refused: u64,
    },
    /// Asks for an answer when everything before it is written.
    Flush(Sender<()>),
}

/// A handle through which lines are put into the log.
#[derive(Clone, Debug)]
pub struct Log {
    items: Sender<Item>,
    lost: Arc<Lost>,
}

impl Log {
    /// Makes standard error the log of this process. Panics are logged, too. From here on SIGTERM
    /// and SIGINT stay pending until somebody reads them.
    pub fn start() -> io::Result<Log> {
        // SIGTERM and SIGINT must not be delivered to the log's thread.
        signal::hold()?;
        // The log has a descriptor of its own. So no other thread waits for the lock of `stderr`,
        // which would be held during a write.
        let out = io::stderr().as_fd().try_clone_to_owned()?;
        let log = Log::to(out.into())?;
        let log = LOG.get_or_init(|| log).clone();
        std::panic::set_hook(Box::new(|panic| {
            let thread = std::thread::current();
            let backtrace = std::backtrace::Backtrace::capture();
            let name = thread.name().unwrap_or("?");
            say(&format!("thread {name:?} {panic}\n{backtrace}\n"));
            flush_within(LAST_WORDS);
        }));
        Ok(log)
    }

    fn to(out: File) -> io::Result<Log> {
        let (items, received) = bounded(LINES);
        let lost = Arc::<Lost>::default();
        let writer = LineWriter {
            out,
            lost: lost.clone(),
            said: 0,
            torn: false,
        };
        thread::spawn("log", move || writer.run(&received))?;
        Ok(Log { items, lost })
    }

    fn put(&self, text: &[u8]) {
        let line = Item::Line {
            text: text.into(),
            refused: self.lost.refused.load(Ordering::Relaxed),
        };
        if self.items.try_send(line).is_err() {
            self.lost.refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn lost(&self) -> u64 {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        count(&self.lost.refused) + count(&self.lost.failed)
    }

    fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let (done, is_done) = bounded(1);
        if self
            .items
            .send_deadline(Item::Flush(done), deadline)
            .is_ok()
        {
            let _ = is_done.recv_deadline(deadline);
        }
    }
}

/// Returns the number of lines that were lost so far.
pub fn lost_lines() -> u64 {
    LOG.get().map_or(0, Log::lost)
}

/// Puts text into the log unchanged. Returns false if this process has no log.
pub fn say(text: &str) -> bool {
    LOG.get().map(|log| log.put(text.as_bytes())).is_some()
}

/// Waits until all lines are written, for `LAST_LINES` at most. To be called at the end of the
/// process.
pub fn flush() {
    flush_within(LAST_LINES);
}

fn flush_within(limit: Duration) {
    if let Some(log) = LOG.get() {
        log.flush(limit);
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Entry<'a>;

    fn make_writer(&'a self) -> Entry<'a> {
        Entry(self)
    }
}

/// Takes one event of `tracing`. `tracing` writes each event with one call.
#[derive(Debug)]
pub struct Entry<'a>(&'a Log);

impl Write for Entry<'_> {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.put(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The state of the log's thread.
struct LineWriter {
    out: File,
    lost: Arc<Lost>,
    /// How many lost lines were reported.
    said: u64,
    /// Whether only a part of the last line was written.
    torn: bool,
}

impl LineWriter {
    fn run(mut self, items: &Receiver<Item>) {
        for item in items {
            match item {
                Item::Line { text, refused } => {
                    self.tell_of_lost(refused);
                    if !self.write(&text) {
                        self.lost.failed.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Item::Flush(done) => {
                    // Fails if the thread that flushes waits no longer.
                    let _ = done.send(());
                }
            }
            if items.is_empty() {
                self.tell_of_lost(self.lost.refused.load(Ordering::Relaxed));
            }
        }
    }

    /// Writes a line about the lines that are missing here, if it can.
    fn tell_of_lost(&mut self, refused: u64) {
        let lost = refused + self.lost.failed.load(Ordering::Relaxed);
        let missing = lost.saturating_sub(self.said);
        if missing == 0 {
            return;
        }
        let mut text = if self.torn { "\n" } else { "" }.to_string();
        // Both write to memory and cannot fail.
        let _ = SystemTime.format_time(&mut Formatted::new(&mut text));
        let _ = writeln!(text, "  WARN {missing} lines of the log were lost");
        if self.write(text.as_bytes()) {
            self.said = lost;
        }
    }

    /// Writes the whole text, however long this takes. Returns false if that is impossible.
    fn write(&mut self, text: &[u8]) -> bool {
        let mut left = text;
        while !left.is_empty() {
            match self.out.write(left) {
                Ok(0) => break,
                Ok(written) => left = &left[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // Another owner of the file description has made it non-blocking.
                    let _ = poll(&mut [PollFd::new(&self.out, PollFlags::OUT)], None);
                }
                Err(_) => break,
            }
        }
        let whole = left.is_empty();
        self.torn = !whole && (self.torn || left.len() < text.len());
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    fn pipe() -> (File, File) {
        let (reader, writer) = io::pipe().unwrap();
        let file = |end: std::os::fd::OwnedFd| File::from(end);
        (file(reader.into()), file(writer.into()))
    }

    #[test]
    fn lines_for_a_reader_that_stands_still_are_counted_and_told_of_where_they_are_missing() {
        const SENT: u64 = 3 * LINES as u64;
        let (reader, writer) = pipe();
        let log = Log::to(writer).unwrap();
        for number in 0..SENT {
            log.put(format!("line {number:0100}\n").as_bytes());
        }
        // Nobody reads: it waits no longer than this.
        log.flush(Duration::from_millis(10));
        let lost = log.lost();
        assert!((1..SENT).contains(&lost), "{lost}");
        let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
        let mut next = 0;
        while next < SENT {
            let line = lines.next().unwrap();
            if let Some(number) = line.strip_prefix("line ") {
                assert_eq!(number.parse(), Ok(next));
                next += 1;
            } else {
                let (_, missing) = line.split_once("  WARN ").unwrap();
                let missing = missing.strip_suffix(" lines of the log were lost").unwrap();
                next += missing.parse::<u64>().unwrap();
            }
        }
        assert_eq!((next, log.lost()), (SENT, lost));
        // Everything that comes is read again.
        log.put(b"line after\n");
        assert_eq!(lines.next().unwrap(), "line after");
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (_, broken) = pipe();
        for out in [full, broken] {
            let log = Log::to(out).unwrap();
            for _ in 0..100 {
                log.put(b"in vain\n");
            }
            log.flush(Duration::from_secs(10));
            assert_eq!(log.lost(), 100);
        }
    }
}
