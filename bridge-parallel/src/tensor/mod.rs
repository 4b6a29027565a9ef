//! Tensor parallelism: what the ranks of a group do together where each holds a part of every matrix.
//!
//! Between blocks every rank has the whole residual stream, or, with sequence parallelism, its own part of the sequence.
//! A block *enters* the region, in which each rank computes with its part of the weights (columns first, then rows), and
//! *leaves* it with a sum over the ranks (Shoeybi et al. 2019, "Megatron-LM"; Korthikanti et al. 2022 for the sequence).
//!
//! ```text
//!            enter                                   leave
//! plain      x -> x            (backward: sum)       y -> sum of y         (backward: as it is)
//! sequence   part -> whole     (backward: sum, cut)  y -> sum of y, cut    (backward: part -> whole)
//! ```

mod cross_entropy;
mod embedding;
mod gradients;
mod norm;
mod region;

#[cfg(test)]
mod tests;

pub use cross_entropy::vocab_parallel_linear_cross_entropy;
pub use embedding::vocab_parallel_embedding;
pub use gradients::complete_gradients;
pub use norm::rms_norm_across;
pub(crate) use region::SEQ_DIM;
pub use region::TensorRegion;
