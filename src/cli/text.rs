//! Text for people: escaping, aligned tables, numbers, and output that may close early.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use anstream::stream::RawStream;
use anstream::{AutoStream, ColorChoice};

use super::Failure;

/// Writes to standard output. If the reader has left (`| head`), the command ends without a
/// message.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(unprinted)
}

/// Returns the failure for an error of standard output.
pub(super) fn unprinted(error: io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::reader_left(),
        _ => Failure::internal(format!("cannot write to standard output: {error}")),
    }
}

/// Returns the number of columns for lines on `stream`: from the terminal, or from `COLUMNS`.
/// `None` if neither is known. The reader is then a program, which expects one line for each
/// record.
pub(super) fn columns(stream: &impl AsFd) -> Option<usize> {
    let terminal = rustix::termios::tcgetwinsize(stream);
    let terminal = terminal.ok().map(|size| usize::from(size.ws_col));
    let said = || std::env::var("COLUMNS").ok()?.parse().ok();
    terminal.filter(|columns| *columns > 0).or_else(said)
}

/// Breaks a line at blanks, so that it has at most `width` columns where its words allow. All
/// further lines begin with `hang` blanks.
pub(super) fn wrap(line: &str, width: usize, hang: usize) -> String {
    let mut text = String::with_capacity(line.len() + 8);
    let mut at = 0;
    for (n, word) in line.split(' ').enumerate() {
        let length = visible(word);
        if n > 0 && at > hang && at + 1 + length > width {
            text.push('\n');
            text.push_str(&" ".repeat(hang));
            at = hang;
        } else if n > 0 {
            text.push(' ');
            at += 1;
        }
        text.push_str(word);
        at += length;
    }
    text
}

/// Counts the characters that take a column: all but those of escape sequences for colours.
fn visible(text: &str) -> usize {
    let mut inside = false;
    let shown = text.chars().filter(|c| {
        inside |= *c == '\x1b';
        let hidden = inside;
        inside &= *c != 'm';
        !hidden
    });
    shown.count()
}

/// Wraps each line of a text, if there is a width.
pub(super) fn fit(text: &str, width: Option<usize>, hang: usize) -> String {
    let Some(width) = width else {
        return text.to_string();
    };
    let lines = text.split('\n').map(|line| wrap(line, width, hang));
    lines.collect::<Vec<_>>().join("\n")
}

/// Whether escape sequences may be written to `stream`. It must be a terminal that supports them,
/// and `NO_COLOR` must not be set. clap uses the same rule for the help and its messages.
pub(super) fn takes_escapes(stream: &impl RawStream) -> bool {
    stream.is_terminal() && AutoStream::choice(stream) != ColorChoice::Never
}

/// Writes to standard error. If that fails, nobody can be told.
pub(super) fn note(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Escapes control characters, and characters that reorder or hide text. Names, paths and messages
/// may come from a frontend, and must not control the operator's terminal.
pub(super) fn escape(text: &str) -> Cow<'_, str> {
    let unsafe_char = |c: char| {
        c.is_control()
            || matches!(
                c,
                '\u{200b}'..='\u{200f}'
                    | '\u{2028}'..='\u{202e}'
                    | '\u{2066}'..='\u{2069}'
                    | '\u{feff}'
            )
    };
    if !text.contains(unsafe_char) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if unsafe_char(c) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

/// How a column is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// Rows under a header, each column as wide as its widest cell.
#[derive(Debug)]
pub(super) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Creates a table with these headers. A header with `>` marks a column of numbers, aligned to
    /// the right.
    pub(super) fn new(headers: &[&'static str]) -> Self {
        let columns = headers
            .iter()
            .map(|header| match header.strip_prefix('>') {
                Some(header) => (header, Align::Right),
                None => (*header, Align::Left),
            })
            .collect();
        Table {
            columns,
            rows: Vec::new(),
        }
    }

    pub(super) fn row<I: IntoIterator<Item = String>>(&mut self, cells: I) {
        let cells = cells.into_iter().map(|cell| escape(&cell).into_owned());
        self.rows.push(cells.collect());
    }

    /// Formats the table for standard output. The last column is wrapped if the terminal is too
    /// narrow.
    pub(super) fn render(&self) -> String {
        self.render_in(columns(&io::stdout()))
    }

    fn render_in(&self, columns: Option<usize>) -> String {
        let widths: Vec<usize> = self
            .columns
            .iter()
            .enumerate()
            .map(|(n, (header, _))| {
                let cells = self.rows.iter().filter_map(|row| row.get(n));
                let widest = cells.map(|cell| cell.chars().count()).max();
                widest.unwrap_or(0).max(header.len())
            })
            .collect();
        let headers: Vec<String> = self.columns.iter().map(|c| c.0.to_string()).collect();
        let mut text = String::new();
        for row in std::iter::once(&headers).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, width), (_, align)) in row.iter().zip(&widths).zip(&self.columns) {
                let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
                match align {
                    Align::Left => line.extend([cell.as_str(), &pad, "  "]),
                    Align::Right => line.extend([pad.as_str(), cell, "  "]),
                }
            }
            text.push_str(&fit_last(line.trim_end(), &widths, columns));
            text.push('\n');
        }
        text
    }
}

/// Wraps the last cell of a row into as many lines as needed.
fn fit_last(row: &str, widths: &[usize], columns: Option<usize>) -> String {
    /// In a narrower column the text would be unreadable, so it is not wrapped.
    const LEAST: usize = 16;
    let before = widths.iter().rev().skip(1).map(|width| width + 2).sum();
    match columns {
        Some(columns) if columns >= before + LEAST => {
            let at = row.char_indices().nth(before).map(|(at, _)| at);
            let (first, last) = row.split_at(at.unwrap_or(row.len()));
            let last = wrap(last, columns - before, 0);
            let next_line = format!("\n{}", " ".repeat(before));
            format!("{first}{}", last.replace('\n', &next_line))
        }
        _ => row.to_string(),
    }
}

/// Formats a number in at most six characters: `999`, `12.3k`, `4.56M`.
pub(super) fn short(value: f64) -> String {
    const UNITS: [&str; 7] = ["", "k", "M", "G", "T", "P", "E"];
    let mut value = value.max(0.0);
    let mut unit = 0;
    // 999.5 and more would be printed as 1000.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$}{}", UNITS[unit])
}

/// Formats an amount of memory in binary units: `201 MiB`.
pub(super) fn memory_size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut value, mut unit) = (bytes as f64 / 1024.0, 0);
    // 1023.5 and more would be printed as 1024.
    while value >= 1023.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(value.fract() != 0.0 && value < 99.95);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// Formats a duration in seconds in at most seven characters.
pub(super) fn seconds(value: f64) -> String {
    match value.max(0.0) {
        0.0 => "0".into(),
        v if v < 1e-6 => format!("{:.0}ns", v * 1e9),
        v if v < 1e-3 => format!("{:.1}µs", v * 1e6),
        v if v < 1.0 => format!("{:.1}ms", v * 1e3),
        v if v < 100.0 => format!("{v:.1}s"),
        v => format!("{v:.0}s"),
    }
}

/// Formats seconds since 1970 as `2026-11-21T01:02:03.123Z`.
pub(super) fn timestamp(time: f64) -> String {
    let millis = (time.max(0.0) * 1000.0).round() as u64;
    let (days, millis_of_day) = (millis / 86_400_000, millis % 86_400_000);
    let (year, month, day) = date(days);
    let of_day = millis_of_day / 1000;
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        text,
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60,
        millis_of_day % 1000
    );
    text
}

/// Formats a time since 1970 like `timestamp`, with all nanoseconds.
pub(super) fn timestamp_ns(time: Duration) -> String {
    let whole = timestamp(time.as_secs() as f64);
    let seconds = whole.split('.').next().unwrap_or_default();
    format!("{seconds}.{:09}Z", time.subsec_nanos())
}

/// Returns the Gregorian date of a day counted from 1970-01-01. In this calculation years start in
/// March, so a leap day is the last day of its year. Eras have 400 years of 146,097 days.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_controls_do_not_get_through() {
        assert_eq!(escape("plain ü"), "plain ü");
        assert_eq!(escape("a\x1b[2Jb\n"), "a\\u{1b}[2Jb\\n");
        assert_eq!(escape("\u{202e}x\u{9b}"), "\\u{202e}x\\u{9b}");
    }

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(&["NAME", ">N"]);
        table.row(["vm1".to_string(), "5".to_string()]);
        table.row(["longer".to_string(), "123".to_string()]);
        assert_eq!(
            table.render_in(None),
            "NAME      N\nvm1       5\nlonger  123\n"
        );
    }

    #[test]
    fn lines_end_at_their_width_and_words_stay_whole() {
        assert_eq!(wrap("aa bb cc", 5, 2), "aa bb\n  cc");
        assert_eq!(wrap("aa bbbbbbbb cc", 5, 1), "aa\n bbbbbbbb\n cc");
        assert_eq!(wrap("\x1b[31maa\x1b[0m bb", 5, 0), "\x1b[31maa\x1b[0m bb");
        assert_eq!(fit("aa bb\ncc", None, 0), "aa bb\ncc");
        let mut table = Table::new(&["NAME", "QUEUES"]);
        table.row([
            "vm1".to_string(),
            "vm1:0 12%, vm2:0 3%, vm3:0 1%".to_string(),
        ]);
        let expected = "NAME  QUEUES\nvm1   vm1:0 12%, vm2:0\n      3%, vm3:0 1%\n";
        assert_eq!(table.render_in(Some(24)), expected);
    }

    #[test]
    fn memory_is_counted_in_powers_of_two() {
        for (bytes, text) in [
            (0, "0 KiB"),
            (1 << 10, "1 KiB"),
            (192 << 20, "192 MiB"),
            (3 << 29, "1.5 GiB"),
            (4 << 40, "4 TiB"),
        ] {
            assert_eq!(memory_size(bytes), text);
        }
    }

    #[test]
    fn numbers_stay_short() {
        for (value, text) in [
            (0.0, "0"),
            (999.0, "999"),
            (999.7, "1.00k"),
            (1234.0, "1.23k"),
            (12_345.0, "12.3k"),
            (9_996_000.0, "10.0M"),
            (123_456_789.0, "123M"),
        ] {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn dates_are_right_around_leap_days() {
        for (time, text) in [
            (0.0, "1970-01-01T00:00:00.000Z"),
            (951_782_400.0, "2000-02-29T00:00:00.000Z"),
            (1_709_164_799.5, "2024-02-28T23:59:59.500Z"),
            (4_107_542_400.0, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(timestamp(time), text);
        }
    }
}
