//! What can go wrong between a hub id and a folder.

use std::path::PathBuf;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a source could not be turned into a folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The source looks like a path, and nothing is there.
    #[error(
        "there is no folder `{0}`; give the path of a Hugging Face folder, or a hub id such as org/name[@revision]"
    )]
    FolderMissing(String),
    /// The source names a file.
    #[error("`{0}` is a file; give the folder that holds config.json and the safetensors files")]
    NotAFolder(PathBuf),
    /// The source is neither a path nor a hub id.
    #[error(
        "`{source_text}` is neither a folder here nor a hub id: {reason}; a hub id is org/name[@revision]"
    )]
    BadId {
        /// What was given.
        source_text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An environment variable holds something unusable.
    #[error("{variable}={value:?}: {reason}")]
    BadSetting {
        /// Name of the variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The hub does not know the repository, or hides it from this user.
    #[error(
        "no repository `{repo}` on {endpoint}, nor a folder of that name here; check the spelling; \
         if it is private, set HF_TOKEN to a token that may read it{}",
        if *.has_token { " (the token in use may not)" } else { "" }
    )]
    RepoNotFound {
        /// The id asked for.
        repo: String,
        /// The hub asked.
        endpoint: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// The repository has no such branch, tag or commit.
    #[error(
        "repository `{repo}` on {endpoint} has no revision `{revision}`; give a branch, a tag or a commit hash"
    )]
    RevisionNotFound {
        /// The repository.
        repo: String,
        /// The revision asked for.
        revision: String,
        /// The hub asked.
        endpoint: String,
    },
    /// A file that the model needs is not in the repository.
    #[error(
        "repository `{repo}` has no file `{file}`, which {needed_by}; the repository is incomplete, try another revision"
    )]
    FileMissing {
        /// The repository with its revision.
        repo: String,
        /// The missing file.
        file: String,
        /// Who needs it, as a verb phrase.
        needed_by: String,
    },
    /// The repository holds no safetensors weights.
    #[error(
        "repository `{repo}` has no safetensors weights{}; use a revision or a repository that has them",
        if .others.is_empty() { String::new() } else { format!(" (found {}, which are not read)", .others.join(", ")) }
    )]
    NoWeights {
        /// The repository with its revision.
        repo: String,
        /// Weight files in other formats.
        others: Vec<String>,
    },
    /// The repository wants its licence accepted first.
    #[error(
        "repository `{repo}` is gated: accept its licence at {page}, then {}",
        if *.has_token { "make sure that HF_TOKEN belongs to the account that did" } else { "set HF_TOKEN to a token of the account that did" }
    )]
    Gated {
        /// The repository.
        repo: String,
        /// Where the licence is accepted.
        page: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// The hub could not be reached.
    #[error(
        "cannot reach {endpoint}: {reason}; check the network, HF_ENDPOINT and proxy settings, or set HF_HUB_OFFLINE=1 to use only what is cached"
    )]
    Unreachable {
        /// The hub asked.
        endpoint: String,
        /// What the connection reported.
        reason: String,
    },
    /// Offline, and the cache does not hold the whole model.
    #[error("`{repo}` is not complete in {} ({missing}), and HF_HUB_OFFLINE forbids fetching it; unset it once to fetch", .cache.display())]
    Offline {
        /// The repository with its revision.
        repo: String,
        /// What is missing.
        missing: String,
        /// The cache searched.
        cache: PathBuf,
    },
    /// A name or hash in the hub's reply would lead outside the cache.
    #[error("the listing of `{repo}` names {name:?}, which {reason}; nothing was fetched")]
    HostileName {
        /// The repository.
        repo: String,
        /// The name as received.
        name: String,
        /// Why it is refused.
        reason: &'static str,
    },
    /// The hub answered with a status that has no better variant.
    #[error("{url} answered {status}{}", if .message.is_empty() { String::new() } else { format!(": {}", .message) })]
    Status {
        /// Address asked.
        url: String,
        /// HTTP status.
        status: u16,
        /// The hub's own words, if any.
        message: String,
    },
    /// The reply was not what the hub's interface promises.
    #[error("unexpected reply from {url}: {reason}")]
    BadReply {
        /// Address asked.
        url: String,
        /// What was unexpected.
        reason: String,
    },
    /// A transfer kept breaking.
    #[error(
        "fetching {file} broke off at byte {received} of {size} in {attempts} attempts ({reason}); run the command again to resume"
    )]
    Broken {
        /// The file in the repository.
        file: String,
        /// Bytes kept so far.
        received: u64,
        /// Bytes expected.
        size: u64,
        /// Attempts made without progress in between.
        attempts: u32,
        /// What the last attempt reported.
        reason: String,
    },
    /// A fetched file does not have the digest that the hub lists.
    #[error(
        "{file} was fetched with {algorithm} {found}, but the hub lists {expected}; the copy was deleted, run the command again"
    )]
    Digest {
        /// The file in the repository.
        file: String,
        /// `sha256` or `git sha1`.
        algorithm: &'static str,
        /// Digest listed.
        expected: String,
        /// Digest of the bytes received.
        found: String,
    },
    /// A fetched file does not have the size that the hub lists.
    #[error(
        "{file} has {found} bytes, but the hub lists {expected}; run the command again, and if it stays so the repository is damaged"
    )]
    Size {
        /// The file in the repository.
        file: String,
        /// Size listed.
        expected: u64,
        /// Size offered or received.
        found: u64,
    },
    /// The cache could not be read or written.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// Whether what the user gave is at fault, rather than the network, the hub or this machine.
    pub fn is_input(&self) -> bool {
        !matches!(
            self,
            Self::Unreachable { .. }
                | Self::Status { .. }
                | Self::BadReply { .. }
                | Self::Broken { .. }
                | Self::Digest { .. }
                | Self::Size { .. }
                | Self::Io { .. }
        )
    }

    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}
