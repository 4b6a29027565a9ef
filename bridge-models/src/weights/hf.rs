//! Loading a model from a Hugging Face checkpoint through its family's weight map.

use std::collections::HashMap;

use bridge_core::checkpoint::{Checkpoint, TensorInfo};
use bridge_core::dtype::{DType, cast_bytes};
use bridge_core::layout::LayoutSpec;
use bridge_core::mapping::View;
use bridge_core::plan::{Plan, TensorHeader, plan_import};
use bridge_core::{HfConfig, ModelBridge};
use bridge_ops::{Float, Ops};

use super::{DtypePolicy, WeightSource, held_tensor};
use crate::decoder::Decoder;
use crate::error::{Error, Result};

/// A [`WeightSource`] that reads a planned checkpoint: one canonical tensor at a time, from wherever its elements lie.
pub struct CheckpointSource<'a> {
    plan: &'a Plan,
    checkpoint: &'a Checkpoint,
    policy: DtypePolicy,
    /// Index into the plan's tensors, by canonical name.
    by_name: HashMap<&'a str, usize>,
}

impl<'a> CheckpointSource<'a> {
    /// The weights of `checkpoint`, whose headers `plan` was made from.
    pub fn new(plan: &'a Plan, checkpoint: &'a Checkpoint, policy: DtypePolicy) -> Self {
        let by_name = plan.tensors.iter().enumerate().map(|(index, tensor)| (tensor.canonical.as_str(), index));
        Self { by_name: by_name.collect(), plan, checkpoint, policy }
    }

    /// The bytes of canonical tensor number `index` of the plan, in the dtype of the checkpoint.
    ///
    /// # Errors
    /// If the checkpoint cannot be read, or is not the one that was planned.
    pub fn canonical_bytes(&self, index: usize) -> Result<Vec<u8>> {
        let planned = &self.plan.tensors[index];
        let whole = View::whole(&planned.shape);
        let mut pieces = Vec::new();
        for piece in self.plan.sources(index) {
            let foreign = &self.plan.mapping().foreign[piece.foreign];
            let info = self.checkpoint.tensor(&foreign.name).map_err(bridge_core::Error::from)?;
            if info.dtype != planned.dtype || info.shape != foreign.shape {
                let problem = format!(
                    "tensor `{}` is {} {:?}, but {} {:?} was planned; the file has changed, plan again",
                    info.name, info.dtype, info.shape, planned.dtype, foreign.shape
                );
                return Err(bridge_core::Error::malformed(self.checkpoint.describe(), problem).into());
            }
            pieces.push((info, piece));
        }
        if let [(info, piece)] = pieces.as_slice()
            && piece.canonical_view == whole
            && is_row_major(&piece.foreign_view, info)
        {
            return Ok(self.checkpoint.read(info).map_err(bridge_core::Error::from)?);
        }
        let size = element_bytes(planned.dtype, &planned.canonical, self.checkpoint)?;
        let mut out = vec![0; whole.numel() * size];
        for (info, piece) in pieces {
            // Only the stretch of the foreign tensor that the piece touches: one expert of a stack, not all.
            let (first, end) = extent(&piece.foreign_view);
            let mut stretch = vec![0; (end - first) * size];
            let bytes = (first * size) as u64..(end * size) as u64;
            self.checkpoint.read_range(info, bytes, &mut stretch).map_err(bridge_core::Error::from)?;
            gather(&stretch, first, &piece.foreign_view, &mut out, &piece.canonical_view, size);
        }
        Ok(out)
    }
}

impl<B: Ops> WeightSource<B> for CheckpointSource<'_> {
    fn weight(&mut self, name: &str, shape: &[usize], device: &B::Device) -> Result<Float<B>> {
        let origin = || self.checkpoint.describe();
        let Some(index) = self.by_name.get(name).copied() else {
            return Err(Error::MissingWeight { origin: origin(), name: name.to_owned(), expected: shape.to_vec() });
        };
        let planned = &self.plan.tensors[index];
        if planned.shape != shape {
            let (name, found, expected) = (name.to_owned(), planned.shape.clone(), shape.to_vec());
            return Err(Error::WeightShape { origin: origin(), name, found, expected });
        }
        let bytes = self.canonical_bytes(index)?;
        held_tensor::<B>(self.policy, name, shape, planned.dtype, bytes, device, origin)
    }
}

/// Loads the decoder in the Hugging Face checkpoint `checkpoint` with config `config`.
///
/// Weights are read one canonical tensor at a time, so that no more than the model and one tensor is in memory.
///
/// ```no_run
/// use std::path::Path;
/// use bridge_core::{HfConfig, checkpoint::Checkpoint};
/// use bridge_models::{DtypePolicy, registry, weights::load_decoder};
/// use burn_flex::Flex;
///
/// let dir = Path::new("SmolLM2-135M-Instruct");
/// let config = HfConfig::load(dir)?;
/// let bridge = registry().detect(&config)?;
/// let checkpoint = Checkpoint::open(dir).map_err(bridge_core::Error::from)?;
/// let model = load_decoder::<Flex>(bridge, &config, &checkpoint, &Default::default(), DtypePolicy::Source)?;
/// # Ok::<(), bridge_models::Error>(())
/// ```
///
/// # Errors
/// If config and checkpoint do not fit together in any way (found before a weight is read), or reading fails.
pub fn load_decoder<B: Ops>(
    bridge: &dyn ModelBridge,
    config: &HfConfig,
    checkpoint: &Checkpoint,
    device: &B::Device,
    policy: DtypePolicy,
) -> Result<Decoder<B>> {
    let headers: Vec<TensorHeader> = checkpoint.tensors().iter().map(TensorHeader::from).collect();
    let plan = plan_import(bridge, config, &headers, &LayoutSpec::default())?;
    let mut source = CheckpointSource::new(&plan, checkpoint, policy);
    Decoder::build(plan.config.clone(), &mut source, device)
}

fn element_bytes(dtype: DType, name: &str, checkpoint: &Checkpoint) -> Result<usize> {
    let bytes = dtype.byte_len(&[1]).and_then(|bytes| usize::try_from(bytes).ok());
    bytes.ok_or_else(|| Error::WeightDtype {
        origin: checkpoint.describe(),
        name: name.to_owned(),
        found: dtype.as_str().to_owned(),
    })
}

/// Whether `view` lists a whole foreign tensor in its own order, maybe under another shape.
fn is_row_major(view: &View, info: &TensorInfo) -> bool {
    let fresh = View::whole(view.shape());
    view.offset() == 0 && view.strides() == fresh.strides() && view.numel() == info.shape.iter().product::<usize>()
}

/// First element that a view touches, and one past the last.
fn extent(view: &View) -> (usize, usize) {
    if view.numel() == 0 {
        return (view.offset(), view.offset());
    }
    let reach: usize = view.shape().iter().zip(view.strides()).map(|(extent, stride)| (extent - 1) * stride).sum();
    (view.offset(), view.offset() + reach + 1)
}

/// Copies the elements of `from` in `src`, whose first element is number `first` of the tensor, to `to` in `dst`.
/// Both views have the same shape.
fn gather(src: &[u8], first: usize, from: &View, dst: &mut [u8], to: &View, size: usize) {
    debug_assert_eq!(from.shape(), to.shape());
    let shape = from.shape();
    // The innermost dimensions that are contiguous on both sides move as one block.
    let (mut block, mut outer) = (1, shape.len());
    while outer > 0 && from.strides()[outer - 1] == block && to.strides()[outer - 1] == block {
        block *= shape[outer - 1];
        outer -= 1;
    }
    let mut index = vec![0usize; outer];
    if from.numel() == 0 {
        return;
    }
    loop {
        let at = |view: &View| view.offset() + index.iter().zip(view.strides()).map(|(i, s)| i * s).sum::<usize>();
        let (from_at, to_at) = ((at(from) - first) * size, at(to) * size);
        dst[to_at..to_at + block * size].copy_from_slice(&src[from_at..from_at + block * size]);
        let Some(dim) = (0..outer).rev().find(|dim| index[*dim] + 1 < shape[*dim]) else { return };
        index[dim] += 1;
        index[dim + 1..].fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Byte `i` of a source is `i`; what arrives where is compared with the views' own listing.
    #[track_caller]
    fn check(source: usize, from: View, target: usize, to: View) {
        let src: Vec<u8> = (0..source as u8).collect();
        let (first, end) = extent(&from);
        let mut dst = vec![255; target];
        gather(&src[first..end], first, &from, &mut dst, &to, 1);
        let mut expected = vec![255; target];
        for (from, to) in from.offsets().zip(to.offsets()) {
            expected[to] = src[from];
        }
        assert_eq!(dst, expected);
    }

    #[test]
    fn strided_views_are_gathered() {
        let whole = |shape: &[usize]| View::whole(shape);
        check(12, whole(&[3, 4]), 12, whole(&[3, 4]));
        check(12, whole(&[3, 4]).transpose(0, 1).unwrap(), 12, whole(&[4, 3]));
        check(12, whole(&[6, 2]).step(0, 1, 2).unwrap(), 6, whole(&[3, 2]));
        check(24, whole(&[2, 3, 4]).select(0, 1).unwrap(), 12, whole(&[3, 4]));
        check(24, whole(&[4, 6]).slice(1, 2..4).unwrap(), 16, whole(&[4, 4]).slice(1, 1..3).unwrap());
        check(24, whole(&[2, 3, 4]).permute(&[2, 0, 1]).unwrap(), 24, whole(&[4, 2, 3]));
        check(6, whole(&[2, 3]).slice(0, 1..1).unwrap(), 3, whole(&[0, 3]));
    }
}
