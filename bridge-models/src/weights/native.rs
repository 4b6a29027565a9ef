//! Loading a model from a native checkpoint.

use std::ops::Range;
use std::sync::Arc;

use bridge_core::checkpoint::Region;
use bridge_core::checkpoint::native::{Group, NativeCheckpoint};
use bridge_core::convert::HF_DIR;
use bridge_core::{DecoderConfig, HfConfig, ModelBridge, Problems, Registry};
use bridge_ops::{Float, Ops};
use bridge_parallel::ParallelContext;

use super::{DtypePolicy, WeightSource, held_tensor};
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::parallel::ParallelOptions;

/// A [`WeightSource`] that reads a native checkpoint, whatever layout wrote it.
pub struct NativeWeights<'a> {
    checkpoint: &'a NativeCheckpoint,
    policy: DtypePolicy,
}

impl<'a> NativeWeights<'a> {
    /// The weights in `checkpoint`, to be held as `policy` says.
    pub fn new(checkpoint: &'a NativeCheckpoint, policy: DtypePolicy) -> Self {
        Self { checkpoint, policy }
    }
}

impl<B: Ops> WeightSource<B> for NativeWeights<'_> {
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
        let origin = || self.checkpoint.dir().display().to_string();
        let Some(stored) = self.checkpoint.index().model.get(name) else {
            return Err(Error::MissingWeight {
                origin: origin(),
                name: name.to_owned(),
                expected: shape.to_vec(),
            });
        };
        if stored.shape != shape {
            let (name, found, expected) = (name.to_owned(), stored.shape.clone(), shape.to_vec());
            return Err(Error::WeightShape {
                origin: origin(),
                name,
                found,
                expected,
            });
        }
        let held: Vec<usize> = ranges.iter().map(Range::len).collect();
        let first: Vec<usize> = ranges.iter().map(|range| range.start).collect();
        let bytes = self
            .checkpoint
            .read_region(Group::Model, name, &Region::new(first, held.clone()))
            .map_err(bridge_core::Error::from)?;
        held_tensor::<B>(
            self.policy,
            name,
            &held,
            stored.dtype,
            bytes,
            device,
            origin,
        )
    }
}

/// What a native checkpoint's `hf/config.json` says that it holds.
///
/// # Errors
/// If the file is missing or wrong, or its architecture is not in `registry`.
pub fn native_config(
    checkpoint: &NativeCheckpoint,
    registry: &Registry,
) -> Result<(&'static dyn ModelBridge, HfConfig, DecoderConfig)> {
    let hf = HfConfig::load(&checkpoint.dir().join(HF_DIR).join("config.json"))?;
    let bridge = registry.detect(&hf)?;
    let config = bridge.config(&hf)?;
    Ok((bridge, hf, config))
}

/// Loads the decoder in a native checkpoint; its `hf/config.json` says which.
///
/// # Errors
/// If config and weights do not fit together in any way (found before a weight is read), or reading fails.
pub fn load_native<B: Ops>(
    checkpoint: &NativeCheckpoint,
    registry: &Registry,
    policy: DtypePolicy,
    device: &B::Device,
) -> Result<Decoder<B>> {
    let config = fitting_config(checkpoint, registry)?;
    Decoder::build(config, &mut NativeWeights::new(checkpoint, policy), device)
}

/// Loads a rank's part of the decoder in a native checkpoint, reading no other weights than its own.
///
/// # Errors
/// As [`load_native`], or if the model cannot be divided that way.
pub fn load_native_parallel<B: Ops>(
    checkpoint: &NativeCheckpoint,
    registry: &Registry,
    policy: DtypePolicy,
    ctx: &Arc<ParallelContext<B>>,
    options: &ParallelOptions,
) -> Result<Decoder<B>> {
    let config = fitting_config(checkpoint, registry)?;
    let mut source = NativeWeights::new(checkpoint, policy);
    Decoder::build_parallel(config, &mut source, ctx, options)
}

/// The config of a checkpoint whose tensors are those of that config.
fn fitting_config(checkpoint: &NativeCheckpoint, registry: &Registry) -> Result<DecoderConfig> {
    let (bridge, _, config) = native_config(checkpoint, registry)?;
    let tensors = bridge.tensors(&config);
    let stored = &checkpoint.index().model;
    let mut problems = Problems::new();
    for tensor in &tensors {
        match stored.get(&tensor.name) {
            None => problems.push(format!(
                "weight `{}` {:?} is missing",
                tensor.name, tensor.shape
            )),
            Some(found) if found.shape != tensor.shape => {
                problems.push(format!(
                    "weight `{}` has shape {:?}, expected {:?}",
                    tensor.name, found.shape, tensor.shape
                ));
            }
            Some(_) => {}
        }
    }
    for name in stored
        .keys()
        .filter(|name| tensors.iter().all(|tensor| tensor.name != **name))
    {
        problems.push(format!("weight `{name}` is none of the model's"));
    }
    if !problems.is_empty() {
        let what = format!(
            "{} does not fit its {HF_DIR}/config.json",
            checkpoint.dir().display()
        );
        return Err(bridge_core::Error::Plan { what, problems }.into());
    }
    Ok(config)
}
