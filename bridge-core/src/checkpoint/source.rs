//! Where bytes come from: anything that can be read by ranges.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::error::{CheckpointError, IoContext, Result};

/// A file, or something like one, that is read at given offsets, from any thread.
///
/// Local files and memory implement it here; object storage can implement it elsewhere.
pub trait RangeReader: Send + Sync {
    /// Size, in bytes, when it was opened.
    fn len(&self) -> u64;

    /// Whether there are no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    /// When the range reaches past the end, or the source fails.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// What to call this source in messages: a path, a URL.
    fn describe(&self) -> String;

    /// The file behind it, where there is one, so that the kernel can copy from it without passing through memory.
    fn as_file(&self) -> Option<&File> {
        None
    }
}

/// A local file, opened once and read by positioned reads.
#[derive(Debug)]
pub struct FileReader {
    file: File,
    path: PathBuf,
    len: u64,
}

impl FileReader {
    /// Opens a regular file (symbolic links are followed: a hub cache consists of them).
    ///
    /// # Errors
    /// [`CheckpointError::NotAFile`] for folders, pipes and devices, [`CheckpointError::Io`] otherwise.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        // Asked before opening, because opening a pipe would wait for its other end.
        let metadata = std::fs::metadata(&path).context("open", &path)?;
        if !metadata.is_file() {
            return Err(CheckpointError::NotAFile { path });
        }
        let file = File::open(&path).context("open", &path)?;
        let len = file.metadata().context("open", &path)?.len();
        Ok(Self { file, path, len })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl RangeReader for FileReader {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        read_exact_at(&self.file, offset, buf).context("read", &self.path)
    }

    fn describe(&self) -> String {
        self.path.display().to_string()
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buf, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !buf.is_empty() {
        match file.seek_read(buf, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                buf = &mut buf[read..];
                offset += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Bytes in memory, for tests and for files that came over a network.
#[derive(Debug, Clone)]
pub struct MemoryReader {
    bytes: Vec<u8>,
    name: String,
}

impl MemoryReader {
    /// A source of `bytes`, called `name` in messages.
    pub fn new(name: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Self {
        Self {
            bytes: bytes.into(),
            name: name.into(),
        }
    }
}

impl RangeReader for MemoryReader {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset).ok();
        let range = start.and_then(|start| Some(start..start.checked_add(buf.len())?));
        match range.and_then(|range| self.bytes.get(range)) {
            Some(bytes) => {
                buf.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(CheckpointError::io(
                "read",
                &self.name,
                io::ErrorKind::UnexpectedEof.into(),
            )),
        }
    }

    fn describe(&self) -> String {
        self.name.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(reader: &dyn RangeReader) {
        assert_eq!(reader.len(), 6);
        assert!(!reader.is_empty());
        let mut buf = [0; 3];
        reader.read_exact_at(2, &mut buf).unwrap();
        assert_eq!(&buf, b"cde");
        reader.read_exact_at(6, &mut []).unwrap();
        for offset in [4, 7, u64::MAX] {
            let error = reader.read_exact_at(offset, &mut buf).unwrap_err();
            assert!(
                matches!(&error, CheckpointError::Io { action: "read", .. }),
                "{offset}: {error:?}"
            );
        }
    }

    #[test]
    fn files_and_memory_read_the_same_ranges() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        std::fs::write(&path, b"abcdef").unwrap();
        let file = FileReader::open(&path).unwrap();
        assert!(file.as_file().is_some());
        check(&file);
        check(&MemoryReader::new("bytes", *b"abcdef"));
    }

    #[test]
    fn folders_and_missing_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(
            FileReader::open(folder.path()),
            Err(CheckpointError::NotAFile { .. })
        ));
        let missing = FileReader::open(folder.path().join("missing")).unwrap_err();
        assert!(missing.is_input() && missing.to_string().contains("missing"));
    }
}
