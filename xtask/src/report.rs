//! Results on stdout: text for people, or one JSON object as the last line for scripts.

use std::io::{self, Write};

use serde_json::Value;

use crate::failure::{Blame, Failure, Result};

/// Where a verb puts its results.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Report {
    json: bool,
}

impl Report {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether a script reads stdout.
    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// Text for people; left out when a script reads.
    pub(crate) fn text(self, text: impl AsRef<str>) -> Result {
        if self.json {
            Ok(())
        } else {
            line(text.as_ref())
        }
    }

    /// A piece of text without a line end, shown at once.
    pub(crate) fn piece(self, text: &str) -> Result {
        if self.json {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .running("cannot write to stdout")
    }

    /// The result for scripts; left out when people read.
    pub(crate) fn json(self, value: &Value) -> Result {
        if self.json { self.line(value) } else { Ok(()) }
    }

    /// A result that is one JSON line whoever reads (the benchmarks).
    pub(crate) fn line(self, value: &Value) -> Result {
        line(&value.to_string())
    }

    /// Says on stderr what went wrong, and to scripts on stdout as well.
    pub(crate) fn failure(self, failure: &Failure) {
        let text = failure.text();
        eprintln!("error: {text}");
        if self.json {
            let error = || serde_json::json!({"error": text, "exit_code": failure.cause.code()});
            let value = failure.result.clone().unwrap_or_else(error);
            // Nobody is left to tell if stdout is closed; the exit code still says it.
            let _ = line(&value.to_string());
        }
    }
}

fn line(text: &str) -> Result {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .running("cannot write to stdout")
}

/// Columns of text, as wide as their widest cell; numbers (cells that start with a digit) stand to the right.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = (0..header.len())
        .map(|c| {
            rows.iter()
                .map(|r| r[c].chars().count())
                .chain([header[c].len()])
                .max()
                .unwrap_or(0)
        })
        .collect();
    let right: Vec<bool> = (0..header.len())
        .map(|c| {
            !rows.is_empty()
                && rows
                    .iter()
                    .all(|r| r[c].starts_with(|d: char| d.is_ascii_digit()))
        })
        .collect();
    let row = |cells: Vec<&str>| {
        let cells = cells.iter().enumerate().map(|(c, cell)| {
            let width = widths[c];
            if right[c] {
                format!("{cell:>width$}")
            } else {
                format!("{cell:<width$}")
            }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut lines = vec![row(header.to_vec())];
    lines.extend(
        rows.iter()
            .map(|r| row(r.iter().map(String::as_str).collect())),
    );
    lines.join("\n")
}

/// Bytes in a unit that suits them, three digits.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.95 {
        0
    } else {
        1 + usize::from(value < 9.995)
    };
    format!("{value:.digits$} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_three_digits() {
        for (n, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_500, "1.50 kB"),
            (99_949, "99.9 kB"),
            (269_060_552, "269 MB"),
            (8_000_000_000, "8.00 GB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn tables_align_numbers_to_the_right() {
        let rows = vec![
            vec!["a".to_owned(), "7".to_owned()],
            vec!["long name".to_owned(), "1000".to_owned()],
        ];
        assert_eq!(
            table(&["name", "size"], &rows),
            "name       size\na             7\nlong name  1000"
        );
    }
}
