//! Turns what a user calls a model into a folder on this machine.
//!
//! A source is either a folder, which stays what it is, or a hub id such as `meta-llama/Llama-3.2-1B@main`. A hub id is
//! fetched into the cache that the Python tools use (`models--org--name/{blobs,refs,snapshots}`), so a model that one of
//! them has fetched is not fetched again, and the other way round. Layout and addresses come from the `hf-hub` crate; the
//! transfer is this crate's own, because it resumes a broken download, checks every byte it keeps against the digest that
//! the hub lists, and says in words what went wrong.
//!
//! Only the files that a conversion can use are fetched: configs, tokenizers, chat templates and safetensors. Pickled
//! weights never are.
//!
//! ```
//! use bridge_hub::{HubOptions, resolve};
//!
//! let options = HubOptions::from_vars(|_| None)?;
//! // A folder needs no network.
//! let here = resolve(".", &options)?;
//! assert!(here.is_dir());
//! // A misspelt folder is told apart from a repository.
//! assert!(resolve("./no-such-folder", &options).is_err());
//! # Ok::<(), bridge_hub::Error>(())
//! ```

mod cache;
mod client;
mod download;
mod error;
mod listing;
mod options;
mod select;
mod source;

use std::path::PathBuf;

pub use error::{Error, Result};
pub use options::{Event, HubOptions, ProgressFn};
pub use source::{RepoId, Source};

use cache::RepoCache;
use client::Client;

/// The folder that `source` names, fetched from the hub first where it is a hub id.
///
/// # Errors
/// A folder that is not there, an id that is not one, and everything that [`fetch`] reports.
pub fn resolve(source: &str, options: &HubOptions) -> Result<PathBuf> {
    match Source::parse(source)? {
        Source::Folder(path) => Ok(path),
        Source::Repository(repo) => fetch(&repo, options),
    }
}

/// Fetches what is missing of a repository and returns its snapshot folder in the cache.
///
/// With [`HubOptions::offline`], or when the hub cannot be reached, a complete snapshot in the cache is used as it is.
///
/// # Errors
/// Repository, revision or file not found; a gated repository; a hub that cannot be reached; a name in the hub's reply
/// that would leave the cache; a size or digest that does not match; a cache that cannot be written.
pub fn fetch(repo: &RepoId, options: &HubOptions) -> Result<PathBuf> {
    let cache = RepoCache::new(options, repo);
    if options.offline {
        return cache.complete_snapshot().map_err(|missing| Error::Offline {
            repo: repo.to_string(),
            missing,
            cache: options.cache_dir.clone(),
        });
    }
    let client = Client::new(options)?;
    let listing = match client.listing(repo) {
        Ok(listing) => listing,
        Err(error @ Error::Unreachable { .. }) => {
            let Ok(snapshot) = cache.complete_snapshot() else {
                return Err(error);
            };
            options.report(Event::Notice(format!(
                "{error}; using the copy in {}",
                snapshot.display()
            )));
            return Ok(snapshot);
        }
        Err(error) => return Err(error),
    };
    download::fetch_all(&client, &cache, repo, &listing, options)
}
