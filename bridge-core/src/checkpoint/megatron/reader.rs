//! Opening a Megatron-Core checkpoint.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::metadata::{self, Blob, Metadata};
use crate::checkpoint::error::{CheckpointError, IoContext, Result, quote};
use crate::checkpoint::shards::plain_name_problem;
use crate::checkpoint::source::{FileReader, RangeReader};
use crate::checkpoint::store::{BlockStore, StoredBlock, StoredTensor, open_files};
use crate::checkpoint::tiling;
use crate::checkpoint::torch::{Limits, Pickle, TorchArchive};
use crate::dtype::DType;

/// Name of the file that says which iteration is the newest.
pub const TRACKER_FILE: &str = "latest_checkpointed_iteration.txt";
const METADATA_FILE: &str = ".metadata";
const FORMAT_FILE: &str = "metadata.json";
/// Where Megatron-Bridge keeps the model's config.
pub(crate) const RUN_CONFIG_FILE: &str = "run_config.yaml";
/// Beginnings of the keys of what is no model weight: optimizer state, random number generators, schedules.
const STATE_KEYS: [&str; 5] = [
    "optimizer.",
    "chained_",
    "rng_state",
    "rerun_state",
    "opt_param_scheduler",
];

/// A Megatron-Core checkpoint whose metadata is read and found to fit its files.
#[derive(Debug)]
pub struct MegatronCheckpoint {
    dir: PathBuf,
    store: BlockStore,
    /// Keys of pickled objects, which are not read.
    objects: Vec<String>,
    /// Names and sizes of tensors that are no model weights.
    state: Vec<(String, u64)>,
}

impl MegatronCheckpoint {
    /// Whether `dir` looks like one: an iteration's folder, or the folder of several.
    pub fn is_in(dir: &Path) -> bool {
        dir.join(TRACKER_FILE).is_file() || dir.join(METADATA_FILE).is_file()
    }

    /// Opens the newest iteration in `dir`, or the iteration that `dir` is the folder of. Reads the metadata and the
    /// description of each box; weights stay where they are.
    ///
    /// # Errors
    /// [`CheckpointError::Megatron`] when the folder holds another format, the metadata is malformed, or boxes are
    /// missing, overlap or are not what the metadata says.
    pub fn open(dir: &Path) -> Result<Self> {
        let dir = iteration_dir(dir)?;
        check_format(&dir)?;
        let path = dir.join(METADATA_FILE);
        let refused = |problem: String| CheckpointError::Megatron {
            path: path.clone(),
            problem,
        };
        let reader = FileReader::open(&path)?;
        let limit = Limits::METADATA.bytes;
        if reader.len() > limit as u64 {
            return Err(refused(format!(
                "it has {} bytes, more than the {limit} that are read",
                reader.len(),
            )));
        }
        let mut bytes = vec![0; reader.len() as usize];
        reader.read_exact_at(0, &mut bytes)?;
        Self::from_files(&dir, bytes, |names| {
            let paths = names.into_iter().map(|name| {
                let path = dir.join(&name);
                (name, path)
            });
            open_files(paths.collect())
        })
    }

    /// Opens the checkpoint that `metadata`, the bytes of its `.metadata`, describes, wherever its files come from:
    /// `open` is given their names, each a plain file name, and returns each with its bytes, in the same order. `place`
    /// is what to call it in messages.
    ///
    /// # Errors
    /// As [`MegatronCheckpoint::open`].
    pub fn from_files(
        place: &Path,
        metadata: Vec<u8>,
        open: impl FnOnce(Vec<String>) -> Result<Vec<(String, Box<dyn RangeReader>)>>,
    ) -> Result<Self> {
        let refused = |problem: String| CheckpointError::Megatron {
            path: place.join(METADATA_FILE),
            problem,
        };
        let pickle = Pickle::parse(metadata, Limits::METADATA).map_err(refused)?;
        let metadata = metadata::decode(&pickle).map_err(refused)?;
        drop(pickle);
        Self::from_metadata(place.to_path_buf(), metadata, open)
    }

    fn from_metadata(
        dir: PathBuf,
        metadata: Metadata,
        open: impl FnOnce(Vec<String>) -> Result<Vec<(String, Box<dyn RangeReader>)>>,
    ) -> Result<Self> {
        let refused = |problem: String| CheckpointError::Megatron {
            path: dir.clone(),
            problem,
        };
        let (model, state): (Vec<_>, Vec<_>) = metadata.tensors.into_iter().partition(|tensor| {
            !STATE_KEYS
                .iter()
                .any(|prefix| tensor.name.starts_with(prefix))
        });
        for tensor in &model {
            let regions: Vec<_> = tensor.boxes.iter().map(|(region, _)| region).collect();
            tiling::check(&tensor.shape, &regions).map_err(|fault| {
                refused(format!(
                    "tensor {} of shape {:?}: {fault}",
                    quote(&tensor.name),
                    tensor.shape
                ))
            })?;
        }
        let blobs = model.iter().flat_map(|tensor| &tensor.boxes);
        let objects = metadata.objects.values();
        if let Some(blob) = blobs
            .clone()
            .map(|(_, blob)| blob)
            .chain(objects)
            .find(|blob| !plain(&blob.file))
        {
            return Err(refused(format!(
                "{} cannot be a file of the checkpoint",
                quote(&blob.file)
            )));
        }
        let everything = blobs.clone().map(|(_, blob)| blob);
        if let Some((first, second)) = overlapping(everything.chain(metadata.objects.values())) {
            return Err(refused(format!(
                "what begins at byte {} and at byte {} of {} overlaps",
                first.offset, second.offset, first.file
            )));
        }
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        for (_, blob) in blobs {
            let next = numbers.len();
            numbers.entry(&blob.file).or_insert(next);
        }
        let mut names: Vec<_> = numbers.iter().collect();
        names.sort_by_key(|(_, number)| **number);
        let names = names.into_iter().map(|(name, _)| (*name).to_owned());
        let files = open(names.collect())?;
        let tensors: Vec<Result<StoredTensor>> = model
            .par_iter()
            .map(|tensor| {
                let blocks = tensor.boxes.iter().map(|(region, blob)| {
                    let file = numbers[blob.file.as_str()];
                    let block = open_box(&*files[file].1, blob, tensor.dtype, &region.shape)
                        .map_err(|problem| {
                            refused(format!(
                                "the part of {} at byte {} of {}: {problem}",
                                quote(&tensor.name),
                                blob.offset,
                                blob.file
                            ))
                        })?;
                    Ok(StoredBlock {
                        region: region.clone(),
                        strides: block.0,
                        file,
                        offset: block.1,
                    })
                });
                Ok(StoredTensor {
                    name: tensor.name.clone(),
                    dtype: tensor.dtype,
                    shape: tensor.shape.clone(),
                    blocks: blocks.collect::<Result<_>>()?,
                })
            })
            .collect();
        let tensors = tensors.into_iter().collect::<Result<Vec<_>>>()?;
        let mut objects: Vec<String> = metadata.objects.into_keys().collect();
        objects.sort();
        let state = state.into_iter().map(|tensor| {
            let bytes = tensor.dtype.byte_len(&tensor.shape).unwrap_or(u64::MAX);
            (tensor.name, bytes)
        });
        let state = state.collect();
        Ok(Self {
            store: BlockStore::new(dir.display().to_string(), files, tensors),
            dir,
            objects,
            state,
        })
    }

    /// The iteration's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model's tensors.
    pub fn store(&self) -> &BlockStore {
        &self.store
    }

    /// The tensors, with those rows of the named tables left out that only pad the vocabulary to `vocab_size`.
    pub fn into_store(mut self, vocab_size: usize) -> BlockStore {
        for table in ["embedding.word_embeddings.weight", "output_layer.weight"] {
            self.store.cut_rows(table, vocab_size);
        }
        self.store
    }

    /// Keys of the pickled objects, which are not read.
    pub fn objects(&self) -> &[String] {
        &self.objects
    }

    /// Tensors that are no model weights (optimizer state and the like), with their sizes in bytes.
    pub fn other_state(&self) -> &[(String, u64)] {
        &self.state
    }

    /// Whether each layer's tensors have names of their own, as where layers differ; otherwise those of all layers are
    /// stacked along a first dim.
    pub fn has_layer_names(&self) -> bool {
        self.store.tensors().iter().any(|tensor| {
            let rest = tensor.name.strip_prefix("decoder.layers.");
            rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
    }

    /// Path of the config that Megatron-Bridge writes, if it is there.
    pub fn run_config(&self) -> Option<PathBuf> {
        let path = self.dir.join(RUN_CONFIG_FILE);
        path.is_file().then_some(path)
    }
}

/// The folder of the iteration to open.
pub(crate) fn iteration_dir(dir: &Path) -> Result<PathBuf> {
    const MAX_TRACKER_BYTES: u64 = 64;
    if dir.join(METADATA_FILE).is_file() {
        return Ok(dir.to_path_buf());
    }
    let tracker = dir.join(TRACKER_FILE);
    let refused = |problem: String| CheckpointError::Megatron {
        path: tracker.clone(),
        problem,
    };
    if !dir.is_dir() {
        return Err(CheckpointError::NotAFolder {
            path: dir.to_path_buf(),
        });
    }
    if !tracker.is_file() {
        return Err(CheckpointError::Megatron {
            path: dir.to_path_buf(),
            problem: format!(
                "it holds neither {TRACKER_FILE} nor {METADATA_FILE}; give the folder that a training run saved to, or \
                 one of its iter_ folders"
            ),
        });
    }
    let reader = FileReader::open(&tracker)?;
    if reader.len() > MAX_TRACKER_BYTES {
        return Err(refused("it should hold a number".to_owned()));
    }
    let text = fs::read_to_string(&tracker).context("read", &tracker)?;
    let name = match text.trim() {
        "release" => "release".to_owned(),
        number => match number.parse::<u64>() {
            Ok(number) => format!("iter_{number:07}"),
            Err(_) => return Err(refused(format!("it holds {}, not a number", quote(number)))),
        },
    };
    Ok(dir.join(name))
}

/// Refuses what is stored in another of Megatron's formats.
fn check_format(dir: &Path) -> Result<()> {
    #[derive(serde::Deserialize)]
    struct Format {
        sharded_backend: String,
    }
    let refused = |path: PathBuf, problem: String| Err(CheckpointError::Megatron { path, problem });
    if dir.join("mp_rank_00").is_dir() || dir.join("mp_rank_00_000").is_dir() {
        let problem = "it is in Megatron-LM's old format (mp_rank_ folders); save it with --ckpt-format torch_dist";
        return refused(dir.to_path_buf(), problem.to_owned());
    }
    let path = dir.join(FORMAT_FILE);
    let reader = match FileReader::open(&path) {
        Ok(reader) => reader,
        // Plain distributed checkpoints of PyTorch have none.
        Err(CheckpointError::Io { source, .. })
            if source.kind() == std::io::ErrorKind::NotFound =>
        {
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    if reader.len() > 1 << 20 {
        return refused(path, "it is too large to be one".to_owned());
    }
    let mut json = vec![0; reader.len() as usize];
    reader.read_exact_at(0, &mut json)?;
    match serde_json::from_slice::<Format>(&json) {
        Ok(format) if format.sharded_backend == "torch_dist" => Ok(()),
        Ok(format) => refused(
            path,
            format!(
                "the checkpoint is in format {}; only torch_dist is read",
                quote(&format.sharded_backend)
            ),
        ),
        Err(error) => refused(path, error.to_string()),
    }
}

/// Strides and first byte of the tensor in an archive, which must be what the metadata says.
fn open_box(
    reader: &dyn RangeReader,
    blob: &Blob,
    dtype: DType,
    shape: &[usize],
) -> Result<(Vec<usize>, u64), String> {
    let archive = TorchArchive::open(reader, blob.offset, blob.len, Limits::TENSOR)?;
    let tensor = archive.tensor(archive.pickle().root())?;
    if tensor.dtype != dtype || tensor.shape != shape {
        return Err(format!(
            "it is {} {:?}, but the metadata says {dtype} {shape:?}",
            tensor.dtype, tensor.shape
        ));
    }
    Ok((tensor.strides, tensor.offset))
}

/// Two ranges that share bytes, which no writer makes: a small file could claim to be a large one with them.
fn overlapping<'a>(blobs: impl Iterator<Item = &'a Blob>) -> Option<(&'a Blob, &'a Blob)> {
    let mut blobs: Vec<_> = blobs.filter(|blob| blob.len > 0).collect();
    blobs.sort_unstable_by_key(|blob| (&blob.file, blob.offset));
    let mut pairs = blobs.windows(2).map(|pair| (pair[0], pair[1]));
    pairs.find(|(a, b)| a.file == b.file && a.offset.saturating_add(a.len) > b.offset)
}

/// A file name within the folder.
fn plain(name: &str) -> bool {
    name.ends_with(".distcp") && plain_name_problem(name).is_none()
}
