//! LoRA and DoRA on one linear layer, or on a rank's part of it.
//!
//! ```text
//! LoRA                y = W x + s B A drop(x)
//! DoRA                y = g (W x + s B A x)                            g = m / ||W + s B A||, a number per row
//! DoRA, x' = drop(x)  y = W x + (g - 1) W x' + g s B A x'              as Hugging Face PEFT has it
//! ```
//!
//! A column-parallel layer has some rows of W: A is whole and sees the gradients of those rows alone, so its gradient is
//! summed over the ranks; B and m are divided as the rows are. A row-parallel layer has some columns: A is divided as they
//! are, and B and m work on a contribution to a sum. The norm of a row is then summed over the ranks.

use std::ops::Range;

use bridge_models::layers::{Linear, LinearAdapter};
use bridge_ops::{
    DType, Float, GradReduction, Ops, Param, ParamShard, Tape, Var, add, float_from_vec, linear,
    mul, random, scale, sub,
};
use bridge_parallel::{ReduceOp, TensorRegion};
use burn::tensor::{Tensor, TensorPrimitive};

use crate::config::{AdapterConfig, AdapterKind, DropoutPosition, InitA};
use crate::weights::Factors;

/// Last part of the names of an adapter's parameters.
pub(crate) const LORA_A: &str = "lora_a";
/// See [`LORA_A`].
pub(crate) const LORA_B: &str = "lora_b";
/// See [`LORA_A`].
pub(crate) const MAGNITUDE: &str = "lora_magnitude";

/// LoRA or DoRA on one layer.
#[derive(Debug)]
pub(crate) struct LowRank<B: Ops> {
    /// `[dim, in]`.
    a: Param<B>,
    /// `[out, dim]`.
    b: Param<B>,
    /// `[out]`, of DoRA.
    magnitude: Option<Param<B>>,
    scale: f64,
    dropout: f64,
    position: DropoutPosition,
    /// Key of what is dropped, before that of the pass.
    key: u64,
    /// Columns of the whole weight that are here, and how many it has.
    columns: (Range<usize>, usize),
    /// Likewise its rows.
    rows: (Range<usize>, usize),
    /// Who has the other columns.
    row_parallel: Option<TensorRegion<B>>,
}

/// The part of a layer's weight that is here, and how the gradients of an adapter's parts are completed.
struct Part {
    shape: [usize; 2],
    rows: Range<usize>,
    columns: Range<usize>,
    shard: Option<ParamShard>,
}

impl Part {
    fn of<B: Ops>(layer: &Linear<B>) -> Self {
        let shard = layer.weight.shard().cloned();
        let (shape, ranges) = match &shard {
            Some(shard) => (shard.global_shape.clone(), shard.ranges.clone()),
            None => {
                let shape = layer.weight.shape();
                let ranges = shape.iter().map(|extent| 0..*extent).collect();
                (shape, ranges)
            }
        };
        Self {
            shape: [shape[0], shape[1]],
            rows: ranges[0].clone(),
            columns: ranges[1].clone(),
            shard,
        }
    }

    /// Where A, which is divided as the columns are, is in the whole.
    fn of_a(&self, dim: usize) -> Option<ParamShard> {
        let shard = self.shard.as_ref()?;
        let by_rows = self.rows.len() < self.shape[0]
            || matches!(shard.reduction, GradReduction::TensorParallelCopies(_));
        Some(ParamShard {
            global_shape: vec![dim, self.shape[1]],
            ranges: vec![0..dim, self.columns.clone()],
            // Of ranks with other rows, which have the same A, the first counts it.
            owner: shard.owner && self.rows.start == 0,
            reduction: if by_rows {
                GradReduction::TensorParallel
            } else {
                shard.reduction
            },
        })
    }

    /// Where something divided as the rows are is in the whole: B, or with no `dim` the magnitude.
    fn of_rows(&self, dim: Option<usize>) -> Option<ParamShard> {
        let shard = self.shard.as_ref()?;
        Some(ParamShard {
            global_shape: std::iter::once(self.shape[0]).chain(dim).collect(),
            ranges: std::iter::once(self.rows.clone())
                .chain(dim.map(|dim| 0..dim))
                .collect(),
            owner: shard.owner && self.columns.start == 0,
            reduction: if self.columns.len() < self.shape[1] {
                GradReduction::TensorParallel
            } else {
                shard.reduction
            },
        })
    }
}

impl<B: Ops> LowRank<B> {
    /// A fresh adapter, which changes nothing yet.
    pub(crate) fn fresh(layer: &Linear<B>, config: &AdapterConfig) -> Self {
        let part = Part::of(layer);
        let key = name_key(layer.name(), config.seed);
        let bound = match config.init {
            InitA::Kaiming => (1.0 / part.shape[1] as f64).sqrt(),
            InitA::Xavier => (6.0 / (part.shape[1] + config.dim) as f64).sqrt(),
        };
        let shape = [config.dim, part.shape[1]];
        let a = random::runs(&shape, &[0..config.dim, part.columns.clone()]);
        let a = (a.into_iter().flatten())
            .map(|index| ((2.0 * random::uniform(key, index as u64) - 1.0) * bound) as f32)
            .collect();
        let b = vec![0.0; part.rows.len() * config.dim];
        let mut adapter = Self::with_values(layer, config, &part, a, b, None);
        if config.kind == AdapterKind::Dora {
            let norm = adapter.row_norms(&layer.weight);
            adapter.magnitude = Some(param(layer, MAGNITUDE, norm, part.of_rows(None)));
        }
        adapter
    }

    /// This rank's part of a trained adapter of the layer's shape.
    pub(crate) fn trained(layer: &Linear<B>, config: &AdapterConfig, factors: &Factors) -> Self {
        let part = Part::of(layer);
        let (dim, columns) = (config.dim, part.shape[1]);
        let a = random::runs(&[dim, columns], &[0..dim, part.columns.clone()]);
        let a = (a.into_iter())
            .flat_map(|run| factors.a[run].iter().copied())
            .collect();
        let b = factors.b[part.rows.start * dim..part.rows.end * dim].to_vec();
        let magnitude = factors.magnitude.as_ref();
        let magnitude = magnitude.map(|values| values[part.rows.clone()].to_vec());
        Self::with_values(layer, config, &part, a, b, magnitude)
    }

    fn with_values(
        layer: &Linear<B>,
        config: &AdapterConfig,
        part: &Part,
        a: Vec<f32>,
        b: Vec<f32>,
        magnitude: Option<Vec<f32>>,
    ) -> Self {
        let device = layer.weight.device();
        let (dim, rows) = (config.dim, part.rows.len());
        let tensor = |values, shape: &[usize]| float_from_vec::<B>(values, shape, &device);
        let a = tensor(a, &[dim, part.columns.len()]);
        Self {
            a: param(layer, LORA_A, a, part.of_a(dim)),
            b: param(
                layer,
                LORA_B,
                tensor(b, &[rows, dim]),
                part.of_rows(Some(dim)),
            ),
            magnitude: magnitude.map(|values| {
                param(
                    layer,
                    MAGNITUDE,
                    tensor(values, &[rows]),
                    part.of_rows(None),
                )
            }),
            scale: config.scale(),
            dropout: config.dropout,
            position: config.dropout_position,
            key: random::mix(name_key(layer.name(), config.seed)),
            columns: (part.columns.clone(), part.shape[1]),
            rows: (part.rows.clone(), part.shape[0]),
            row_parallel: layer.row_parallel().cloned(),
        }
    }

    /// W + s B A of the part that is here, fp32.
    fn adapted(&self, weight: &Param<B>) -> Tensor<B, 2> {
        let fp32 = |param: &Param<B>| {
            Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(B::cast(
                param.value(),
                DType::F32,
            )))
        };
        fp32(weight) + fp32(&self.b).matmul(fp32(&self.a)).mul_scalar(self.scale)
    }

    /// The norm of each row of the whole W + s B A, fp32: `[out]`.
    fn row_norms(&self, weight: &Param<B>) -> Float<B> {
        let adapted = self.adapted(weight);
        let squares: Tensor<B, 1> = (adapted.clone() * adapted).sum_dim(1).squeeze_dim(1);
        let squares = squares.into_primitive().tensor();
        let squares = match self.row_parallel.as_ref().and_then(TensorRegion::group) {
            Some(group) => group.all_reduce(squares, ReduceOp::Sum),
            None => squares,
        };
        B::float_sqrt(squares)
    }

    /// `x` with some values dropped and the others made up for it, in a training pass. `columns`: those of the whole that
    /// its last dimension is, and how many that has.
    fn dropped(
        &self,
        tape: &Tape<B>,
        x: &Var<B>,
        columns: &(Range<usize>, usize),
    ) -> Option<Var<B>> {
        let pass = tape.pass().filter(|_| self.dropout > 0.0)?;
        let key = random::mix(self.key ^ pass);
        let shape = x.shape();
        let rows = shape[..shape.len() - 1].iter().product::<usize>();
        let (here, whole) = columns;
        let keep = (1.0 / (1.0 - self.dropout)) as f32;
        let mask = (0..rows)
            .flat_map(|row| {
                here.clone()
                    .map(move |column| (row * whole + column) as u64)
            })
            .map(|index| {
                if random::uniform(key, index) < self.dropout {
                    0.0
                } else {
                    keep
                }
            })
            .collect();
        let mask = float_from_vec::<B>(mask, &shape, &self.a.device());
        Some(mul(tape, x, &tape.constant(B::cast(mask, x.dtype()))))
    }

    /// s B A x.
    fn product(&self, tape: &Tape<B>, x: &Var<B>) -> Var<B> {
        let inner = linear(tape, x, &self.a, None);
        scale(tape, &linear(tape, &inner, &self.b, None), self.scale)
    }
}

impl<B: Ops> LinearAdapter<B> for LowRank<B> {
    fn forward(&self, tape: &Tape<B>, x: &Var<B>, weight: &Param<B>) -> Var<B> {
        let base = linear(tape, x, weight, None);
        let dropped = match self.position {
            DropoutPosition::Pre => self.dropped(tape, x, &self.columns),
            DropoutPosition::Post => None,
        };
        let delta = self.product(tape, dropped.as_ref().unwrap_or(x));
        match (&self.magnitude, dropped) {
            (None, _) if self.position == DropoutPosition::Post => {
                let dropped = self.dropped(tape, &delta, &self.rows);
                add(tape, &base, &dropped.unwrap_or(delta))
            }
            (None, _) => add(tape, &base, &delta),
            (Some(magnitude), None) => {
                let norm = self.row_norms(weight);
                scale_columns(tape, &add(tape, &base, &delta), magnitude, norm)
            }
            (Some(magnitude), Some(dropped)) => {
                let norm = self.row_norms(weight);
                let of_dropped = linear(tape, &dropped, weight, None);
                let sum = add(tape, &of_dropped, &delta);
                let scaled = scale_columns(tape, &sum, magnitude, norm);
                add(tape, &sub(tape, &base, &of_dropped), &scaled)
            }
        }
    }

    fn adapted_weight(&self, weight: &Param<B>) -> Float<B> {
        let adapted = self.adapted(weight);
        let adapted = match &self.magnitude {
            None => adapted,
            Some(magnitude) => {
                let factor = ratio(magnitude, self.row_norms(weight));
                adapted * factor.unsqueeze_dim(1)
            }
        };
        B::cast(adapted.into_primitive().tensor(), weight.dtype())
    }

    fn params(&self) -> Vec<Param<B>> {
        let mut params = vec![self.a.clone(), self.b.clone()];
        params.extend(self.magnitude.clone());
        params
    }
}

/// `y m / norm`, column by column; the norm is a constant. y: [.., out], magnitude: `[out]`, norm: `[out]` fp32.
fn scale_columns<B: Ops>(
    tape: &Tape<B>,
    y: &Var<B>,
    magnitude: &Param<B>,
    norm: Float<B>,
) -> Var<B> {
    let (shape, dtype, tracked) = (y.shape(), y.dtype(), y.is_tracked());
    let out = shape[shape.len() - 1];
    let rows = shape.iter().product::<usize>() / out.max(1);
    let matrix = move |x: Float<B>| {
        Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(B::float_reshape(
            B::cast(x, DType::F32),
            [rows, out].into(),
        )))
    };
    let back = move |x: Tensor<B, 2>| {
        let x = B::float_reshape(x.into_primitive().tensor(), shape.clone().into());
        B::cast(x, dtype)
    };
    let factor = ratio(magnitude, norm.clone()).unsqueeze_dim::<2>(0);
    let output = back(matrix(y.value()) * factor.clone());
    let (saved, param) = (y.value(), magnitude.clone());
    tape.record_with_params(output, &[y], &[magnitude], move |dy| {
        let dy = matrix(dy);
        if param.requires_grad() {
            let sums: Tensor<B, 1> = (dy.clone() * matrix(saved)).sum_dim(0).squeeze_dim(0);
            let norm = Tensor::<B, 1>::from_primitive(TensorPrimitive::Float(norm));
            param.accumulate_grad((sums / norm).into_primitive().tensor());
        }
        vec![tracked.then(|| back(dy * factor))]
    })
}

/// m / norm, fp32: `[out]`.
fn ratio<B: Ops>(magnitude: &Param<B>, norm: Float<B>) -> Tensor<B, 1> {
    let magnitude = TensorPrimitive::Float(B::cast(magnitude.value(), DType::F32));
    Tensor::from_primitive(magnitude) / Tensor::from_primitive(TensorPrimitive::Float(norm))
}

/// A parameter beside the layer's weight, of its dtype.
fn param<B: Ops>(
    layer: &Linear<B>,
    part: &str,
    value: Float<B>,
    shard: Option<ParamShard>,
) -> Param<B> {
    let name = format!("{}.{part}", layer.name());
    let value = B::cast(value, layer.weight.dtype());
    match shard {
        Some(shard) => Param::sharded(name, value, shard),
        None => Param::new(name, value),
    }
}

/// A key from a name (FNV-1a) and a seed. It must never change: what a seed gives depends on it.
fn name_key(name: &str, seed: u64) -> u64 {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    random::mix(hash ^ random::mix(seed ^ 0xada9_7e12))
}
