//! One repository's place in the cache that is shared with the Python tools:
//!
//! ```text
//! <cache>/models--org--name/refs/main                      commit hash that the branch had when last asked
//! <cache>/models--org--name/snapshots/<commit>/config.json symbolic link into blobs/
//! <cache>/models--org--name/blobs/<digest>                 content, stored once
//! <cache>/models--org--name/blobs/<digest>.incomplete      a download that can be resumed
//! <cache>/.locks/models--org--name/<digest>.lock           held while that blob is written
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::listing::{Digest, check_name};
use crate::options::HubOptions;
use crate::select::{INDEX, SINGLE, shards};
use crate::source::RepoId;

pub(crate) struct RepoCache {
    entry: hf_hub::CacheRepo,
    locks: PathBuf,
    repo: RepoId,
}

impl RepoCache {
    pub(crate) fn new(options: &HubOptions, repo: &RepoId) -> Self {
        let layout = repo.layout();
        let locks = options.cache_dir.join(".locks").join(layout.folder_name());
        Self {
            entry: hf_hub::Cache::new(options.cache_dir.clone()).repo(layout),
            locks,
            repo: repo.clone(),
        }
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.entry.blob_path(digest.hex())
    }

    pub(crate) fn incomplete(&self, digest: &Digest) -> PathBuf {
        self.entry
            .blob_path(&format!("{}.incomplete", digest.hex()))
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.entry.pointer_path(commit)
    }

    /// Makes the blob folder, and waits for whoever else writes this blob. The lock ends with the returned file.
    pub(crate) fn lock(&self, digest: &Digest) -> Result<File> {
        let blobs = self.blob(digest);
        for folder in [blobs.parent().unwrap_or(&self.locks), &self.locks] {
            fs::create_dir_all(folder).map_err(Error::io("create the cache folder", folder))?;
        }
        let path = self.locks.join(format!("{}.lock", digest.hex()));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(Error::io("open the lock", &path))?;
        file.lock().map_err(Error::io("take the lock", &path))?;
        Ok(file)
    }

    /// Makes `name` in the snapshot of `commit` point to the blob.
    pub(crate) fn link(&self, commit: &str, name: &str, digest: &Digest) -> Result<()> {
        let pointer = self.snapshot(commit).join(name);
        let blob = self.blob(digest);
        if let (Ok(old), Ok(new)) = (fs::canonicalize(&pointer), fs::canonicalize(&blob))
            && old == new
        {
            return Ok(());
        }
        if let Some(folder) = pointer.parent() {
            fs::create_dir_all(folder).map_err(Error::io("create the snapshot folder", folder))?;
        }
        // A link to nothing, or a stale one, gives way.
        if pointer.symlink_metadata().is_ok() {
            fs::remove_file(&pointer).map_err(Error::io("replace the link", &pointer))?;
        }
        // From snapshots/<commit>/ two levels up, plus one for each folder in the name.
        let up = "../".repeat(2 + name.matches('/').count());
        place(
            Path::new(&format!("{up}blobs/{}", digest.hex())),
            &blob,
            &pointer,
        )
    }

    /// Records which commit the revision stands for. Written last, so that it never names an incomplete snapshot.
    pub(crate) fn record_revision(&self, commit: &str) -> Result<()> {
        if self.repo.is_commit() {
            return Ok(());
        }
        self.entry.create_ref(commit).map_err(Error::io(
            "record the revision in",
            self.root().join("refs"),
        ))
    }

    /// The snapshot of the revision, if the cache holds the config and every weight file of it; else what is missing.
    pub(crate) fn complete_snapshot(&self) -> Result<PathBuf, String> {
        let commit = if self.repo.is_commit() {
            self.repo.revision.clone()
        } else {
            let path = self.root().join("refs").join(&self.repo.revision);
            fs::read_to_string(&path)
                .map_err(|_| format!("revision `{}` was never fetched", self.repo.revision))?
                .trim()
                .to_owned()
        };
        check_name(&commit).map_err(|reason| format!("the recorded commit {reason}"))?;
        let snapshot = self.snapshot(&commit);
        let mut needed = vec!["config.json".to_owned()];
        match fs::read(snapshot.join(INDEX)) {
            Ok(index) => {
                for name in shards(&index).map_err(|reason| format!("{INDEX}: {reason}"))? {
                    check_name(&name)
                        .map_err(|reason| format!("{INDEX} names {name:?}, which {reason}"))?;
                    needed.push(name);
                }
            }
            Err(_) => needed.push(SINGLE.to_owned()),
        }
        match needed.iter().find(|name| !snapshot.join(name).is_file()) {
            Some(name) => Err(format!("{name} is missing")),
            None => Ok(snapshot),
        }
    }

    fn root(&self) -> PathBuf {
        // `pointer_path` is <root>/snapshots/<commit>.
        let mut root = self.entry.pointer_path("x");
        root.pop();
        root.pop();
        root
    }
}

#[cfg(unix)]
fn place(relative: &Path, _blob: &Path, pointer: &Path) -> Result<()> {
    std::os::unix::fs::symlink(relative, pointer).map_err(Error::io("create the link", pointer))
}

/// Symbolic links need a privilege on other systems; a second name for the same file does not.
#[cfg(not(unix))]
fn place(_relative: &Path, blob: &Path, pointer: &Path) -> Result<()> {
    fs::hard_link(blob, pointer).map_err(Error::io("create the link", pointer))
}
