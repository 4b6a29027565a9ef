//! Writing new positions into a key-value cache.

use burn_flex::FlexTensor;

use super::fast_path;
use super::storage::{contiguous_f32, unique_values, values};
use crate::primitive::dims;

/// In place. `Err` gives the cache back when it is shared or the dtypes are not covered.
pub(super) fn write(
    mut cache: FlexTensor,
    x: &FlexTensor,
    start: usize,
) -> Result<FlexTensor, FlexTensor> {
    let (cache_shape, shape) = (dims(&cache), dims(x));
    let Some(x) = contiguous_f32(x) else {
        return Err(cache);
    };
    let Some(target) = unique_values(&mut cache) else {
        return Err(cache);
    };
    fast_path::took("cache_write");
    let position = shape[2] * shape[3];
    let (row, added) = (cache_shape[1] * position, shape[1] * position);
    if added > 0 {
        for (target, x) in target
            .chunks_exact_mut(row)
            .zip(values(&x).chunks_exact(added))
        {
            target[start * position..][..added].copy_from_slice(x);
        }
    }
    Ok(cache)
}
