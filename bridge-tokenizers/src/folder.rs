//! Hugging Face tokenizer folders: reading and writing.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::byte_level;
use crate::chat::ChatTemplate;
use crate::error::{Result, TokenizerError};
use crate::tokenizer::{Model, Tokenizer};

/// Largest `tokenizer.json` read, in bytes. The largest in use have about 35 million.
const MAX_TOKENIZER_BYTES: u64 = 512 << 20;
/// Largest side file read (configs, chat templates), in bytes.
const MAX_SIDE_FILE_BYTES: u64 = 32 << 20;

/// Files that make up a tokenizer, as they may stand in a model folder.
const TOKENIZER_FILES: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
];

/// Special tokens with a role: their text and id.
#[derive(Clone, Debug, Default)]
pub(crate) struct Named {
    pub(crate) bos: Option<(String, u32)>,
    pub(crate) eos: Option<(String, u32)>,
    pub(crate) pad: Option<(String, u32)>,
    pub(crate) unk: Option<(String, u32)>,
}

pub(crate) fn load(folder: &Path) -> Result<Tokenizer> {
    let path = folder.join("tokenizer.json");
    let Some(bytes) = read_if_there(&path, MAX_TOKENIZER_BYTES)? else {
        return Err(no_tokenizer_file(folder));
    };
    let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| {
        TokenizerError::BadTokenizer {
            path: path.clone(),
            reason: error.to_string(),
        }
    })?;
    // A saved truncation or padding is a leftover of how someone last called it; texts are encoded whole here.
    let reset = inner.with_truncation(None).map(|_| ());
    reset.map_err(|error| TokenizerError::BadTokenizer {
        path,
        reason: error.to_string(),
    })?;
    inner.with_padding(None);

    let config = SideFile::read(folder, "tokenizer_config.json")?;
    let map = SideFile::read(folder, "special_tokens_map.json")?;
    add_tokens(&mut inner, &config)?;
    let named = Named {
        bos: named_token(&mut inner, &config, &map, "bos_token")?,
        eos: named_token(&mut inner, &config, &map, "eos_token")?,
        pad: named_token(&mut inner, &config, &map, "pad_token")?,
        unk: named_token(&mut inner, &config, &map, "unk_token")?,
    };

    let without_processor = inner.get_post_processor().is_none();
    let mut tokenizer = Tokenizer::assemble(Model::HuggingFace(Box::new(inner)), named);
    tokenizer.prepend_bos = without_processor && config.flag("add_bos_token")?;
    tokenizer.append_eos = without_processor && config.flag("add_eos_token")?;
    tokenizer.templates = chat_templates(folder, &config)?;
    tokenizer.folder = Some(folder.to_owned());
    Ok(tokenizer)
}

fn no_tokenizer_file(folder: &Path) -> TokenizerError {
    let mut names = match std::fs::read_dir(folder) {
        Ok(entries) => entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect::<Vec<_>>(),
        Err(source) => {
            return TokenizerError::Io {
                action: "list",
                path: folder.to_owned(),
                source,
            };
        }
    };
    names.sort();
    let has = |name: &str| names.iter().any(|known| known == name);
    let advice = if has("tokenizer.model") || has("spiece.model") {
        "its SentencePiece file has to be converted once: load the folder with `transformers` (AutoTokenizer) and save_pretrained it"
    } else if has("vocab.json") && has("merges.txt") {
        "its vocab.json and merges.txt have to be joined once: load the folder with `transformers` (AutoTokenizer) and save_pretrained it"
    } else {
        "copy the tokenizer files of the model into the folder"
    };
    let found = match names.len() {
        0 => "the folder is empty".to_owned(),
        count => {
            let shown = names
                .iter()
                .take(12)
                .cloned()
                .collect::<Vec<_>>()
                .join(", ");
            format!(
                "it holds {shown}{}",
                if count > 12 {
                    format!(" and {} more", count - 12)
                } else {
                    String::new()
                }
            )
        }
    };
    TokenizerError::NoTokenizerFile {
        folder: folder.to_owned(),
        found,
        advice: advice.into(),
    }
}

/// Reads a file of bounded size; `None` if there is none.
fn read_if_there(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let size = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(TokenizerError::Io {
                action: "read",
                path: path.to_owned(),
                source,
            });
        }
    };
    if size > limit {
        return Err(TokenizerError::TooLarge {
            path: path.to_owned(),
            size,
            limit,
        });
    }
    std::fs::read(path)
        .map(Some)
        .map_err(TokenizerError::io("read", path))
}

/// A JSON object beside `tokenizer.json`; empty if the file is missing.
struct SideFile {
    path: PathBuf,
    json: Map<String, Value>,
}

impl SideFile {
    fn read(folder: &Path, name: &str) -> Result<Self> {
        let path = folder.join(name);
        let json = match read_if_there(&path, MAX_SIDE_FILE_BYTES)? {
            None => Map::new(),
            Some(bytes) => {
                serde_json::from_slice(&bytes).map_err(|error| TokenizerError::BadJson {
                    path: path.clone(),
                    reason: error.to_string(),
                })?
            }
        };
        Ok(Self { path, json })
    }

    fn bad(&self, reason: impl Into<String>) -> TokenizerError {
        TokenizerError::BadJson {
            path: self.path.clone(),
            reason: reason.into(),
        }
    }

    /// A boolean that is false when missing or null.
    fn flag(&self, key: &str) -> Result<bool> {
        match self.json.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.bad(format!("`{key}` is {other}, expected true or false"))),
        }
    }

    /// A token written as text or as an object with `content`.
    fn token(&self, key: &str) -> Result<Option<AddedToken>> {
        match self.json.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            Some(Value::String(text)) => Ok(Some(AddedToken::from(text.as_str(), true))),
            Some(object) => self.added_token(object, key).map(Some),
        }
    }

    fn added_token(&self, value: &Value, key: &str) -> Result<AddedToken> {
        let content = value
            .get("content")
            .and_then(Value::as_str)
            .filter(|text| !text.is_empty());
        let content = content.ok_or_else(|| {
            self.bad(format!(
                "`{key}` is {value}, expected a text or an object with `content`"
            ))
        })?;
        let flag =
            |name: &str, default| value.get(name).and_then(Value::as_bool).unwrap_or(default);
        let special = flag("special", false);
        Ok(AddedToken::from(content, special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special)))
    }
}

/// Adds the tokens that `tokenizer_config.json` lists under `added_tokens_decoder` and `tokenizer.json` lacks.
fn add_tokens(inner: &mut tokenizers::Tokenizer, config: &SideFile) -> Result<()> {
    let Some(listed) = config.json.get("added_tokens_decoder") else {
        return Ok(());
    };
    let listed = listed
        .as_object()
        .ok_or_else(|| config.bad("`added_tokens_decoder` is not an object"))?;
    let mut by_id = BTreeMap::new();
    for (id, value) in listed {
        let id: u32 = id.parse().map_err(|_| {
            config.bad(format!(
                "`added_tokens_decoder` has the key `{id}`, expected a token id"
            ))
        })?;
        by_id.insert(
            id,
            config.added_token(value, &format!("added_tokens_decoder.{id}"))?,
        );
    }
    for (id, token) in by_id {
        let text = token.content.clone();
        match inner.token_to_id(&text) {
            Some(known) if known == id => continue,
            Some(known) => {
                return Err(misplaced(config, text, &format!("added token {id}"), known));
            }
            None => {
                let special = token.special;
                inner.add_tokens(std::slice::from_ref(&token));
                if special {
                    inner.add_special_tokens(&[token]);
                }
                match inner.token_to_id(&text) {
                    Some(given) if given != id => {
                        return Err(misplaced(config, text, &format!("added token {id}"), given));
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(())
}

fn misplaced(file: &SideFile, token: String, role: &str, id: u32) -> TokenizerError {
    let reason = format!(
        "but tokenizer.json gives it the id {id}; the two files belong to different models"
    );
    TokenizerError::BadSpecialToken {
        path: file.path.clone(),
        token,
        role: role.into(),
        reason,
    }
}

/// The token of a role such as `eos_token`: what `tokenizer_config.json` says, else `special_tokens_map.json`.
///
/// One that the vocabulary lacks is added behind it, as `transformers` does.
fn named_token(
    inner: &mut tokenizers::Tokenizer,
    config: &SideFile,
    map: &SideFile,
    role: &'static str,
) -> Result<Option<(String, u32)>> {
    let (file, token) = match config.token(role)? {
        Some(token) => (config, token),
        None => match map.token(role)? {
            Some(token) => (map, token),
            None => return Ok(None),
        },
    };
    let text = token.content.clone();
    if inner.token_to_id(&text).is_none() {
        let mut token = token;
        token.special = true;
        inner.add_special_tokens(&[token]);
    }
    match inner.token_to_id(&text) {
        Some(id) => Ok(Some((text, id))),
        None => Err(TokenizerError::BadSpecialToken {
            path: file.path.clone(),
            token: text,
            role: role.into(),
            reason: "which the vocabulary neither has nor takes".into(),
        }),
    }
}

/// Chat templates of a folder: its template files, or else what `tokenizer_config.json` holds.
fn chat_templates(folder: &Path, config: &SideFile) -> Result<Vec<(String, ChatTemplate)>> {
    let mut sources: Vec<(String, String, PathBuf)> = Vec::new();
    let mut from_file = |name: String, path: PathBuf| -> Result<()> {
        if let Some(bytes) = read_if_there(&path, MAX_SIDE_FILE_BYTES)? {
            let text = String::from_utf8(bytes).map_err(|_| TokenizerError::Template {
                place: path.display().to_string(),
                reason: "it is not UTF-8".into(),
            })?;
            sources.push((name, text, path));
        }
        Ok(())
    };
    from_file("default".into(), folder.join("chat_template.jinja"))?;
    let more = folder.join("chat_templates");
    if more.is_dir() {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(&more).map_err(TokenizerError::io("list", &more))? {
            paths.push(entry.map_err(TokenizerError::io("list", &more))?.path());
        }
        paths.sort();
        for path in paths.into_iter().filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "jinja")
        }) {
            let name = path
                .file_stem()
                .map(|stem| stem.to_string_lossy().into_owned())
                .unwrap_or_default();
            from_file(name, path)?;
        }
    }
    if sources.is_empty() {
        match config.json.get("chat_template") {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => {
                sources.push(("default".into(), text.clone(), config.path.clone()))
            }
            Some(Value::Array(list)) => {
                for entry in list {
                    let field = |key| entry.get(key).and_then(Value::as_str).map(str::to_owned);
                    let (Some(name), Some(text)) = (field("name"), field("template")) else {
                        return Err(config
                            .bad("`chat_template` has an entry without `name` and `template`"));
                    };
                    sources.push((name, text, config.path.clone()));
                }
            }
            Some(_) => {
                return Err(
                    config.bad("`chat_template` is neither a text nor a list of named templates")
                );
            }
        }
    }
    Ok(sources
        .into_iter()
        .map(|(name, text, path)| {
            let place = format!("`{name}` of {}", path.display());
            (name, ChatTemplate::new(text, place))
        })
        .collect())
}

/// Writes a file so that it is either whole or not there.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file =
        tempfile::NamedTempFile::new_in(folder).map_err(TokenizerError::io("write", path))?;
    file.write_all(bytes)
        .and_then(|()| file.as_file().sync_all())
        .map_err(TokenizerError::io("write", path))?;
    file.persist(path).map_err(|error| TokenizerError::Io {
        action: "write",
        path: path.to_owned(),
        source: error.error,
    })?;
    Ok(())
}

pub(crate) fn save(tokenizer: &Tokenizer, folder: &Path) -> Result<()> {
    let failed = |reason: String| TokenizerError::Failed {
        action: "save the tokenizer",
        reason,
    };
    let vocabulary = match &tokenizer.model {
        Model::HuggingFace(inner) => inner
            .to_string(true)
            .map_err(|error| failed(error.to_string()))?,
        Model::Bytes => pretty(&byte_level::tokenizer_json()).map_err(failed)?,
        Model::Null(_) => return Err(failed("ids as text have no tokenizer.json".into())),
    };
    write(&folder.join("tokenizer.json"), vocabulary.as_bytes())?;
    let config = match &tokenizer.folder {
        Some(source) => Value::Object(SideFile::read(source, "tokenizer_config.json")?.json),
        None => byte_level::tokenizer_config(),
    };
    write(
        &folder.join("tokenizer_config.json"),
        pretty(&config).map_err(failed)?.as_bytes(),
    )?;
    for (name, template) in &tokenizer.templates {
        let path = if name == "default" {
            folder.join("chat_template.jinja")
        } else if name
            .chars()
            .all(|c| c.is_alphanumeric() || "_-.".contains(c))
            && !name.starts_with('.')
        {
            let more = folder.join("chat_templates");
            std::fs::create_dir_all(&more).map_err(TokenizerError::io("write", &more))?;
            more.join(format!("{name}.jinja"))
        } else {
            return Err(failed(format!(
                "the chat template name `{name}` cannot be a file name"
            )));
        };
        write(&path, template.source().as_bytes())?;
    }
    Ok(())
}

fn pretty(value: &Value) -> std::result::Result<String, String> {
    serde_json::to_string_pretty(value)
        .map(|text| text + "\n")
        .map_err(|error| error.to_string())
}

/// The tokenizer files that stand in a folder.
pub(crate) fn tokenizer_files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = TOKENIZER_FILES
        .iter()
        .map(|name| folder.join(name))
        .filter(|path| path.is_file())
        .collect();
    if let Ok(entries) = std::fs::read_dir(folder.join("chat_templates")) {
        let mut more: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|e| e == "jinja"))
            .collect();
        more.sort();
        files.extend(more);
    }
    files
}
