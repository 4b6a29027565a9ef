//! Tokenizers and chat templates.
//!
//! [`Tokenizer`] is one type over four sources:
//!
//! | source | vocabulary | made by |
//! | --- | --- | --- |
//! | a Hugging Face folder | whatever `tokenizer.json` says | [`Tokenizer::from_folder`] |
//! | bytes | 256 bytes and four special tokens; nothing to download | [`Tokenizer::bytes`] |
//! | trained here | byte-level BPE learnt from a text | [`Tokenizer::train_bpe`] |
//! | ids written as text (`"12 7 99"`) | any size; for data that is tokenized already | [`Tokenizer::null`] |
//!
//! ```
//! use bridge_tokenizers::{SpecialTokens, Tokenizer};
//!
//! let tokenizer = Tokenizer::bytes();
//! let ids = tokenizer.encode("Être ou ne pas être", SpecialTokens::Omit)?;
//! assert_eq!(tokenizer.decode(&ids, SpecialTokens::Omit)?, "Être ou ne pas être");
//!
//! // Tokens arrive one at a time while a model generates; text comes out only in whole characters.
//! let mut stream = tokenizer.decode_stream(SpecialTokens::Omit);
//! let mut text = String::new();
//! for id in ids {
//!     text += &stream.push(id)?;
//! }
//! text += &stream.finish()?;
//! assert_eq!(text, "Être ou ne pas être");
//! # Ok::<(), bridge_tokenizers::TokenizerError>(())
//! ```
//!
//! Chat templates ([`ChatTemplate`]) are the Jinja templates that models ship with, rendered as `transformers` renders them.

mod byte_level;
pub mod chat;
mod error;
mod folder;
mod null;
mod stream;
mod tokenizer;
mod train;

pub use chat::{ChatRequest, ChatTemplate, RenderedChat};
pub use error::{Result, TokenizerError};
pub use stream::DecodeStream;
pub use tokenizer::{SpecialTokens, Tokenizer, TokenizerKind, TokenizerSource};
