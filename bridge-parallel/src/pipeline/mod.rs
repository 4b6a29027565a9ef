//! Pipeline parallelism: which stage runs what when, as data.

mod picture;
mod schedule;
mod simulate;

pub use schedule::{Action, Schedule, ScheduleError, Transfer, TransferKind};
pub use simulate::{Slot, Timeline};

#[cfg(test)]
mod tests;
