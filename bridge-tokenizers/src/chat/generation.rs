//! `{% generation %}` blocks.
//!
//! The tag is an extension of `transformers`; the engine has no custom tags. So the template is rewritten: the tag becomes a
//! filter block, whose filter puts a marker around the text, and the markers are taken out of the result again.
//! A scope (`with`) inside keeps assignments in the block from leaking out, as in the original. One tag becomes two with
//! nothing between them, and the outer sides keep the signs for white space, so that trimming works as written.

use std::ops::Range;

/// Name of the filter that marks its input.
pub(super) const FILTER: &str = "_mark_generation";

/// The template with the generation blocks made filter blocks, or `None` if it has none.
pub(super) fn rewrite(source: &str) -> Option<String> {
    let mut result = String::with_capacity(source.len() + 64);
    let mut rest = source;
    let mut found = false;
    let mut raw = false;
    while let Some(start) = rest.find("{%").into_iter().chain(rest.find("{#")).min() {
        let (before, tag) = rest.split_at(start);
        result.push_str(before);
        if tag.starts_with("{#") && !raw {
            let len = tag.find("#}").map_or(tag.len(), |end| end + 2);
            result.push_str(&tag[..len]);
            rest = &tag[len..];
            continue;
        }
        let inside = &tag[2..];
        let (open, word, close, len) = parse_tag(inside);
        match word {
            "raw" => raw = true,
            "endraw" => raw = false,
            _ => {}
        }
        match word {
            "generation" if !raw => {
                found = true;
                result.push_str(&format!("{{%{open} filter {FILTER} %}}{{% with {close}%}}"));
                rest = &inside[len..];
            }
            "endgeneration" if !raw => {
                found = true;
                result.push_str(&format!("{{%{open} endwith %}}{{% endfilter {close}%}}"));
                rest = &inside[len..];
            }
            _ => {
                result.push_str(&tag[..2]);
                rest = inside;
            }
        }
    }
    result.push_str(rest);
    found.then_some(result)
}

/// Reads `- word -%}`: the sign at the front, the word, the sign at the end, and the length. The word is empty if the tag holds
/// more than one.
fn parse_tag(inside: &str) -> (&str, &str, &str, usize) {
    let other = ("", "", "", 0);
    let Some(end) = inside.find("%}") else {
        return other;
    };
    let body = &inside[..end];
    let open = if body.starts_with(['-', '+']) {
        &body[..1]
    } else {
        ""
    };
    let body = &body[open.len()..];
    let close = if body.ends_with(['-', '+']) {
        &body[body.len() - 1..]
    } else {
        ""
    };
    let word = body[..body.len() - close.len()].trim();
    if word.contains(char::is_whitespace) {
        other
    } else {
        (open, word, close, end + 2)
    }
}

/// A pair of characters around generated text that occurs nowhere else.
///
/// Unicode's noncharacters never stand for text, but a hostile message may hold some, so one is chosen that none of the
/// inputs contains; the same one opens and closes, told apart by what follows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Marker(char);

const OPEN: char = '(';
const CLOSE: char = ')';

impl Marker {
    /// A marker that none of the texts contains.
    pub(super) fn absent_from(texts: &[&str]) -> Option<Self> {
        ('\u{fdd0}'..='\u{fdef}')
            .find(|c| !texts.iter().any(|text| text.contains(*c)))
            .map(Self)
    }

    pub(super) fn wrap(self, text: &str) -> String {
        let Self(mark) = self;
        format!("{mark}{OPEN}{text}{mark}{CLOSE}")
    }

    /// Takes the markers out and returns the byte ranges they enclosed; of nested blocks, the outer ones.
    pub(super) fn extract(self, text: &str) -> (String, Vec<Range<usize>>) {
        let mut plain = String::with_capacity(text.len());
        let mut ranges = Vec::new();
        let mut depth = 0usize;
        let mut start = 0;
        let mut pieces = text.split(self.0);
        plain.push_str(pieces.next().unwrap_or_default());
        for piece in pieces {
            let rest = if let Some(rest) = piece.strip_prefix(OPEN) {
                if depth == 0 {
                    start = plain.len();
                }
                depth += 1;
                rest
            } else if let Some(rest) = piece.strip_prefix(CLOSE) {
                depth = depth.saturating_sub(1);
                if depth == 0 && plain.len() > start {
                    ranges.push(start..plain.len());
                }
                rest
            } else {
                piece
            };
            plain.push_str(rest);
        }
        (plain, ranges)
    }
}
