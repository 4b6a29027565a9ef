//! YAML of bounded size as a JSON value, and back.

use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};
use serde_json::{Map, Value};

use crate::checkpoint::quote;

/// Largest file that is read, in bytes. A whole run's config has some 30 KB.
pub const MAX_YAML_BYTES: usize = 4 << 20;

/// Most values in a document, each as often as aliases repeat it.
const MAX_VALUES: usize = 200_000;
/// Deepest nesting.
const MAX_DEPTH: usize = 32;

/// Reads one YAML document. Values are those of JSON: other tags than that of text, merge keys and keys that repeat are
/// refused.
///
/// # Errors
/// What is wrong with it, or which limit it passes.
pub(super) fn parse(bytes: &[u8]) -> Result<Value, String> {
    if bytes.len() > MAX_YAML_BYTES {
        return Err(format!(
            "it has {} bytes, more than the {MAX_YAML_BYTES} that are read",
            bytes.len()
        ));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not valid UTF-8")?;
    let mut builder = Builder::default();
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| error.to_string())?;
        let line = span.start.line();
        let took = builder.take(event);
        took.map_err(|problem| format!("{problem}, at line {line}"))?;
    }
    builder
        .document
        .map(|node| node.value)
        .ok_or_else(|| "it is empty".to_owned())
}

/// A value with what it counts for.
#[derive(Clone)]
struct Node {
    value: Value,
    /// Values in it, itself included.
    count: usize,
    /// Levels of nesting below it.
    depth: usize,
}

/// A container whose end has not come yet.
struct Open {
    /// Number of its anchor, 0 for none.
    anchor: usize,
    items: Items,
    count: usize,
    depth: usize,
}

enum Items {
    Sequence(Vec<Value>),
    /// The entries, and the key whose value comes next.
    Mapping(Map<String, Value>, Option<String>),
}

/// Puts a document together from its events.
#[derive(Default)]
struct Builder {
    open: Vec<Open>,
    anchors: HashMap<usize, Node>,
    values: usize,
    document: Option<Node>,
}

impl Builder {
    fn take(&mut self, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let value = match tag {
                    None => scalar_value(&text, style),
                    Some(tag) if tag.is_yaml_core_schema() && tag.suffix == "str" => {
                        Value::from(text.as_ref())
                    }
                    Some(tag) => return Err(refused_tag(&tag)),
                };
                let node = Node {
                    value,
                    count: 1,
                    depth: 0,
                };
                self.put(node, anchor)
            }
            Event::SequenceStart(anchor, tag) => {
                self.begin(anchor, tag.as_deref(), Items::Sequence(Vec::new()))
            }
            Event::MappingStart(anchor, tag) => {
                self.begin(anchor, tag.as_deref(), Items::Mapping(Map::new(), None))
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let Some(open) = self.open.pop() else {
                    return Err("an end without a beginning".to_owned());
                };
                let value = match open.items {
                    Items::Sequence(items) => Value::Array(items),
                    Items::Mapping(entries, _) => Value::Object(entries),
                };
                let node = Node {
                    value,
                    count: open.count,
                    depth: open.depth,
                };
                self.put(node, open.anchor)
            }
            Event::Alias(anchor) => match self.anchors.get(&anchor) {
                Some(node) => {
                    let count = node.count;
                    self.charge(count)?;
                    let node = self.anchors[&anchor].clone();
                    self.put(node, 0)
                }
                None => Err("an alias of a value that contains it".to_owned()),
            },
            Event::DocumentStart(_) if self.document.is_some() => {
                Err("a second document".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn begin(&mut self, anchor: usize, tag: Option<&Tag>, items: Items) -> Result<(), String> {
        if let Some(tag) = tag {
            return Err(refused_tag(tag));
        }
        if self.open.len() >= MAX_DEPTH {
            return Err(format!("more than {MAX_DEPTH} levels of nesting"));
        }
        self.open.push(Open {
            anchor,
            items,
            count: 1,
            depth: 0,
        });
        Ok(())
    }

    fn charge(&mut self, count: usize) -> Result<(), String> {
        self.values = self.values.saturating_add(count);
        if self.values > MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} values"));
        }
        Ok(())
    }

    /// Puts a finished value where it belongs.
    fn put(&mut self, node: Node, anchor: usize) -> Result<(), String> {
        self.charge(1)?;
        if anchor != 0 {
            self.charge(node.count)?;
            self.anchors.insert(anchor, node.clone());
        }
        if self.open.len() + node.depth > MAX_DEPTH {
            return Err(format!("more than {MAX_DEPTH} levels of nesting"));
        }
        let Some(open) = self.open.last_mut() else {
            self.document = Some(node);
            return Ok(());
        };
        open.count += node.count;
        open.depth = open.depth.max(node.depth + 1);
        match &mut open.items {
            Items::Sequence(items) => items.push(node.value),
            Items::Mapping(entries, key) => match key.take() {
                Some(key) => {
                    if entries.insert(key.clone(), node.value).is_some() {
                        return Err(format!("key {} twice", quote(&key)));
                    }
                }
                None => {
                    *key = Some(match node.value {
                        Value::String(text) if text == "<<" => {
                            return Err("a merge key".to_owned());
                        }
                        Value::String(text) => text,
                        Value::Array(_) | Value::Object(_) => {
                            return Err("a key that is no scalar".to_owned());
                        }
                        other => other.to_string(),
                    });
                }
            },
        }
        Ok(())
    }
}

fn refused_tag(tag: &Tag) -> String {
    format!(
        "tag {} is not one that is read",
        quote(&format!("{}{}", tag.handle, tag.suffix))
    )
}

/// What a scalar stands for: where it is in no quotes, null, a flag or a finite number if it is spelt like one.
fn scalar_value(text: &str, style: ScalarStyle) -> Value {
    if style != ScalarStyle::Plain {
        return text.into();
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return true.into(),
        "false" | "False" | "FALSE" => return false.into(),
        _ => {}
    }
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return text.into();
    }
    if let Ok(number) = text.parse::<u64>() {
        return number.into();
    }
    if let Ok(number) = text.parse::<i64>() {
        return number.into();
    }
    let number = text
        .parse::<f64>()
        .ok()
        .and_then(serde_json::Number::from_f64);
    number.map_or_else(|| text.into(), Value::Number)
}

/// Writes a value so that YAML 1.1 (PyYAML) and 1.2 read it alike: text in quotes, and floats with a point.
pub(super) fn write(value: &Value) -> String {
    let mut out = String::new();
    block(value, 0, &mut out);
    out
}

fn block(value: &Value, indent: usize, out: &mut String) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, value) in map {
                push_line(
                    indent,
                    &format!("{}:", scalar(&Value::from(key.as_str()))),
                    value,
                    out,
                );
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                push_line(indent, "-", item, out);
            }
        }
        _ => {
            out.push_str(&scalar(value));
            out.push('\n');
        }
    }
}

fn push_line(indent: usize, start: &str, value: &Value, out: &mut String) {
    out.push_str(&" ".repeat(indent));
    out.push_str(start);
    let nested = match value {
        Value::Object(map) => !map.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if nested {
        out.push('\n');
        block(value, indent + 2, out);
    } else {
        out.push(' ');
        out.push_str(&scalar(value));
        out.push('\n');
    }
}

fn scalar(value: &Value) -> String {
    match value {
        // Words that no version of YAML takes for anything but text.
        Value::String(text) if is_plain(text) => text.clone(),
        Value::Number(number) if number.is_f64() => {
            let text = number.to_string();
            match text.split_once('e') {
                Some((digits, exponent)) => {
                    let point = if digits.contains('.') { "" } else { ".0" };
                    let sign = if exponent.starts_with(['-', '+']) {
                        ""
                    } else {
                        "+"
                    };
                    format!("{digits}{point}e{sign}{exponent}")
                }
                None => text,
            }
        }
        // A JSON scalar or an empty container.
        other => other.to_string(),
    }
}

fn is_plain(text: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.');
    let reserved = [
        "y", "n", "yes", "no", "on", "off", "true", "false", "null", "inf", "nan",
    ];
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(word)
        && !reserved.contains(&text.to_ascii_lowercase().as_str())
}
