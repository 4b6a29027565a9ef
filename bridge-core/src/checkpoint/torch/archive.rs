//! A file of `torch.save`: a pickle, and the storages that its tensors point to.

use super::pickle::{Limits, Node, NodeId, Pickle};
use super::zip::ZipIndex;
use super::{dtype_named, dtype_of_storage};
use crate::checkpoint::RangeReader;
use crate::dtype::DType;

/// A tensor in an archive: element `[i, j, ..]` lies `strides[0] * i + strides[1] * j + ..` elements after byte
/// `offset` of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TorchTensor {
    /// Element type.
    pub dtype: DType,
    /// Dims, outermost first.
    pub shape: Vec<usize>,
    /// Distance between neighbours along each dim, in elements.
    pub strides: Vec<usize>,
    /// Byte of element 0, counted from the start of the file that holds the archive.
    pub offset: u64,
}

impl TorchTensor {
    /// Whether the elements lie row by row without gaps.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        let dims = self.shape.iter().zip(&self.strides).rev();
        self.shape.contains(&0)
            || dims.into_iter().all(|(extent, stride)| {
                let fits = *extent == 1 || *stride == expected;
                expected *= extent;
                fits
            })
    }
}

/// An archive of `torch.save`, opened: the pickle is parsed, the tensors' bytes stay where they are.
pub struct TorchArchive {
    pickle: Pickle,
    zip: ZipIndex,
    root: String,
}

impl TorchArchive {
    /// Opens the archive in bytes `start..start + len` of `reader`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn open(
        reader: &dyn RangeReader,
        start: u64,
        len: u64,
        limits: Limits,
    ) -> Result<Self, String> {
        let zip = ZipIndex::read(reader, start, len)?;
        let root = zip.root()?.to_owned();
        let read = |name: &str, limit: usize| -> Result<Option<Vec<u8>>, String> {
            let Some(entry) = zip.find(&root, name) else {
                return Ok(None);
            };
            if entry.len > limit as u64 {
                return Err(format!(
                    "its {name} has {} bytes, more than the {limit} that are read",
                    entry.len
                ));
            }
            let mut bytes = vec![0; entry.len as usize];
            let read = reader.read_exact_at(entry.offset, &mut bytes);
            read.map_err(|error| error.to_string())?;
            Ok(Some(bytes))
        };
        if let Some(order) = read("byteorder", 64)?.filter(|order| order != b"little") {
            return Err(format!(
                "its byte order is {:?}; only little-endian archives are read",
                String::from_utf8_lossy(&order)
            ));
        }
        let bytes = read("data.pkl", limits.bytes)?.ok_or("its data.pkl is missing")?;
        let pickle = Pickle::parse(bytes, limits)?;
        Ok(Self { pickle, zip, root })
    }

    /// The parsed `data.pkl`.
    pub fn pickle(&self) -> &Pickle {
        &self.pickle
    }

    /// The tensor that node `id` of the pickle stands for.
    ///
    /// # Errors
    /// If the node is something else, or the tensor leaves its storage.
    pub fn tensor(&self, id: NodeId) -> Result<TorchTensor, String> {
        let pickle = &self.pickle;
        let other = || format!("{} stands where a tensor should be", pickle.describe(id));
        let (module, name, args) = pickle.call(id).ok_or_else(other)?;
        match (module, name, args) {
            // A parameter is a tensor and its flags.
            ("torch._utils", "_rebuild_parameter", [data, _, _])
            | ("torch._utils", "_rebuild_parameter_with_state", [data, _, _, _])
            | ("torch.nn.parameter", "Parameter", [data, ..])
                if *data != id =>
            {
                match pickle.call(*data) {
                    Some(("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor_v3", _)) => {
                        self.tensor(*data)
                    }
                    _ => Err(other()),
                }
            }
            ("torch._utils", "_rebuild_tensor_v2", [storage, offset, size, stride, ..]) => {
                self.rebuild(*storage, *offset, *size, *stride, None)
            }
            (
                "torch._utils",
                "_rebuild_tensor_v3",
                [storage, offset, size, stride, _, _, dtype, ..],
            ) => {
                let dtype = match pickle.global(*dtype) {
                    Some(("torch", name)) => dtype_named(name),
                    _ => None,
                };
                let dtype = dtype.ok_or("a tensor's dtype is not one that is read")?;
                self.rebuild(*storage, *offset, *size, *stride, Some(dtype))
            }
            _ => Err(other()),
        }
    }

    fn rebuild(
        &self,
        storage: NodeId,
        offset: NodeId,
        size: NodeId,
        stride: NodeId,
        dtype: Option<DType>,
    ) -> Result<TorchTensor, String> {
        let pickle = &self.pickle;
        let malformed = || "a tensor's description is malformed".to_owned();
        let (dtype, base, elements) = self.storage(storage, dtype)?;
        let offset = pickle.size(offset).ok_or_else(malformed)?;
        let shape = pickle.sizes(size).ok_or_else(malformed)?;
        let strides = pickle.sizes(stride).ok_or_else(malformed)?;
        if shape.len() != strides.len() {
            return Err(malformed());
        }
        let element = dtype.bytes().ok_or_else(malformed)? as u64;
        if !shape.contains(&0) {
            // The last element decides, since strides are not negative.
            let last = shape.iter().zip(&strides).try_fold(offset, |at, (n, s)| {
                (n - 1)
                    .checked_mul(*s)
                    .and_then(|step| at.checked_add(step))
            });
            if last.is_none_or(|last| last as u64 >= elements) {
                return Err(format!(
                    "a tensor of shape {shape:?}, strides {strides:?} and offset {offset} leaves its storage of \
                     {elements} elements"
                ));
            }
            // Elements that share a place cannot be told from a file that claims to be larger than it is.
            let mut dims: Vec<(usize, usize)> = shape
                .iter()
                .copied()
                .zip(strides.iter().copied())
                .filter(|(extent, _)| *extent > 1)
                .collect();
            dims.sort_unstable_by_key(|(_, stride)| *stride);
            let mut span = 1usize;
            for (extent, stride) in dims {
                if stride < span {
                    return Err(format!(
                        "a tensor of shape {shape:?} and strides {strides:?} repeats elements; save it contiguous"
                    ));
                }
                span = (extent - 1)
                    .checked_mul(stride)
                    .and_then(|reach| reach.checked_add(span))
                    .ok_or_else(malformed)?;
            }
        }
        Ok(TorchTensor {
            dtype,
            shape,
            strides,
            offset: base + offset.min(elements as usize) as u64 * element,
        })
    }

    /// Dtype, first byte and number of elements of the storage that a persistent id names.
    fn storage(&self, id: NodeId, dtype: Option<DType>) -> Result<(DType, u64, u64), String> {
        let pickle = &self.pickle;
        let malformed = || "a storage's description is malformed".to_owned();
        let Node::Persistent(reference) = pickle.node(id) else {
            return Err(malformed());
        };
        let Some([tag, class, key, _location, _numel, ..]) = pickle.sequence(*reference) else {
            return Err(malformed());
        };
        if pickle.str(*tag) != Some("storage") {
            return Err(malformed());
        }
        let class = match pickle.global(*class) {
            Some(("torch" | "torch.storage", name)) => name,
            _ => return Err(malformed()),
        };
        let dtype = match dtype {
            Some(dtype) => dtype,
            None => dtype_of_storage(class)
                .ok_or_else(|| format!("storage class torch.{class} is not one that is read"))?,
        };
        let key = pickle.str(*key).ok_or_else(malformed)?;
        let entry = self
            .zip
            .find(&self.root, &format!("data/{key}"))
            .ok_or_else(|| format!("storage {} is missing", crate::checkpoint::quote(key)))?;
        let element = dtype.bytes().ok_or_else(malformed)? as u64;
        // The file's own size counts, not what the pickle says of it.
        Ok((dtype, entry.offset, entry.len / element))
    }
}
