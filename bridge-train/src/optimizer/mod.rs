//! AdamW over a model's parameters, and the norm of their gradients.

mod adamw;
mod grad_norm;
mod pattern;

pub use adamw::{AdamW, AdamWOptions, ParamState};
pub use grad_norm::{clip_coefficient, grad_norm, non_finite_gradients};
pub use pattern::name_matches;
