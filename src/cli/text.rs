//! Text for people: escaping, aligned tables, numbers, and a standard output that may close early.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use super::Failure;

/// Writes to standard output; a reader that has left (`| head`) ends the command without a fuss.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::reader_left(),
            _ => Failure::internal(format!("cannot write to standard output: {error}")),
        })
}

/// Writes to standard error; if that fails nobody is left to tell.
pub(super) fn note(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Control characters, and those that reorder or hide text, as escapes: names, paths and messages
/// may come from a frontend, and must not drive the operator's terminal.
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
    /// A header with `>` marks a column of numbers, aligned to the right.
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

    pub(super) fn render(&self, indent: &str) -> String {
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
            let mut line = String::from(indent);
            for ((cell, width), (_, align)) in row.iter().zip(&widths).zip(&self.columns) {
                let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
                match align {
                    Align::Left => line.extend([cell.as_str(), &pad, "  "]),
                    Align::Right => line.extend([pad.as_str(), cell, "  "]),
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// A number in at most six characters: `999`, `12.3k`, `4.56M`.
pub(super) fn short(value: f64) -> String {
    const UNITS: [&str; 7] = ["", "k", "M", "G", "T", "P", "E"];
    let mut value = value.max(0.0);
    let mut unit = 0;
    // 999.5 would be printed as 1000.
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

/// A duration in at most seven characters.
pub(super) fn seconds(value: f64) -> String {
    match value.max(0.0) {
        0.0 => "0".into(),
        v if v < 1e-6 => format!("{:.0}ns", v * 1e9),
        v if v < 1e-3 => format!("{:.1}us", v * 1e6),
        v if v < 1.0 => format!("{:.1}ms", v * 1e3),
        v if v < 100.0 => format!("{v:.1}s"),
        v => format!("{v:.0}s"),
    }
}

/// `2026-11-21T01:02:03.123Z` from seconds since 1970.
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

/// The same with all nanoseconds.
pub(super) fn timestamp_ns(time: Duration) -> String {
    let whole = timestamp(time.as_secs() as f64);
    let seconds = whole.split('.').next().unwrap_or_default();
    format!("{seconds}.{:09}Z", time.subsec_nanos())
}

/// The Gregorian date of a day counted from 1970-01-01. Years start in March here, so that a leap
/// day is the last of its year, and eras have 400 years of 146,097 days.
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
        assert_eq!(table.render(""), "NAME      N\nvm1       5\nlonger  123\n");
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
