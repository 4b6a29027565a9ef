//! Typed configuration values: how each type of key reads from TOML and from the command line.

use toml::Value;

/// What a key accepts. The schema of the whole configuration is a list of these, which is what types an override such as
/// `train.train_iters=20` and names the choices in an error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number from 0 up.
    Integer,
    /// A finite number.
    Float,
    /// Text.
    String,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A list of texts.
    StringList,
    /// A table of further keys that this crate does not interpret.
    Table,
    /// A whole number or a list of whole numbers.
    Integers,
}

impl Kind {
    /// The kind in words, for messages.
    pub fn describe(self) -> String {
        match self {
            Kind::Bool => "true or false".into(),
            Kind::Integer => "a whole number from 0 up".into(),
            Kind::Float => "a number".into(),
            Kind::String => "a text".into(),
            Kind::Choice(names) => format!("one of {}", names.join(", ")),
            Kind::StringList => "a list of texts".into(),
            Kind::Table => "a table".into(),
            Kind::Integers => "a whole number or a list of them".into(),
        }
    }

    /// Reads the right-hand side of a command-line override. Text needs no quotes and lists no brackets:
    /// `data.data_path=a,b`.
    ///
    /// # Errors
    /// A sentence that says what was expected.
    pub fn parse(self, text: &str) -> Result<Value, String> {
        let expected = || format!("`{text}` is not {}", self.describe());
        match self {
            Kind::Bool => match text {
                "true" => Ok(Value::Boolean(true)),
                "false" => Ok(Value::Boolean(false)),
                _ => Err(expected()),
            },
            Kind::Integer => parse_integer(text).ok_or_else(expected),
            Kind::Float => parse_float(text).ok_or_else(expected),
            Kind::String | Kind::Choice(_) => Ok(Value::String(unquote(text).to_owned())),
            Kind::StringList => parse_list(text, |item| Some(Value::String(item.to_owned()))).ok_or_else(expected),
            Kind::Integers => parse_integer(text).or_else(|| parse_list(text, parse_integer)).ok_or_else(expected),
            Kind::Table => parse_toml(text).filter(Value::is_table).ok_or_else(|| {
                format!("`{text}` is not a table; write one as {{ name = value }} or set its keys one by one")
            }),
        }
    }
}

/// Reads a value without knowing its type, for keys inside a [`Kind::Table`]: a TOML value, else plain text.
pub(crate) fn parse_untyped(text: &str) -> Value {
    parse_toml(text).unwrap_or_else(|| Value::String(text.to_owned()))
}

fn parse_toml(text: &str) -> Option<Value> {
    let table: toml::Table = format!("value = {text}").parse().ok()?;
    // A line break in the text could smuggle further keys in.
    (table.len() == 1).then(|| table.into_iter().next().expect("one entry").1)
}

fn parse_integer(text: &str) -> Option<Value> {
    text.replace('_', "")
        .parse::<i64>()
        .ok()
        .filter(|n| *n >= 0)
        .map(Value::Integer)
}

fn parse_float(text: &str) -> Option<Value> {
    text.replace('_', "")
        .parse::<f64>()
        .ok()
        .filter(|x| x.is_finite())
        .map(Value::Float)
}

fn parse_list(text: &str, item: impl Fn(&str) -> Option<Value>) -> Option<Value> {
    if text.trim_start().starts_with('[') {
        return parse_toml(text).filter(Value::is_array);
    }
    text.split(',')
        .map(|part| item(unquote(part.trim())))
        .collect::<Option<Vec<_>>>()
        .map(Value::Array)
}

fn unquote(text: &str) -> &str {
    for quote in ['"', '\''] {
        if let Some(inner) = text.strip_prefix(quote).and_then(|t| t.strip_suffix(quote)) {
            return inner;
        }
    }
    text
}

/// A type that a configuration key can have.
pub trait ConfigValue: Sized {
    /// What the key accepts.
    const KIND: Kind;

    /// Reads the value from TOML.
    ///
    /// # Errors
    /// A sentence that says what was found and what was expected.
    fn from_toml(value: &Value) -> Result<Self, String>;
}

/// `found` against the kind, as a sentence.
fn mismatch(found: &Value, kind: Kind) -> String {
    let shown = match found {
        Value::Table(_) => "a table".to_owned(),
        other => format!("`{}`", other.to_string().trim()),
    };
    format!("{shown} is not {}", kind.describe())
}

impl ConfigValue for bool {
    const KIND: Kind = Kind::Bool;
    fn from_toml(value: &Value) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| mismatch(value, Self::KIND))
    }
}

impl ConfigValue for u64 {
    const KIND: Kind = Kind::Integer;
    fn from_toml(value: &Value) -> Result<Self, String> {
        value
            .as_integer()
            .and_then(|n| n.try_into().ok())
            .ok_or_else(|| mismatch(value, Self::KIND))
    }
}

impl ConfigValue for usize {
    const KIND: Kind = Kind::Integer;
    fn from_toml(value: &Value) -> Result<Self, String> {
        value
            .as_integer()
            .and_then(|n| n.try_into().ok())
            .ok_or_else(|| mismatch(value, Self::KIND))
    }
}

impl ConfigValue for f64 {
    const KIND: Kind = Kind::Float;
    fn from_toml(value: &Value) -> Result<Self, String> {
        let number = value
            .as_float()
            .or_else(|| value.as_integer().map(|n| n as f64));
        number
            .filter(|x| x.is_finite())
            .ok_or_else(|| mismatch(value, Self::KIND))
    }
}

impl ConfigValue for String {
    const KIND: Kind = Kind::String;
    fn from_toml(value: &Value) -> Result<Self, String> {
        value
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| mismatch(value, Self::KIND))
    }
}

impl ConfigValue for Vec<String> {
    const KIND: Kind = Kind::StringList;
    fn from_toml(value: &Value) -> Result<Self, String> {
        match value {
            // One text stands for a list of one.
            Value::String(one) => Ok(vec![one.clone()]),
            // A weight among paths may be written as the number it is.
            Value::Array(items) => items
                .iter()
                .map(|item| match item {
                    Value::Integer(_) | Value::Float(_) => Ok(item.to_string()),
                    other => String::from_toml(other),
                })
                .collect(),
            _ => Err(mismatch(value, Self::KIND)),
        }
    }
}

impl ConfigValue for Vec<u64> {
    const KIND: Kind = Kind::Integers;
    fn from_toml(value: &Value) -> Result<Self, String> {
        match value {
            Value::Array(items) => items.iter().map(u64::from_toml).collect(),
            one => u64::from_toml(one)
                .map(|n| vec![n])
                .map_err(|_| mismatch(value, Self::KIND)),
        }
    }
}

/// A key that may be left out.
impl<T: ConfigValue> ConfigValue for Option<T> {
    const KIND: Kind = T::KIND;
    fn from_toml(value: &Value) -> Result<Self, String> {
        T::from_toml(value).map(Some)
    }
}

impl ConfigValue for toml::Table {
    const KIND: Kind = Kind::Table;
    fn from_toml(value: &Value) -> Result<Self, String> {
        value
            .as_table()
            .cloned()
            .ok_or_else(|| mismatch(value, Self::KIND))
    }
}

/// Defines an enum that is one word in a configuration: its names in one place, with `Display`, `FromStr`, `Serialize`
/// and [`ConfigValue`].
macro_rules! choice {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_meta])* $variant,)+ }

        impl $name {
            /// Every name, as written in a configuration.
            pub const NAMES: &'static [&'static str] = &[$($text),+];

            /// The name as written in a configuration.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err($crate::config::unknown_choice(text, Self::NAMES)),
                }
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl $crate::config::ConfigValue for $name {
            const KIND: $crate::config::Kind = $crate::config::Kind::Choice(Self::NAMES);

            fn from_toml(value: &toml::Value) -> Result<Self, String> {
                String::from_toml(value)?.parse()
            }
        }
    };
}
pub(crate) use choice;

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn parses(kind: Kind, text: &str, expected: &str) {
        let value = kind.parse(text).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(value.to_string(), expected);
    }

    #[test]
    fn overrides_are_typed_by_the_kind_and_not_by_their_looks() {
        parses(Kind::Integer, "20", "20");
        parses(Kind::Integer, "1_000_000", "1000000");
        parses(Kind::Float, "3e-4", "0.0003");
        parses(Kind::Float, "1", "1.0");
        parses(Kind::String, "20", "\"20\"");
        parses(Kind::String, "true", "\"true\"");
        parses(Kind::String, "a/b=c", "\"a/b=c\"");
        parses(Kind::String, "\"quoted text\"", "\"quoted text\"");
        parses(Kind::StringList, "a, b", "[\"a\", \"b\"]");
        parses(Kind::StringList, "[\"a\", \"b,c\"]", "[\"a\", \"b,c\"]");
        parses(Kind::Integers, "2", "2");
        parses(Kind::Integers, "2,3", "[2, 3]");
    }

    #[test]
    fn wrong_values_say_what_was_expected() {
        let fails = |kind: Kind, text: &str, part: &str| {
            let message = kind.parse(text).expect_err(text);
            assert!(message.contains(part), "{message}");
        };
        fails(Kind::Integer, "-3", "a whole number from 0 up");
        fails(Kind::Integer, "1.5", "a whole number");
        fails(Kind::Float, "nan", "a number");
        fails(Kind::Bool, "yes", "true or false");
        fails(Kind::Table, "3", "a table");
        fails(Kind::Table, "{}\nother = 1", "a table");
    }
}
