//! Folders that appear whole or not at all: written under a temporary name beside the target, then renamed.

use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::error::{CheckpointError, IoContext, Result};
use crate::error::Problems;

/// What a finished write survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// A crash of this program. The kernel writes to the disk when it likes: fastest.
    #[default]
    Cached,
    /// A power cut too: files and folders are synchronised before the result is published.
    Synced,
}

/// What to do when the target of a write exists and is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Existing {
    /// Refuse before writing anything.
    #[default]
    Refuse,
    /// Put the new folder in its place, all at once; only done to what looks like a checkpoint.
    Replace,
}

/// After how long without a change the temporary folder of a writer that cannot be asked is taken for abandoned.
const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 3600);
/// Between the target's name and the writer's mark.
const PARTIAL: &str = ".partial-";
/// The same for a folder on its way out.
const REMOVED: &str = ".removed-";

/// A temporary folder that becomes `target`, or disappears.
#[derive(Debug)]
pub(super) struct Staging {
    dir: PathBuf,
    target: PathBuf,
    existing: Existing,
    published: bool,
    /// Parents of the target that were made for it, outermost first.
    made_parents: Vec<PathBuf>,
}

impl Staging {
    /// Makes the temporary folder beside `target`, after removing what dead writers of the same target left there.
    pub(super) fn create(target: &Path, existing: Existing) -> Result<Self> {
        let target = resolve_target(target)?;
        check_replaceable(&target, existing)?;
        let (parent, name) = parent_and_name(&target)?;
        let made_parents = make_parents(parent)?;
        // From here on, dropping cleans up.
        let dir = parent.join(format!(".{name}{PARTIAL}{}", writer_mark()));
        let staging = Self {
            dir,
            target: target.clone(),
            existing,
            published: false,
            made_parents,
        };
        remove_leftovers(parent, |leftover| leftover == name)?;
        fs::create_dir(&staging.dir).context("create folder", &staging.dir)?;
        Ok(staging)
    }

    /// The temporary folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where it will appear.
    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// Fails when the disk has not enough room for `needed` bytes.
    pub(super) fn check_room(&self, needed: u64) -> Result<()> {
        #[cfg(unix)]
        {
            let stat = rustix::fs::statvfs(&self.dir).context("ask for free room at", &self.dir)?;
            let available = stat.f_bavail.saturating_mul(stat.f_frsize);
            if available < needed {
                let path = self.target.clone();
                return Err(CheckpointError::DiskFull {
                    path,
                    needed,
                    available: Some(available),
                });
            }
        }
        Ok(())
    }

    /// Makes the folder appear as the target, by one rename.
    pub(super) fn publish(mut self, durability: Durability) -> Result<PathBuf> {
        if durability == Durability::Synced {
            sync_tree(&self.dir)?;
        }
        // Looked at again: someone may have written there since.
        check_replaceable(&self.target, self.existing)?;
        if is_nonempty_folder(&self.target)? {
            self.swap_in()?;
        } else {
            fs::rename(&self.dir, &self.target).context("publish", &self.target)?;
            self.published = true;
        }
        if durability == Durability::Synced {
            let (parent, _) = parent_and_name(&self.target)?;
            sync_dir(parent)?;
        }
        Ok(self.target.clone())
    }

    /// Exchanges the new folder for the old one and removes the old one.
    fn swap_in(&mut self) -> Result<()> {
        let (parent, name) = parent_and_name(&self.target)?;
        let old = parent.join(format!(".{name}{REMOVED}{}", writer_mark()));
        if exchange(&self.dir, &self.target).context("publish", &self.target)? {
            // What is now under the temporary name is the old folder.
            self.published = true;
            fs::rename(&self.dir, &old).context("rename", &self.dir)?;
        } else {
            fs::rename(&self.target, &old).context("rename", &self.target)?;
            if let Err(error) = fs::rename(&self.dir, &self.target) {
                // The old one comes back; should that fail too, the first error is the one to tell.
                let _ = fs::rename(&old, &self.target);
                return Err(CheckpointError::io("publish", &self.target, error));
            }
            self.published = true;
        }
        fs::remove_dir_all(&old).context("remove", &old)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        // Best effort: an error is on its way already, and the next writer of this target tries again.
        let _ = fs::remove_dir_all(&self.dir);
        for parent in self.made_parents.iter().rev() {
            let _ = fs::remove_dir(parent);
        }
    }
}

/// The target as an absolute path with links resolved, so that the rename hits the folder and not a link to it.
fn resolve_target(target: &Path) -> Result<PathBuf> {
    match fs::canonicalize(target) {
        Ok(resolved) => Ok(resolved),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::path::absolute(target).context("create", target)
        }
        Err(error) => Err(CheckpointError::io("open", target, error)),
    }
}

fn parent_and_name(target: &Path) -> Result<(&Path, &str)> {
    let name = target.file_name().and_then(|name| name.to_str());
    match (target.parent(), name) {
        (Some(parent), Some(name)) => Ok((parent, name)),
        _ => {
            let mut problems = Problems::new();
            problems.push(format!(
                "{} is not the name of a folder that can be made",
                target.display()
            ));
            Err(CheckpointError::BadLayout { problems })
        }
    }
}

/// Makes the missing folders above the target; returns those made.
fn make_parents(parent: &Path) -> Result<Vec<PathBuf>> {
    let missing = parent.ancestors().take_while(|folder| !folder.exists());
    let mut missing: Vec<PathBuf> = missing.map(Path::to_path_buf).collect();
    missing.reverse();
    for (made, folder) in missing.iter().enumerate() {
        match fs::create_dir(folder) {
            Ok(()) => {}
            // Another writer was quicker.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {}
            Err(error) => {
                for folder in missing[..made].iter().rev() {
                    // Best effort, as on drop.
                    let _ = fs::remove_dir(folder);
                }
                return Err(CheckpointError::io("create folder", folder, error));
            }
        }
    }
    Ok(missing)
}

fn is_nonempty_folder(path: &Path) -> Result<bool> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_some()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            Err(CheckpointError::NotAFolder {
                path: path.to_path_buf(),
            })
        }
        Err(error) => Err(CheckpointError::io("open folder", path, error)),
    }
}

fn check_replaceable(target: &Path, existing: Existing) -> Result<()> {
    if !is_nonempty_folder(target)? {
        return check_not_mount_point(target);
    }
    if existing == Existing::Refuse {
        return Err(CheckpointError::OutputExists {
            path: target.to_path_buf(),
        });
    }
    let mut looks_like_checkpoint = false;
    for entry in fs::read_dir(target).context("open folder", target)? {
        let name = entry.context("read folder", target)?.file_name();
        let name = name.to_string_lossy();
        looks_like_checkpoint |=
            name == "config.json" || name == "index.json" || name.ends_with(".safetensors");
    }
    if !looks_like_checkpoint {
        return Err(CheckpointError::NotReplaceable {
            path: target.to_path_buf(),
        });
    }
    check_not_mount_point(target)
}

/// A rename cannot replace the root of a mounted file system; said before the work rather than after it.
fn check_not_mount_point(target: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;

        if let (Ok(folder), Some(Ok(parent))) =
            (fs::metadata(target), target.parent().map(fs::metadata))
            && folder.dev() != parent.dev()
        {
            let mut problems = Problems::new();
            problems.push(format!(
                "{} is a mount point; choose a folder inside it",
                target.display()
            ));
            return Err(CheckpointError::BadLayout { problems });
        }
    }
    Ok(())
}

/// Exchanges two folders in one step; `false` where the system has no such step.
fn exchange(a: &Path, b: &Path) -> io::Result<bool> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags};
        use rustix::io::Errno;

        match rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(true),
            Err(Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (a, b);
        Ok(false)
    }
}

/// Who writes: process id, machine, and a number of its own, so that leftovers can be told from work in progress.
pub(super) fn writer_mark() -> String {
    format!(
        "{}-{:08x}{:08x}",
        std::process::id(),
        machine_mark(),
        random_u32()
    )
}

fn random_u32() -> u32 {
    // Every `RandomState` has keys of its own.
    RandomState::new().build_hasher().finish() as u32
}

/// A number for the space in which process ids are unique: the machine's name and, within containers, the id space.
fn machine_mark() -> u32 {
    #[cfg(unix)]
    let node = rustix::system::uname().nodename().to_bytes().to_vec();
    #[cfg(not(unix))]
    let node = std::env::var_os("COMPUTERNAME")
        .map(|name| name.to_string_lossy().into_owned().into_bytes());
    #[cfg(not(unix))]
    let node = node.unwrap_or_default();
    let id_space = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    // FNV-1a: the same number in every process of this machine, which the standard hasher does not promise.
    let bytes = node
        .iter()
        .copied()
        .chain(id_space.to_string_lossy().into_owned().into_bytes());
    bytes.fold(0x811c_9dc5, |hash: u32, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

/// The target's name, the process and the machine from the name of a temporary folder of ours.
fn parse_leftover(name: &str) -> Option<(&str, u32, u32)> {
    let name = name.strip_prefix('.')?;
    let (target, mark) = name
        .rsplit_once(PARTIAL)
        .or_else(|| name.rsplit_once(REMOVED))?;
    let (pid, rest) = mark.split_once('-')?;
    let digits = |text: &str| {
        text.bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    if rest.len() != 16 || !digits(rest) {
        return None;
    }
    Some((
        target,
        pid.parse().ok()?,
        u32::from_str_radix(&rest[..8], 16).ok()?,
    ))
}

/// Removes the temporary folders and files in `parent` that belong to targets for which `wanted` holds and whose
/// writers are gone: dead, or unknown and without a change for a day.
pub(super) fn remove_leftovers(parent: &Path, wanted: impl Fn(&str) -> bool) -> Result<()> {
    for entry in fs::read_dir(parent).context("open folder", parent)? {
        let entry = entry.context("read folder", parent)?;
        let name = entry.file_name();
        let Some((target, pid, machine)) = name.to_str().and_then(parse_leftover) else {
            continue;
        };
        if !wanted(target) {
            continue;
        }
        let dead = machine == machine_mark() && !is_alive(pid);
        let path = entry.path();
        if !dead && !is_abandoned(&path) {
            continue;
        }
        let removed = if path.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        match removed {
            Ok(()) => {}
            // Another writer had the same thought.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(CheckpointError::io(
                    "remove the leftover of an earlier write",
                    path,
                    error,
                ));
            }
        }
    }
    Ok(())
}

fn is_alive(pid: u32) -> bool {
    #[cfg(unix)]
    {
        let pid = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        // "Not permitted" means that there is such a process, of another user.
        pid.is_some_and(|pid| {
            rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH)
        })
    }
    #[cfg(not(unix))]
    {
        let _ = pid;
        true
    }
}

/// Whether neither the folder nor anything in it has changed for a day. What cannot be read counts as in use.
fn is_abandoned(path: &Path) -> bool {
    fn newest(path: &Path) -> io::Result<SystemTime> {
        let metadata = fs::symlink_metadata(path)?;
        let mut time = metadata.modified()?;
        if metadata.is_dir() {
            for entry in fs::read_dir(path)? {
                time = time.max(newest(&entry?.path())?);
            }
        }
        Ok(time)
    }
    newest(path).is_ok_and(|time| time.elapsed().is_ok_and(|age| age > ABANDONED_AFTER))
}

/// Renames `dir` out of the way first, so that being killed half-way leaves no half-empty folder under its name.
pub(super) fn remove_folder(dir: &Path) -> Result<()> {
    let (parent, name) = parent_and_name(dir)?;
    let doomed = parent.join(format!(".{name}{REMOVED}{}", writer_mark()));
    fs::rename(dir, &doomed).context("remove", dir)?;
    fs::remove_dir_all(&doomed).context("remove", &doomed)
}

/// Writes a small file so that it is either the old one or the new one, never a part.
pub(super) fn replace_file(path: &Path, bytes: &[u8], durability: Durability) -> Result<()> {
    let (parent, name) = parent_and_name(path)?;
    let partial = parent.join(format!(".{name}{PARTIAL}{}", writer_mark()));
    let written = write_file(&partial, bytes, durability)
        .and_then(|()| fs::rename(&partial, path).context("write", path));
    if written.is_err() {
        // Best effort: the error is on its way already.
        let _ = fs::remove_file(&partial);
    }
    written?;
    if durability == Durability::Synced {
        sync_dir(parent)?;
    }
    Ok(())
}

pub(super) fn write_file(path: &Path, bytes: &[u8], durability: Durability) -> Result<()> {
    let file = File::create_new(path)
        .map_err(|error| CheckpointError::write(path, bytes.len() as u64, error))?;
    super::copy::write_all_at(&file, 0, bytes)
        .map_err(|error| CheckpointError::write(path, bytes.len() as u64, error))?;
    if durability == Durability::Synced {
        file.sync_all().context("synchronise", path)?;
    }
    Ok(())
}

fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).context("open folder", dir)? {
        let path = entry.context("read folder", dir)?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            // Opened for reading: that serves to synchronise, and works for files copied without write permission.
            File::open(&path)
                .and_then(|file| file.sync_all())
                .context("synchronise", &path)?;
        }
    }
    sync_dir(dir)
}

pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .context("synchronise folder", dir)?;
    #[cfg(not(unix))]
    let _ = dir;
    Ok(())
}

#[cfg(test)]
#[path = "staging_tests.rs"]
mod tests;
