//! A configuration as written: TOML layers and command-line overrides, merged with a memory of who set what.

use std::collections::HashMap;
use std::path::Path;

use bridge_core::registry::nearest;
use toml::{Table, Value};

use super::model;
use super::schema;
use super::section::{Problem, Problems, SectionSchema};
use super::value::{Kind, parse_untyped};
use crate::error::{Error, Result};

/// Keys of which one is to be given: a later layer that gives one replaces another of an earlier layer.
const ALTERNATIVES: &[(&str, &[&str])] = &[
    ("train", &["train_iters", "train_samples"]),
    (
        "scheduler",
        &["lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"],
    ),
    ("scheduler", &["lr_decay_iters", "lr_decay_samples"]),
    ("scheduler", &["lr_wsd_decay_iters", "lr_wsd_decay_samples"]),
];

/// Layers of configuration, the later over the earlier: recipe, file, `key=value`.
///
/// ```
/// use bridge_train::config::ConfigLayers;
///
/// let mut layers = ConfigLayers::new();
/// layers.push_toml("recipe", "[train]\ntrain_iters = 100\n")?;
/// layers.push_override("train.train_iters=20");
/// assert_eq!(layers.get("train", "train_iters").and_then(|v| v.as_integer()), Some(20));
/// # Ok::<(), bridge_train::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct ConfigLayers {
    merged: Table,
    origins: HashMap<String, String>,
    problems: Vec<Problem>,
}

impl ConfigLayers {
    /// No layers yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a layer of TOML text. `origin` names it in messages, for example `recipe llama3_8b`.
    ///
    /// # Errors
    /// If the text is not TOML. Unknown or misspelt keys are reported later, together, by [`crate::config::resolve`].
    pub fn push_toml(&mut self, origin: &str, text: &str) -> Result<()> {
        let table: Table = text.parse().map_err(|source| Error::ConfigSyntax {
            origin: origin.to_owned(),
            source,
        })?;
        self.push_table(origin, table);
        Ok(())
    }

    /// Adds a TOML file as a layer.
    ///
    /// # Errors
    /// If the file cannot be read or is not TOML.
    pub fn push_file(&mut self, path: &Path) -> Result<()> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
            action: "read the configuration",
            path: path.to_owned(),
            source,
        })?;
        self.push_toml(&path.display().to_string(), &text)
    }

    /// Adds a parsed layer.
    pub fn push_table(&mut self, origin: &str, table: Table) {
        for (section_name, value) in table {
            let Some(section) = self.find_section(&section_name, &value, origin) else {
                continue;
            };
            let Value::Table(keys) = value else {
                self.problem(
                    section_name,
                    origin,
                    "is a section; write it as a [table]".into(),
                );
                continue;
            };
            for (key, value) in keys {
                if let Some(kind) = self.find_key(section, &key, origin) {
                    self.set(section.name, &key, value, origin, kind);
                }
            }
        }
    }

    /// Adds one `section.key=value` from the command line, typed by the schema. What is wrong with it is reported by
    /// [`crate::config::resolve`], together with everything else.
    pub fn push_override(&mut self, text: &str) {
        let origin = "the command line";
        let Some((path, value)) = text.split_once('=') else {
            let message =
                "is not an override; write section.key=value, for example train.train_iters=20";
            self.problem(text.to_owned(), origin, message.into());
            return;
        };
        let (path, value) = (path.trim(), value.trim());
        let mut parts = path.split('.');
        let (section_name, key) = (parts.next().unwrap_or_default(), parts.next());
        let Some(key) = key else {
            let message = match key_elsewhere(section_name) {
                Some(full) => format!("needs its section; did you mean `{full}`?"),
                None => "needs its section; write section.key=value".to_owned(),
            };
            self.problem(section_name.to_owned(), origin, message);
            return;
        };
        let Some(section) = self.find_section(section_name, &Value::Table(Table::new()), origin)
        else {
            return;
        };
        let Some(kind) = self.find_key(section, key, origin) else {
            return;
        };
        let inner: Vec<&str> = parts.collect();
        if inner.is_empty() {
            match kind.parse(value) {
                Ok(value) => self.set(section.name, key, value, origin, kind),
                Err(message) => self.problem(path.to_owned(), origin, message),
            }
        } else if kind == Kind::Table {
            self.set_inside(section.name, key, &inner, parse_untyped(value), origin);
        } else {
            self.problem(
                path.to_owned(),
                origin,
                format!("`{section_name}.{key}` is {}", kind.describe()),
            );
        }
    }

    /// The value of a key, if any layer set it.
    pub fn get(&self, section: &str, key: &str) -> Option<&Value> {
        self.merged.get(section)?.get(key)
    }

    /// Sets a key unless some layer did.
    pub fn set_default(&mut self, section: &str, key: &str, value: Value) {
        if self.get(section, key).is_none() {
            self.section_mut(section).insert(key.to_owned(), value);
        }
    }

    /// Everything that was set, merged.
    pub fn merged(&self) -> &Table {
        &self.merged
    }

    /// What was wrong with the layers themselves, and `found` with the origin of each key filled in.
    pub(crate) fn problems_with(&self, found: Problems) -> Vec<Problem> {
        let mut all = self.problems.clone();
        for mut problem in found.into_vec() {
            let top: String = problem.key.split('.').take(2).collect::<Vec<_>>().join(".");
            problem.origin = self.origins.get(&top).cloned();
            // A key that could not be read has been reported; that it is also missing is no news.
            if !all.iter().any(|p| p.key == problem.key) {
                all.push(problem);
            }
        }
        all
    }

    fn problem(&mut self, key: String, origin: &str, message: String) {
        self.problems.push(Problem {
            key,
            origin: Some(origin.to_owned()),
            message,
        });
    }

    fn section_mut(&mut self, section: &str) -> &mut Table {
        self.merged
            .entry(section)
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut()
            .expect("only tables are inserted at the top")
    }

    fn set(&mut self, section: &str, key: &str, value: Value, origin: &str, kind: Kind) {
        if let (Kind::Choice(names), Some(word)) = (kind, value.as_str())
            && !names.contains(&word)
        {
            self.problem(
                format!("{section}.{key}"),
                origin,
                super::unknown_choice(word, names),
            );
            return;
        }
        self.drop_replaced(section, key, origin);
        self.section_mut(section).insert(key.to_owned(), value);
        self.origins
            .insert(format!("{section}.{key}"), origin.to_owned());
    }

    /// Drops what other layers said that `key`, set by `origin`, replaces: another way to say the same thing, or, where
    /// it names a whole model, everything about the model. Two ways in one layer stay, and are reported later.
    fn drop_replaced(&mut self, section: &str, key: &str, origin: &str) {
        let names_a_model = section == model::SECTION && model::WHOLE.contains(&key);
        let group = ALTERNATIVES
            .iter()
            .find(|(owner, keys)| *owner == section && keys.contains(&key));
        let Some(Value::Table(table)) = self.merged.get_mut(section) else {
            return;
        };
        let origins = &self.origins;
        table.retain(|other, _| {
            let replaced = names_a_model || group.is_some_and(|(_, keys)| keys.contains(&other));
            other == key
                || !replaced
                || origins
                    .get(&format!("{section}.{other}"))
                    .is_some_and(|by| by == origin)
        });
    }

    fn set_inside(&mut self, section: &str, key: &str, inner: &[&str], value: Value, origin: &str) {
        let mut table = self
            .section_mut(section)
            .entry(key)
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut();
        let (last, parents) = inner.split_last().expect("not empty");
        for parent in parents {
            table = table.and_then(|t| {
                t.entry(*parent)
                    .or_insert_with(|| Value::Table(Table::new()))
                    .as_table_mut()
            });
        }
        match table {
            Some(table) => {
                table.insert((*last).to_owned(), value);
                self.origins
                    .insert(format!("{section}.{key}"), origin.to_owned());
            }
            None => self.problem(
                format!("{section}.{key}.{}", inner.join(".")),
                origin,
                "cannot be set: a part of its path is not a table".into(),
            ),
        }
    }

    fn find_section(
        &mut self,
        name: &str,
        value: &Value,
        origin: &str,
    ) -> Option<&'static SectionSchema> {
        if let Some(section) = schema().iter().find(|section| section.name == name) {
            return Some(section);
        }
        let message = if let (false, Some(full)) = (value.is_table(), key_elsewhere(name)) {
            format!("unknown key outside every section; did you mean `{full}`?")
        } else {
            let names: Vec<&str> = schema().iter().map(|section| section.name).collect();
            match nearest(name, names.iter().copied()) {
                Some(near) => format!("unknown section; did you mean `{near}`?"),
                None => format!("unknown section; the sections are {}", names.join(", ")),
            }
        };
        self.problem(name.to_owned(), origin, message);
        None
    }

    fn find_key(
        &mut self,
        section: &'static SectionSchema,
        key: &str,
        origin: &str,
    ) -> Option<Kind> {
        if let Some(found) = section.keys.iter().find(|candidate| candidate.name == key) {
            return Some(found.kind);
        }
        let own = nearest(key, section.keys.iter().map(|k| k.name))
            .map(|near| format!("{}.{near}", section.name));
        let exact = exact_elsewhere(key);
        let message = match exact.or(own).or_else(|| key_elsewhere(key)) {
            Some(full) => format!("unknown key; did you mean `{full}`?"),
            None if section.name == model::SECTION => {
                "unknown key; model keys are `hf`, `architecture` and the words of a Hugging Face config.json".into()
            }
            None => format!(
                "unknown key; [{}] has {}",
                section.name,
                section.keys.iter().map(|k| k.name).collect::<Vec<_>>().join(", ")
            ),
        };
        self.problem(format!("{}.{key}", section.name), origin, message);
        None
    }
}

/// `section.key` of the key with exactly this name in some section.
fn exact_elsewhere(key: &str) -> Option<String> {
    let section = schema()
        .iter()
        .find(|section| section.keys.iter().any(|k| k.name == key))?;
    Some(format!("{}.{key}", section.name))
}

/// `section.key` of the key with this or nearly this name in some section.
fn key_elsewhere(key: &str) -> Option<String> {
    exact_elsewhere(key).or_else(|| {
        let near = nearest(
            key,
            schema()
                .iter()
                .flat_map(|section| section.keys.iter().map(|k| k.name)),
        )?;
        exact_elsewhere(near)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn problem_of(toml: &str, overrides: &[&str]) -> String {
        let mut layers = ConfigLayers::new();
        layers.push_toml("run.toml", toml).expect("valid TOML");
        overrides.iter().for_each(|o| layers.push_override(o));
        let problems = layers.problems_with(Problems::default());
        assert_eq!(problems.len(), 1, "{problems:?}");
        problems[0].to_string()
    }

    #[test]
    fn later_layers_win_key_by_key() {
        let mut layers = ConfigLayers::new();
        layers
            .push_toml(
                "recipe",
                "[train]\ntrain_iters = 1\nseed = 5\n[optimizer]\nlr = 1e-3\n",
            )
            .unwrap();
        layers
            .push_toml("file", "[train]\ntrain_iters = 2\n")
            .unwrap();
        layers.push_override("optimizer.lr=1");
        layers.push_override("model.rope_scaling.factor=8.0");
        let get = |section, key| layers.get(section, key).expect("set").to_string();
        assert_eq!(get("train", "train_iters"), "2");
        assert_eq!(get("train", "seed"), "5");
        assert_eq!(get("optimizer", "lr"), "1.0");
        assert_eq!(get("model", "rope_scaling"), "{ factor = 8.0 }");
        assert!(layers.problems_with(Problems::default()).is_empty());
    }

    #[test]
    fn another_way_to_say_the_same_replaces_an_earlier_layer() {
        let mut layers = ConfigLayers::new();
        let recipe =
            "[scheduler]\nlr_warmup_iters = 9\n[model]\npreset = \"llama3_8b\"\nhead_dim = 7\n";
        layers.push_toml("recipe", recipe).unwrap();
        layers.push_override("scheduler.lr_warmup_fraction=0.5");
        layers.push_override("model.hf=folder");
        layers.push_override("model.num_hidden_layers=2");
        let is_set = |section, key| layers.get(section, key).is_some();
        assert!(
            is_set("scheduler", "lr_warmup_fraction") && !is_set("scheduler", "lr_warmup_iters")
        );
        assert!(is_set("model", "hf") && is_set("model", "num_hidden_layers"));
        assert!(!is_set("model", "preset") && !is_set("model", "head_dim"));
    }

    #[test]
    fn two_ways_in_one_layer_stay_for_the_error() {
        let mut layers = ConfigLayers::new();
        layers
            .push_toml("file", "[train]\ntrain_iters = 9\ntrain_samples = 90\n")
            .unwrap();
        assert!(
            layers.get("train", "train_iters").is_some()
                && layers.get("train", "train_samples").is_some()
        );
    }

    #[test]
    fn unknown_names_get_the_nearest_right_one() {
        let check = |toml, overrides: &[&str], part: &str| {
            let message = problem_of(toml, overrides);
            assert!(message.contains(part), "{message}\nshould contain {part}");
        };
        check(
            "[train]\ntrian_iters = 3",
            &[],
            "train.trian_iters (set by run.toml): unknown key; did you mean `train.train_iters`?",
        );
        check(
            "[trian]\ntrain_iters = 3",
            &[],
            "unknown section; did you mean `train`?",
        );
        check("[train]\nlr = 3", &[], "did you mean `optimizer.lr`?");
        check("lr = 3", &[], "did you mean `optimizer.lr`?");
        check("train = 3", &[], "write it as a [table]");
        check(
            "",
            &["train.seq_length=8"],
            "did you mean `data.seq_length`?",
        );
        check("", &["lr=3"], "did you mean `optimizer.lr`?");
        check("", &["train.train_iters"], "is not an override");
        check(
            "",
            &["train.train_iters=many"],
            "`many` is not a whole number from 0 up",
        );
        check(
            "",
            &["scheduler.lr_decay_style=cosin"],
            "did you mean `cosine`?",
        );
        check("", &["train.seed.x=1"], "`train.seed` is a whole number");
        check(
            "[model]\nhidden_sise = 3",
            &[],
            "did you mean `model.hidden_size`?",
        );
    }

    #[test]
    fn broken_toml_names_its_origin() {
        let error = ConfigLayers::new()
            .push_toml("run.toml", "[train\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("run.toml"), "{error}");
    }
}
