//! PyTorch state dicts as a model's weights: `pytorch_model.bin`, its shards, and single `.pt` or `.pth` files.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use super::archive::TorchArchive;
use super::pickle::{Limits, NodeId};
use crate::checkpoint::error::{CheckpointError, Result, quote};
use crate::checkpoint::region::Region;
use crate::checkpoint::shards::plain_name_problem;
use crate::checkpoint::source::{FileReader, RangeReader};
use crate::checkpoint::store::{BlockStore, StoredBlock, StoredTensor, open_files};
use crate::error::Problems;

/// Name of the weights when they are one file.
pub const BIN_FILE: &str = "pytorch_model.bin";
/// Name of the file that says which shard holds which tensor.
pub const BIN_INDEX_FILE: &str = "pytorch_model.bin.index.json";
/// Largest index that is read, in bytes.
const MAX_INDEX_BYTES: u64 = 100_000_000;
/// Keys under which training scripts put the state dict beside other things.
const WRAPPERS: [&str; 3] = ["state_dict", "model", "module"];

/// Opens PyTorch state dicts as a store of tensors.
#[derive(Debug)]
pub struct TorchWeights;

impl TorchWeights {
    /// Whether a folder holds PyTorch weights under the names of the hub.
    pub fn are_in(dir: &Path) -> bool {
        dir.join(BIN_FILE).is_file() || dir.join(BIN_INDEX_FILE).is_file()
    }

    /// Opens `pytorch_model.bin` or the shards of its index in a folder, or a single file.
    ///
    /// # Errors
    /// [`CheckpointError`] when files are missing, are no state dicts, or hold a tensor twice.
    pub fn open(path: &Path) -> Result<BlockStore> {
        if path.is_file() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            return Self::open_all(path, vec![(name.into_owned(), path.to_path_buf())]);
        }
        let index = path.join(BIN_INDEX_FILE);
        if path.join(BIN_FILE).is_file() || !index.is_file() {
            return Self::open_all(path, vec![(BIN_FILE.to_owned(), path.join(BIN_FILE))]);
        }
        let shards = indexed(&index)?;
        let paths = shards.into_iter().map(|name| {
            let file = path.join(&name);
            (name, file)
        });
        Self::open_all(path, paths.collect())
    }

    fn open_all(place: &Path, paths: Vec<(String, PathBuf)>) -> Result<BlockStore> {
        Self::from_files(place, open_files(paths)?)
    }

    /// Opens state dicts that are files of names `files[..].0` at `place`, wherever their bytes come from.
    ///
    /// # Errors
    /// As [`TorchWeights::open`].
    pub fn from_files(
        place: &Path,
        files: Vec<(String, Box<dyn RangeReader>)>,
    ) -> Result<BlockStore> {
        let mut tensors: Vec<StoredTensor> = Vec::new();
        let mut holders: HashMap<String, usize> = HashMap::new();
        let mut problems = Problems::new();
        for (index, (name, reader)) in files.iter().enumerate() {
            let found = state_dict(&**reader, index).map_err(|problem| CheckpointError::Torch {
                file: reader.describe(),
                problem,
            })?;
            for tensor in found {
                if let Some(first) = holders.insert(tensor.name.clone(), index) {
                    problems.push(format!(
                        "tensor {} is in {} and in {name}",
                        quote(&tensor.name),
                        files[first].0
                    ));
                }
                tensors.push(tensor);
            }
        }
        if !problems.is_empty() {
            return Err(CheckpointError::Inconsistent {
                path: place.to_path_buf(),
                problems,
            });
        }
        Ok(BlockStore::new(place.display().to_string(), files, tensors))
    }
}

/// The tensors of one file.
fn state_dict(reader: &dyn RangeReader, file: usize) -> Result<Vec<StoredTensor>, String> {
    let mut start = [0; 4];
    if reader.len() >= 4 {
        let read = reader.read_exact_at(0, &mut start);
        read.map_err(|error| error.to_string())?;
    }
    if start != *b"PK\x03\x04" {
        return Err(
            "it is no zip archive; files of PyTorch before 1.6 must be loaded and saved again by a newer one"
                .to_owned(),
        );
    }
    let archive = TorchArchive::open(reader, 0, reader.len(), Limits::STATE_DICT)?;
    let pickle = archive.pickle();
    let mut root = pickle.root();
    // A training script's checkpoint holds the state dict under a key; nothing else in it is looked at.
    if let Some(inner) = WRAPPERS.iter().find_map(|key| {
        let inner = pickle.get(root, key)?;
        pickle.items(inner).map(|_| inner)
    }) {
        root = inner;
    }
    let items = pickle.items(root).ok_or_else(|| {
        format!(
            "it holds {}, not a state dict (a dict of tensors)",
            pickle.describe(root)
        )
    })?;
    let mut last: HashMap<&str, NodeId> = HashMap::with_capacity(items.len());
    for (key, value) in items {
        let name = pickle.str(*key).ok_or_else(|| {
            format!(
                "a key of its state dict is {}, not a name",
                pickle.describe(*key)
            )
        })?;
        last.insert(name, *value);
    }
    last.into_iter()
        .map(|(name, id)| {
            let tensor = archive
                .tensor(id)
                .map_err(|problem| format!("{}: {problem}", quote(name)))?;
            Ok(StoredTensor {
                name: name.to_owned(),
                dtype: tensor.dtype,
                blocks: vec![StoredBlock {
                    region: Region::whole(&tensor.shape),
                    strides: tensor.strides,
                    file,
                    offset: tensor.offset,
                }],
                shape: tensor.shape,
            })
        })
        .collect()
}

/// The shards that an index names.
fn indexed(path: &Path) -> Result<BTreeSet<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let reader = FileReader::open(path)?;
    if reader.len() > MAX_INDEX_BYTES {
        return Err(CheckpointError::IndexTooLarge {
            path: path.to_path_buf(),
            found: reader.len(),
            limit: MAX_INDEX_BYTES,
        });
    }
    let mut json = vec![0; reader.len() as usize];
    reader.read_exact_at(0, &mut json)?;
    let index: Index =
        serde_json::from_slice(&json).map_err(|source| CheckpointError::IndexJson {
            path: path.to_path_buf(),
            source,
        })?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    let mut problems = Problems::new();
    for name in names.iter().filter(|name| !plain(name)) {
        problems.push(quote(name));
    }
    if problems.is_empty() {
        Ok(names)
    } else {
        Err(CheckpointError::IndexFileNames {
            path: path.to_path_buf(),
            problems,
        })
    }
}

/// A name within the folder.
fn plain(name: &str) -> bool {
    name.ends_with(".bin") && plain_name_problem(name).is_none()
}
