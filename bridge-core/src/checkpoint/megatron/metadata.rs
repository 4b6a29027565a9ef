//! `.metadata`: which box of which tensor is where.

use std::collections::HashMap;

use crate::checkpoint::error::quote;
use crate::checkpoint::region::Region;
use crate::checkpoint::torch::{Node, NodeId, Pickle, dtype_named};
use crate::dtype::DType;

/// A byte range that holds one archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blob {
    /// File name within the checkpoint.
    pub(super) file: String,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// One tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TensorEntry {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    pub(super) boxes: Vec<(Region, Blob)>,
}

/// What a checkpoint holds.
#[derive(Debug, Default)]
pub(super) struct Metadata {
    pub(super) tensors: Vec<TensorEntry>,
    /// Pickled objects by key.
    pub(super) objects: HashMap<String, Blob>,
}

/// Largest number of dims of a tensor; Megatron-Core uses 4.
const MAX_DIMS: usize = 16;

/// Reads the metadata out of its pickle.
///
/// # Errors
/// What is malformed or missing, with the key it concerns.
pub(super) fn decode(pickle: &Pickle) -> Result<Metadata, String> {
    let root = pickle.root();
    let attribute = |name: &str| {
        ["Metadata", "MCoreMetadata"]
            .iter()
            .find_map(|class| pickle.attribute(root, class, name))
    };
    let entries = attribute("state_dict_metadata").and_then(|id| pickle.items(id));
    let entries = entries.ok_or_else(|| {
        format!(
            "it holds {}, not the Metadata of a distributed checkpoint",
            pickle.describe(root)
        )
    })?;
    let storage = attribute("storage_data").and_then(|id| pickle.items(id));
    let storage = storage.ok_or("it has no storage_data, so it does not say where anything is")?;

    let mut blobs: HashMap<(&str, Option<Vec<usize>>), Blob> =
        HashMap::with_capacity(storage.len());
    for (index, info) in storage {
        let (key, blob) = storage_entry(pickle, *index, *info)?;
        if blobs.insert(key, blob).is_some() {
            return Err("storage_data lists one box twice".to_owned());
        }
    }
    let mut metadata = Metadata::default();
    for (key, value) in entries {
        let name = pickle
            .str(*key)
            .ok_or("a key of state_dict_metadata is no name")?;
        let missing = || format!("{}: a part of it is in no file", quote(name));
        if is_bytes(pickle, *value) {
            let blob = blobs.remove(&(name, None)).ok_or_else(missing)?;
            metadata.objects.insert(name.to_owned(), blob);
            continue;
        }
        let (dtype, shape, regions) = tensor_entry(pickle, *value)
            .ok_or_else(|| format!("{}: its description is malformed", quote(name)))?;
        let dtype = dtype.map_err(|dtype| {
            format!(
                "{}: dtype torch.{dtype} is not one that is read",
                quote(name)
            )
        })?;
        let boxes = regions
            .into_iter()
            .map(|region| {
                let key = (name, Some(region.offset.clone()));
                let blob = blobs.remove(&key).ok_or_else(missing)?;
                Ok((region, blob))
            })
            .collect::<Result<Vec<_>, String>>()?;
        metadata.tensors.push(TensorEntry {
            name: name.to_owned(),
            dtype,
            shape,
            boxes,
        });
    }
    Ok(metadata)
}

fn is_bytes(pickle: &Pickle, id: NodeId) -> bool {
    matches!(pickle.call(id), Some((_, "BytesStorageMetadata", _)))
}

type Key<'a> = (&'a str, Option<Vec<usize>>);

fn storage_entry(pickle: &Pickle, index: NodeId, info: NodeId) -> Result<(Key<'_>, Blob), String> {
    let malformed = || "an entry of storage_data is malformed".to_owned();
    let key = |name| pickle.attribute(index, "MetadataIndex", name);
    let name = key("fqn").and_then(|id| pickle.str(id));
    let name = name.ok_or_else(malformed)?;
    let offset = match key("offset") {
        None => None,
        Some(id) if *pickle.node(id) == Node::None => None,
        Some(id) => Some(pickle.sizes(id).ok_or_else(malformed)?),
    };
    let of = |name| pickle.attribute(info, "_StorageInfo", name);
    let number = |name| {
        of(name)
            .and_then(|id| pickle.int(id))
            .and_then(|n| u64::try_from(n).ok())
    };
    let file = of("relative_path").and_then(|id| pickle.str(id));
    let (Some(file), Some(start), Some(len)) = (file, number("offset"), number("length")) else {
        return Err(malformed());
    };
    let transformed = of("transform_descriptors").is_some_and(|id| match pickle.node(id) {
        Node::None => false,
        _ => pickle.sequence(id).is_none_or(|items| !items.is_empty()),
    });
    if transformed {
        return Err(format!(
            "{}: it is stored compressed or encrypted, which is not read here",
            quote(name)
        ));
    }
    let blob = Blob {
        file: file.to_owned(),
        offset: start,
        len,
    };
    Ok(((name, offset), blob))
}

/// Dtype (or its unknown name), global shape and boxes.
#[allow(clippy::type_complexity)]
fn tensor_entry(
    pickle: &Pickle,
    id: NodeId,
) -> Option<(Result<DType, String>, Vec<usize>, Vec<Region>)> {
    let of = |name| pickle.attribute(id, "TensorStorageMetadata", name);
    let properties = pickle.state(of("properties")?, "TensorProperties")?;
    // A tuple with the dtype first; a dict of fields in versions that pickle it as any dataclass.
    let dtype = match pickle.sequence(properties) {
        Some(fields) => *fields.first()?,
        None => pickle.get(properties, "dtype")?,
    };
    let (module, name) = pickle.global(dtype)?;
    if module != "torch" {
        return None;
    }
    let dtype = dtype_named(name).ok_or_else(|| name.escape_debug().take(40).collect());
    let shape = pickle.sizes(of("size")?)?;
    if shape.len() > MAX_DIMS {
        return None;
    }
    let chunks = pickle.sequence(of("chunks")?)?;
    let regions = chunks.iter().map(|chunk| {
        let field = |name| {
            pickle
                .attribute(*chunk, "ChunkStorageMetadata", name)
                .and_then(|id| pickle.sizes(id))
        };
        let (offset, extent) = (field("offsets")?, field("sizes")?);
        if offset.len() != extent.len() {
            return None;
        }
        let region = Region::new(offset, extent);
        region.fits(&shape).then_some(region)
    });
    let regions = regions.collect::<Option<Vec<_>>>()?;
    Some((dtype, shape, regions))
}
