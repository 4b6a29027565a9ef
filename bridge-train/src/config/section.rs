//! The macro that declares a section: its keys, their types, defaults and documentation in one table, from which the
//! typed struct, the schema and the reader all come.

use toml::Table;

use super::value::{ConfigValue, Kind};

/// One key of the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Name inside its section.
    pub name: &'static str,
    /// What it accepts.
    pub kind: Kind,
    /// What it means, in one or a few sentences.
    pub doc: &'static str,
}

/// One section of the configuration.
#[derive(Clone, Copy, Debug)]
pub struct SectionSchema {
    /// Name of the TOML table.
    pub name: &'static str,
    /// Its keys, in the order they are documented and printed.
    pub keys: &'static [Key],
}

/// Something wrong with one key.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// `section.key`.
    pub key: String,
    /// Which layer set the key, if any did.
    pub origin: Option<String>,
    /// What is wrong, what was expected and what to do.
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.origin {
            Some(origin) => write!(f, "{} (set by {origin}): {}", self.key, self.message),
            None => write!(f, "{}: {}", self.key, self.message),
        }
    }
}

/// Collects what is wrong, so that a user sees all of it at once.
#[derive(Clone, Debug, Default)]
pub struct Problems {
    found: Vec<Problem>,
}

impl Problems {
    /// Adds a problem with `section.key`.
    pub fn add(&mut self, key: impl Into<String>, message: impl Into<String>) {
        self.found.push(Problem {
            key: key.into(),
            origin: None,
            message: message.into(),
        });
    }

    /// Adds a problem unless `holds`.
    pub fn require(&mut self, holds: bool, key: &str, message: impl FnOnce() -> String) {
        if !holds {
            self.add(key, message());
        }
    }

    /// How many were found.
    pub(crate) fn len(&self) -> usize {
        self.found.len()
    }

    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// What was found, in order.
    pub fn into_vec(self) -> Vec<Problem> {
        self.found
    }
}

/// A section that reads itself from TOML.
pub trait Section: Sized {
    /// Its name and keys.
    const SCHEMA: SectionSchema;

    /// Reads the section. A missing key takes its default; a required one that is missing, or a value of the wrong type,
    /// is a problem (and the field a placeholder, so that reading can go on to find more).
    fn read(table: &Table, problems: &mut Problems) -> Self;
}

/// Reads one key; `None` where it is absent or of the wrong type (which is a problem).
pub(crate) fn read_key<T: ConfigValue>(
    section: &str,
    key: &str,
    table: &Table,
    problems: &mut Problems,
) -> Option<T> {
    match T::from_toml(table.get(key)?) {
        Ok(value) => Some(value),
        Err(message) => {
            problems.add(format!("{section}.{key}"), message);
            None
        }
    }
}

/// Declares a section: `key: type = default` or, for a key that must be given, `key: type`.
macro_rules! section {
    (
        $(#[$meta:meta])*
        pub struct $name:ident($section:literal) {
            $($(#[doc = $doc:literal])+ $field:ident: $type:ty $(= $default:expr)?,)+
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, serde::Serialize)]
        pub struct $name { $($(#[doc = $doc])+ pub $field: $type,)+ }

        impl $crate::config::Section for $name {
            const SCHEMA: $crate::config::SectionSchema = $crate::config::SectionSchema {
                name: $section,
                keys: &[$($crate::config::Key {
                    name: stringify!($field),
                    kind: <$type as $crate::config::ConfigValue>::KIND,
                    doc: concat!($($doc),+),
                }),+],
            };

            fn read(table: &toml::Table, problems: &mut $crate::config::Problems) -> Self {
                Self {
                    $($field: {
                        let given = $crate::config::section::read_key($section, stringify!($field), table, problems);
                        section!(@fill given, $section, $field, $type, table, problems $(, $default)?)
                    },)+
                }
            }
        }
    };
    (@fill $given:ident, $section:literal, $field:ident, $type:ty, $table:ident, $problems:ident, $default:expr) => {
        $given.unwrap_or_else(|| $default)
    };
    (@fill $given:ident, $section:literal, $field:ident, $type:ty, $table:ident, $problems:ident) => {
        $given.unwrap_or_else(|| {
            if !$table.contains_key(stringify!($field)) {
                $problems.add(
                    concat!($section, ".", stringify!($field)),
                    format!("must be set: {}", <$type as $crate::config::ConfigValue>::KIND.describe()),
                );
            }
            <$type>::default()
        })
    };
}
pub(crate) use section;
