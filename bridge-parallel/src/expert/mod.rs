//! Expert parallelism: each rank has some of a layer's experts, or a part of each, and tokens travel to their experts.

mod dispatch;

#[cfg(test)]
mod tests;

pub use dispatch::ExpertParallel;
