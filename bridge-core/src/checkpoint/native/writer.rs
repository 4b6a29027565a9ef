//! Writes a native checkpoint: every rank its own pieces, the first rank the index.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::super::error::{CheckpointError, IoContext, Result, quote};
use super::super::folder::SafetensorsFile;
use super::super::header::{Header, TensorSpec};
use super::super::output_file::OutputFiles;
use super::super::region::Region;
use super::super::source::{FileReader, RangeReader};
use super::super::staging::{
    Durability, Existing, Staging, remove_folder, remove_leftovers, replace_file, sync_dir,
    write_file,
};
use super::super::unique_map::UniqueMap;
use super::index::{Group, GroupIndex, NativeIndex, NativeTensor, Piece};
use super::{LATEST_FILE, NATIVE_INDEX_FILE, iteration_dir, list_iterations, parse_iteration};
use crate::dtype::DType;
use crate::error::Problems;

/// Metadata key under which a file of pieces says where those that are not whole tensors belong.
const PIECES_KEY: &str = "bridge.pieces";

/// A part of a canonical tensor that a rank is going to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PieceSpec {
    /// Name of the tensor.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dims of the whole tensor, over all ranks.
    pub shape: Vec<usize>,
    /// The part.
    pub region: Region,
}

impl PieceSpec {
    /// All of a tensor.
    pub fn whole(name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        let region = Region::whole(&shape);
        Self {
            name: name.into(),
            dtype,
            shape,
            region,
        }
    }
}

/// Where a piece belongs, as a file of pieces states it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Placement {
    name: String,
    shape: Vec<usize>,
    offset: Vec<usize>,
}

/// One iteration while it is written; held by the first rank.
///
/// [`NativeWriter::begin`] makes a hidden folder, every rank fills [`PieceWriter`]s in it (threads share this writer,
/// processes are given [`NativeWriter::staging_dir`]), and [`NativeWriter::finish`], called when all are done, checks
/// that the pieces make up every tensor, publishes the folder and moves `latest`. Dropped before that, it leaves
/// nothing; killed, it leaves the hidden folder, which the next save removes.
#[derive(Debug)]
pub struct NativeWriter {
    staging: Staging,
    root: PathBuf,
    iteration: u64,
    durability: Durability,
}

impl NativeWriter {
    /// Starts the checkpoint of `iteration` in the folder `root`, which is made if it is not there. A checkpoint of
    /// the same iteration is replaced when this one is complete.
    ///
    /// Folders of earlier saves whose process is dead are removed.
    ///
    /// # Errors
    /// [`CheckpointError`] when the folder cannot be made.
    pub fn begin(root: impl Into<PathBuf>, iteration: u64, durability: Durability) -> Result<Self> {
        let root = root.into();
        let staging = Staging::create(&iteration_dir(&root, iteration), Existing::Replace)?;
        remove_leftovers(&root, |target| {
            target == LATEST_FILE || parse_iteration(target).is_some()
        })?;
        Ok(Self {
            staging,
            root,
            iteration,
            durability,
        })
    }

    /// The hidden folder.
    pub fn staging_dir(&self) -> &Path {
        self.staging.dir()
    }

    /// [`PieceWriter::create`] in this checkpoint.
    ///
    /// # Errors
    /// As there.
    pub fn piece_file(
        &self,
        group: Group,
        part: usize,
        pieces: Vec<PieceSpec>,
    ) -> Result<PieceWriter> {
        PieceWriter::create(self.staging_dir(), group, part, pieces, self.durability)
    }

    /// Adds a file, `train_state.json` or `hf/config.json`, whose content means nothing here.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], also when there is one of that name already, and [`CheckpointError::DiskFull`].
    pub fn add_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.staging_dir().join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).context("create folder", parent)?;
        }
        write_file(&path, bytes, self.durability)
    }

    /// Checks that parts 0 to `model_parts` and `optimizer_parts` are there and make up every tensor exactly once,
    /// writes the index, publishes the checkpoint and moves `latest` to it. Returns its folder.
    ///
    /// Only headers are read for this.
    ///
    /// # Errors
    /// [`CheckpointError::MissingShards`] for parts that are not there or not complete,
    /// [`CheckpointError::Inconsistent`] or [`CheckpointError::NativeIndex`] when the pieces do not fit together,
    /// [`CheckpointError::Io`]. The earlier checkpoints are untouched then.
    pub fn finish(self, model_parts: usize, optimizer_parts: usize) -> Result<PathBuf> {
        let mut index = NativeIndex {
            iteration: self.iteration,
            model: GroupIndex::new(),
            optimizer: GroupIndex::new(),
        };
        for (group, parts) in [
            (Group::Model, model_parts),
            (Group::Optimizer, optimizer_parts),
        ] {
            *index.group_mut(group) = collect_pieces(self.staging.dir(), group, parts)?;
        }
        let path = self.staging.dir().join(NATIVE_INDEX_FILE);
        let wrong = |problem| CheckpointError::NativeIndex {
            file: path.display().to_string(),
            problem,
        };
        let json = index.to_json().map_err(wrong)?;
        write_file(&path, &json, self.durability)?;
        let published = self.staging.publish(self.durability)?;
        let name = published
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        replace_file(
            &self.root.join(LATEST_FILE),
            format!("{name}\n").as_bytes(),
            self.durability,
        )?;
        Ok(published)
    }
}

/// One rank's file of pieces. Every byte of every piece is written exactly once, in any order, from any thread.
#[derive(Debug)]
pub struct PieceWriter {
    files: OutputFiles,
    partial: PathBuf,
    path: PathBuf,
    durability: Durability,
    finished: bool,
}

impl PieceWriter {
    /// Creates the file of part number `part` (usually the rank) of `group` in the hidden folder `staging_dir`.
    ///
    /// Pieces without elements are allowed. Each piece is a row-major block of its own.
    ///
    /// # Errors
    /// [`CheckpointError::BadLayout`] for pieces that are not within their tensor or that a file cannot hold,
    /// [`CheckpointError::DiskFull`], [`CheckpointError::Io`].
    pub fn create(
        staging_dir: &Path,
        group: Group,
        part: usize,
        pieces: Vec<PieceSpec>,
        durability: Durability,
    ) -> Result<Self> {
        let mut problems = Problems::new();
        let mut specs = Vec::with_capacity(pieces.len());
        let mut placements = BTreeMap::new();
        for PieceSpec {
            name,
            dtype,
            shape,
            region,
        } in pieces
        {
            if !region.fits(&shape) {
                problems.push(format!(
                    "piece {region:?} is not within tensor {} of shape {shape:?}",
                    quote(&name)
                ));
            }
            if dtype.bytes().is_none() {
                problems.push(format!(
                    "tensor {} of packed type {dtype} cannot be stored in pieces",
                    quote(&name)
                ));
            }
            if region.shape == shape {
                specs.push(TensorSpec { name, dtype, shape });
                continue;
            }
            let offsets: Vec<String> = region.offset.iter().map(usize::to_string).collect();
            let key = format!("{name}@{}", offsets.join(","));
            specs.push(TensorSpec {
                name: key.clone(),
                dtype,
                shape: region.shape,
            });
            placements.insert(
                key,
                Placement {
                    name,
                    shape,
                    offset: region.offset,
                },
            );
        }
        if !problems.is_empty() {
            return Err(CheckpointError::BadLayout { problems });
        }
        let dir = staging_dir.join(group.as_str());
        let file_name = part_file_name(part);
        let (partial, path) = (
            dir.join(format!(".{file_name}.partial")),
            dir.join(&file_name),
        );
        let wrong = |problem| CheckpointError::Header {
            file: path.display().to_string(),
            problem,
        };
        let json = serde_json::to_string(&placements)
            .map_err(|error| wrong(super::super::HeaderError::Json(error)))?;
        let (bytes, header) =
            Header::encode(&specs, &[(PIECES_KEY.to_owned(), json)]).map_err(wrong)?;

        fs::create_dir_all(&dir).context("create folder", &dir)?;
        let mut writer = Self {
            files: OutputFiles::default(),
            partial,
            path,
            durability,
            finished: false,
        };
        writer.files.add(writer.partial.clone(), &bytes, &header)?;
        Ok(writer)
    }

    /// Writes `bytes` at byte `offset` of piece number `piece`. May be called from several threads at once.
    ///
    /// # Errors
    /// As [`super::super::ShardedWriter::write_at`].
    ///
    /// # Panics
    /// When there is no piece of that number.
    pub fn write_at(&self, piece: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        self.files.write_at(piece, offset, bytes)
    }

    /// Copies `len` bytes of `source`, from `source_offset` on, to byte `offset` of piece number `piece`; between
    /// files by the kernel.
    ///
    /// # Errors
    /// As [`super::super::ShardedWriter::copy_from`].
    ///
    /// # Panics
    /// When there is no piece of that number.
    pub fn copy_from(
        &self,
        piece: usize,
        offset: u64,
        source: &dyn RangeReader,
        source_offset: u64,
        len: u64,
    ) -> Result<()> {
        self.files
            .copy_from(piece, offset, source, source_offset, len)
    }

    /// Checks that every byte has been written and gives the file its name, by which the first rank knows that it is
    /// complete.
    ///
    /// # Errors
    /// [`CheckpointError::Incomplete`], [`CheckpointError::Io`].
    pub fn finish(mut self) -> Result<()> {
        std::mem::take(&mut self.files).finish(&self.path, self.durability)?;
        fs::rename(&self.partial, &self.path).context("rename", &self.partial)?;
        self.finished = true;
        if let (Durability::Synced, Some(dir)) = (self.durability, self.path.parent()) {
            sync_dir(dir)?;
        }
        Ok(())
    }
}

impl Drop for PieceWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Best effort: the folder goes too when the checkpoint is given up.
            let _ = fs::remove_file(&self.partial);
        }
    }
}

fn part_file_name(part: usize) -> String {
    format!("rank_{part:05}.safetensors")
}

/// Reads the headers of a group's files and gathers where the pieces of each tensor are.
fn collect_pieces(staging_dir: &Path, group: Group, parts: usize) -> Result<GroupIndex> {
    let dir = staging_dir.join(group.as_str());
    let mut missing = Problems::new();
    let expected: Vec<String> = (0..parts).map(part_file_name).collect();
    for name in expected.iter().filter(|name| !dir.join(name).exists()) {
        missing.push(format!("{group}/{name}"));
    }
    if !missing.is_empty() {
        return Err(CheckpointError::MissingShards {
            path: staging_dir.to_path_buf(),
            files: missing,
        });
    }
    let mut problems = Problems::new();
    if dir.exists() {
        for entry in fs::read_dir(&dir).context("open folder", &dir)? {
            let name = entry.context("read folder", &dir)?.file_name();
            if !expected.iter().any(|expected| name == **expected) {
                problems.push(format!(
                    "{group}/{} is beyond the {parts} parts expected",
                    name.display()
                ));
            }
        }
    }
    let mut tensors = GroupIndex::new();
    for name in &expected {
        let file = SafetensorsFile::new(&**name, Box::new(FileReader::open(dir.join(name))?))?;
        add_pieces(
            &file,
            &format!("{group}/{name}"),
            &mut tensors,
            &mut problems,
        )?;
    }
    if problems.is_empty() {
        return Ok(tensors);
    }
    Err(CheckpointError::Inconsistent {
        path: staging_dir.to_path_buf(),
        problems,
    })
}

fn add_pieces(
    file: &SafetensorsFile,
    path: &str,
    tensors: &mut GroupIndex,
    problems: &mut Problems,
) -> Result<()> {
    let header = file.header();
    let stated = header.metadata.iter().find(|(key, _)| key == PIECES_KEY);
    let placements = match stated {
        None => UniqueMap(Vec::new()),
        Some((_, json)) => serde_json::from_str::<UniqueMap<Placement>>(json).map_err(|error| {
            let problem = super::super::HeaderError::Json(error);
            CheckpointError::Header {
                file: path.to_owned(),
                problem,
            }
        })?,
    };
    let mut placements: BTreeMap<String, Placement> = placements.0.into_iter().collect();
    for entry in &header.entries {
        let TensorSpec {
            name: key,
            dtype,
            shape,
        } = entry.spec.clone();
        let Placement {
            name,
            shape: whole,
            offset,
        } = placements.remove(&key).unwrap_or_else(|| Placement {
            name: key.clone(),
            shape: shape.clone(),
            offset: vec![0; shape.len()],
        });
        let piece = Piece {
            file: path.to_owned(),
            key,
            offset,
            shape,
        };
        let tensor = tensors.entry(name).or_insert_with_key(|_| NativeTensor {
            dtype,
            shape: whole.clone(),
            pieces: vec![],
        });
        if (tensor.dtype, &tensor.shape) != (dtype, &whole) {
            problems.push(format!(
                "{} of {path} is a piece of a {dtype} tensor of shape {whole:?}, but other pieces are of {} {:?}",
                quote(&piece.key),
                tensor.dtype,
                tensor.shape
            ));
        }
        tensor.pieces.push(piece);
    }
    Ok(())
}

/// Removes all but the `keep` iterations of the highest numbers; never `current`, nor the one that `latest` names.
/// Returns those removed.
///
/// Each is renamed before it is removed, so that being killed half-way leaves no damaged iteration.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn retain(root: &Path, keep: usize, current: u64) -> Result<Vec<u64>> {
    let latest = super::reader::read_latest(root).ok();
    let mut removed = Vec::new();
    for (iteration, dir) in list_iterations(root)?.into_iter().rev().skip(keep) {
        if iteration != current && Some(iteration) != latest {
            remove_folder(&dir)?;
            removed.push(iteration);
        }
    }
    Ok(removed)
}
