//! Telling a folder from a hub id.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What a user calls a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder on this machine.
    Folder(PathBuf),
    /// A repository on the hub.
    Repository(RepoId),
}

/// `org/name` at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoId {
    /// `org/name`.
    pub name: String,
    /// Branch, tag or commit hash; `main` unless given.
    pub revision: String,
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.revision)
    }
}

impl Source {
    /// Reads a source. A folder that exists wins over a repository of the same spelling.
    ///
    /// # Errors
    /// A path to nothing or to a file, and text that is no hub id.
    pub fn parse(text: &str) -> Result<Self> {
        let path = Path::new(text);
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        if path.exists() {
            return Err(Error::NotAFolder(path.to_owned()));
        }
        let is_path = text.is_empty()
            || text.starts_with(['/', '.', '~'])
            || text.ends_with('/')
            || text.contains('\\');
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        if is_path || name.matches('/').count() != 1 {
            return Err(Error::FolderMissing(text.to_owned()));
        }
        RepoId::new(name, revision)
            .map(Self::Repository)
            .map_err(|reason| Error::BadId {
                source_text: text.to_owned(),
                reason,
            })
    }
}

impl RepoId {
    /// Checks both parts against what the hub allows, so that they are safe in addresses and paths.
    fn new(name: &str, revision: &str) -> Result<Self, String> {
        for part in name.split('/') {
            let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if part.is_empty() || part.len() > 96 {
                return Err(format!(
                    "`{part}` has {} characters, expected 1 to 96",
                    part.len()
                ));
            }
            if let Some(c) = part.chars().find(|c| !legal(*c)) {
                return Err(format!(
                    "`{part}` contains {c:?}; letters, digits, `-`, `_` and `.` are allowed"
                ));
            }
            if part.starts_with(['-', '.'])
                || part.ends_with(['-', '.'])
                || part.contains("..")
                || part.contains("--")
            {
                return Err(format!(
                    "`{part}` starts or ends with `-` or `.`, or contains `--` or `..`"
                ));
            }
        }
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | '/');
        let sound = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains("..");
        if revision.len() > 200 || !revision.chars().all(legal) || !revision.split('/').all(sound) {
            return Err(format!(
                "`{revision}` is no revision; give a branch, a tag or a commit hash"
            ));
        }
        Ok(Self {
            name: name.to_owned(),
            revision: revision.to_owned(),
        })
    }

    /// Whether the revision is a full commit hash.
    pub(crate) fn is_commit(&self) -> bool {
        self.revision.len() == 40 && self.revision.bytes().all(|b| b.is_ascii_hexdigit())
    }

    /// This repository as the `hf-hub` crate describes it.
    pub(crate) fn layout(&self) -> hf_hub::Repo {
        hf_hub::Repo::with_revision(
            self.name.clone(),
            hf_hub::RepoType::Model,
            self.revision.clone(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn repository(text: &str) -> (String, String) {
        match Source::parse(text) {
            Ok(Source::Repository(repo)) => (repo.name, repo.revision),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[track_caller]
    fn refused(text: &str, words: &str) {
        let error = Source::parse(text).expect_err(text).to_string();
        assert!(error.contains(words), "{text}: {error}");
    }

    #[test]
    fn ids_with_and_without_revision_are_read() {
        assert_eq!(
            repository("meta-llama/Llama-3.2-1B"),
            ("meta-llama/Llama-3.2-1B".into(), "main".into())
        );
        assert_eq!(
            repository("org/name@v1.0"),
            ("org/name".into(), "v1.0".into())
        );
        assert_eq!(
            repository("org/name@refs/pr/3"),
            ("org/name".into(), "refs/pr/3".into())
        );
    }

    #[test]
    fn paths_to_nothing_are_not_taken_for_repositories() {
        for text in [
            "/nowhere/at/all",
            "./org/name",
            "../org/name",
            "~/models",
            "one/two/three",
            "plain",
            "",
            "org/name/",
        ] {
            refused(text, "there is no folder");
        }
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        refused(file.path().to_str().expect("utf-8"), "is a file");
    }

    #[test]
    fn unsafe_ids_are_refused() {
        refused("org/na me", "contains ' '");
        refused("org/..name", "`..`");
        refused("org/name@../../etc", "no revision");
        refused("org/name@", "no revision");
        refused("org/name@a b", "no revision");
        refused("org/na--me", "`--`");
    }
}
