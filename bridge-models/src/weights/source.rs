//! The trait through which models get their weights.

use bridge_ops::{Float, Ops, Param};
use burn::tensor::TensorMetadata;

use crate::error::{Error, Result};

/// Gives a model its weights, one at a time, by canonical name.
pub trait WeightSource<B: Ops> {
    /// The weight called `name`, which the model needs with `shape`.
    ///
    /// # Errors
    /// If the source has no such weight, has it in another shape, or cannot read it.
    fn weight(&mut self, name: &str, shape: &[usize], device: &B::Device) -> Result<Float<B>>;
}

/// Makes a model's parameters from a [`WeightSource`].
pub struct ParamBuilder<'a, B: Ops> {
    source: &'a mut dyn WeightSource<B>,
    device: B::Device,
}

impl<'a, B: Ops> ParamBuilder<'a, B> {
    /// Parameters on `device` from `source`.
    pub fn new(source: &'a mut dyn WeightSource<B>, device: &B::Device) -> Self {
        Self {
            source,
            device: device.clone(),
        }
    }

    /// The parameter with canonical name `name` and `shape`.
    ///
    /// # Errors
    /// If the source fails, or gives a tensor of another shape.
    pub fn param(&mut self, name: &str, shape: &[usize]) -> Result<Param<B>> {
        let value = self.source.weight(name, shape, &self.device)?;
        let found = value.shape();
        if *found != *shape {
            return Err(Error::WeightShape {
                origin: "weight source".to_owned(),
                name: name.to_owned(),
                found: found.to_vec(),
                expected: shape.to_vec(),
            });
        }
        Ok(Param::new(name, value))
    }
}
