//! JSON as Python's `json.dumps` writes it: the `tojson` filter of chat templates.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

use super::python;

/// The options of `json.dumps` that chat templates use.
#[derive(Clone, Debug, Default)]
pub(super) struct Style {
    /// Escape everything beyond ASCII.
    pub(super) ensure_ascii: bool,
    /// What one level is indented by; `None` writes everything on one line.
    pub(super) indent: Option<String>,
    /// Between items, and between key and value.
    pub(super) separators: Option<(String, String)>,
    /// Order keys by name.
    pub(super) sort_keys: bool,
}

pub(super) fn dumps(value: &Value, style: &Style) -> Result<String, Error> {
    let mut out = String::new();
    write(&mut out, value, style, 0)?;
    Ok(out)
}

/// Deeper values are refused: they come from outside and would exhaust the stack.
const MAX_DEPTH: usize = 200;

fn write(out: &mut String, value: &Value, style: &Style, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("tojson: nested deeper than {MAX_DEPTH} levels"),
        ));
    }
    match value.kind() {
        ValueKind::Undefined => Err(Error::new(
            ErrorKind::UndefinedError,
            "tojson: the value is undefined",
        )),
        ValueKind::None => {
            out.push_str("null");
            Ok(())
        }
        ValueKind::Bool => {
            out.push_str(if value.is_true() { "true" } else { "false" });
            Ok(())
        }
        ValueKind::Number => {
            out.push_str(&number(value));
            Ok(())
        }
        ValueKind::String => {
            string(out, value.as_str().unwrap_or_default(), style.ensure_ascii);
            Ok(())
        }
        ValueKind::Map => {
            let mut keys = value.try_iter()?.collect::<Vec<_>>();
            if style.sort_keys {
                keys.sort();
            }
            let entries = keys
                .into_iter()
                .map(|key| value.get_item(&key).map(|item| (Some(key), item)));
            container(
                out,
                ['{', '}'],
                entries.collect::<Result<_, _>>()?,
                style,
                depth,
            )
        }
        ValueKind::Seq | ValueKind::Iterable => container(
            out,
            ['[', ']'],
            value.try_iter()?.map(|item| (None, item)).collect(),
            style,
            depth,
        ),
        other => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("tojson: {other} cannot be written as JSON"),
        )),
    }
}

fn container(
    out: &mut String,
    brackets: [char; 2],
    entries: Vec<(Option<Value>, Value)>,
    style: &Style,
    depth: usize,
) -> Result<(), Error> {
    let default_item = if style.indent.is_some() { "," } else { ", " };
    let (between, colon) = style
        .separators
        .as_ref()
        .map_or((default_item, ": "), |(a, b)| (a, b));
    let new_line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    };
    out.push(brackets[0]);
    let empty = entries.is_empty();
    for (index, (key, item)) in entries.into_iter().enumerate() {
        if index > 0 {
            out.push_str(between);
        }
        new_line(out, depth + 1);
        if let Some(key) = key {
            string(out, &key_text(&key)?, style.ensure_ascii);
            out.push_str(colon);
        }
        write(out, &item, style, depth + 1)?;
    }
    if !empty {
        new_line(out, depth);
    }
    out.push(brackets[1]);
    Ok(())
}

fn key_text(key: &Value) -> Result<String, Error> {
    Ok(match key.kind() {
        ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
        ValueKind::None => "null".into(),
        ValueKind::Bool => if key.is_true() { "true" } else { "false" }.into(),
        ValueKind::Number => number(key),
        other => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("tojson: {other} cannot be a key"),
            ));
        }
    })
}

fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => {
            if float.is_nan() {
                "NaN".into()
            } else if float.is_infinite() {
                if float > 0.0 { "Infinity" } else { "-Infinity" }.into()
            } else {
                python::float(float)
            }
        }
        _ => value.to_string(),
    }
}

fn string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' => out.push_str(&format!("\\u{:04x}", c as u32)),
            c if ensure_ascii && !(' '..='\u{7e}').contains(&c) && c != '\u{7f}' => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}
