//! Copies of byte ranges between files, by the kernel where it can.

use std::fs::File;
use std::io;
use std::path::Path;

use super::error::{CheckpointError, Result};
use super::source::RangeReader;

/// Bytes that one kernel copy moves. Small enough that a stop request or progress bar is served in between.
#[cfg(target_os = "linux")]
const KERNEL_COPY_BYTES: u64 = 64 << 20;
/// Size of the buffer when bytes pass through this process: small enough that what was read, or computed, is still in the
/// second-level cache when it is written.
pub(super) const BUFFER_BYTES: usize = 256 << 10;

/// Copies `len` bytes of `source` from `source_offset` on to `file` (called `path` in errors) at `offset`.
pub(super) fn copy_range(
    source: &dyn RangeReader,
    mut source_offset: u64,
    file: &File,
    path: &Path,
    mut offset: u64,
    mut len: u64,
) -> Result<()> {
    #[cfg(target_os = "linux")]
    if let Some(from) = source.as_file() {
        let copied = kernel_copy(from, source_offset, file, offset, len)
            .map_err(|error| CheckpointError::write(path, len, error))?;
        source_offset += copied;
        offset += copied;
        len -= copied;
    }
    // What the kernel would not copy, or came up short of: a plain read then tells why.
    let mut buffer = vec![0; BUFFER_BYTES.min(usize::try_from(len).unwrap_or(usize::MAX))];
    while len > 0 {
        let part = &mut buffer[..len.min(BUFFER_BYTES as u64) as usize];
        source.read_exact_at(source_offset, part)?;
        write_all_at(file, offset, part)
            .map_err(|error| CheckpointError::write(path, part.len() as u64, error))?;
        source_offset += part.len() as u64;
        offset += part.len() as u64;
        len -= part.len() as u64;
    }
    Ok(())
}

/// Copies as much as the kernel will; returns how many bytes that is. An error is a failure of the copy itself.
#[cfg(target_os = "linux")]
fn kernel_copy(
    from: &File,
    mut from_offset: u64,
    to: &File,
    mut to_offset: u64,
    len: u64,
) -> io::Result<u64> {
    use rustix::io::Errno;

    let mut left = len;
    while left > 0 {
        let want = left.min(KERNEL_COPY_BYTES) as usize;
        match rustix::fs::copy_file_range(
            from,
            Some(&mut from_offset),
            to,
            Some(&mut to_offset),
            want,
        ) {
            // The source ends here. The plain read that follows reports it.
            Ok(0) => break,
            Ok(copied) => left -= copied as u64,
            Err(Errno::INTR) => {}
            // Not between these file systems, not on this kernel, not within this sandbox: read and write instead.
            Err(
                Errno::XDEV
                | Errno::NOSYS
                | Errno::INVAL
                | Errno::OPNOTSUPP
                | Errno::PERM
                | Errno::BADF,
            ) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(len - left)
}

#[cfg(unix)]
pub(super) fn write_all_at(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
pub(super) fn write_all_at(file: &File, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        match file.seek_write(bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                bytes = &bytes[written..];
                offset += written as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Gives `file` its final size and takes the room for it now, so that a full disk shows before any byte is copied.
pub(super) fn reserve(file: &File, len: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    if len > 0 {
        use rustix::fs::FallocateFlags;
        use rustix::io::Errno;

        loop {
            match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                // File systems that cannot reserve: the size alone is set.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    file.set_len(len)
}

#[cfg(test)]
mod tests {
    use super::super::source::{FileReader, MemoryReader};
    use super::*;

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
    }

    #[test]
    fn files_and_memory_are_copied_alike() {
        let folder = tempfile::tempdir().unwrap();
        let data = bytes(3 * BUFFER_BYTES + 17);
        let source_path = folder.path().join("source");
        std::fs::write(&source_path, &data).unwrap();
        let file_source = FileReader::open(&source_path).unwrap();
        let memory_source = MemoryReader::new("memory", data.clone());
        for source in [&file_source as &dyn RangeReader, &memory_source] {
            let path = folder.path().join("out");
            let out = File::create(&path).unwrap();
            reserve(&out, 4 * BUFFER_BYTES as u64).unwrap();
            let len = 2 * BUFFER_BYTES as u64 + 11;
            copy_range(source, 5, &out, &path, 3, len).unwrap();
            let written = std::fs::read(&path).unwrap();
            assert_eq!(written.len(), 4 * BUFFER_BYTES);
            assert_eq!(&written[3..3 + len as usize], &data[5..5 + len as usize]);
            assert!(
                written[..3]
                    .iter()
                    .chain(&written[3 + len as usize..])
                    .all(|&byte| byte == 0)
            );
        }
    }

    #[test]
    fn a_source_that_ends_early_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let source_path = folder.path().join("source");
        std::fs::write(&source_path, bytes(100)).unwrap();
        let source = FileReader::open(&source_path).unwrap();
        let path = folder.path().join("out");
        let out = File::create(&path).unwrap();
        let error = copy_range(&source, 50, &out, &path, 0, 60).unwrap_err();
        assert!(
            matches!(&error, CheckpointError::Io { action: "read", path, .. } if *path == source_path),
            "{error:?}"
        );
    }

    #[test]
    fn another_file_system_falls_back_to_reads_and_writes() {
        // /proc files are on their own file system and report no size, which the kernel copy refuses.
        let source = Path::new("/proc/self/status");
        if !source.exists() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let out = File::create(&path).unwrap();
        let source = FileReader::open(source).unwrap();
        copy_range(&source, 0, &out, &path, 0, 5).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"Name:");
    }
}
