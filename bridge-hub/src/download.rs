//! Fetching files into the cache: resumable, checked against the listed digest, published by rename.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::thread;

use sha1::Sha1;
use sha2::{Digest as _, Sha256};
use ureq::Body;
use ureq::http::Response;

use crate::cache::RepoCache;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::listing::{Digest, Listing, RemoteFile};
use crate::options::{Event, HubOptions};
use crate::select::{self, INDEX};
use crate::source::RepoId;

/// Bytes moved at a time.
const CHUNK: usize = 256 << 10;

/// Fetches everything a conversion can use and returns the snapshot folder.
pub(crate) fn fetch_all(
    client: &Client,
    cache: &RepoCache,
    repo: &RepoId,
    listing: &Listing,
    options: &HubOptions,
) -> Result<PathBuf> {
    let transfer = Transfer {
        client,
        cache,
        repo,
        commit: &listing.commit,
        options,
    };
    let small = select::small_files(listing);
    if !small.iter().any(|f| f.name == "config.json") {
        return Err(Error::FileMissing {
            repo: repo.to_string(),
            file: "config.json".into(),
            needed_by: "every Hugging Face model has".into(),
        });
    }
    // The index comes first: it tells which shards there must be, so that a repository that lacks one is refused before
    // gigabytes of the others have been fetched.
    let index = match small.iter().find(|f| f.name == INDEX) {
        Some(file) => {
            let path = transfer.file(file)?;
            Some(fs::read(&path).map_err(Error::io("read", &path))?)
        }
        None => None,
    };
    let weights = select::weight_files(repo, listing, index.as_deref())?;
    let files: Vec<&RemoteFile> = small.into_iter().chain(weights).collect();
    options.report(Event::Plan {
        files: files.len(),
        bytes: files.iter().map(|f| f.size).sum(),
    });
    for file in files {
        transfer.file(file)?;
    }
    cache.record_revision(&listing.commit)?;
    Ok(cache.snapshot(&listing.commit))
}

struct Transfer<'a> {
    client: &'a Client<'a>,
    cache: &'a RepoCache,
    repo: &'a RepoId,
    commit: &'a str,
    options: &'a HubOptions,
}

impl Transfer<'_> {
    /// Brings one file into the snapshot and returns its path there.
    fn file(&self, file: &RemoteFile) -> Result<PathBuf> {
        let blob = self.cache.blob(&file.digest);
        let present = || fs::metadata(&blob).is_ok_and(|m| m.len() == file.size);
        let cached = present() || {
            let _lock = self.cache.lock(&file.digest)?;
            // Another process may have fetched it while this one waited.
            present() || {
                self.fetch(file, &blob)?;
                false
            }
        };
        self.cache.link(self.commit, &file.name, &file.digest)?;
        self.options.report(Event::Done {
            file: file.name.clone(),
            cached,
        });
        Ok(self.cache.snapshot(self.commit).join(&file.name))
    }

    /// Continues or starts the download, checks the digest, and gives the blob its name.
    fn fetch(&self, file: &RemoteFile, blob: &Path) -> Result<()> {
        let path = self.cache.incomplete(&file.digest);
        let mut part = Part::open(&path, file)?;
        let resumed = part.len > 0;
        self.complete(file, &mut part)?;
        if let Err(error) = part.check() {
            if !resumed {
                return Err(error);
            }
            // The bytes left by an earlier attempt may be the wrong ones; a fresh start tells.
            self.options.report(Event::Notice(format!(
                "{error}; fetching it again from the start"
            )));
            part = Part::open(&path, file)?;
            self.complete(file, &mut part)?;
            part.check()?;
        }
        part.file.sync_all().map_err(Error::io("write", &path))?;
        fs::rename(&path, blob).map_err(Error::io("publish the download as", blob))
    }

    /// Asks for the missing rest until the file has its size. Attempts count only while no new byte arrives.
    fn complete(&self, file: &RemoteFile, part: &mut Part) -> Result<()> {
        let mut failures = 0;
        let mut wait = self.options.retry_wait;
        self.progress(file, part.len);
        while part.len < file.size {
            let before = part.len;
            let reason = match self.attempt(file, part) {
                Ok(()) => continue,
                Err(Error::Broken { reason, .. }) | Err(Error::Unreachable { reason, .. }) => {
                    reason
                }
                Err(Error::Status {
                    url,
                    status,
                    message,
                }) if status >= 500 || status == 429 => Error::Status {
                    url,
                    status,
                    message,
                }
                .to_string(),
                Err(error) => return Err(error),
            };
            if part.len > before {
                (failures, wait) = (0, self.options.retry_wait);
            }
            failures += 1;
            if failures >= self.options.attempts {
                return Err(Error::Broken {
                    file: file.name.clone(),
                    received: part.len,
                    size: file.size,
                    attempts: failures,
                    reason,
                });
            }
            thread::sleep(wait);
            wait *= 2;
        }
        Ok(())
    }

    fn attempt(&self, file: &RemoteFile, part: &mut Part) -> Result<()> {
        let reply = self.client.file(self.repo, self.commit, file, part.len)?;
        let broken = |part: &Part, reason: String| Error::Broken {
            file: file.name.clone(),
            received: part.len,
            size: file.size,
            attempts: 1,
            reason,
        };
        match reply.status().as_u16() {
            206 => check_range(&reply, part.len, file)?,
            // The server does not do ranges, or finds nothing where the part ends: start over.
            200 | 416 if part.len > 0 => {
                part.restart()?;
                if reply.status() == 416 {
                    return Ok(());
                }
            }
            200 => {}
            status => {
                return Err(Error::Status {
                    url: file.name.clone(),
                    status,
                    message: "no such range".into(),
                });
            }
        }
        let mut body = reply
            .into_body()
            .into_with_config()
            .limit(u64::MAX)
            .reader();
        let mut chunk = vec![0; CHUNK];
        loop {
            let n = body
                .read(&mut chunk)
                .map_err(|e| broken(part, e.to_string()))?;
            if n == 0 {
                break;
            }
            if part.len + n as u64 > file.size {
                return Err(Error::Size {
                    file: file.name.clone(),
                    expected: file.size,
                    found: part.len + n as u64,
                });
            }
            part.append(&chunk[..n])?;
            self.progress(file, part.len);
        }
        if part.len < file.size {
            return Err(broken(part, "the connection closed early".into()));
        }
        Ok(())
    }

    fn progress(&self, file: &RemoteFile, done: u64) {
        self.options.report(Event::Progress {
            file: file.name.clone(),
            done,
            total: file.size,
        });
    }
}

/// A 206 reply must continue exactly where the part ends, in a file of the listed size.
fn check_range(reply: &Response<Body>, start: u64, file: &RemoteFile) -> Result<()> {
    let header = reply
        .headers()
        .get("content-range")
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default();
    let parsed = header.strip_prefix("bytes ").and_then(|rest| {
        let (range, total) = rest.split_once('/')?;
        let (first, _) = range.split_once('-')?;
        Some((first.parse::<u64>().ok()?, total.parse::<u64>().ok()))
    });
    match parsed {
        Some((first, total)) if first == start && total.is_none_or(|t| t == file.size) => Ok(()),
        Some((first, Some(total))) if first == start => Err(Error::Size {
            file: file.name.clone(),
            expected: file.size,
            found: total,
        }),
        _ => Err(Error::BadReply {
            url: file.name.clone(),
            reason: format!("asked for bytes from {start} on, got content-range {header:?}"),
        }),
    }
}

/// The running digest of a part.
enum Hasher {
    Sha256(Sha256),
    GitSha1(Sha1),
}

impl Hasher {
    fn new(file: &RemoteFile) -> Self {
        match file.digest {
            Digest::Sha256(_) => Self::Sha256(Sha256::new()),
            Digest::GitSha1(_) => {
                Self::GitSha1(Sha1::new_with_prefix(format!("blob {}\0", file.size)))
            }
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(h) => h.update(bytes),
            Self::GitSha1(h) => h.update(bytes),
        }
    }

    fn hex(self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect();
        match self {
            Self::Sha256(h) => hex(&h.finalize()),
            Self::GitSha1(h) => hex(&h.finalize()),
        }
    }
}

/// A download under way: what is on disk and the digest of it.
struct Part {
    path: PathBuf,
    file: File,
    len: u64,
    hasher: Hasher,
    remote: RemoteFile,
}

impl Part {
    /// Opens what an earlier attempt left, and hashes it.
    fn open(path: &Path, remote: &RemoteFile) -> Result<Self> {
        let file = File::options()
            .create(true)
            .read(true)
            .append(true)
            .open(path)
            .map_err(Error::io("open", path))?;
        let mut part = Self {
            path: path.to_owned(),
            file,
            len: 0,
            hasher: Hasher::new(remote),
            remote: remote.clone(),
        };
        let mut chunk = vec![0; CHUNK];
        loop {
            let n = part
                .file
                .read(&mut chunk)
                .map_err(Error::io("read", path))?;
            if n == 0 {
                break;
            }
            part.hasher.update(&chunk[..n]);
            part.len += n as u64;
        }
        if part.len > remote.size {
            part.restart()?;
        }
        Ok(part)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .map_err(Error::io("write", &self.path))?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        self.file
            .set_len(0)
            .map_err(Error::io("truncate", &self.path))?;
        self.hasher = Hasher::new(&self.remote);
        self.len = 0;
        Ok(())
    }

    /// Compares the digest; a part that fails is deleted.
    fn check(&mut self) -> Result<()> {
        let remote = &self.remote;
        let found = std::mem::replace(&mut self.hasher, Hasher::new(remote)).hex();
        if found == remote.digest.hex() {
            return Ok(());
        }
        fs::remove_file(&self.path).map_err(Error::io("delete the damaged", &self.path))?;
        Err(Error::Digest {
            file: remote.name.clone(),
            algorithm: remote.digest.algorithm(),
            expected: remote.digest.hex().to_owned(),
            found,
        })
    }
}
