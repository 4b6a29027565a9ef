//! The trait through which models get their weights.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bridge_core::CanonicalTensor;
use bridge_core::layout::{ShardRule, local_slice};
use bridge_ops::{DType, Float, FloatDType, GradReduction, Ops, Param, ParamShard};
use bridge_parallel::{ContextParallel, CpCommType, ExpertParallel, ParallelContext, TensorRegion};
use burn::tensor::{Slice, TensorMetadata};

use crate::error::{Error, Result};

/// Gives a model its weights, one at a time, by canonical name.
pub trait WeightSource<B: Ops> {
    /// The weight called `name`, which the model needs with `shape`.
    ///
    /// # Errors
    /// If the source has no such weight, has it in another shape, or cannot read it.
    fn weight(&mut self, name: &str, shape: &[usize], device: &B::Device) -> Result<Float<B>>;

    /// The part `ranges` (one per dimension, none empty) of the weight called `name`, whose whole shape is `shape`. The
    /// default makes the whole weight and cuts it; a source that reads files reads the part alone.
    ///
    /// # Errors
    /// As [`weight`](Self::weight).
    fn slice(
        &mut self,
        name: &str,
        shape: &[usize],
        ranges: &[Range<usize>],
        device: &B::Device,
    ) -> Result<Float<B>> {
        let whole = self.weight(name, shape, device)?;
        let slices: Vec<Slice> = ranges.iter().cloned().map(Slice::from).collect();
        Ok(B::float_slice(whole, &slices))
    }
}

/// Makes a model's parameters from a [`WeightSource`]: whole ones for one rank, or a rank's part of each, as the shard
/// rules of the model's canonical tensors say. Layers ask for weights by their whole shapes.
pub struct ParamBuilder<'a, B: Ops> {
    source: Source<'a, B>,
    device: B::Device,
    shards: Option<Arc<Shards<B>>>,
    inside: bool,
}

/// Where values come from.
enum Source<'a, B: Ops> {
    Weights(&'a mut dyn WeightSource<B>),
    /// Nowhere yet: parameters get places alone, for values of this dtype.
    Later(DType),
}

/// How a model is divided, and the rank for which it is built.
struct Shards<B: Ops> {
    ctx: Arc<ParallelContext<B>>,
    rules: HashMap<String, ShardRule>,
    cp_comm_type: CpCommType,
}

impl<'a, B: Ops> ParamBuilder<'a, B> {
    /// Whole parameters on `device` from `source`.
    pub fn new(source: &'a mut dyn WeightSource<B>, device: &B::Device) -> Self {
        Self {
            source: Source::Weights(source),
            device: device.clone(),
            shards: None,
            inside: false,
        }
    }

    /// A rank's parts of parameters from `source`, as the rules of `tensors` divide them.
    pub fn parallel(
        source: &'a mut dyn WeightSource<B>,
        ctx: &Arc<ParallelContext<B>>,
        tensors: Vec<CanonicalTensor>,
        cp_comm_type: CpCommType,
    ) -> Self {
        Self::on_rank(Source::Weights(source), ctx, tensors, cp_comm_type)
    }

    /// As [`parallel`](Self::parallel), without values: [`load_param`] brings each of them. They are to be of `dtype`,
    /// except for those built [in full precision](Self::in_full_precision).
    pub fn without_values(
        dtype: DType,
        ctx: &Arc<ParallelContext<B>>,
        tensors: Vec<CanonicalTensor>,
        cp_comm_type: CpCommType,
    ) -> Self {
        Self::on_rank(Source::Later(dtype), ctx, tensors, cp_comm_type)
    }

    fn on_rank(
        source: Source<'a, B>,
        ctx: &Arc<ParallelContext<B>>,
        tensors: Vec<CanonicalTensor>,
        cp_comm_type: CpCommType,
    ) -> Self {
        let device = ctx.device().clone();
        let rules = tensors.into_iter().map(|t| (t.name, t.shard)).collect();
        let shards = (ctx.world_size() > 1).then(|| {
            Arc::new(Shards {
                ctx: Arc::clone(ctx),
                rules,
                cp_comm_type,
            })
        });
        Self {
            source,
            device,
            shards,
            inside: false,
        }
    }

    /// A builder for weights that every rank holds whole but uses on its own heads, inside of a tensor-parallel region:
    /// their gradients are summed over the region's ranks.
    pub fn inside(&mut self) -> ParamBuilder<'_, B> {
        ParamBuilder {
            inside: true,
            ..self.again()
        }
    }

    /// A builder for weights that are trained in fp32 whatever the dtype of the others.
    pub fn in_full_precision(&mut self) -> ParamBuilder<'_, B> {
        let mut builder = self.again();
        if let Source::Later(dtype) = &mut builder.source {
            *dtype = DType::F32;
        }
        builder
    }

    fn again(&mut self) -> ParamBuilder<'_, B> {
        ParamBuilder {
            source: match &mut self.source {
                Source::Weights(source) => Source::Weights(&mut **source),
                Source::Later(dtype) => Source::Later(*dtype),
            },
            device: self.device.clone(),
            shards: self.shards.clone(),
            inside: self.inside,
        }
    }

    /// The place in a layout for which the model is built, if it is divided.
    pub fn context(&self) -> Option<&Arc<ParallelContext<B>>> {
        self.shards.as_ref().map(|shards| &shards.ctx)
    }

    /// Where the parameters live.
    pub fn device(&self) -> &B::Device {
        &self.device
    }

    /// The tensor-parallel region that layers enter and leave.
    pub fn region(&self) -> TensorRegion<B> {
        match &self.shards {
            Some(shards) => TensorRegion::new(&shards.ctx),
            None => TensorRegion::single(),
        }
    }

    /// How attention reaches the other parts of its sequences.
    pub fn context_parallel(&self) -> ContextParallel<B> {
        match &self.shards {
            Some(shards) => ContextParallel::new(&shards.ctx, shards.cp_comm_type),
            None => ContextParallel::single(),
        }
    }

    /// How a layer reaches the experts of other ranks.
    pub fn expert_parallel(&self) -> ExpertParallel<B> {
        match &self.shards {
            Some(shards) => ExpertParallel::new(&shards.ctx),
            None => ExpertParallel::single(),
        }
    }

    /// Whether ranks of a tensor-parallel group divide the weight called `name` along its inputs, so that a product with
    /// it is one rank's contribution to a sum.
    pub fn is_row_parallel(&self, name: &str) -> bool {
        let Some(shards) = &self.shards else {
            return false;
        };
        let cut = match shards.rules.get(name) {
            Some(ShardRule::Split { dim } | ShardRule::Heads { dim, .. }) => Some(*dim),
            _ => None,
        };
        shards.ctx.layout().tp > 1 && cut == Some(1)
    }

    /// The parameter with canonical name `name` and whole shape `shape`.
    ///
    /// # Errors
    /// If the source fails, or gives a tensor of another shape, or the weight cannot be divided.
    pub fn param(&mut self, name: &str, shape: &[usize]) -> Result<Param<B>> {
        let Some(shards) = self.shards.clone() else {
            return match &mut self.source {
                Source::Weights(source) => {
                    let value = source.weight(name, shape, &self.device)?;
                    Ok(Param::new(name, checked::<B>(name, value, shape)?))
                }
                Source::Later(dtype) => {
                    Ok(Param::released(name, shape, *dtype, &self.device, None))
                }
            };
        };
        let Some(rule) = shards.rules.get(name) else {
            return Err(Error::MissingWeight {
                origin: "the model's list of canonical tensors".to_owned(),
                name: name.to_owned(),
                expected: shape.to_vec(),
            });
        };
        let (layout, coords) = (shards.ctx.layout(), shards.ctx.coords());
        let Some(slice) = local_slice(rule, shape, layout, coords)? else {
            return Err(Error::NotOnThisRank {
                name: name.to_owned(),
                rank: shards.ctx.rank(),
            });
        };
        let shard = ParamShard {
            global_shape: shape.to_vec(),
            ranges: slice.ranges,
            owner: slice.owner,
            reduction: self.reduction(rule, &shards),
        };
        match &mut self.source {
            Source::Weights(source) => {
                let local = &slice.local_shape;
                let value = part_of::<B>(&mut **source, name, &shard, local, &self.device)?;
                Ok(Param::sharded(name, value, shard))
            }
            Source::Later(dtype) => {
                let local = &slice.local_shape;
                Ok(Param::released(
                    name,
                    local,
                    *dtype,
                    &self.device,
                    Some(shard),
                ))
            }
        }
    }

    fn reduction(&self, rule: &ShardRule, shards: &Shards<B>) -> GradReduction {
        let layout = shards.ctx.layout();
        match rule {
            // The residual stream's weights see their own part of the sequence only under sequence parallelism.
            ShardRule::Replicated if layout.tp > 1 && (self.inside || layout.sp) => {
                GradReduction::TensorParallel
            }
            ShardRule::Heads { heads, .. } if layout.tp > *heads => {
                GradReduction::TensorParallelCopies(layout.tp / heads)
            }
            ShardRule::Replicated
            | ShardRule::Split { .. }
            | ShardRule::Vocab { .. }
            | ShardRule::Heads { .. } => GradReduction::None,
            ShardRule::StackedExperts { inner } | ShardRule::Expert { inner, .. } => {
                if inner.is_none() && layout.etp > 1 {
                    GradReduction::ExpertTensorParallel
                } else {
                    GradReduction::Expert
                }
            }
        }
    }
}

/// Gives a parameter its value from `source`, in the parameter's dtype: all of it, or this rank's part.
///
/// # Errors
/// If the source fails, or gives a tensor of another shape.
pub fn load_param<B: Ops>(param: &Param<B>, source: &mut dyn WeightSource<B>) -> Result<()> {
    let (name, shape, device) = (param.name(), param.shape(), param.device());
    let value = match param.shard() {
        None => checked::<B>(name, source.weight(name, &shape, &device)?, &shape)?,
        Some(shard) => part_of::<B>(source, name, shard, &shape, &device)?,
    };
    param.set_value(B::cast(value, param.dtype()));
    Ok(())
}

/// A rank's part of a weight, of `local_shape`, padding included.
fn part_of<B: Ops>(
    source: &mut dyn WeightSource<B>,
    name: &str,
    shard: &ParamShard,
    local_shape: &[usize],
    device: &B::Device,
) -> Result<Float<B>> {
    let held: Vec<usize> = shard.ranges.iter().map(Range::len).collect();
    let value = if held.contains(&0) {
        None
    } else {
        let part = source.slice(name, &shard.global_shape, &shard.ranges, device)?;
        Some(checked::<B>(name, part, &held)?)
    };
    Ok(match value {
        Some(value) if held == local_shape => value,
        part => padded::<B>(part, local_shape, device),
    })
}

fn checked<B: Ops>(name: &str, value: Float<B>, expected: &[usize]) -> Result<Float<B>> {
    let found = value.shape();
    if *found == *expected {
        return Ok(value);
    }
    Err(Error::WeightShape {
        origin: "weight source".to_owned(),
        name: name.to_owned(),
        found: found.to_vec(),
        expected: expected.to_vec(),
    })
}

/// `part`, or nothing, with zeros after it up to `shape`.
fn padded<B: Ops>(part: Option<Float<B>>, shape: &[usize], device: &B::Device) -> Float<B> {
    let dtype = part.as_ref().map_or(DType::F32, TensorMetadata::dtype);
    let zeros = B::float_zeros(shape.to_vec().into(), device, FloatDType::from(dtype));
    match part {
        None => zeros,
        Some(part) => {
            let held: Vec<Slice> = part
                .shape()
                .iter()
                .map(|extent| Slice::from(0..*extent))
                .collect();
            B::float_slice_assign(zeros, &held, part)
        }
    }
}
