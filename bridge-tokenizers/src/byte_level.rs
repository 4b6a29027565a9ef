//! Bytes as tokens: a vocabulary that needs no file.
//!
//! Ids 0 to 255 are the bytes of UTF-8. Then come [`END_OF_TEXT`] (256, which begins and ends documents), [`PAD`] (257) and
//! [`TURN_START`] and [`TURN_END`] (258, 259), around the turns of a chat. Special tokens are recognised in text, as in
//! any Hugging Face tokenizer.
//!
//! The same vocabulary can be written as a `tokenizer.json` (a byte-level BPE without merges), so that a model
//! trained on bytes can be exported and used by `transformers`.

use serde_json::{Value, json};

/// Begins and ends documents: id 256.
pub(crate) const END_OF_TEXT: &str = "<|endoftext|>";
/// Fills up short sequences: id 257.
pub(crate) const PAD: &str = "<|pad|>";
/// Opens a turn of a chat: id 258.
pub(crate) const TURN_START: &str = "<|im_start|>";
/// Closes a turn of a chat: id 259.
pub(crate) const TURN_END: &str = "<|im_end|>";

/// Special tokens in the order of their ids, from 256.
pub(crate) const SPECIAL: [&str; 4] = [END_OF_TEXT, PAD, TURN_START, TURN_END];

/// Number of ids.
pub(crate) const VOCAB_SIZE: usize = 256 + SPECIAL.len();

/// The chat format of the tokenizers made here: each turn between [`TURN_START`] and [`TURN_END`].
pub(crate) const CHAT_TEMPLATE: &str = "\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- message['content'] + '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
";

pub(crate) fn encode(text: &str) -> Vec<u32> {
    let bytes = text.as_bytes();
    let mut ids = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        // Every special token begins with the same two bytes, which are rare in text.
        if bytes[at] == b'<'
            && let Some((id, token)) = SPECIAL
                .iter()
                .enumerate()
                .find(|(_, token)| text[at..].starts_with(*token))
        {
            ids.push(256 + id as u32);
            at += token.len();
        } else {
            ids.push(u32::from(bytes[at]));
            at += 1;
        }
    }
    ids
}

/// The bytes of one id, or `None` for an id outside the vocabulary.
pub(crate) fn piece(id: u32, keep_special: bool) -> Option<Vec<u8>> {
    match id {
        0..=255 => Some(vec![id as u8]),
        _ => SPECIAL.get(id as usize - 256).map(|token| {
            if keep_special {
                token.as_bytes().to_vec()
            } else {
                Vec::new()
            }
        }),
    }
}

/// The printable character that byte-level BPE files use for a byte.
///
/// Bytes that are visible in Latin-1 stand for themselves; the other 68 take the code points from 256 on, in order.
/// Source: the GPT-2 tokenizer.
pub(crate) fn byte_symbol(byte: u8) -> char {
    let visible = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if visible(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !visible(b)).count() as u32;
    char::from_u32(256 + rank).unwrap_or('\u{fffd}')
}

/// The vocabulary as a `tokenizer.json`.
pub(crate) fn tokenizer_json() -> Value {
    let vocab: serde_json::Map<String, Value> = (0..=255u8)
        .map(|byte| (byte_symbol(byte).to_string(), json!(byte)))
        .collect();
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(index, token)| {
            json!({
                "id": 256 + index, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true
            })
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []
        }
    })
}

/// The `tokenizer_config.json` that goes with the tokenizers made here.
pub(crate) fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_tokens_are_found_between_other_text() {
        assert_eq!(
            encode("a<|endoftext|>b<|pad|"),
            [97, 256, 98, 60, 124, 112, 97, 100, 124]
        );
        assert_eq!(encode("é<|im_start|><|im_end|>"), [0xc3, 0xa9, 258, 259]);
    }

    #[test]
    fn byte_symbols_are_distinct_and_known() {
        let all: std::collections::HashSet<char> = (0..=255).map(byte_symbol).collect();
        assert_eq!(all.len(), 256);
        assert_eq!(
            (byte_symbol(b'A'), byte_symbol(b' '), byte_symbol(b'\n')),
            ('A', 'Ġ', 'Ċ')
        );
    }
}
