//! A rank's elements of a weight, and where they belong in the whole weight on disk.

use std::ops::Range;

use bridge_core::checkpoint::Region;
use bridge_core::checkpoint::native::{Group, NativeCheckpoint};
use bridge_core::dtype::decode_f32;
use bridge_ops::{Ops, Param};

use crate::error::{Error, Result};

/// How a rank's elements of a weight lie in the whole weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LocalView {
    /// Shape of the whole weight.
    pub(super) global_shape: Vec<usize>,
    /// Shape here, padding at the end included.
    shape: Vec<usize>,
    /// Where this rank's part begins in the whole.
    offset: Vec<usize>,
    /// The elements here that are no padding.
    valid: Region,
}

/// A box of elements.
pub(super) struct Cut {
    /// The box in the whole weight.
    pub(super) global: Region,
    /// The same box in the weight as it is here.
    local: Region,
    /// The box of elements here that it is cut from, padding included.
    outer: Region,
    /// Where that begins in the stretch that was asked for, in elements.
    start: usize,
}

impl LocalView {
    pub(super) fn of<B: Ops>(param: &Param<B>) -> Self {
        let shape = param.shape();
        match param.shard() {
            None => Self {
                global_shape: shape.clone(),
                offset: vec![0; shape.len()],
                valid: Region::whole(&shape),
                shape,
            },
            Some(shard) => Self {
                global_shape: shard.global_shape.clone(),
                offset: shard.ranges.iter().map(|range| range.start).collect(),
                valid: Region::new(
                    vec![0; shape.len()],
                    shard.ranges.iter().map(Range::len).collect::<Vec<_>>(),
                ),
                shape,
            },
        }
    }

    /// The boxes that make up elements `range` here, counted in row-major order, without padding.
    pub(super) fn cuts(&self, range: &Range<usize>) -> Vec<Cut> {
        let mut start = 0;
        let mut cuts = Vec::new();
        for outer in Region::of_flat_range(&self.shape, range.start as u64, range.end as u64) {
            let elements = outer.shape.iter().product::<usize>();
            if let Some(local) = outer.intersect(&self.valid) {
                let offset: Vec<usize> = local
                    .offset
                    .iter()
                    .zip(&self.offset)
                    .map(|(local, base)| local + base)
                    .collect();
                cuts.push(Cut {
                    global: Region::new(offset, local.shape.clone()),
                    local,
                    outer,
                    start,
                });
            }
            start += elements;
        }
        cuts
    }

    /// Elements `range` here from the tensor `name` of a checkpoint, as fp32; padding is 0.
    pub(super) fn read(
        &self,
        checkpoint: &NativeCheckpoint,
        group: Group,
        name: &str,
        range: &Range<usize>,
    ) -> Result<Vec<f32>> {
        let stored = checkpoint
            .tensor(group, name)
            .map_err(bridge_core::Error::from)?;
        let origin = || format!("{} ({group})", checkpoint.dir().display());
        if stored.shape != self.global_shape {
            return Err(Error::Model(bridge_models::Error::WeightShape {
                origin: origin(),
                name: name.to_owned(),
                found: stored.shape.clone(),
                expected: self.global_shape.clone(),
            }));
        }
        let wrong_dtype = || {
            Error::Model(bridge_models::Error::WeightDtype {
                origin: origin(),
                name: name.to_owned(),
                found: stored.dtype.as_str().to_owned(),
            })
        };
        let mut values = vec![0.0; range.len()];
        for cut in self.cuts(range) {
            let elements = cut.global.shape.iter().product::<usize>();
            let size = stored
                .dtype
                .byte_len(&cut.global.shape)
                .and_then(|size| usize::try_from(size).ok())
                .ok_or_else(wrong_dtype)?;
            let mut bytes = vec![0; size];
            checkpoint
                .read_slice(group, name, &cut.global, &mut bytes)
                .map_err(bridge_core::Error::from)?;
            let mut found = vec![0.0; elements];
            decode_f32(&bytes, stored.dtype, &mut found).map_err(|_| wrong_dtype())?;
            for run in cut.local.runs(&cut.local, &cut.outer, 1) {
                let (src, dst, len) = (run.src as usize, run.dst as usize, run.len as usize);
                values[cut.start + dst..][..len].copy_from_slice(&found[src..][..len]);
            }
        }
        Ok(values)
    }
}

impl Cut {
    /// The box's elements, out of those of the stretch that it was cut from, `element_bytes` each.
    pub(super) fn bytes(&self, stretch: &[u8], element_bytes: usize) -> Vec<u8> {
        let outer = &stretch[self.start * element_bytes..];
        let mut bytes =
            Vec::with_capacity(self.local.shape.iter().product::<usize>() * element_bytes);
        for run in self.local.runs(&self.outer, &self.local, element_bytes) {
            bytes.extend_from_slice(&outer[run.src as usize..][..run.len as usize]);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use bridge_ops::{GradReduction, ParamShard, float_zeros};
    use burn::backend::Flex;

    use super::*;

    #[test]
    fn padding_is_cut_away_and_offsets_are_those_of_the_whole() {
        // Rows 4 and 5 of 6, and two rows of padding.
        let value = float_zeros::<Flex>(&[4, 3], bridge_ops::DType::F32, &Default::default());
        let param = Param::<Flex>::sharded(
            "embedding.weight",
            value,
            ParamShard {
                global_shape: vec![6, 3],
                ranges: vec![4..6, 0..3],
                owner: true,
                reduction: GradReduction::None,
            },
        );
        let view = LocalView::of(&param);
        let stretch: Vec<u8> = (0..12).collect();
        let mut seen = Vec::new();
        for range in [0..2, 2..7, 7..12] {
            for cut in view.cuts(&range) {
                let rows = cut.global.offset[0]..cut.global.offset[0] + cut.global.shape[0];
                assert!((4..6).contains(&rows.start) && rows.end <= 6, "{rows:?}");
                seen.extend(cut.bytes(&stretch[range.clone()], 1));
            }
        }
        assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
    }
}
