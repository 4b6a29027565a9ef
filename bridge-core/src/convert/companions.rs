//! The files beside the weights: tokenizer, chat template, generation and processor settings, licence.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};

/// A file that a conversion leaves behind, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SkippedFile {
    /// Its name in the source folder.
    pub name: String,
    /// Why it is not taken along.
    pub reason: &'static str,
}

/// The files beside a checkpoint's weights.
#[derive(Debug, Default)]
pub(super) struct Companions {
    /// Names of the files to take along, sorted.
    pub(super) names: Vec<String>,
    pub(super) skipped: Vec<SkippedFile>,
}

/// Largest file that is taken along, in bytes. The largest tokenizers are below 100 MB.
const MAX_BYTES: u64 = 1 << 30;

/// Full names, without config.json, which conversions treat by itself.
const NAMES: [&str; 17] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "image_processor_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
    "vocabulary.json",
];

/// What names of files to take along may begin with: `tokenizer.json`, `tokenizer.model`, `LICENSE.txt`, ...
const PREFIXES: [&str; 5] = ["tokenizer.", "LICENSE", "LICENCE", "NOTICE", "USE_POLICY"];

impl Companions {
    /// Looks through folder `dir`. Nothing is read but names and sizes; links are followed, since a hub cache consists
    /// of them.
    pub(super) fn find(dir: &Path, with_code: bool) -> Result<Self> {
        let mut found = Self::default();
        let read = |source| Error::io("read folder", dir, source);
        for entry in fs::read_dir(dir).map_err(read)? {
            let entry = entry.map_err(read)?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let wanted = NAMES.contains(&name.as_str())
                || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
                || name.ends_with(".tiktoken");
            let is_code = name.ends_with(".py");
            if !wanted && !is_code {
                continue;
            }
            let metadata = fs::metadata(entry.path())
                .map_err(|source| Error::io("read", entry.path(), source))?;
            if !metadata.is_file() {
                continue;
            }
            if metadata.len() > MAX_BYTES {
                found.skipped.push(SkippedFile {
                    name,
                    reason: "larger than 1 GiB",
                });
            } else if is_code && !with_code {
                found.skipped.push(SkippedFile {
                    name,
                    reason: "code is copied only on request",
                });
            } else {
                found.names.push(name);
            }
        }
        found.names.sort();
        found.skipped.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Copies the files from `from` to the existing folder `to`.
    pub(super) fn copy(&self, from: &Path, to: &Path) -> Result<()> {
        for name in &self.names {
            copy_file(&from.join(name), &to.join(name))?;
        }
        Ok(())
    }
}

fn copy_file(from: &Path, to: &Path) -> Result<()> {
    // Permissions of the source (a read-only cache, say) are not taken along, so this is not `fs::copy`.
    let mut source = fs::File::open(from).map_err(|source| Error::io("read", from, source))?;
    let mut target = fs::File::create_new(to).map_err(|source| Error::io("create", to, source))?;
    std::io::copy(&mut source, &mut target).map_err(|source| Error::io("write", to, source))?;
    Ok(())
}

/// Writes a new small file.
pub(super) fn write_new(path: PathBuf, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let mut file =
        fs::File::create_new(&path).map_err(|source| Error::io("create", &path, source))?;
    file.write_all(bytes)
        .map_err(|source| Error::io("write", &path, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokenizers_and_templates_are_taken_and_code_is_not() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
            "LICENSE.txt",
            "qwen.tiktoken",
            "modeling.py",
            "notes.md",
            "pytorch_model.bin",
        ] {
            fs::write(folder.path().join(name), name).unwrap();
        }
        fs::create_dir(folder.path().join("tokenizer.d")).unwrap();
        let found = Companions::find(folder.path(), false).unwrap();
        let taken = [
            "LICENSE.txt",
            "chat_template.jinja",
            "generation_config.json",
            "qwen.tiktoken",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
        ];
        assert_eq!(found.names, taken);
        assert_eq!(found.skipped.len(), 1);
        assert_eq!(found.skipped[0].name, "modeling.py");
        assert!(
            Companions::find(folder.path(), true)
                .unwrap()
                .names
                .contains(&"modeling.py".to_owned())
        );

        let target = tempfile::tempdir().unwrap();
        found.copy(folder.path(), target.path()).unwrap();
        assert_eq!(
            fs::read(target.path().join("tokenizer.json")).unwrap(),
            b"tokenizer.json"
        );
        assert!(
            found.copy(folder.path(), target.path()).is_err(),
            "existing files are never overwritten"
        );
    }
}
