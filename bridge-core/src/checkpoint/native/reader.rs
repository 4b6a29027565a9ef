//! Reads a native checkpoint: any rectangular slice of any tensor, from whatever pieces it was written in.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::super::copy::BUFFER_BYTES;
use super::super::error::{CheckpointError, IoContext, Result, Shape, quote};
use super::super::folder::{SafetensorsFile, nearest};
use super::super::header::TensorSpec;
use super::super::region::{Region, Run};
use super::super::source::{FileReader, RangeReader};
use super::index::{Group, MAX_INDEX_BYTES, NativeIndex, NativeIndexError, NativeTensor, Piece};
use super::{LATEST_FILE, NATIVE_INDEX_FILE, iteration_dir, parse_iteration};
use crate::error::Problems;

/// A contiguous stretch of a file, and where it goes in a row-major buffer of the slice asked for.
pub struct SourceRun<'a> {
    /// The file.
    pub reader: &'a dyn RangeReader,
    /// First byte in the file.
    pub offset: u64,
    /// First byte in the slice.
    pub dst: u64,
    /// Number of bytes.
    pub len: u64,
}

/// One iteration of a native checkpoint, its index read and checked. Files are opened when first needed, and once.
#[derive(Debug)]
pub struct NativeCheckpoint {
    dir: PathBuf,
    index: NativeIndex,
    files: BTreeMap<String, PieceFile>,
    notes: Vec<String>,
}

/// A file of pieces, and what the index says must be in it.
#[derive(Debug, Default)]
struct PieceFile {
    expected: HashMap<String, TensorSpec>,
    opened: OnceLock<OpenedFile>,
}

struct OpenedFile {
    file: SafetensorsFile,
    /// First byte of each piece in the file.
    starts: HashMap<String, u64>,
}

impl std::fmt::Debug for OpenedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.file.name())
    }
}

impl NativeCheckpoint {
    /// Opens an iteration's folder; or, in the folder of several, the one that `latest` names.
    ///
    /// When `latest` is missing, unreadable or names an iteration that is not there, the newest complete iteration is
    /// opened, and [`NativeCheckpoint::notes`] says so.
    ///
    /// # Errors
    /// [`CheckpointError::NoCheckpoint`] when there is none, [`CheckpointError::NativeIndex`] or
    /// [`CheckpointError::MissingShards`] when the one named is damaged, [`CheckpointError::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !fs::metadata(path).context("open folder", path)?.is_dir() {
            return Err(CheckpointError::NotAFolder {
                path: path.to_path_buf(),
            });
        }
        if path.join(NATIVE_INDEX_FILE).exists() {
            return Self::open_iteration(path);
        }
        let problem = match read_latest(path) {
            Ok(iteration) => {
                let dir = iteration_dir(path, iteration);
                if dir.is_dir() {
                    return Self::open_iteration(&dir);
                }
                format!("{LATEST_FILE} names {}, which is not there", dir.display())
            }
            Err(problem) => problem,
        };
        Self::open_newest(path, problem)
    }

    fn open_newest(root: &Path, problem: String) -> Result<Self> {
        let mut problems = Problems::new();
        problems.push(problem.clone());
        for (_, dir) in list_iterations(root)?.into_iter().rev() {
            let opened = Self::open_iteration(&dir)
                .and_then(|checkpoint| checkpoint.check_files().map(|()| checkpoint));
            match opened {
                Ok(mut checkpoint) => {
                    let name = dir.file_name().unwrap_or_default().display();
                    checkpoint.notes.push(format!(
                        "{problem}; using {name}, the newest complete iteration"
                    ));
                    checkpoint
                        .notes
                        .extend(problems.listed().iter().skip(1).cloned());
                    return Ok(checkpoint);
                }
                Err(error) => problems.push(with_causes(&error)),
            }
        }
        Err(CheckpointError::NoCheckpoint {
            path: root.to_path_buf(),
            problems,
        })
    }

    fn open_iteration(dir: &Path) -> Result<Self> {
        let path = dir.join(NATIVE_INDEX_FILE);
        let wrong = |problem| CheckpointError::NativeIndex {
            file: path.display().to_string(),
            problem,
        };
        let reader = FileReader::open(&path)?;
        if reader.len() > MAX_INDEX_BYTES {
            return Err(wrong(NativeIndexError::TooLarge {
                found: reader.len(),
            }));
        }
        let mut json = vec![0; reader.len() as usize];
        reader.read_exact_at(0, &mut json)?;
        let index = NativeIndex::parse(&json).map_err(wrong)?;
        drop(json);

        let mut files: BTreeMap<String, PieceFile> = BTreeMap::new();
        for tensor in Group::ALL
            .into_iter()
            .flat_map(|group| index.group(group).values())
        {
            for piece in &tensor.pieces {
                let spec = TensorSpec::new(&*piece.key, tensor.dtype, &*piece.shape);
                let file = files.entry(piece.file.clone()).or_default();
                if file.expected.insert(piece.key.clone(), spec).is_some() {
                    let problem = format!("{} is listed for two pieces", quote(&piece.key));
                    return Err(wrong(NativeIndexError::FileDisagrees {
                        file: piece.file.clone(),
                        problem,
                    }));
                }
            }
        }
        let mut missing = Problems::new();
        for file in files.keys().filter(|file| !dir.join(file).is_file()) {
            missing.push(quote(file));
        }
        if !missing.is_empty() {
            return Err(CheckpointError::MissingShards {
                path: dir.to_path_buf(),
                files: missing,
            });
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            index,
            files,
            notes: Vec::new(),
        })
    }

    /// The iteration's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The iteration that it was taken after.
    pub fn iteration(&self) -> u64 {
        self.index.iteration
    }

    /// The index.
    pub fn index(&self) -> &NativeIndex {
        &self.index
    }

    /// What the user should be told about how this checkpoint was chosen; usually nothing.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// A tensor by name.
    ///
    /// # Errors
    /// [`CheckpointError::UnknownTensor`], with the nearest name.
    pub fn tensor(&self, group: Group, name: &str) -> Result<&NativeTensor> {
        let tensors = self.index.group(group);
        tensors
            .get(name)
            .ok_or_else(|| CheckpointError::UnknownTensor {
                place: format!("the {group} part of {}", self.dir.display()),
                name: name.to_owned(),
                nearest: nearest(name, tensors.keys().map(String::as_str)),
            })
    }

    /// Opens every file and compares its header with the index. Otherwise each is checked when it is first needed.
    ///
    /// # Errors
    /// [`CheckpointError::Header`], [`CheckpointError::NativeIndex`] or [`CheckpointError::Io`] of the first bad file.
    pub fn check_files(&self) -> Result<()> {
        self.files
            .iter()
            .try_for_each(|(name, file)| self.opened(name, file).map(drop))
    }

    /// Reads a file that was added to the checkpoint, such as `train_state.json`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn read_file(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.dir.join(name);
        fs::read(&path).context("read", &path)
    }

    /// Reads a whole tensor into memory.
    ///
    /// # Errors
    /// As [`NativeCheckpoint::read_slice`].
    pub fn read(&self, group: Group, name: &str) -> Result<Vec<u8>> {
        let region = Region::whole(&self.tensor(group, name)?.shape);
        self.read_region(group, name, &region)
    }

    /// Reads the slice `region` of a tensor into memory.
    ///
    /// # Errors
    /// As [`NativeCheckpoint::read_slice`].
    pub fn read_region(&self, group: Group, name: &str, region: &Region) -> Result<Vec<u8>> {
        let (tensor, _) = self.checked(group, name, region)?;
        // The pieces in the index hold every byte, so a size that no file backs fails here before it is allocated.
        self.check_pieces(tensor)?;
        let mut out = vec![0; tensor.dtype.byte_len(&region.shape).unwrap_or(0) as usize];
        self.read_slice(group, name, region, &mut out)?;
        Ok(out)
    }

    /// Reads the slice `region` of a tensor into `out`, row-major, whatever pieces it lies in.
    ///
    /// Beyond `out` this takes at most one buffer of a mebibyte.
    ///
    /// # Errors
    /// [`CheckpointError::UnknownTensor`], [`CheckpointError::BadRange`] when the slice is not within the tensor or
    /// `out` has another size, and what opening and reading files may give.
    pub fn read_slice(
        &self,
        group: Group,
        name: &str,
        region: &Region,
        out: &mut [u8],
    ) -> Result<()> {
        let (tensor, element_bytes) = self.checked(group, name, region)?;
        let expected = tensor.dtype.byte_len(&region.shape);
        if expected != Some(out.len() as u64) {
            let (shape, dtype, found) = (Shape(&region.shape), tensor.dtype, out.len());
            let problem = format!(
                "a slice of shape {shape} of {dtype} does not fit a buffer of {found} bytes"
            );
            return Err(CheckpointError::BadRange {
                name: name.to_owned(),
                problem,
            });
        }
        for (piece, shared) in pieces_of(tensor, region) {
            let (reader, start) = self.located(piece)?;
            let runs = shared.runs(&piece.region(), region, element_bytes);
            read_runs(reader, start, runs, out)?;
        }
        Ok(())
    }

    /// Calls `visit` with every stretch of the files that makes up the slice `region` of a tensor, so that a caller
    /// can have the kernel copy them. No bytes are read.
    ///
    /// # Errors
    /// As [`NativeCheckpoint::read_slice`], and what `visit` returns.
    pub fn for_each_run<'a>(
        &'a self,
        group: Group,
        name: &str,
        region: &Region,
        mut visit: impl FnMut(SourceRun<'a>) -> Result<()>,
    ) -> Result<()> {
        let (tensor, element_bytes) = self.checked(group, name, region)?;
        for (piece, shared) in pieces_of(tensor, region) {
            let (reader, start) = self.located(piece)?;
            for Run { src, dst, len } in shared.runs(&piece.region(), region, element_bytes) {
                visit(SourceRun {
                    reader,
                    offset: start + src,
                    dst,
                    len,
                })?;
            }
        }
        Ok(())
    }

    fn checked(&self, group: Group, name: &str, region: &Region) -> Result<(&NativeTensor, usize)> {
        let tensor = self.tensor(group, name)?;
        if !region.fits(&tensor.shape) {
            let (offset, shape) = (Shape(&region.offset), Shape(&region.shape));
            let problem = format!(
                "slice at {offset} of shape {shape} is not within shape {}",
                Shape(&tensor.shape)
            );
            return Err(CheckpointError::BadRange {
                name: name.to_owned(),
                problem,
            });
        }
        let packed = || CheckpointError::PackedElements {
            name: name.to_owned(),
            dtype: tensor.dtype,
        };
        Ok((tensor, tensor.dtype.bytes().ok_or_else(packed)?))
    }

    fn check_pieces(&self, tensor: &NativeTensor) -> Result<()> {
        tensor
            .pieces
            .iter()
            .try_for_each(|piece| self.located(piece).map(drop))
    }

    /// The file of a piece, and the piece's first byte in it.
    fn located(&self, piece: &Piece) -> Result<(&dyn RangeReader, u64)> {
        let file = self.opened(&piece.file, &self.files[&piece.file])?;
        Ok((file.file.reader(), file.starts[&piece.key]))
    }

    fn opened<'a>(&self, name: &str, file: &'a PieceFile) -> Result<&'a OpenedFile> {
        if let Some(opened) = file.opened.get() {
            return Ok(opened);
        }
        let opened = SafetensorsFile::new(name, Box::new(FileReader::open(self.dir.join(name))?))?;
        let opened =
            compare(opened, &file.expected).map_err(|problem| CheckpointError::NativeIndex {
                file: self.dir.join(NATIVE_INDEX_FILE).display().to_string(),
                problem: NativeIndexError::FileDisagrees {
                    file: name.to_owned(),
                    problem,
                },
            })?;
        // Another thread may have opened it meanwhile; then that one is used.
        Ok(file.opened.get_or_init(|| opened))
    }
}

/// Checks that a file holds exactly the pieces expected.
fn compare(
    file: SafetensorsFile,
    expected: &HashMap<String, TensorSpec>,
) -> Result<OpenedFile, String> {
    let header = file.header();
    let mut starts = HashMap::with_capacity(header.entries.len());
    for entry in &header.entries {
        match expected.get(&entry.spec.name) {
            Some(spec) if *spec == entry.spec => {
                starts.insert(entry.spec.name.clone(), header.data_start + entry.offset);
            }
            Some(TensorSpec { dtype, shape, .. }) => {
                let (name, found) = (quote(&entry.spec.name), &entry.spec);
                return Err(format!(
                    "{name} is {} {} there, but {dtype} {} in the index",
                    found.dtype,
                    Shape(&found.shape),
                    Shape(shape)
                ));
            }
            None => {
                return Err(format!(
                    "it holds {}, which the index does not list",
                    quote(&entry.spec.name)
                ));
            }
        }
    }
    if let Some(key) = expected
        .keys()
        .filter(|key| !starts.contains_key(*key))
        .min()
    {
        return Err(format!("it lacks {}, which the index lists", quote(key)));
    }
    Ok(OpenedFile { file, starts })
}

/// The pieces that hold parts of `region`, with those parts.
fn pieces_of<'a>(
    tensor: &'a NativeTensor,
    region: &'a Region,
) -> impl Iterator<Item = (&'a Piece, Region)> {
    tensor
        .pieces
        .iter()
        .filter_map(|piece| Some((piece, piece.region().intersect(region)?)))
}

/// Reads runs, in ascending order of their source offsets, which count from byte `start` of the file.
///
/// Short runs that lie close together are read as one stretch and picked from a buffer: a slice of columns would
/// otherwise cost a system call a row.
fn read_runs(
    reader: &dyn RangeReader,
    start: u64,
    runs: impl Iterator<Item = Run>,
    out: &mut [u8],
) -> Result<()> {
    /// Runs of this length are read on their own: the call no longer matters.
    const LONG_RUN: u64 = 64 << 10;
    let mut buffer = Vec::new();
    let mut batch: Vec<Run> = Vec::new();
    for run in runs {
        if let (Some(first), Some(last)) = (batch.first(), batch.last()) {
            let gap = run.src - (last.src + last.len);
            let span = run.src + run.len - first.src;
            // At most three quarters of what is read is thrown away.
            if gap > 3 * run.len || span > BUFFER_BYTES as u64 || run.len >= LONG_RUN {
                read_batch(reader, start, &batch, &mut buffer, out)?;
                batch.clear();
            }
        }
        batch.push(run);
    }
    read_batch(reader, start, &batch, &mut buffer, out)
}

fn read_batch(
    reader: &dyn RangeReader,
    start: u64,
    batch: &[Run],
    buffer: &mut Vec<u8>,
    out: &mut [u8],
) -> Result<()> {
    match batch {
        [] => Ok(()),
        [run] => reader.read_exact_at(
            start + run.src,
            &mut out[run.dst as usize..][..run.len as usize],
        ),
        [first, .., last] => {
            buffer.resize((last.src + last.len - first.src) as usize, 0);
            reader.read_exact_at(start + first.src, buffer)?;
            for run in batch {
                let bytes = &buffer[(run.src - first.src) as usize..][..run.len as usize];
                out[run.dst as usize..][..run.len as usize].copy_from_slice(bytes);
            }
            Ok(())
        }
    }
}

/// The iterations in a checkpoint's folder, by number.
///
/// # Errors
/// [`CheckpointError::Io`] when the folder cannot be read.
pub fn list_iterations(root: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut iterations = Vec::new();
    for entry in fs::read_dir(root).context("open folder", root)? {
        let entry = entry.context("read folder", root)?;
        if let Some(iteration) = entry.file_name().to_str().and_then(parse_iteration)
            && entry.path().is_dir()
        {
            iterations.push((iteration, entry.path()));
        }
    }
    iterations.sort();
    Ok(iterations)
}

/// The iteration that `latest` names, or why it names none.
pub(super) fn read_latest(root: &Path) -> Result<u64, String> {
    /// More than any iteration's name.
    const MAX_BYTES: u64 = 100;
    let path = root.join(LATEST_FILE);
    let reader = match FileReader::open(&path) {
        Err(CheckpointError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Err(format!("there is no {}", path.display()));
        }
        reader => reader.map_err(|error| with_causes(&error))?,
    };
    let mut bytes = vec![0; reader.len().min(MAX_BYTES) as usize];
    reader
        .read_exact_at(0, &mut bytes)
        .map_err(|error| with_causes(&error))?;
    let text = String::from_utf8_lossy(&bytes);
    parse_iteration(text.trim()).ok_or_else(|| {
        format!(
            "{} holds {}, no iteration's name",
            path.display(),
            quote(&text)
        )
    })
}

/// An error with the errors behind it, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
