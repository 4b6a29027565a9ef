//! Canonical weights, wherever they are: in a native checkpoint, or behind the weight map of a foreign one.

use std::ops::Range;
use std::sync::Arc;

use super::export::stored_segments;
use super::load::HfModel;
use super::transfer::{Segment, SegmentReader};
use crate::checkpoint::native::{Group, NativeCheckpoint};
use crate::checkpoint::{CheckpointError, RangeReader};
use crate::error::{Error, Result};
use crate::mapping::View;
use crate::plan::TensorHeader;

/// Where canonical weights can be read.
pub(super) trait CanonicalSource: Sync {
    /// Every canonical tensor that there is.
    fn headers(&self) -> Vec<TensorHeader>;

    /// The elements of the view `canonical` of tensor `name`, each with its part of `target`.
    fn segments<'a>(
        &'a self,
        name: &str,
        canonical: &View,
        target: &View,
    ) -> Result<Vec<Segment<'a>>>;
}

impl CanonicalSource for NativeCheckpoint {
    fn headers(&self) -> Vec<TensorHeader> {
        let model = self.index().model.iter();
        let header = model.map(|(name, tensor)| {
            TensorHeader::new(name.as_str(), tensor.dtype, tensor.shape.as_slice())
        });
        header.collect()
    }

    fn segments<'a>(
        &'a self,
        name: &str,
        canonical: &View,
        target: &View,
    ) -> Result<Vec<Segment<'a>>> {
        let stored = self.tensor(Group::Model, name)?;
        stored_segments(self, name, stored, canonical, target)
    }
}

impl CanonicalSource for HfModel {
    fn headers(&self) -> Vec<TensorHeader> {
        let tensors = self.plan().tensors.iter();
        let header = tensors.map(|tensor| {
            TensorHeader::new(
                tensor.canonical.as_str(),
                tensor.dtype,
                tensor.shape.as_slice(),
            )
        });
        header.collect()
    }

    fn segments<'a>(
        &'a self,
        name: &str,
        canonical: &View,
        target: &View,
    ) -> Result<Vec<Segment<'a>>> {
        let (_, dtype) = self.tensor(name)?;
        // A tensor that lies in the source as it is here is read from there, by whatever view.
        if let Some((reader, base, shift)) = self.stored_as_is(name)? {
            let (shape, strides) = (canonical.shape().to_vec(), canonical.strides().to_vec());
            return Ok(vec![Segment {
                target: target.clone(),
                source: View::from_parts(shape, strides, canonical.offset() + shift),
                dtype,
                reader,
                base,
            }]);
        }
        let reader = CanonicalReader {
            model: self,
            name: name.to_owned(),
        };
        Ok(vec![Segment {
            target: target.clone(),
            source: canonical.clone(),
            dtype,
            reader: SegmentReader::Computed(Arc::new(reader)),
            base: 0,
        }])
    }
}

/// A canonical tensor of a foreign checkpoint as one row-major stretch of bytes, made as it is read.
struct CanonicalReader<'a> {
    model: &'a HfModel,
    name: String,
}

impl CanonicalReader<'_> {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let (shape, dtype) = self.model.tensor(&self.name)?;
        let numel: usize = shape.iter().product();
        let size = dtype.bytes().unwrap_or(1) as u64;
        let end = offset.saturating_add(buf.len() as u64);
        if end > numel as u64 * size {
            return Err(CheckpointError::Io {
                action: "read",
                path: self.describe().into(),
                source: std::io::ErrorKind::UnexpectedEof.into(),
            }
            .into());
        }
        let elements: Range<usize> = (offset / size) as usize..end.div_ceil(size) as usize;
        if offset.is_multiple_of(size) && end.is_multiple_of(size) {
            return self.model.read_elements(&self.name, elements, buf);
        }
        // Part of an element: nothing in this crate asks for that, and other readers may.
        let mut whole = vec![0; elements.len() * size as usize];
        let skipped = (offset % size) as usize;
        self.model.read_elements(&self.name, elements, &mut whole)?;
        buf.copy_from_slice(&whole[skipped..][..buf.len()]);
        Ok(())
    }
}

impl RangeReader for CanonicalReader<'_> {
    fn len(&self) -> u64 {
        let found = self.model.tensor(&self.name);
        found.map_or(0, |(shape, dtype)| dtype.byte_len(shape).unwrap_or(0))
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), CheckpointError> {
        self.read(offset, buf).map_err(|error| match error {
            Error::Checkpoint(error) => error,
            other => CheckpointError::BadRange {
                name: self.name.clone(),
                problem: other.to_string(),
            },
        })
    }

    fn describe(&self) -> String {
        format!(
            "tensor `{}` of {}",
            self.name,
            self.model.source().describe()
        )
    }
}
