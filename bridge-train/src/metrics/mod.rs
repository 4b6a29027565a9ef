//! Where the numbers of a run go: the terminal, `metrics.jsonl`, TensorBoard, and a picture of the loss at the end.
//!
//! Each is a [`crate::callback::Callback`], so a program can use some and add its own.

mod console;
mod jsonl;
mod plot;
mod tensorboard;

pub use console::Console;
pub use jsonl::{History, JsonLines, METRICS_FILE};
pub use plot::{LOSS_PLOT_FILE, LossPlot, draw_loss};
pub use tensorboard::{EventWriter, TensorBoard};
