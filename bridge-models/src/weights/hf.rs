//! Loading a model from a Hugging Face folder through its family's weight map.

use std::ops::Range;
use std::sync::Arc;

use bridge_core::convert::HfModel;
use bridge_ops::{Float, Ops};
use bridge_parallel::ParallelContext;

use super::{DtypePolicy, WeightSource, held_tensor};
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::parallel::ParallelOptions;

/// A [`WeightSource`] that reads a Hugging Face folder: one canonical tensor, or a rank's part of it, at a time,
/// from wherever its elements lie.
pub struct HfWeights<'a> {
    model: &'a HfModel,
    policy: DtypePolicy,
}

impl<'a> HfWeights<'a> {
    /// The weights of `model`, to be held as `policy` says.
    pub fn new(model: &'a HfModel, policy: DtypePolicy) -> Self {
        Self { model, policy }
    }
}

impl<B: Ops> WeightSource<B> for HfWeights<'_> {
    fn weight(&mut self, name: &str, shape: &[usize], device: &B::Device) -> Result<Float<B>> {
        let whole: Vec<Range<usize>> = shape.iter().map(|extent| 0..*extent).collect();
        WeightSource::<B>::slice(self, name, shape, &whole, device)
    }

    fn slice(
        &mut self,
        name: &str,
        shape: &[usize],
        ranges: &[Range<usize>],
        device: &B::Device,
    ) -> Result<Float<B>> {
        let origin = || self.model.source().describe();
        let (stored_shape, dtype) = self.model.tensor(name)?;
        if stored_shape != shape {
            let (name, found, expected) = (name.to_owned(), stored_shape.to_vec(), shape.to_vec());
            return Err(Error::WeightShape {
                origin: origin(),
                name,
                found,
                expected,
            });
        }
        let held: Vec<usize> = ranges.iter().map(Range::len).collect();
        held_tensor::<B>(
            self.policy,
            name,
            &held,
            dtype,
            self.model.read_slice(name, ranges)?,
            device,
            origin,
        )
    }
}

/// Loads the decoder in a Hugging Face folder.
///
/// Weights are read one canonical tensor at a time, so that no more than the model and one tensor is in memory.
///
/// ```no_run
/// use std::path::Path;
/// use bridge_core::{LayoutSpec, convert::HfModel};
/// use bridge_models::{DtypePolicy, registry, weights::load_hf};
/// use burn_flex::Flex;
///
/// let folder = HfModel::open(Path::new("SmolLM2-135M-Instruct"), &registry(), &LayoutSpec::default())?;
/// let model = load_hf::<Flex>(&folder, DtypePolicy::Source, &Default::default())?;
/// # Ok::<(), bridge_models::Error>(())
/// ```
///
/// # Errors
/// If reading fails. That config and files fit together was found out when the folder was opened.
pub fn load_hf<B: Ops>(
    model: &HfModel,
    policy: DtypePolicy,
    device: &B::Device,
) -> Result<Decoder<B>> {
    Decoder::build(
        model.config().clone(),
        &mut HfWeights::new(model, policy),
        device,
    )
}

/// Loads a rank's part of the decoder in a Hugging Face folder, reading no other weights than its own.
///
/// # Errors
/// As [`load_hf`], or if the model cannot be divided that way.
pub fn load_hf_parallel<B: Ops>(
    model: &HfModel,
    policy: DtypePolicy,
    ctx: &Arc<ParallelContext<B>>,
    options: &ParallelOptions,
) -> Result<Decoder<B>> {
    let config = model.config().clone();
    let mut source = HfWeights::new(model, policy);
    Decoder::build_parallel(config, &mut source, ctx, options)
}
