//! AdamW over a model's parameters, on one rank or over many, and the norm of their gradients.

mod adamw;
mod buckets;
mod grad_norm;
mod parallel;
mod pattern;
mod placement;
mod reduction;
mod sharded;
mod state;
mod weights;

pub use adamw::{AdamW, AdamWOptions, ParamState};
pub use grad_norm::{clip_coefficient, grad_norm, non_finite_gradients};
pub use parallel::{DataParallelOptions, Gradients, Optimizer};
pub use pattern::name_matches;
pub use placement::{Placement, placements};
pub use reduction::Reduction;
pub use state::StatePart;
pub use weights::WeightHooks;
