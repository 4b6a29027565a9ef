//! Text from tokens that come one at a time.

use crate::byte_level;
use crate::error::{Result, TokenizerError};
use crate::tokenizer::{Model, SpecialTokens, Tokenizer};

/// The replacement character: what a decoder writes for bytes that are not (yet) a character.
const REPLACEMENT: char = '\u{fffd}';

/// Tokens held back at most while waiting for a character to become whole. A character has four bytes at most, so only
/// text that is not UTF-8 at all, or a long run of hidden special tokens, gets this far.
const MAX_PENDING: usize = 64;

/// Decodes tokens as they come. Made by [`Tokenizer::decode_stream`].
///
/// A token may hold part of a character, and some decoders look at a token's neighbours (a leading space is dropped at
/// the start of a text only). So text comes out once it can no longer change: what `push` returns, joined, and
/// what [`finish`](Self::finish) returns, is what [`Tokenizer::decode`] gives for all the tokens together.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    special: SpecialTokens,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Bytes that do not make a whole character yet.
    Bytes(Vec<u8>),
    /// Whether anything has come out yet.
    Null { started: bool },
    /// `ids[..shown]` is the context whose text has been given out; what follows is waiting.
    Window { ids: Vec<u32>, shown: usize },
}

impl<'a> DecodeStream<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, special: SpecialTokens) -> Self {
        let state = match tokenizer.model {
            Model::Bytes => State::Bytes(Vec::new()),
            Model::Null(_) => State::Null { started: false },
            Model::HuggingFace(_) => State::Window {
                ids: Vec::new(),
                shown: 0,
            },
        };
        Self {
            tokenizer,
            special,
            state,
        }
    }

    /// Takes one token and returns the text that is certain now, often empty in the middle of a character.
    ///
    /// # Errors
    /// If the id is outside the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let vocab_size = self.tokenizer.vocab_size();
        if id as usize >= vocab_size {
            return Err(TokenizerError::UnknownId { id, vocab_size });
        }
        match &mut self.state {
            State::Bytes(pending) => {
                pending.extend(
                    byte_level::piece(id, self.special == SpecialTokens::Add).unwrap_or_default(),
                );
                let whole = whole_characters(pending);
                let text = String::from_utf8_lossy(&pending[..whole]).into_owned();
                pending.drain(..whole);
                Ok(text)
            }
            State::Null { started } => {
                let separator = if std::mem::replace(started, true) {
                    " "
                } else {
                    ""
                };
                Ok(format!("{separator}{id}"))
            }
            State::Window { ids, shown } => {
                ids.push(id);
                let before = self.tokenizer.decode(&ids[..*shown], self.special)?;
                let after = self.tokenizer.decode(ids, self.special)?;
                let overdue = ids.len() - *shown > MAX_PENDING;
                if (after.len() <= before.len() || after.ends_with(REPLACEMENT)) && !overdue {
                    return Ok(String::new());
                }
                let text = after[common_prefix(&before, &after)..].to_owned();
                // The tokens just shown are the context of the next.
                ids.drain(..*shown);
                *shown = ids.len();
                Ok(text)
            }
        }
    }

    /// Ends the stream and returns what was held back: the beginning of a character that never became whole.
    ///
    /// # Errors
    /// If the decoder fails.
    pub fn finish(self) -> Result<String> {
        match self.state {
            State::Bytes(pending) => Ok(String::from_utf8_lossy(&pending).into_owned()),
            State::Null { .. } => Ok(String::new()),
            State::Window { ids, shown } => {
                let before = self.tokenizer.decode(&ids[..shown], self.special)?;
                let after = self.tokenizer.decode(&ids, self.special)?;
                Ok(after[common_prefix(&before, &after)..].to_owned())
            }
        }
    }
}

/// How many leading bytes can be decoded whatever follows: all but an unfinished character at the end.
fn whole_characters(bytes: &[u8]) -> usize {
    let mut at = 0;
    loop {
        match std::str::from_utf8(&bytes[at..]) {
            Ok(_) => return bytes.len(),
            Err(error) => match error.error_len() {
                // Invalid whatever follows: stands for one replacement character.
                Some(len) => at += error.valid_up_to() + len,
                None => return at + error.valid_up_to(),
            },
        }
    }
}

/// Length in bytes of the longest common beginning, on a character border.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars()
        .zip(b.chars())
        .take_while(|(x, y)| x == y)
        .map(|(x, _)| x.len_utf8())
        .sum()
}
