//! Progress of long work on stderr: a bar on a terminal, a plain line now and then elsewhere.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::report::bytes;

/// Time between plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Shows how many of a number of bytes are done. May be shared among threads.
pub(crate) struct ByteProgress {
    what: String,
    bar: Option<ProgressBar>,
    last_line: Mutex<Instant>,
}

impl ByteProgress {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let template =
                "{prefix} {bar:24} {bytes}/{total_bytes}  {bytes_per_sec}  ETA {eta}  {wide_msg}";
            let style = ProgressStyle::with_template(template).expect("a fixed template");
            ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr())
                .with_style(style)
                .with_prefix(what.clone())
        });
        Self {
            what,
            bar,
            last_line: Mutex::new(Instant::now()),
        }
    }

    /// `done` of `total` bytes, at present of `item`.
    pub(crate) fn update(&self, done: u64, total: u64, item: &str) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(item.to_owned());
            return;
        }
        let Ok(mut last) = self.last_line.lock() else {
            return;
        };
        if last.elapsed() >= LINE_INTERVAL {
            *last = Instant::now();
            eprintln!("{}: {} of {} {item}", self.what, bytes(done), bytes(total));
        }
    }

    /// A line beside the bar.
    pub(crate) fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }
}

impl Drop for ByteProgress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
