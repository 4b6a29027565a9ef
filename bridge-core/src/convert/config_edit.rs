//! Changing one value of a JSON file and no other byte.

use std::ops::Range;

/// Where the values of the keys of the outermost object lie in `json`, which must be valid JSON (Python's `NaN` and
/// `Infinity` may occur). Keys are compared as they are spelt.
fn top_level_values(json: &[u8]) -> Vec<(&[u8], Range<usize>)> {
    let mut values = Vec::new();
    let mut depth = 0usize;
    let mut key: Option<Range<usize>> = None;
    let mut value_start: Option<usize> = None;
    let mut at = 0;
    while at < json.len() {
        match json[at] {
            b'"' => {
                let end = string_end(json, at);
                if depth == 1 && key.is_none() {
                    key = Some(at + 1..end - 1);
                }
                at = end;
                continue;
            }
            b':' if depth == 1 && value_start.is_none() => value_start = Some(at + 1),
            close @ (b',' | b'}' | b']') => {
                if depth == 1
                    && let (Some(key), Some(start)) = (key.take(), value_start.take())
                {
                    values.push((&json[key], trimmed(json, start..at)));
                }
                depth -= usize::from(close != b',' && depth > 0);
            }
            b'{' | b'[' => depth += 1,
            _ => {}
        }
        at += 1;
    }
    values
}

/// One past the closing quote of the string that opens at `open`.
fn string_end(json: &[u8], open: usize) -> usize {
    let mut at = open + 1;
    while at < json.len() && json[at] != b'"' {
        at += if json[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(json.len())
}

fn trimmed(json: &[u8], range: Range<usize>) -> Range<usize> {
    let text = &json[range.clone()];
    let start = range.start + (text.len() - text.trim_ascii_start().len());
    start..start + text.trim_ascii().len()
}

/// `json` with `value` (a JSON text) in place of the value of each of `keys` that the outermost object has; `None` if
/// it has none of them.
pub(super) fn replace_values(json: &[u8], keys: &[&str], value: &str) -> Option<Vec<u8>> {
    let wanted = |key: &[u8]| keys.iter().any(|wanted| wanted.as_bytes() == key);
    let ranges: Vec<Range<usize>> = top_level_values(json)
        .into_iter()
        .filter(|(key, _)| wanted(key))
        .map(|(_, range)| range)
        .collect();
    if ranges.is_empty() {
        return None;
    }
    let mut edited = Vec::with_capacity(json.len() + value.len());
    let mut kept = 0;
    for range in ranges {
        edited.extend_from_slice(&json[kept..range.start]);
        edited.extend_from_slice(value.as_bytes());
        kept = range.end;
    }
    edited.extend_from_slice(&json[kept..]);
    Some(edited)
}

/// `json` with a key more at the end of the outermost object, which must hold at least one already.
pub(super) fn add_value(json: &[u8], key: &str, value: &str) -> Vec<u8> {
    let Some((_, last)) = top_level_values(json).pop() else {
        return json.to_vec();
    };
    let mut edited = json[..last.end].to_vec();
    edited.extend_from_slice(format!(",\n  \"{key}\": {value}").as_bytes());
    edited.extend_from_slice(&json[last.end..]);
    edited
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    #[track_caller]
    fn check(json: &str, expected: Option<&str>) {
        let edited = replace_values(json.as_bytes(), &["dtype", "torch_dtype"], "\"float32\"");
        assert_eq!(
            edited
                .map(|bytes| String::from_utf8(bytes).unwrap())
                .as_deref(),
            expected
        );
    }

    #[test]
    fn only_the_outermost_value_changes() {
        check("{}", None);
        check(r#"{"a": 1}"#, None);
        check(
            r#"{ "dtype" : "bfloat16" , "a":[1, {"dtype": 2}]}"#,
            Some(r#"{ "dtype" : "float32" , "a":[1, {"dtype": 2}]}"#),
        );
        check(
            r#"{"x":{"dtype":"a"},"torch_dtype":null}"#,
            Some(r#"{"x":{"dtype":"a"},"torch_dtype":"float32"}"#),
        );
        check(
            r#"{"s":"\"dtype\": \\","dtype":"a","torch_dtype":"b"}"#,
            Some(r#"{"s":"\"dtype\": \\","dtype":"float32","torch_dtype":"float32"}"#),
        );
        check(
            "{\n  \"dtype\": \"a\",\n  \"b\": [NaN, -Infinity]\n}\n",
            Some("{\n  \"dtype\": \"float32\",\n  \"b\": [NaN, -Infinity]\n}\n"),
        );
        check(
            r#"{"dtype": {"a": [1, 2]}, "z": "dtype"}"#,
            Some(r#"{"dtype": "float32", "z": "dtype"}"#),
        );
        check(r#"{"z": "dtype", "y": 1}"#, None);
    }

    proptest! {
        /// However the file is laid out, the edited text parses to the same object with the new value.
        #[test]
        fn edits_agree_with_an_edit_of_the_parsed_value(
            pairs in prop::collection::vec(("[a-c:,{}\"\\\\]{0,3}", ".{0,6}", prop::option::of(0u8..9)), 0..5),
            pretty in any::<bool>(),
        ) {
            let mut object = serde_json::Map::new();
            for (key, text, number) in pairs {
                object.insert(key, number.map_or(json!(text), |n| json!([n, {"dtype": text}])));
            }
            object.insert("dtype".into(), json!("bfloat16"));
            let value = Value::Object(object);
            let text = if pretty { format!("{value:#}") } else { value.to_string() };
            let edited = replace_values(text.as_bytes(), &["dtype"], "\"float32\"").unwrap();
            let mut expected = value;
            expected["dtype"] = json!("float32");
            prop_assert_eq!(serde_json::from_slice::<Value>(&edited).unwrap(), expected);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = replace_values(&bytes, &["a"], "1");
        }
    }
}
