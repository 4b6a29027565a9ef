//! Weight mappings: how the elements of canonical tensors and of a foreign checkpoint's tensors correspond.
//!
//! A mapping is data. Each [`Piece`] pairs a strided [`View`] of a canonical tensor with a view of the same shape of a
//! foreign tensor, and says that their elements are equal. Renaming, transposing, fusing, interleaving and stacking are
//! all such pairs, so one declaration serves both directions, it can be checked that every element of both sides
//! appears exactly once, and a rank's slice of a canonical tensor leads straight to the bytes to read.

mod builder;
mod coverage;
mod fuse;
mod pattern;
mod region;
mod resolve;
mod view;

pub use builder::{Fused, WeightMap};
pub use pattern::{Captures, Pattern};
pub use region::ViewPair;
pub use resolve::{ForeignRole, ForeignTensor, Mapping, Piece};
pub use view::{Arranged, View, ViewError};

#[cfg(test)]
mod algebra_tests;
#[cfg(test)]
mod tests;
