//! A schedule drawn as text, one line a stage, time from left to right.

use std::fmt;

use super::schedule::{Action, Schedule};
use super::simulate::Timeline;

/// Draws the schedule's [`Timeline`]: `F3` is the forward pass of micro-batch 3, `B3` its backward pass,
/// twice as long; with several chunks a stage, a letter says which of them (`F3b` is the second).
///
/// ```
/// use bridge_parallel::pipeline::Schedule;
/// let schedule = Schedule::training(2, 1, 3)?;
/// assert_eq!(
///     schedule.to_string(),
///     "1F1B: 2 stages, 3 micro-batches, bubble 25%\n\
///      stage 0 |F0|F1|  |  |B0---|F2|B1---|  |B2---| at most 2 in flight\n\
///      stage 1 |  |F0|B0---|F1|B1---|F2|B2---|  |  | at most 1 in flight\n"
/// );
/// # Ok::<(), bridge_parallel::pipeline::ScheduleError>(())
/// ```
impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let timeline = match Timeline::of(self) {
            Ok(timeline) => timeline,
            Err(error) => return writeln!(f, "{error}"),
        };
        let kind = match (self.pp, self.vpp) {
            (1, 1) => "no pipeline",
            (_, 1) => "1F1B",
            _ => "interleaved",
        };
        write!(f, "{kind}: {} stages, ", self.pp)?;
        if self.vpp > 1 {
            write!(f, "{} chunks each, ", self.vpp)?;
        }
        writeln!(
            f,
            "{} micro-batches, bubble {:.0}%",
            self.micro_batches,
            100.0 * timeline.bubble()
        )?;
        let name = |action: Action| {
            let (letter, chunk, micro_batch) = match action {
                Action::Forward { chunk, micro_batch } => ('F', chunk, micro_batch),
                Action::Backward { chunk, micro_batch } => ('B', chunk, micro_batch),
                Action::Send(_) | Action::Recv(_) => return String::new(),
            };
            if self.vpp == 1 {
                format!("{letter}{micro_batch}")
            } else {
                format!("{letter}{micro_batch}{}", chunk_letters(chunk / self.pp))
            }
        };
        let slots = |stage| timeline.stage(stage).iter();
        let width = (0..self.pp)
            .flat_map(slots)
            .map(|slot| name(slot.action).len())
            .max()
            .unwrap_or(1);
        let stage_width = (self.pp - 1).to_string().len();
        for stage in 0..self.pp {
            write!(f, "stage {stage:stage_width$} |")?;
            let mut time = 0;
            let idle = |f: &mut fmt::Formatter<'_>, from: usize, to: usize| {
                (from..to).try_for_each(|_| write!(f, "{:width$}|", ""))
            };
            for slot in slots(stage) {
                idle(f, time, slot.start)?;
                let cells = slot.length * (width + 1) - 1;
                write!(f, "{:-<cells$}|", name(slot.action))?;
                time = slot.start + slot.length;
            }
            idle(f, time, timeline.length())?;
            writeln!(f, " at most {} in flight", self.peak_in_flight(stage))?;
        }
        Ok(())
    }
}

/// a, b, .., z, aa, ab, ..
fn chunk_letters(mut index: usize) -> String {
    let mut letters = Vec::new();
    loop {
        letters.push(char::from(b'a' + (index % 26) as u8));
        index /= 26;
        if index == 0 {
            break;
        }
        index -= 1;
    }
    letters.iter().rev().collect()
}
