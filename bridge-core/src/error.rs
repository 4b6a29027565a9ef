//! The one error type of this crate: facts with fields, and whether the fault lies in what was given or in the run.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::checkpoint::CheckpointError;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// How many findings of one kind an error message lists before it only counts them.
pub const MAX_LISTED_PROBLEMS: usize = 20;

/// Findings of one kind, reported together; the text lists the first [`MAX_LISTED_PROBLEMS`] and counts the rest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems {
    listed: Vec<String>,
    total: usize,
}

impl Problems {
    /// No findings yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a finding. Texts beyond the listed number are counted and dropped, so a hostile file cannot make this grow.
    pub fn push(&mut self, problem: impl Into<String>) {
        self.total += 1;
        if self.listed.len() < MAX_LISTED_PROBLEMS {
            self.listed.push(problem.into());
        }
    }

    /// Adds every finding of `other`, each with `prefix` before it.
    pub fn extend(&mut self, prefix: &str, other: Problems) {
        let unlisted = other.total - other.listed.len();
        for problem in other.listed {
            self.push(format!("{prefix}{problem}"));
        }
        self.total += unlisted;
    }

    /// How many findings there are, listed or not.
    pub fn len(&self) -> usize {
        self.total
    }

    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// The findings that are listed, at most [`MAX_LISTED_PROBLEMS`].
    pub fn listed(&self) -> &[String] {
        &self.listed
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let ([only], 1) = (self.listed.as_slice(), self.total) {
            return f.write_str(only);
        }
        write!(f, "{} problems", self.total)?;
        for problem in &self.listed {
            write!(f, "\n  - {problem}")?;
        }
        match self.total - self.listed.len() {
            0 => Ok(()),
            more => write!(f, "\n  - and {more} more"),
        }
    }
}

/// What can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read or write a file or folder.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb phrase: "read", "create folder".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },

    /// A file does not follow its format: a header, an offset, an index.
    #[error("{file}: {problem}")]
    Malformed {
        /// The file, and the place in it where known.
        file: String,
        /// What was found, what was expected, what to do.
        problem: String,
    },

    /// Checkpoint files cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),

    /// A model's config file lacks keys or holds wrong ones.
    #[error("{file}: {problems}")]
    Config {
        /// The config file.
        file: String,
        /// Every finding.
        problems: Problems,
    },

    /// No registered bridge handles the architecture that a config names.
    #[error("{file}: {found}; supported architectures: {supported}{}", nearest_hint(.nearest.as_deref()))]
    UnknownArchitecture {
        /// The config file.
        file: String,
        /// What the config says, in words.
        found: String,
        /// The supported names, comma separated.
        supported: String,
        /// The supported name that is spelt most like the one found.
        nearest: Option<String>,
    },

    /// A parallel layout cannot hold the model.
    #[error("layout {layout}: {problems}")]
    Layout {
        /// The layout, as its flags.
        layout: String,
        /// Every finding.
        problems: Problems,
    },

    /// The checkpoint's tensors and the model's tensors do not fit together. Raised before a weight byte is read.
    #[error("{what}: {problems}")]
    Plan {
        /// Which conversion of which model.
        what: String,
        /// Every finding.
        problems: Problems,
    },

    /// A request that makes no sense, whatever the files hold.
    #[error("{0}")]
    InvalidArgument(String),

    /// Two stored copies of one tied weight differ, so that writing one of them would lose the other.
    #[error("{0}")]
    TiedWeightsDiffer(String),

    /// The caller's progress callback asked to stop.
    #[error("stopped on request; nothing was left behind")]
    Cancelled,
}

fn nearest_hint(nearest: Option<&str>) -> String {
    nearest
        .map(|name| format!("; did you mean {name}?"))
        .unwrap_or_default()
}

impl Error {
    /// An [`Error::Io`] for `path`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Error::Io {
            action,
            path: path.into(),
            source,
        }
    }

    /// An [`Error::Malformed`].
    pub fn malformed(file: impl Into<String>, problem: impl Into<String>) -> Self {
        Error::Malformed {
            file: file.into(),
            problem: problem.into(),
        }
    }

    /// Whether the fault lies in what was given (exit code 2) rather than in the run (exit code 3).
    ///
    /// A missing or unreadable file counts as input; a full disk or a failing device does not.
    pub fn is_input(&self) -> bool {
        match self {
            Error::Io { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::NotADirectory
                    | io::ErrorKind::IsADirectory
                    | io::ErrorKind::InvalidInput
                    | io::ErrorKind::InvalidFilename
                    | io::ErrorKind::ReadOnlyFilesystem
            ),
            Error::Checkpoint(error) => error.is_input(),
            Error::Cancelled => false,
            _ => true,
        }
    }
}
