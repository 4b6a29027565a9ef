//! Tensors of a native checkpoint, and their placeholders.

use bridge_core::checkpoint::native::{Group, NativeCheckpoint};
use bridge_core::dtype::decode_f32;
use bridge_models::WeightSource;
use bridge_ops::{DType, Float, Ops, float_from_f32, float_zeros};

use crate::error::{Error, Result};

/// A tensor of a checkpoint as fp32, which must have `shape`.
pub(super) fn read_tensor<B: Ops>(
    checkpoint: &NativeCheckpoint,
    group: Group,
    name: &str,
    shape: &[usize],
    device: &B::Device,
) -> Result<Float<B>> {
    let stored = checkpoint
        .tensor(group, name)
        .map_err(bridge_core::Error::from)?;
    let origin = || format!("{} ({group})", checkpoint.dir().display());
    if stored.shape != shape {
        let (name, found, expected) = (name.to_owned(), stored.shape.clone(), shape.to_vec());
        return Err(Error::Model(bridge_models::Error::WeightShape {
            origin: origin(),
            name,
            found,
            expected,
        }));
    }
    let bytes = checkpoint
        .read(group, name)
        .map_err(bridge_core::Error::from)?;
    let mut values = vec![0.0; shape.iter().product()];
    decode_f32(&bytes, stored.dtype, &mut values).map_err(|_| {
        let (name, found) = (name.to_owned(), stored.dtype.as_str().to_owned());
        Error::Model(bridge_models::Error::WeightDtype {
            origin: origin(),
            name,
            found,
        })
    })?;
    Ok(float_from_f32::<B>(&values, shape, device))
}

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
