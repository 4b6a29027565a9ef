//! Placeholders for weights.

use bridge_models::WeightSource;
use bridge_ops::{DType, Float, Ops, float_zeros};

/// Zeros, for a model whose weights are about to be replaced.
#[derive(Clone, Copy, Debug, Default)]
pub struct ZeroSource;

impl<B: Ops> WeightSource<B> for ZeroSource {
    fn weight(
        &mut self,
        _name: &str,
        shape: &[usize],
        device: &B::Device,
    ) -> bridge_models::Result<Float<B>> {
        Ok(float_zeros::<B>(shape, DType::F32, device))
    }
}
