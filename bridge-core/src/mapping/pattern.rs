//! Name patterns with captures: `layers.{l}.mlp.{p:gate|up|down}_proj.weight`.

use std::fmt;

/// The text that each capture of a pattern matched, in the order of the pattern.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Captures(Vec<(String, String)>);

impl Captures {
    /// The text of capture `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, text)| text.as_str())
    }

    /// The number of capture `name`.
    pub fn number(&self, name: &str) -> Option<usize> {
        self.get(name)?.parse().ok()
    }

    /// The same captures without those that `keep` rejects.
    pub(super) fn filtered(&self, keep: impl Fn(&str) -> bool) -> Captures {
        Captures(
            self.0
                .iter()
                .filter(|(name, _)| keep(name))
                .cloned()
                .collect(),
        )
    }

    /// The same captures and one more.
    pub(super) fn with(&self, name: &str, text: String) -> Captures {
        let mut all = self.0.clone();
        all.push((name.to_owned(), text));
        Captures(all)
    }
}

/// A tensor name with captures.
///
/// - `{l}`, `{e}`, `{i}`, `{n}` match a decimal number without leading zeros;
/// - `{p:gate|up|down}` matches one of the words;
/// - any other `{name}` matches one or more characters other than a dot;
/// - `{name*}` matches anything, dots included.
///
/// A name that occurs twice must match the same text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    segments: Vec<Segment>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    Literal(String),
    Capture { name: String, kind: Kind },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Number,
    Word,
    Rest,
    OneOf(Vec<String>),
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Pattern {
    /// Parses a pattern.
    ///
    /// # Errors
    /// What is wrong with `text`, in words: an unclosed brace or an empty capture.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut segments = Vec::new();
        let mut rest = text;
        while let Some(open) = rest.find('{') {
            let (literal, tail) = rest.split_at(open);
            if !literal.is_empty() {
                segments.push(Segment::Literal(literal.to_owned()));
            }
            let close = tail
                .find('}')
                .ok_or_else(|| format!("pattern `{text}` has an unclosed brace"))?;
            segments.push(parse_capture(&tail[1..close]).ok_or_else(|| {
                format!(
                    "pattern `{text}` has a capture `{}` without a name or words",
                    &tail[..=close]
                )
            })?);
            rest = &tail[close + 1..];
        }
        if !rest.is_empty() {
            segments.push(Segment::Literal(rest.to_owned()));
        }
        Ok(Self {
            text: text.to_owned(),
            segments,
        })
    }

    /// The names of the captures, each once.
    pub fn capture_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for segment in &self.segments {
            if let Segment::Capture { name, .. } = segment
                && !names.contains(&name.as_str())
            {
                names.push(name);
            }
        }
        names
    }

    /// Matches a whole name.
    pub fn matches(&self, name: &str) -> Option<Captures> {
        let mut captures = Captures::default();
        match_from(&self.segments, name, &mut captures).then_some(captures)
    }

    /// The name that `captures` lead to; `None` if one of the pattern's captures is not among them.
    pub fn fill(&self, captures: &Captures) -> Option<String> {
        let mut name = String::with_capacity(self.text.len());
        for segment in &self.segments {
            match segment {
                Segment::Literal(text) => name.push_str(text),
                Segment::Capture { name: capture, .. } => name.push_str(captures.get(capture)?),
            }
        }
        Some(name)
    }
}

fn parse_capture(inner: &str) -> Option<Segment> {
    let (name, kind) = if let Some((name, words)) = inner.split_once(':') {
        let words: Vec<String> = words.split('|').map(str::to_owned).collect();
        if words.iter().any(String::is_empty) {
            return None;
        }
        (name, Kind::OneOf(words))
    } else if let Some(name) = inner.strip_suffix('*') {
        (name, Kind::Rest)
    } else if matches!(inner, "l" | "e" | "i" | "n") {
        (inner, Kind::Number)
    } else {
        (inner, Kind::Word)
    };
    (!name.is_empty()).then(|| Segment::Capture {
        name: name.to_owned(),
        kind,
    })
}

/// Matches `segments` against all of `text`, longest capture first, adding to `captures` on success only.
///
/// Depth is the number of segments, which comes from the program; the work is bounded by the length of the name to the
/// power of the number of `Word` and `Rest` captures in one pattern, of which there are at most a few.
fn match_from(segments: &[Segment], text: &str, captures: &mut Captures) -> bool {
    let Some((first, others)) = segments.split_first() else {
        return text.is_empty();
    };
    let (name, kind) = match first {
        Segment::Literal(literal) => {
            return text
                .strip_prefix(literal.as_str())
                .is_some_and(|rest| match_from(others, rest, captures));
        }
        Segment::Capture { name, kind } => (name, kind),
    };
    let mut try_length = |length: usize| {
        let (taken, rest) = text.split_at(length);
        let known = captures.get(name).map(|earlier| earlier == taken);
        if known == Some(false) {
            return false;
        }
        if known.is_none() {
            captures.0.push((name.clone(), taken.to_owned()));
        }
        let matched = match_from(others, rest, captures);
        if !matched && known.is_none() {
            captures.0.pop();
        }
        matched
    };
    match kind {
        Kind::Number => {
            let digits = text.bytes().take_while(u8::is_ascii_digit).count();
            let plain = digits == 1 || (digits > 1 && digits < 10 && !text.starts_with('0'));
            plain && try_length(digits)
        }
        Kind::OneOf(words) => words
            .iter()
            .any(|word| text.starts_with(word.as_str()) && try_length(word.len())),
        Kind::Word | Kind::Rest => {
            let limit = if *kind == Kind::Word {
                text.find('.').unwrap_or(text.len())
            } else {
                text.len()
            };
            let mut lengths: Vec<usize> = text[..limit]
                .char_indices()
                .map(|(at, c)| at + c.len_utf8())
                .collect();
            lengths.reverse();
            lengths.into_iter().any(try_length)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pattern: &str, name: &str, expected: Option<&[(&str, &str)]>) {
        let found = Pattern::parse(pattern).unwrap().matches(name);
        let expected = expected.map(|pairs| {
            Captures(
                pairs
                    .iter()
                    .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                    .collect(),
            )
        });
        assert_eq!(found, expected, "{pattern} against {name}");
        if let Some(captures) = found {
            assert_eq!(
                Pattern::parse(pattern).unwrap().fill(&captures).as_deref(),
                Some(name)
            );
        }
    }

    #[test]
    fn names_match_and_fill() {
        check("norm.weight", "norm.weight", Some(&[]));
        check("norm.weight", "norm.weight2", None);
        check("layers.{l}.x", "layers.12.x", Some(&[("l", "12")]));
        check("layers.{l}.x", "layers.0.x", Some(&[("l", "0")]));
        check("layers.{l}.x", "layers.012.x", None);
        check("layers.{l}.x", "layers..x", None);
        check("layers.{l}.x", "layers.-1.x", None);
        check("layers.{l}.x", "layers.99999999999999999999999.x", None);
        check("a.{p}_proj.weight", "a.q_proj.weight", Some(&[("p", "q")]));
        check(
            "a.{p}_proj.weight",
            "a.q_proj_proj.weight",
            Some(&[("p", "q_proj")]),
        );
        check("a.{p}_proj.weight", "a.q.r_proj.weight", None);
        check("a.{p:q|k}_proj", "a.k_proj", Some(&[("p", "k")]));
        check("a.{p:q|k}_proj", "a.v_proj", None);
        check("mtp.{rest*}", "mtp.a.b.c", Some(&[("rest", "a.b.c")]));
        check("{x}.{x}", "a.a", Some(&[("x", "a")]));
        check("{x}.{x}", "a.b", None);
        check("é{x}", "éü", Some(&[("x", "ü")]));
    }

    #[test]
    fn malformed_patterns_are_refused() {
        for text in ["layers.{l", "{}", "{:a|b}", "{p:a||b}", "{*}"] {
            assert!(Pattern::parse(text).is_err(), "{text}");
        }
    }
}
