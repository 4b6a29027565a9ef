//! A folder of safetensors files, as Hugging Face lays it out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::error::{CheckpointError, IoContext, Result, quote};
use super::header::Header;
use super::shards::file_name_problem;
use super::source::{FileReader, RangeReader};
use super::unique_map::UniqueMap;
use crate::dtype::DType;
use crate::error::Problems;

/// Name of the file that says which shard holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Name of the weights when they are one file.
pub const SINGLE_FILE: &str = "model.safetensors";
/// Largest index that is read, in bytes.
const MAX_INDEX_BYTES: u64 = 100_000_000;

/// A tensor in a checkpoint, and where its bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dims, outermost first.
    pub shape: Vec<usize>,
    /// Which of [`Checkpoint::files`] holds it.
    pub file: usize,
    /// First byte in that file.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// A safetensors file, opened once and its header parsed once.
pub struct SafetensorsFile {
    name: String,
    reader: Box<dyn RangeReader>,
    header: Header,
}

impl SafetensorsFile {
    /// Reads the header of `reader`, called `name` within its checkpoint.
    ///
    /// # Errors
    /// As [`Header::read`].
    pub fn new(name: impl Into<String>, reader: Box<dyn RangeReader>) -> Result<Self> {
        let header = Header::read(&*reader)?;
        Ok(Self {
            name: name.into(),
            reader,
            header,
        })
    }

    /// File name within its checkpoint.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The checked header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The file's bytes.
    pub fn reader(&self) -> &dyn RangeReader {
        &*self.reader
    }
}

/// The safetensors files of one model, all headers read and found to fit together.
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<SafetensorsFile>,
    tensors: Vec<TensorInfo>,
    index_json: Option<Vec<u8>>,
}

impl Checkpoint {
    /// Opens the weights in `dir`: `model.safetensors`; or the shards of `model.safetensors.index.json`; or, when
    /// there is neither, the only safetensors file or one complete `NAME-00001-of-0000N.safetensors` set.
    ///
    /// Reads headers only.
    ///
    /// # Errors
    /// [`CheckpointError`] when the folder or a file cannot be read, a file breaks the format, files are missing, or
    /// index and files do not agree; each names everything concerned.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let names = list_folder(dir)?;
        if names.contains(SINGLE_FILE) {
            return Self::open_files(dir, [SINGLE_FILE.to_owned()]);
        }
        if names.contains(INDEX_FILE) {
            return Self::open_indexed(dir, &names);
        }
        Self::open_files(dir, files_without_index(dir, &names)?)
    }

    /// Opens the named files of `dir` as one checkpoint.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_files(
        dir: impl AsRef<Path>,
        names: impl IntoIterator<Item = String>,
    ) -> Result<Self> {
        let dir = dir.as_ref();
        let open = |name: String| {
            SafetensorsFile::new(&*name, Box::new(FileReader::open(dir.join(&name))?))
        };
        let files = names.into_iter().map(open).collect::<Result<_>>()?;
        Self::from_files(dir, files)
    }

    /// Puts files from anywhere together; `dir` is what to call the whole in messages.
    ///
    /// # Errors
    /// [`CheckpointError::Inconsistent`] when two files hold tensors of the same name.
    pub fn from_files(dir: impl Into<PathBuf>, files: Vec<SafetensorsFile>) -> Result<Self> {
        let mut tensors =
            Vec::with_capacity(files.iter().map(|file| file.header.entries.len()).sum());
        for (index, file) in files.iter().enumerate() {
            tensors.extend(file.header.entries.iter().map(|entry| TensorInfo {
                name: entry.spec.name.clone(),
                dtype: entry.spec.dtype,
                shape: entry.spec.shape.clone(),
                file: index,
                offset: file.header.data_start + entry.offset,
                len: entry.len,
            }));
        }
        tensors.sort_by(|a: &TensorInfo, b| a.name.cmp(&b.name));
        let checkpoint = Self {
            dir: dir.into(),
            files,
            tensors,
            index_json: None,
        };
        let mut problems = Problems::new();
        for pair in checkpoint
            .tensors
            .windows(2)
            .filter(|pair| pair[0].name == pair[1].name)
        {
            let file = |info: &TensorInfo| &checkpoint.files[info.file].name;
            let (first, second) = (file(&pair[0]), file(&pair[1]));
            problems.push(format!(
                "tensor {} is in both {first} and {second}",
                quote(&pair[0].name)
            ));
        }
        checkpoint.consistent(problems)
    }

    fn open_indexed(dir: &Path, names: &BTreeSet<String>) -> Result<Self> {
        let path = dir.join(INDEX_FILE);
        let reader = FileReader::open(&path)?;
        if reader.len() > MAX_INDEX_BYTES {
            return Err(CheckpointError::IndexTooLarge {
                path,
                found: reader.len(),
                limit: MAX_INDEX_BYTES,
            });
        }
        let mut json = vec![0; reader.len() as usize];
        reader.read_exact_at(0, &mut json)?;
        let weight_map = parse_index(&path, &json)?;

        let shards: BTreeSet<&str> = weight_map.iter().map(|(_, shard)| shard.as_str()).collect();
        let mut missing = Problems::new();
        for shard in shards.iter().filter(|&&shard| !names.contains(shard)) {
            missing.push(quote(shard));
        }
        if !missing.is_empty() {
            return Err(CheckpointError::MissingShards {
                path: dir.to_path_buf(),
                files: missing,
            });
        }
        let mut checkpoint = Self::open_files(dir, shards.iter().map(|&shard| shard.to_owned()))?;
        checkpoint.index_json = Some(json);

        let mut problems = Problems::new();
        let listed: HashMap<&str, &str> = weight_map
            .iter()
            .map(|(name, shard)| (&**name, &**shard))
            .collect();
        for (name, shard) in &weight_map {
            match checkpoint
                .get(name)
                .map(|info| &checkpoint.files[info.file].name)
            {
                Some(holder) if holder == shard => {}
                Some(holder) => {
                    problems.push(format!(
                        "tensor {} is in {holder}, but the index says {shard}",
                        quote(name)
                    ));
                }
                None => problems.push(format!(
                    "tensor {} is not in {shard}, where the index says it is",
                    quote(name)
                )),
            }
        }
        for info in checkpoint
            .tensors
            .iter()
            .filter(|info| !listed.contains_key(info.name.as_str()))
        {
            let file = &checkpoint.files[info.file].name;
            problems.push(format!(
                "tensor {} of {file} is not in the index",
                quote(&info.name)
            ));
        }
        checkpoint.consistent(problems)
    }

    fn consistent(self, problems: Problems) -> Result<Self> {
        if problems.is_empty() {
            return Ok(self);
        }
        Err(CheckpointError::Inconsistent {
            path: self.dir,
            problems,
        })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What to call the checkpoint in messages.
    pub fn describe(&self) -> String {
        self.dir.display().to_string()
    }

    /// The files, in the order of their names.
    pub fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// The bytes of the index, where there is one.
    pub fn index_json(&self) -> Option<&[u8]> {
        self.index_json.as_deref()
    }

    /// Every tensor, sorted by name.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.iter().map(|info| info.len).sum()
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        let position = self
            .tensors
            .binary_search_by(|info| info.name.as_str().cmp(name))
            .ok()?;
        Some(&self.tensors[position])
    }

    /// A tensor by name, or an error that names the nearest one.
    ///
    /// # Errors
    /// [`CheckpointError::UnknownTensor`].
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.get(name)
            .ok_or_else(|| CheckpointError::UnknownTensor {
                place: self.describe(),
                name: name.to_owned(),
                nearest: nearest(name, self.tensors.iter().map(|info| info.name.as_str())),
            })
    }

    /// The bytes of the file that holds `info`, in which the tensor starts at `info.offset`.
    ///
    /// # Panics
    /// When `info` is of another checkpoint with more files.
    pub fn reader(&self, info: &TensorInfo) -> &dyn RangeReader {
        &*self.files[info.file].reader
    }

    /// Reads a whole tensor into memory.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn read(&self, info: &TensorInfo) -> Result<Vec<u8>> {
        // The length is within the file's, as the header's checks have it.
        let mut bytes = vec![0; info.len as usize];
        self.reader(info).read_exact_at(info.offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads the bytes `range` of a tensor into `out`, which must have that size.
    ///
    /// # Errors
    /// [`CheckpointError::BadRange`] when the range leaves the tensor or `out` has another size;
    /// [`CheckpointError::Io`].
    pub fn read_range(&self, info: &TensorInfo, range: Range<u64>, out: &mut [u8]) -> Result<()> {
        if range.start > range.end
            || range.end > info.len
            || range.end - range.start != out.len() as u64
        {
            let Range { start, end } = range;
            let problem = format!(
                "bytes {start}..{end} of {} do not fit a buffer of {} bytes",
                info.len,
                out.len()
            );
            return Err(CheckpointError::BadRange {
                name: info.name.clone(),
                problem,
            });
        }
        self.reader(info)
            .read_exact_at(info.offset + range.start, out)
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (files, tensors) = (self.files.len(), self.tensors.len());
        f.debug_struct("Checkpoint")
            .field("dir", &self.dir)
            .field("files", &files)
            .field("tensors", &tensors)
            .finish()
    }
}

/// The name most like `name`, when one is like it at all. Looks at a bounded number of names.
pub(super) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<String> {
    const MAX_COMPARED: usize = 20_000;
    const MAX_NAME: usize = 300;
    if name.len() > MAX_NAME {
        return None;
    }
    let candidates = names
        .take(MAX_COMPARED)
        .filter(|candidate| candidate.len() <= MAX_NAME);
    let scored = candidates.map(|candidate| (strsim::jaro_winkler(name, candidate), candidate));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 > 0.85).then(|| best.1.to_owned())
}

/// The names in a folder.
fn list_folder(dir: &Path) -> Result<BTreeSet<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
            return Err(CheckpointError::NotAFolder {
                path: dir.to_path_buf(),
            });
        }
        entries => entries.context("open folder", dir)?,
    };
    let mut names = BTreeSet::new();
    for entry in entries {
        // A name that is not UTF-8 is none that an index can name.
        if let Ok(name) = entry.context("read folder", dir)?.file_name().into_string() {
            names.insert(name);
        }
    }
    Ok(names)
}

/// The pairs of tensor and shard in an index whose shard names are all plain names.
fn parse_index(path: &Path, json: &[u8]) -> Result<Vec<(String, String)>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueMap<String>,
    }
    let wrong = |source| CheckpointError::IndexJson {
        path: path.to_path_buf(),
        source,
    };
    let index: Index = serde_json::from_slice(json).map_err(wrong)?;
    let mut told = BTreeSet::new();
    let mut problems = Problems::new();
    for (tensor, shard) in &index.weight_map.0 {
        if let Some(problem) = file_name_problem(shard)
            && told.insert(shard)
        {
            problems.push(format!(
                "{} (of tensor {}): {problem}",
                quote(shard),
                quote(tensor)
            ));
        }
    }
    if !problems.is_empty() {
        return Err(CheckpointError::IndexFileNames {
            path: path.to_path_buf(),
            problems,
        });
    }
    Ok(index.weight_map.0)
}

/// The files that make up a checkpoint without an index.
fn files_without_index(dir: &Path, names: &BTreeSet<String>) -> Result<Vec<String>> {
    let files: Vec<&String> = names
        .iter()
        .filter(|name| file_name_problem(name).is_none())
        .collect();
    let path = dir.to_path_buf();
    // Sets of numbered files, by what comes before the number and by how many there should be.
    let mut sets: BTreeMap<(&str, usize), BTreeSet<usize>> = BTreeMap::new();
    for (stem, number, count) in files.iter().filter_map(|name| numbered(name)) {
        sets.entry((stem, count)).or_default().insert(number);
    }
    let in_sets: usize = sets.values().map(BTreeSet::len).sum();
    match (files.as_slice(), sets.len()) {
        ([], _) => {
            let has = |part: &str| names.iter().any(|name| name.contains(part));
            let hint = if names.contains("latest") || names.contains("index.json") {
                "; it looks like a native checkpoint, which has its own option"
            } else if has("pytorch_model")
                || names
                    .iter()
                    .any(|name| name.ends_with(".pt") || name.ends_with(".pth"))
            {
                "; it holds pickled weights, which are not read because loading them runs code: convert them to \
                 safetensors first"
            } else {
                " (*.safetensors); is it the right folder?"
            };
            Err(CheckpointError::NoWeights { path, hint })
        }
        ([only], 0) => Ok(vec![(*only).clone()]),
        (_, 1) if in_sets == files.len() => {
            let ((stem, count), numbers) = sets.into_iter().next().expect("one set");
            let name = |number: usize| format!("{stem}-{number:05}-of-{count:05}.safetensors");
            let mut missing = Problems::new();
            for number in (1..=count).filter(|number| !numbers.contains(number)) {
                missing.push(quote(&name(number)));
            }
            if !missing.is_empty() {
                return Err(CheckpointError::MissingShards {
                    path,
                    files: missing,
                });
            }
            Ok(numbers.into_iter().map(name).collect())
        }
        _ => {
            let mut problems = Problems::new();
            files.iter().for_each(|name| problems.push(quote(name)));
            Err(CheckpointError::AmbiguousFiles {
                path,
                files: problems,
            })
        }
    }
}

/// `NAME-00002-of-00005.safetensors` as (`NAME`, 2, 5).
fn numbered(file_name: &str) -> Option<(&str, usize, usize)> {
    let stem = file_name.strip_suffix(".safetensors")?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| -> Option<usize> {
        let five = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        if five { text.parse().ok() } else { None }
    };
    let (number, count) = (digits(number)?, digits(count)?);
    (1..=count)
        .contains(&number)
        .then_some((stem, number, count))
}

#[cfg(test)]
#[path = "folder_tests.rs"]
mod tests;
