//! A model forward and backward, segment by segment, on one rank or on the stages of a pipeline.
//!
//! Each segment (the embedding, one layer, the head) has a tape of its own, whose input is a leaf. Going back, each
//! tape is fed the gradient of its output and gives that of its input. So what a segment keeps can be chosen one by one
//! (recomputation), a pipeline can hold some segments here and others elsewhere, and a layer's gradients are complete,
//! and can travel, while the layers before it still work.
//!
//! A stretch of segments is a chunk. [`Executor`] runs the [`Schedule`](bridge_parallel::pipeline::Schedule) of a layout
//! over the chunks that this rank holds; one rank holds one chunk, the whole model, and its schedule is forward and
//! backward in turn.

mod chunk;
mod executor;
mod header;
mod hooks;

pub use executor::{Executor, LocalLoss, TokenLoss};
pub use hooks::{NoHooks, SegmentHooks, WhenComplete};
