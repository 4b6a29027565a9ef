//! What canonical weights are read from: safetensors files, or tensors in blocks.

use std::sync::Arc;

use super::strided::{self, Paired};
use super::transfer::SegmentReader;
use crate::checkpoint::{
    BlockStore, Checkpoint, CheckpointError, RangeReader, Region, StoredBlock, StoredTensor,
    TensorInfo,
};
use crate::dtype::DType;
use crate::mapping::{View, ViewPair};
use crate::plan::TensorHeader;

/// The files of a foreign checkpoint.
#[derive(Debug)]
pub enum Source {
    /// A folder of safetensors files.
    Safetensors(Checkpoint),
    /// A format whose tensors lie in blocks: PyTorch state dicts, Megatron-Core checkpoints.
    Blocks(BlockStore),
}

impl Source {
    /// What to call the checkpoint in messages.
    pub fn describe(&self) -> String {
        match self {
            Source::Safetensors(checkpoint) => checkpoint.describe(),
            Source::Blocks(store) => store.describe().to_owned(),
        }
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        match self {
            Source::Safetensors(checkpoint) => checkpoint.get(name).is_some(),
            Source::Blocks(store) => store.get(name).is_some(),
        }
    }

    /// The safetensors files, if that is what it is.
    pub fn safetensors(&self) -> Option<&Checkpoint> {
        match self {
            Source::Safetensors(checkpoint) => Some(checkpoint),
            Source::Blocks(_) => None,
        }
    }

    /// The headers of the tensors, with the file of each for messages.
    pub(super) fn headers(&self) -> Vec<TensorHeader> {
        match self {
            Source::Safetensors(checkpoint) => {
                let several = checkpoint.files().len() > 1;
                let header = |info: &TensorInfo| TensorHeader {
                    file: several.then(|| checkpoint.files()[info.file].name().to_owned()),
                    ..TensorHeader::from(info)
                };
                checkpoint.tensors().iter().map(header).collect()
            }
            Source::Blocks(store) => {
                let header = |tensor: &StoredTensor| TensorHeader {
                    file: match tensor.blocks.as_slice() {
                        [block] => Some(store.file_name(block).to_owned()),
                        _ => None,
                    },
                    ..TensorHeader::new(tensor.name.as_str(), tensor.dtype, tensor.shape.as_slice())
                };
                store.tensors().iter().map(header).collect()
            }
        }
    }

    /// Where a tensor can be read as one row-major stretch: from what, as which type, from which byte on.
    pub(super) fn stored(&self, name: &str) -> Option<(SegmentReader<'_>, DType, u64)> {
        match self {
            Source::Safetensors(checkpoint) => {
                let info = checkpoint.get(name)?;
                Some((checkpoint.reader(info).into(), info.dtype, info.offset))
            }
            Source::Blocks(store) => {
                let tensor = store.get(name)?;
                let reader = BlockReader::new(store, tensor);
                Some((SegmentReader::Computed(Arc::new(reader)), tensor.dtype, 0))
            }
        }
    }

    /// The elements that `view` shows of a tensor in blocks, as they lie in the file of the one block that holds all of
    /// them, if there is one and it is stored row by row: the file, the byte that element 0 of the new view lies at,
    /// and the view. Such elements can be copied without passing through memory.
    pub(super) fn within_block(
        &self,
        name: &str,
        view: &View,
    ) -> Option<(&dyn RangeReader, u64, View)> {
        let Source::Blocks(store) = self else {
            return None;
        };
        let tensor = store.get(name)?;
        let dims = view.shape().iter().zip(view.strides());
        let last = view.offset() + dims.map(|(n, s)| n.saturating_sub(1) * s).sum::<usize>();
        let whole = View::whole(&tensor.shape);
        tensor.blocks.iter().find_map(|block| {
            let start = flat(&block.region.offset, whole.strides());
            let numel: usize = block.region.shape.iter().product();
            if view.offset() < start || last >= start + numel {
                return None;
            }
            // One stretch of the tensor, and stored as one: dims of extent 1, then at most one that is cut, then whole
            // ones.
            let own = View::whole(&block.region.shape);
            let dims = block.region.shape.iter().zip(&tensor.shape);
            let mut dims = dims.skip_while(|(own, _)| **own == 1).skip(1);
            let in_order = own.strides() == block.strides
                || block
                    .region
                    .shape
                    .iter()
                    .zip(own.strides().iter().zip(&block.strides))
                    .all(|(extent, (a, b))| *extent == 1 || a == b);
            if !in_order || !dims.all(|(own, all)| own == all) {
                return None;
            }
            let shifted = View::from_parts(
                view.shape().to_vec(),
                view.strides().to_vec(),
                view.offset() - start,
            );
            Some((store.reader(block), block.offset, shifted))
        })
    }

    /// Where a tensor's bytes begin: its file and the offset in it.
    pub(super) fn place(&self, name: &str) -> Option<(usize, u64)> {
        match self {
            Source::Safetensors(checkpoint) => {
                checkpoint.get(name).map(|info| (info.file, info.offset))
            }
            Source::Blocks(store) => {
                let block = store.get(name)?.blocks.first()?;
                Some((block.file, block.offset))
            }
        }
    }
}

/// A tensor in blocks, read as if it were one row-major stretch of bytes.
struct BlockReader<'a> {
    store: &'a BlockStore,
    tensor: &'a StoredTensor,
    /// The blocks with elements, by the number of the first one.
    spans: Vec<Span>,
}

/// Where a block lies in its tensor, whose elements are counted row by row.
struct Span {
    block: usize,
    first: usize,
    /// The largest last element of this block and of all before it.
    reach: usize,
}

/// The number of the element at `offset`.
fn flat(offset: &[usize], strides: &[usize]) -> usize {
    offset
        .iter()
        .zip(strides)
        .map(|(at, stride)| at * stride)
        .sum()
}

/// Most bytes that are read together with what lies between the wanted ones.
const SPAN_BYTES: usize = 16 << 20;

impl<'a> BlockReader<'a> {
    fn new(store: &'a BlockStore, tensor: &'a StoredTensor) -> Self {
        let whole = View::whole(&tensor.shape);
        let blocks = tensor.blocks.iter().enumerate();
        let blocks = blocks.filter(|(_, block)| !block.region.is_empty());
        let mut spans: Vec<Span> = blocks
            .map(|(index, block)| {
                let first = flat(&block.region.offset, whole.strides());
                let extent: Vec<usize> = block.region.shape.iter().map(|n| n - 1).collect();
                Span {
                    block: index,
                    first,
                    reach: first + flat(&extent, whole.strides()),
                }
            })
            .collect();
        spans.sort_unstable_by_key(|span| span.first);
        let mut reach = 0;
        for span in &mut spans {
            reach = reach.max(span.reach);
            span.reach = reach;
        }
        Self {
            store,
            tensor,
            spans,
        }
    }

    /// The blocks that may hold elements `start..end`.
    fn blocks(&self, start: usize, end: usize) -> impl Iterator<Item = &StoredBlock> {
        let from = self.spans.partition_point(|span| span.reach < start);
        let to = self.spans.partition_point(|span| span.first < end);
        let spans = self.spans.get(from..to).unwrap_or_default();
        spans.iter().map(|span| &self.tensor.blocks[span.block])
    }

    /// Fills `out` with elements from number `start` on.
    fn read_elements(&self, start: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        let size = self.tensor.dtype.bytes().unwrap_or(1);
        let end = start + (out.len() / size) as u64;
        let shape = &self.tensor.shape;
        let strides = View::whole(shape).strides().to_vec();
        let mut scratch = Vec::new();
        for stretch in Region::of_flat_range(shape, start, end) {
            for block in self.blocks(start as usize, end as usize) {
                let Some(part) = stretch.intersect(&block.region) else {
                    continue;
                };
                let position = |offset: &dyn Fn(usize) -> usize, strides: &[usize]| -> usize {
                    (0..shape.len()).map(|dim| offset(dim) * strides[dim]).sum()
                };
                let near = position(&|dim| part.offset[dim], &strides) - start as usize;
                let own = |dim: usize| part.offset[dim] - block.region.offset[dim];
                let far = position(&own, &block.strides);
                let pair = ViewPair {
                    near: View::from_parts(part.shape.clone(), strides.clone(), near),
                    far: View::from_parts(part.shape.clone(), block.strides.clone(), far),
                };
                strided::gather(
                    &Paired::new(&pair),
                    size,
                    self.store.reader(block),
                    block.offset,
                    out,
                    &mut scratch,
                    SPAN_BYTES,
                )
                .map_err(|error| match error {
                    crate::error::Error::Checkpoint(error) => error,
                    other => CheckpointError::BadRange {
                        name: self.tensor.name.clone(),
                        problem: other.to_string(),
                    },
                })?;
            }
        }
        Ok(())
    }
}

impl RangeReader for BlockReader<'_> {
    fn len(&self) -> u64 {
        self.tensor.dtype.byte_len(&self.tensor.shape).unwrap_or(0)
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), CheckpointError> {
        let size = self.tensor.dtype.bytes().unwrap_or(1) as u64;
        let end = offset
            .checked_add(buf.len() as u64)
            .filter(|end| *end <= self.len())
            .ok_or_else(|| CheckpointError::Io {
                action: "read",
                path: self.describe().into(),
                source: std::io::ErrorKind::UnexpectedEof.into(),
            })?;
        if offset.is_multiple_of(size) && end.is_multiple_of(size) {
            return self.read_elements(offset / size, buf);
        }
        // Part of an element: nothing in this crate asks for that, and other readers may.
        let from = offset / size * size;
        let mut whole = vec![0; (end.next_multiple_of(size) - from) as usize];
        self.read_elements(from / size, &mut whole)?;
        buf.copy_from_slice(&whole[(offset - from) as usize..][..buf.len()]);
        Ok(())
    }

    fn describe(&self) -> String {
        let name = crate::checkpoint::quote(&self.tensor.name);
        format!("tensor {name} of {}", self.store.describe())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::checkpoint::MemoryReader;

    proptest! {
        /// Blocks in any order, some of them transposed, read by any range of bytes.
        #[test]
        fn blocks_read_as_one_stretch(
            rows in 1usize..6, cols in 1usize..6, depth in 1usize..4,
            cut in 0usize..6, transposed in any::<[bool; 2]>(), from in 0usize..300, len in 0usize..300,
        ) {
            let shape = vec![rows, cols, depth];
            let element = |at: usize| [(at * 7 + 1) as u8, (at * 31 + 5) as u8];
            let cut = cut.min(rows);
            let mut bytes = Vec::new();
            let mut blocks = Vec::new();
            for (number, range) in [cut..rows, 0..cut].into_iter().enumerate() {
                let region = Region::new([range.start, 0, 0], [range.len(), cols, depth]);
                let offset = bytes.len() as u64;
                let order: [usize; 3] = if transposed[number] { [1, 2, 0] } else { [0, 1, 2] };
                let own = View::whole(&[range.len(), cols, depth]).permute(&order).unwrap();
                let base = range.start * cols * depth;
                bytes.extend(own.offsets().flat_map(|at| element(base + at)));
                // Strides of the stored order, by dim of the tensor.
                let stored = View::whole(own.shape());
                let mut strides = vec![0; 3];
                for (position, dim) in order.into_iter().enumerate() {
                    strides[dim] = stored.strides()[position];
                }
                blocks.push(StoredBlock { region, strides, file: 0, offset });
            }
            let tensor = StoredTensor { name: "t".into(), dtype: DType::F16, shape, blocks };
            let files: Vec<(String, Box<dyn RangeReader>)> =
                vec![("f".into(), Box::new(MemoryReader::new("f", bytes)))];
            let store = BlockStore::new("store", files, vec![tensor]);
            let whole: Vec<u8> = (0..rows * cols * depth).flat_map(element).collect();
            let source = Source::Blocks(store);
            let (reader, dtype, base) = source.stored("t").unwrap();
            prop_assert_eq!((dtype, base, reader.len()), (DType::F16, 0, whole.len() as u64));
            let from = from.min(whole.len());
            let to = (from + len).min(whole.len());
            let mut found = vec![0; to - from];
            reader.read_exact_at(from as u64, &mut found).unwrap();
            prop_assert_eq!(&found, &whole[from..to]);
            prop_assert!(reader.read_exact_at(whole.len() as u64, &mut [0]).is_err());
            // Some rows, seen across: found in the file where one block in order holds them.
            let (first, last) = (cut / 2, (cut / 2 + 1 + from % 3).min(rows));
            let view = View::whole(&[rows, cols, depth]).slice(0, first..last).unwrap();
            let view = view.transpose(1, 2).unwrap();
            let found = source.within_block("t", &view);
            let in_one = [(0, cut), (cut, rows)].map(|(start, end)| first >= start && last <= end);
            // Blocks were made in the order of `transposed`: the one from `cut` on comes first.
            if (in_one[0] && !transposed[1]) || (in_one[1] && !transposed[0]) {
                prop_assert!(found.is_some());
            }
            if let Some((reader, base, own)) = found {
                for (here, there) in view.offsets().zip(own.offsets()) {
                    let mut bytes = [0; 2];
                    reader.read_exact_at(base + 2 * there as u64, &mut bytes).unwrap();
                    prop_assert_eq!(bytes, element(here));
                }
            }
        }
    }
}
