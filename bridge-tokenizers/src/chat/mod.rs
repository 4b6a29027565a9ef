//! Chat templates: a conversation as the text that a model was trained on.
//!
//! Models ship a Jinja template. It is rendered here as `transformers` renders it: blocks trimmed, Python's methods on
//! values, Python's way of writing values, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, and
//! `{% generation %}` blocks, which mark the text that the assistant wrote.
//! Source: `transformers.utils.chat_template_utils`.

mod engine;
mod generation;
mod json;
mod python;

use std::ops::Range;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{Result, TokenizerError};

/// What a chat template is asked to render.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ChatRequest {
    /// The turns: objects with `role`, `content` and whatever else the template reads (`tool_calls`, `name`, ...).
    pub messages: Vec<Value>,
    /// Tools the model may call, as JSON schemas.
    #[serde(default)]
    pub tools: Option<Vec<Value>>,
    /// Documents to draw on, objects with `title` and `text`.
    #[serde(default)]
    pub documents: Option<Vec<Value>>,
    /// Whether to end with the beginning of an assistant's turn.
    #[serde(default)]
    pub add_generation_prompt: bool,
    /// Further variables that the template reads, such as `enable_thinking`.
    #[serde(default)]
    pub variables: Map<String, Value>,
    /// The time that `strftime_now` gives, in the local time zone; `None` is now.
    #[serde(skip)]
    pub now: Option<SystemTime>,
}

impl ChatRequest {
    /// A conversation of the given turns.
    pub fn new(messages: Vec<Value>) -> Self {
        Self {
            messages,
            ..Self::default()
        }
    }

    /// One turn of the user, to be answered.
    pub fn user(text: &str) -> Self {
        Self {
            add_generation_prompt: true,
            ..Self::new(vec![json!({"role": "user", "content": text})])
        }
    }
}

/// A conversation as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderedChat {
    /// The text, special tokens included.
    pub text: String,
    /// Byte ranges of `text` inside `{% generation %}` blocks: what the assistant wrote. Empty if the template has none.
    pub assistant: Vec<Range<usize>>,
}

/// A chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    place: String,
}

impl ChatTemplate {
    /// A template; `place` says in messages where it came from. Syntax errors show when it is rendered.
    pub fn new(source: impl Into<String>, place: impl Into<String>) -> Self {
        Self {
            source: source.into(),
            place: place.into(),
        }
    }

    pub(crate) fn built_in(source: &str) -> Self {
        Self::new(source, "built in")
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether it marks what the assistant wrote.
    pub fn marks_generation(&self) -> bool {
        generation::rewrite(&self.source).is_some()
    }

    /// Renders a conversation. `special_tokens` are variables such as `("bos_token", "<s>")`.
    ///
    /// # Errors
    /// If the template has a syntax error, uses what is not there, runs for too long, or calls `raise_exception`.
    pub fn render<'a>(
        &self,
        request: &ChatRequest,
        special_tokens: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<RenderedChat> {
        let special_tokens = special_tokens.into_iter().collect::<Vec<_>>();
        engine::render(&self.source, request, &special_tokens).map_err(|reason| {
            TokenizerError::Template {
                place: self.place.clone(),
                reason,
            }
        })
    }
}

#[cfg(test)]
mod tests;
