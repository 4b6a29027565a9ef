//! The hub's description of a repository, checked before anything in it is used as a path.

use serde::Deserialize;

use crate::error::{Error, Result};

/// Files of a repository at one commit.
#[derive(Debug)]
pub(crate) struct Listing {
    /// Commit hash, checked to be one.
    pub(crate) commit: String,
    /// Every file, with checked names.
    pub(crate) files: Vec<RemoteFile>,
}

/// One file of the repository.
#[derive(Clone, Debug)]
pub(crate) struct RemoteFile {
    /// Path in the repository.
    pub(crate) name: String,
    /// Size in bytes.
    pub(crate) size: u64,
    /// Digest of the content, which is also its name among the cached blobs.
    pub(crate) digest: Digest,
}

/// How the hub identifies content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Digest {
    /// Large files: sha256 of the content.
    Sha256(String),
    /// Small files: sha1 of git's blob header and the content.
    GitSha1(String),
}

impl Digest {
    pub(crate) fn hex(&self) -> &str {
        let (Self::Sha256(hex) | Self::GitSha1(hex)) = self;
        hex
    }

    pub(crate) fn algorithm(&self) -> &'static str {
        match self {
            Self::Sha256(_) => "sha256",
            Self::GitSha1(_) => "git sha1",
        }
    }
}

#[derive(Deserialize)]
struct Reply {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

/// Parses and checks the reply of `/api/models/<repo>/revision/<revision>?blobs=true`.
pub(crate) fn parse(repo: &str, url: &str, body: &[u8]) -> Result<Listing> {
    let bad = |reason: String| Error::BadReply {
        url: url.to_owned(),
        reason,
    };
    let reply: Reply = serde_json::from_slice(body)
        .map_err(|e| bad(format!("the listing is not what was expected: {e}")))?;
    let hostile = |name: &str, reason| Error::HostileName {
        repo: repo.to_owned(),
        name: shortened(name),
        reason,
    };
    if !is_hex(&reply.sha, 40) {
        return Err(hostile(&reply.sha, "is not a commit hash"));
    }
    let mut files = Vec::with_capacity(reply.siblings.len());
    for file in reply.siblings {
        check_name(&file.rfilename).map_err(|reason| hostile(&file.rfilename, reason))?;
        let (digest, size) = match (file.lfs, file.blob_id, file.size) {
            (Some(lfs), _, _) if is_hex(&lfs.sha256, 64) => (Digest::Sha256(lfs.sha256), lfs.size),
            (None, Some(id), Some(size)) if is_hex(&id, 40) => (Digest::GitSha1(id), size),
            _ => {
                return Err(bad(format!(
                    "`{}` is listed without a valid digest and size",
                    file.rfilename
                )));
            }
        };
        files.push(RemoteFile {
            name: file.rfilename,
            size,
            digest,
        });
    }
    Ok(Listing {
        commit: reply.sha,
        files,
    })
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Refuses a name that is not a plain relative path below the repository's root.
pub(crate) fn check_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() {
        return Err("is empty");
    }
    if name.contains('\0') || name.contains('\\') || name.chars().any(char::is_control) {
        return Err("contains a NUL, a backslash or a control character");
    }
    if name.starts_with('/') {
        return Err("is an absolute path");
    }
    for part in name.split('/') {
        match part {
            "" | "." | ".." => return Err("would leave the folder it belongs in"),
            _ if part.len() > 255 => return Err("is longer than a file name may be"),
            _ => {}
        }
    }
    Ok(())
}

fn shortened(name: &str) -> String {
    match name.char_indices().nth(80) {
        Some((cut, _)) => format!("{}...", &name[..cut]),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(name: &str) -> Result<Listing> {
        let body = serde_json::json!({"sha": "0".repeat(40), "siblings": [{"rfilename": name, "size": 1, "blobId": "a".repeat(40)}]});
        parse("org/name", "http://hub", body.to_string().as_bytes())
    }

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for name in [
            "../x",
            "a/../../x",
            "/etc/passwd",
            "a//b",
            ".",
            "",
            "a\0b",
            "a\\b",
            "tab\there",
            &"long".repeat(80),
        ] {
            let error = listing(name).expect_err(name);
            assert!(
                matches!(error, Error::HostileName { .. }),
                "{name}: {error}"
            );
        }
        for name in [
            "config.json",
            "sub/folder/file.json",
            ".gitattributes",
            "..almost",
        ] {
            assert_eq!(listing(name).expect(name).files[0].name, name);
        }
    }

    #[test]
    fn a_listing_without_digests_or_with_a_false_commit_is_refused() {
        for body in [
            r#"{"sha": "../../x", "siblings": []}"#,
            r#"{"sha": "0000000000000000000000000000000000000000", "siblings": [{"rfilename": "config.json", "size": 3}]}"#,
            r#"{"sha": "0000000000000000000000000000000000000000", "siblings": [{"rfilename": "a", "size": 3, "blobId": "../../x"}]}"#,
            r#"{"siblings": []}"#,
            "not json",
        ] {
            parse("org/name", "http://hub", body.as_bytes()).expect_err(body);
        }
    }
}
