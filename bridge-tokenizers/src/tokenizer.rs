//! [`Tokenizer`]: text to ids and back.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use rayon::prelude::*;

use crate::byte_level;
use crate::chat::{ChatRequest, ChatTemplate, RenderedChat};
use crate::error::{Result, TokenizerError};
use crate::folder::{self, Named};
use crate::null::NullTokenizer;
use crate::stream::DecodeStream;

/// Whether the tokens that mark structure (begin of text, end of turn) take part.
///
/// In encoding, `Add` lets the tokenizer add those it adds by itself, such as Llama's begin-of-text; `Omit` gives the tokens
/// of the text alone. In decoding, `Add` writes them out as text and `Omit` leaves them out.
/// Special tokens spelt out *in* the text are always recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// With them.
    Add,
    /// Without them.
    Omit,
}

/// What a tokenizer is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenizerKind {
    /// A `tokenizer.json`, loaded or trained.
    HuggingFace,
    /// One token a byte.
    Bytes,
    /// Ids as text.
    Null,
}

#[derive(Clone, Debug)]
pub(crate) enum Model {
    HuggingFace(Box<tokenizers::Tokenizer>),
    Bytes,
    Null(NullTokenizer),
}

/// Text to token ids and back, with the model's special tokens and chat templates.
///
/// Cheap to share by reference between threads.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    pub(crate) model: Model,
    pub(crate) named: Named,
    /// Whether `encode` puts the begin-of-text token first itself, because no post-processor does.
    pub(crate) prepend_bos: bool,
    /// Whether `encode` puts the end-of-text token last itself.
    pub(crate) append_eos: bool,
    pub(crate) templates: Vec<(String, ChatTemplate)>,
    /// The folder it came from.
    pub(crate) folder: Option<PathBuf>,
    vocab_size: usize,
}

impl Tokenizer {
    /// Loads the tokenizer of a Hugging Face model folder.
    ///
    /// Reads `tokenizer.json` and, where present, `tokenizer_config.json` (names of the special tokens, added tokens, chat
    /// template), `special_tokens_map.json`, `chat_template.jinja` and `chat_templates/*.jinja`. As in `transformers`,
    /// template files go before the template in the config, and whether a begin-of-text token is added is up to
    /// `tokenizer.json`; only where that has no post-processor do `add_bos_token` and `add_eos_token` decide.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing (the message says what is there instead) or a file is malformed.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        folder::load(folder.as_ref())
    }

    /// One token a byte and four special tokens; see the crate's front page.
    pub fn bytes() -> Self {
        let named = Named {
            bos: Some((byte_level::END_OF_TEXT.into(), 256)),
            eos: Some((byte_level::END_OF_TEXT.into(), 256)),
            pad: Some((byte_level::PAD.into(), 257)),
            unk: None,
        };
        let mut tokenizer = Self::assemble(Model::Bytes, named);
        tokenizer.templates = vec![(
            "default".into(),
            ChatTemplate::built_in(byte_level::CHAT_TEMPLATE),
        )];
        tokenizer
    }

    /// Ids below `size` written as text, separated by spaces; the id `size` ends a document.
    ///
    /// # Errors
    /// If `size` is 0 or does not leave room for one more id.
    pub fn null(size: u32) -> Result<Self> {
        if size == 0 || size > i32::MAX as u32 {
            let text = format!("null:{size}");
            return Err(TokenizerError::BadSource {
                text,
                reason: "the size must lie between 1 and 2147483647".into(),
            });
        }
        let model = NullTokenizer::new(size);
        let named = Named {
            eos: Some((size.to_string(), model.eos_id())),
            ..Named::default()
        };
        Ok(Self::assemble(Model::Null(model), named))
    }

    /// Learns a byte-level BPE of `vocab_size` tokens from texts: 256 bytes, the merges, and four special tokens with the
    /// highest ids. Any text can be encoded, and comes back unchanged.
    ///
    /// The same texts give the same vocabulary.
    ///
    /// # Errors
    /// If `vocab_size` has no room for the bytes and special tokens, or the texts are too small to learn it from.
    pub fn train_bpe<'a>(
        texts: impl Iterator<Item = &'a str> + Send,
        vocab_size: usize,
    ) -> Result<Self> {
        crate::train::train_bpe(texts, vocab_size)
    }

    pub(crate) fn assemble(model: Model, named: Named) -> Self {
        let vocab_size = match &model {
            // The highest id decides, since files may leave holes between the vocabulary and the added tokens.
            Model::HuggingFace(inner) => {
                let count = inner.get_vocab_size(true);
                inner
                    .get_vocab(true)
                    .values()
                    .map(|&id| id as usize + 1)
                    .max()
                    .unwrap_or(0)
                    .max(count)
            }
            Model::Bytes => byte_level::VOCAB_SIZE,
            Model::Null(null) => null.vocab_size(),
        };
        Self {
            model,
            named,
            prepend_bos: false,
            append_eos: false,
            templates: Vec::new(),
            folder: None,
            vocab_size,
        }
    }

    /// What it is made of.
    pub fn kind(&self) -> TokenizerKind {
        match self.model {
            Model::HuggingFace(_) => TokenizerKind::HuggingFace,
            Model::Bytes => TokenizerKind::Bytes,
            Model::Null(_) => TokenizerKind::Null,
        }
    }

    /// One more than the highest id, added tokens included: the least number of rows that an embedding needs.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Id of the token that begins a text, if there is one.
    pub fn bos_id(&self) -> Option<u32> {
        self.named.bos.as_ref().map(|(_, id)| *id)
    }

    /// Id of the token that ends a text or a document, if there is one.
    pub fn eos_id(&self) -> Option<u32> {
        self.named.eos.as_ref().map(|(_, id)| *id)
    }

    /// Id of the token that fills up short sequences, if there is one.
    pub fn pad_id(&self) -> Option<u32> {
        self.named.pad.as_ref().map(|(_, id)| *id)
    }

    /// Where it came from, for messages: a folder, `bytes`, `null:100`.
    pub fn describe(&self) -> String {
        match (&self.folder, &self.model) {
            (Some(folder), _) => folder.display().to_string(),
            (None, Model::Bytes) => "bytes".into(),
            (None, Model::Null(null)) => format!("null:{}", null.eos_id()),
            (None, Model::HuggingFace(_)) => {
                format!("a trained vocabulary of {} tokens", self.vocab_size)
            }
        }
    }

    /// The ids of `text`.
    ///
    /// # Errors
    /// If the vocabulary cannot express the text, or (null tokenizer) the text is not a list of ids.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>> {
        let add = special == SpecialTokens::Add;
        let mut ids = match &self.model {
            Model::Bytes => byte_level::encode(text),
            Model::Null(null) => null.encode(text)?,
            Model::HuggingFace(inner) => {
                let encoding =
                    inner
                        .encode_fast(text, add)
                        .map_err(|error| TokenizerError::Failed {
                            action: "encode the text",
                            reason: error.to_string(),
                        })?;
                encoding.get_ids().to_vec()
            }
        };
        if add && self.prepend_bos {
            ids.splice(0..0, self.bos_id());
        }
        if add && self.append_eos {
            ids.extend(self.eos_id());
        }
        Ok(ids)
    }

    /// The ids of many texts, on all cores, in order.
    ///
    /// # Errors
    /// The first text that fails decides; see [`encode`](Self::encode).
    pub fn encode_batch<S: AsRef<str> + Sync>(
        &self,
        texts: &[S],
        special: SpecialTokens,
    ) -> Result<Vec<Vec<u32>>> {
        texts
            .par_iter()
            .map(|text| self.encode(text.as_ref(), special))
            .collect()
    }

    /// The text of `ids`. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// If an id is outside the vocabulary.
    pub fn decode(&self, ids: &[u32], special: SpecialTokens) -> Result<String> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(TokenizerError::UnknownId {
                id,
                vocab_size: self.vocab_size,
            });
        }
        let keep = special == SpecialTokens::Add;
        match &self.model {
            Model::Bytes => {
                let bytes: Vec<u8> = ids
                    .iter()
                    .filter_map(|&id| byte_level::piece(id, keep))
                    .flatten()
                    .collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Model::Null(null) => Ok(null.decode(ids)),
            Model::HuggingFace(inner) => {
                inner
                    .decode(ids, !keep)
                    .map_err(|error| TokenizerError::Failed {
                        action: "decode the tokens",
                        reason: error.to_string(),
                    })
            }
        }
    }

    /// The texts of many sequences, on all cores, in order.
    ///
    /// # Errors
    /// See [`decode`](Self::decode).
    pub fn decode_batch<S: AsRef<[u32]> + Sync>(
        &self,
        sequences: &[S],
        special: SpecialTokens,
    ) -> Result<Vec<String>> {
        sequences
            .par_iter()
            .map(|ids| self.decode(ids.as_ref(), special))
            .collect()
    }

    /// Decodes tokens as they come, giving out text only in whole characters.
    pub fn decode_stream(&self, special: SpecialTokens) -> DecodeStream<'_> {
        DecodeStream::new(self, special)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.model {
            Model::HuggingFace(inner) => inner.token_to_id(token),
            Model::Bytes => match byte_level::SPECIAL
                .iter()
                .position(|special| *special == token)
            {
                Some(index) => Some(256 + index as u32),
                None => (0..=255u8)
                    .find(|&byte| token.chars().eq([byte_level::byte_symbol(byte)]))
                    .map(u32::from),
            },
            Model::Null(null) => token
                .parse()
                .ok()
                .filter(|&id: &u32| (id as usize) < null.vocab_size()),
        }
    }

    /// How the vocabulary spells an id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        match &self.model {
            Model::HuggingFace(inner) => inner.id_to_token(id),
            Model::Bytes => match id {
                0..=255 => Some(byte_level::byte_symbol(id as u8).to_string()),
                _ => byte_level::SPECIAL
                    .get(id as usize - 256)
                    .map(ToString::to_string),
            },
            Model::Null(null) => ((id as usize) < null.vocab_size()).then(|| id.to_string()),
        }
    }

    /// The chat template: the one called `default`, or the only one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        match self.templates.as_slice() {
            [(_, only)] => Some(only),
            many => many
                .iter()
                .find(|(name, _)| name == "default")
                .map(|(_, template)| template),
        }
    }

    /// A chat template by name, such as `tool_use`.
    pub fn chat_template_named(&self, name: &str) -> Option<&ChatTemplate> {
        self.templates
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, template)| template)
    }

    /// Names of the chat templates.
    pub fn chat_template_names(&self) -> impl Iterator<Item = &str> {
        self.templates.iter().map(|(name, _)| name.as_str())
    }

    /// Renders a conversation with the model's chat template.
    ///
    /// With tools and a template called `tool_use`, that one is taken, as in `transformers`. The special tokens are part of
    /// the result: encode it with [`SpecialTokens::Omit`].
    ///
    /// # Errors
    /// If the conversation is empty, there is no template, or the template refuses the conversation.
    pub fn render_chat(&self, request: &ChatRequest) -> Result<RenderedChat> {
        if request.messages.is_empty() {
            return Err(TokenizerError::EmptyConversation);
        }
        let for_tools = request
            .tools
            .is_some()
            .then(|| self.chat_template_named("tool_use"))
            .flatten();
        let template = for_tools.or_else(|| self.chat_template()).ok_or_else(|| {
            TokenizerError::NoChatTemplate {
                place: self.describe(),
                named: match self.templates.len() {
                    0 => String::new(),
                    _ => format!(
                        " named default (there are {})",
                        self.chat_template_names().collect::<Vec<_>>().join(", ")
                    ),
                },
            }
        })?;
        let named = &self.named;
        let tokens = [
            ("bos_token", &named.bos),
            ("eos_token", &named.eos),
            ("pad_token", &named.pad),
            ("unk_token", &named.unk),
        ];
        let tokens = tokens
            .iter()
            .filter_map(|(name, token)| token.as_ref().map(|(text, _)| (*name, text.as_str())));
        template.render(request, tokens)
    }

    /// Writes the tokenizer as Hugging Face files into an existing folder: `tokenizer.json`, `tokenizer_config.json` and, if
    /// there is one, `chat_template.jinja`.
    ///
    /// For a tokenizer loaded from a folder, prefer copying its files.
    ///
    /// # Errors
    /// If a file cannot be written, or for a null tokenizer, which has no such form.
    pub fn save(&self, folder: &Path) -> Result<()> {
        folder::save(self, folder)
    }

    /// The tokenizer's own files in the folder it was loaded from, for copying beside an exported model.
    pub fn source_files(&self) -> Vec<PathBuf> {
        self.folder
            .as_deref()
            .map(folder::tokenizer_files)
            .unwrap_or_default()
    }
}

/// A tokenizer as a configuration names it: `bytes`, `null:SIZE` or a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerSource {
    /// [`Tokenizer::bytes`].
    Bytes,
    /// [`Tokenizer::null`].
    Null(u32),
    /// [`Tokenizer::from_folder`].
    Folder(PathBuf),
}

impl TokenizerSource {
    /// Makes the tokenizer.
    ///
    /// # Errors
    /// As the constructor of its kind.
    pub fn load(&self) -> Result<Tokenizer> {
        match self {
            Self::Bytes => Ok(Tokenizer::bytes()),
            Self::Null(size) => Tokenizer::null(*size),
            Self::Folder(folder) => Tokenizer::from_folder(folder),
        }
    }
}

impl FromStr for TokenizerSource {
    type Err = TokenizerError;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |reason: &str| TokenizerError::BadSource {
            text: text.into(),
            reason: reason.into(),
        };
        match text.split_once(':') {
            _ if text == "bytes" => Ok(Self::Bytes),
            _ if text.is_empty() => Err(bad("it is empty")),
            Some(("null", size)) => size
                .parse()
                .map(Self::Null)
                .map_err(|_| bad("SIZE must be a number of ids")),
            _ if text == "null" => Err(bad("say how many ids there are, as in null:50000")),
            _ => Ok(Self::Folder(text.into())),
        }
    }
}

impl std::fmt::Display for TokenizerSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bytes => write!(f, "bytes"),
            Self::Null(size) => write!(f, "null:{size}"),
            Self::Folder(folder) => write!(f, "{}", folder.display()),
        }
    }
}
