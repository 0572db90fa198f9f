//! Printing: aligned tables for people, the API's JSON for programs.

use std::io::{self, Write};

use clap::ValueEnum;
use serde::Serialize;
use time::OffsetDateTime;

use crate::admin::types::{RepairProgress, Space};
use crate::units::ByteSize;

/// How answers are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people
    Table,
    /// For programs
    Json,
}

/// Standard output in one format.
pub(super) struct Output {
    format: Format,
}

impl Output {
    pub(super) fn new(format: Format) -> Self {
        Self { format }
    }

    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// Prints `value` as JSON, or what `table` makes of it.
    pub(super) fn show<T: Serialize>(
        &mut self,
        value: &T,
        table: impl FnOnce(&T) -> String,
    ) -> io::Result<()> {
        let text = match self.format {
            Format::Json => serde_json::to_string_pretty(value)? + "\n",
            Format::Table => table(value),
        };
        self.text(&text)
    }

    /// Prints text as it is.
    #[expect(clippy::unused_self, reason = "whoever may print has an Output")]
    pub(super) fn text(&mut self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }
}

/// A table; columns are as wide as their widest cell, two spaces apart.
pub(super) struct Table {
    /// Title of each column, and whether it is aligned to the right.
    columns: Vec<(&'static str, bool)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns; a title that begins with `>` is a column of numbers, aligned
    /// to the right.
    pub(super) fn new(titles: &[&'static str]) -> Self {
        let columns = titles
            .iter()
            .map(|title| title.strip_prefix('>').map_or((*title, false), |title| (title, true)))
            .collect();
        Self { columns, rows: Vec::new() }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.columns.len(), "a cell for each column");
        self.rows.push(cells.into_iter().map(|cell| printable(&cell)).collect());
    }

    pub(super) fn render(&self) -> String {
        let width = |i: usize| {
            let title = self.columns[i].0.chars().count();
            self.rows.iter().map(|row| row[i].chars().count()).fold(title, usize::max)
        };
        let widths: Vec<_> = (0..self.columns.len()).map(width).collect();
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let cells: Vec<_> = cells
                .zip(self.columns.iter().zip(&widths))
                .map(
                    |(cell, ((_, right), &width))| {
                        if *right { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
                    },
                )
                .collect();
            cells.join("  ").trim_end().to_owned() + "\n"
        };
        let mut text = line(&mut self.columns.iter().map(|(title, _)| *title));
        for row in &self.rows {
            text += &line(&mut row.iter().map(String::as_str));
        }
        text
    }
}

/// `key: value` lines with the values below each other.
pub(super) fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(key, _)| key.len()).max().unwrap_or(0) + 2;
    pairs
        .iter()
        .map(|(key, value)| {
            format!("{:<width$}{}", format!("{key}:"), printable(value)).trim_end().to_owned()
                + "\n"
        })
        .collect()
}

/// A moment, milliseconds since 1970, in UTC.
pub(super) fn utc(unix_ms: u64) -> String {
    let nanos = i128::from(unix_ms) * 1_000_000;
    let Ok(at) = OffsetDateTime::from_unix_timestamp_nanos(nanos) else {
        return format!("{unix_ms} ms");
    };
    let (date, (hour, minute, second, milli)) = (at.date(), at.time().as_hms_milli());
    format!("{date} {hour:02}:{minute:02}:{second:02}.{milli:03}")
}

/// The text without control characters, which could repaint the terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// `or`, if the text is empty.
pub(super) fn non_empty(text: String, or: &str) -> String {
    if text.is_empty() { or.to_owned() } else { text }
}

/// Bytes for people, rounded: `9.31GiB`.
pub(super) fn human_bytes(bytes: u64) -> String {
    ByteSize(bytes).approximate()
}

/// Seconds for people: `45s`, `3m 20s`, `5h 2m`, `12d 4h`.
pub(super) fn human_seconds(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

/// How far the restoring of redundancy is, on a line: `1.00GiB of 4.00GiB (25%), 100MiB/s, about
/// 30s left`.
pub(super) fn repair_progress(repair: &RepairProgress) -> String {
    let mut text = format!(
        "{} of {} ({}), {}/s",
        human_bytes(repair.bytes_done),
        human_bytes(repair.bytes_total),
        percent(repair.bytes_done, repair.bytes_total),
        human_bytes(repair.bytes_per_second),
    );
    if let Some(eta) = repair.eta_s {
        text.push_str(", about ");
        text.push_str(&human_seconds(eta));
        text.push_str(" left");
    }
    if let Some(limit) = repair.limit_bytes_per_second {
        text.push_str("; clients leave ");
        text.push_str(&human_bytes(limit));
        text.push_str("/s of I/O");
    }
    text
}

/// A bar of `width` characters of which `part` of `whole` are filled.
pub(super) fn bar(part: u64, whole: u64, width: usize) -> String {
    let filled = u128::from(part.min(whole)) * width as u128 / u128::from(whole.max(1));
    let filled = usize::try_from(filled).unwrap_or(width);
    format!("[{}{}]", "#".repeat(filled), "-".repeat(width - filled))
}

/// `part` of `whole` in percent, rounded down; `-` of nothing.
pub(super) fn percent(part: u64, whole: u64) -> String {
    match (u128::from(part) * 100).checked_div(u128::from(whole)) {
        Some(percent) => format!("{percent}%"),
        None => "-".to_owned(),
    }
}

/// What slots are for, in a line.
pub(super) fn space(space: &Space) -> String {
    format!(
        "{} used: {} live, {} reclaimable; {} reserved",
        human_bytes(space.used),
        human_bytes(space.live),
        human_bytes(space.reclaimable),
        human_bytes(space.reserved)
    )
}

/// The thin-provisioning ratio: `1.35`.
pub(super) fn ratio(percent: u64) -> String {
    format!("{}.{:02}", percent / 100, percent % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (seconds, text) in
            [(0, "0s"), (59, "59s"), (200, "3m 20s"), (18_120, "5h 2m"), (1_051_200, "12d 4h")]
        {
            assert_eq!(human_seconds(seconds), text);
        }
    }

    #[test]
    fn the_progress_of_a_repair() {
        let mut repair = RepairProgress { bytes_done: 1 << 30, ..RepairProgress::default() };
        repair.bytes_total = 4 << 30;
        assert_eq!(repair_progress(&repair), "1.00GiB of 4.00GiB (25%), 0B/s");
        repair.bytes_per_second = 100 << 20;
        repair.eta_s = Some(31);
        repair.limit_bytes_per_second = Some(300 << 20);
        let text =
            "1.00GiB of 4.00GiB (25%), 100MiB/s, about 31s left; clients leave 300MiB/s of I/O";
        assert_eq!(repair_progress(&repair), text);
        assert_eq!(bar(1, 4, 8), "[##------]");
        assert_eq!(bar(9, 4, 8), "[########]");
        assert_eq!(bar(0, 0, 2), "[--]");
    }

    #[test]
    fn tables_are_aligned() {
        let mut table = Table::new(&["NAME", ">SIZE", "STATE"]);
        table.row(vec!["a".into(), "10 GiB".into(), "online".into()]);
        table.row(vec!["longer\x1b".into(), "1 B".into(), String::new()]);
        let expected = "NAME       SIZE  STATE\na        10 GiB  online\nlonger?     1 B\n";
        assert_eq!(table.render(), expected);
    }

    #[test]
    fn percents() {
        assert_eq!(percent(1, 3), "33%");
        assert_eq!(percent(u64::MAX, u64::MAX), "100%");
        assert_eq!(percent(0, 0), "-");
    }
}
