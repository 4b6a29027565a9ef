//! Ranks, process groups and collectives: what a model or an engine needs to run on more than one rank.
//!
//! - [`Communicator`] is one process group as a rank sees it. Its collectives return tensors, not `Result`s, because they
//!   run inside tapes; a failure is remembered instead, and [`Communicator::health`] tells it (see [`comm`]).
//! - [`ParallelContext`] is a rank's place in a layout: its coordinates, its device, and a group for each [`Axis`].
//! - [`TensorRegion`] and its neighbours are what layers use under tensor and sequence parallelism, [`context_attention`]
//!   under context parallelism; [`autodiff`] has the collectives as operations with gradients.
//! - [`run_threads`] runs a layout on the CPU, every rank a thread of this process. It is deterministic, needs no
//!   cluster, and is what proves a layout equal to one rank.
//!
//! ```
//! use std::time::Duration;
//!
//! use bridge_core::LayoutSpec;
//! use bridge_ops::{float_from_f32, to_f32_vec};
//! use bridge_parallel::{Axis, Error, ReduceOp, run_threads};
//! use burn_flex::Flex;
//!
//! let layout = LayoutSpec::tp_pp(2, 1);
//! let sums = run_threads::<Flex, _, Error>(layout, Duration::from_secs(10), |ctx| {
//!     let mine = float_from_f32::<Flex>(&[ctx.coords().tp as f32 + 1.0], &[1], ctx.device());
//!     let sum = ctx.group(Axis::Tp).all_reduce(mine, ReduceOp::Sum);
//!     ctx.health()?; // before a result is used
//!     Ok(to_f32_vec::<Flex>(sum))
//! })?;
//! assert_eq!(sums, [[3.0], [3.0]]);
//! # Ok::<(), Error>(())
//! ```

pub mod comm;
mod context;
mod error;
mod expert;
mod groups;
pub mod memory;
pub mod pipeline;
mod sequence;
mod tensor;
mod tensors;

#[cfg(test)]
mod testing;

pub use comm::autodiff;
pub use comm::nccl::NcclTransport;
pub use comm::tcp::{JobOptions, TcpTransport};
pub use comm::{Communicator, Group, Pending, ReduceOp, SingleRank, Transport, run_threads};
pub use context::ParallelContext;
pub use error::{Error, Result};
pub use expert::ExpertParallel;
pub use groups::{Axis, group_ranks};
pub use sequence::{ContextParallel, CpCommType, SequenceShard, context_attention, rows_of_params};
pub use tensor::{
    TensorRegion, complete_gradients, rms_norm_across, vocab_parallel_embedding,
    vocab_parallel_linear_cross_entropy,
};
