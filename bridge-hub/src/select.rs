//! Which files of a repository a conversion can use.

use std::collections::BTreeSet;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::listing::{Listing, RemoteFile, check_name};
use crate::source::RepoId;

/// The name of the shard index.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The name of weights in one file.
pub(crate) const SINGLE: &str = "model.safetensors";

/// What to fetch before the weights are known: configs, tokenizers, chat templates, the shard index.
pub(crate) fn small_files(listing: &Listing) -> Vec<&RemoteFile> {
    listing
        .files
        .iter()
        .filter(|f| is_small_file(&f.name))
        .collect()
}

fn is_small_file(name: &str) -> bool {
    const NAMES: [&str; 8] = [
        "tokenizer.model",
        "merges.txt",
        "vocab.txt",
        "chat_template.jinja",
        "LICENSE",
        "LICENSE.txt",
        "LICENSE.md",
        "NOTICE",
    ];
    // Subfolders hold other formats and other models; what belongs to this one lies at the root. Index files of pickled
    // weights are of no use.
    !name.contains('/')
        && (NAMES.contains(&name)
            || (name.ends_with(".json") && (name == INDEX || !name.ends_with(".index.json"))))
}

/// The weight files: the shards that `index` names, or the single file.
///
/// # Errors
/// No safetensors weights; a shard that the repository does not have or whose name would leave the folder.
pub(crate) fn weight_files<'a>(
    repo: &RepoId,
    listing: &'a Listing,
    index: Option<&[u8]>,
) -> Result<Vec<&'a RemoteFile>> {
    let find = |name: &str| listing.files.iter().find(|f| f.name == name);
    if let Some(index) = index {
        return shards(index)
            .map_err(|reason| Error::BadReply {
                url: format!("{repo}/{INDEX}"),
                reason,
            })?
            .iter()
            .map(|name| {
                check_name(name).map_err(|reason| Error::HostileName {
                    repo: repo.to_string(),
                    name: name.clone(),
                    reason,
                })?;
                find(name).ok_or_else(|| Error::FileMissing {
                    repo: repo.to_string(),
                    file: name.clone(),
                    needed_by: format!("{INDEX} names as a shard"),
                })
            })
            .collect();
    }
    if let Some(single) = find(SINGLE) {
        return Ok(vec![single]);
    }
    let other = |name: &&RemoteFile| {
        [".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack"]
            .iter()
            .any(|e| name.name.ends_with(e))
    };
    let others = listing
        .files
        .iter()
        .filter(other)
        .map(|f| f.name.clone())
        .take(4)
        .collect();
    Err(Error::NoWeights {
        repo: repo.to_string(),
        others,
    })
}

/// The distinct shard names of a `model.safetensors.index.json`.
pub(crate) fn shards(index: &[u8]) -> Result<BTreeSet<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: serde_json::Map<String, serde_json::Value>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|e| e.to_string())?;
    let names: Option<BTreeSet<String>> = index
        .weight_map
        .values()
        .map(|v| v.as_str().map(str::to_owned))
        .collect();
    names.filter(|n| !n.is_empty()).ok_or_else(|| {
        "weight_map is empty or maps a tensor to something that is no file name".into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listing::Digest;

    fn listing(names: &[&str]) -> Listing {
        let file = |n: &&str| RemoteFile {
            name: (*n).to_owned(),
            size: 1,
            digest: Digest::GitSha1("a".repeat(40)),
        };
        Listing {
            commit: "0".repeat(40),
            files: names.iter().map(file).collect(),
        }
    }

    fn repo() -> RepoId {
        RepoId {
            name: "org/name".into(),
            revision: "main".into(),
        }
    }

    #[test]
    fn pickles_other_formats_and_subfolders_are_left_alone() {
        let listing = listing(&[
            "config.json",
            "tokenizer.json",
            "chat_template.jinja",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "original/params.json",
            "model.gguf",
            "README.md",
            "model.safetensors",
            "consolidated.safetensors",
        ]);
        let small: Vec<_> = small_files(&listing)
            .iter()
            .map(|f| f.name.as_str())
            .collect();
        assert_eq!(
            small,
            ["config.json", "tokenizer.json", "chat_template.jinja"]
        );
        let weights = weight_files(&repo(), &listing, None).expect("weights");
        assert_eq!(
            weights.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(),
            ["model.safetensors"]
        );
    }

    #[test]
    fn shards_come_from_the_index() {
        let listing = listing(&["a.safetensors", "b.safetensors", "model.safetensors"]);
        let index = br#"{"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}"#;
        assert_eq!(
            weight_files(&repo(), &listing, Some(index))
                .expect("shards")
                .len(),
            2
        );
        for (index, words) in [
            (
                r#"{"weight_map": {"x": "c.safetensors"}}"#,
                "`c.safetensors`",
            ),
            (
                r#"{"weight_map": {"x": "../c.safetensors"}}"#,
                "would leave",
            ),
            (r#"{"weight_map": {"x": 3}}"#, "no file name"),
            (r#"{"weight_map": {}}"#, "empty"),
            (r#"[]"#, "unexpected reply"),
        ] {
            let error = weight_files(&repo(), &listing, Some(index.as_bytes()))
                .expect_err(index)
                .to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn missing_weights_say_what_is_there_instead() {
        let error = weight_files(
            &repo(),
            &listing(&["config.json", "pytorch_model.bin"]),
            None,
        )
        .expect_err("no weights");
        assert!(error.to_string().contains("pytorch_model.bin"), "{error}");
    }
}
