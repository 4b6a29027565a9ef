//! The embedded recipes and how they build on each other.

use bridge_core::registry::nearest;
use bridge_train::config::ConfigLayers;
use toml::{Table, Value};

/// The recipe of `pretrain` without arguments.
pub const DEFAULT_RECIPE: &str = "tiny_llama";

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no recipe of this name.
    #[error("there is no recipe `{name}`{}; the recipes are {}", did_you_mean(.name), names().join(", "))]
    Unknown {
        /// The name asked for.
        name: String,
    },

    /// An embedded recipe is broken, which the tests of this crate rule out.
    #[error("recipe file {path}.toml is broken: {reason}")]
    Broken {
        /// Its path under `recipes/`, without the ending.
        path: &'static str,
        /// What is wrong.
        reason: String,
    },
}

fn did_you_mean(name: &str) -> String {
    nearest(name, names())
        .map(|near| format!("; did you mean `{near}`?"))
        .unwrap_or_default()
}

fn names() -> Vec<&'static str> {
    recipe_files().map(|file| file.name()).collect()
}

/// One TOML file under `recipes/`.
struct File {
    /// Path under `recipes/` without the ending, which is also how `extends` names it.
    path: &'static str,
    text: &'static str,
}

macro_rules! files {
    ($($path:literal),+ $(,)?) => {
        &[$(File { path: $path, text: include_str!(concat!("../recipes/", $path, ".toml")) }),+]
    };
}

const FILES: &[File] = files![
    "finetune",
    "pretrain",
    "llama/base",
    "llama/tiny_llama",
    "llama/smollm2_135m",
    "llama/llama32_1b",
    "llama/llama3_8b",
    "llama/llama32_1b_sft",
    "llama/llama32_1b_lora",
    "llama/llama32_1b_dora",
    "llama/llama3_8b_sft",
    "llama/llama3_8b_lora",
    "llama/llama3_8b_dora",
    "llama/tiny_llama_lora",
];

impl File {
    fn name(&self) -> &'static str {
        self.path.rsplit('/').next().unwrap_or(self.path)
    }

    fn is_recipe(&self) -> bool {
        self.path.contains('/') && self.name() != "base"
    }

    fn parse(&self) -> Result<Table> {
        self.text
            .parse()
            .map_err(|e: toml::de::Error| Error::Broken {
                path: self.path,
                reason: e.to_string(),
            })
    }
}

fn recipe_files() -> impl Iterator<Item = &'static File> {
    FILES.iter().filter(|file| file.is_recipe())
}

/// A ready configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// Its name, as given to `pretrain`.
    pub name: &'static str,
    /// The family it belongs to: the folder it lies in.
    pub family: &'static str,
    /// What it trains, in one line.
    pub description: String,
    /// What it builds on, nearest first.
    pub extends: Vec<&'static str>,
    /// The file as written.
    pub text: &'static str,
}

/// Every recipe.
///
/// # Errors
/// [`Error::Broken`] if an embedded file is, which the tests of this crate rule out.
pub fn list() -> Result<Vec<Recipe>> {
    recipe_files().map(recipe).collect()
}

/// The recipe called `name`.
///
/// # Errors
/// [`Error::Unknown`] with the nearest name.
pub fn get(name: &str) -> Result<Recipe> {
    recipe(find(name)?)
}

/// The recipe called `name` and all it builds on, as configuration layers.
///
/// # Errors
/// [`Error::Unknown`] with the nearest name.
pub fn layers(name: &str) -> Result<ConfigLayers> {
    let mut layers = ConfigLayers::new();
    for (file, mut table) in chain(find(name)?)?.into_iter().rev() {
        table.remove("extends");
        table.remove("description");
        let origin = if file.is_recipe() {
            format!("recipe {}", file.name())
        } else {
            format!("recipe base {}", file.path)
        };
        layers.push_table(&origin, table);
    }
    Ok(layers)
}

fn find(name: &str) -> Result<&'static File> {
    recipe_files()
        .find(|file| file.name() == name)
        .ok_or_else(|| Error::Unknown {
            name: name.to_owned(),
        })
}

fn recipe(file: &'static File) -> Result<Recipe> {
    let chain = chain(file)?;
    let description = chain[0].1.get("description").and_then(Value::as_str);
    let broken = |reason: &str| Error::Broken {
        path: file.path,
        reason: reason.to_owned(),
    };
    Ok(Recipe {
        name: file.name(),
        family: file.path.split('/').next().unwrap_or_default(),
        description: description
            .ok_or_else(|| broken("it has no description"))?
            .to_owned(),
        extends: chain[1..].iter().map(|(base, _)| base.path).collect(),
        text: file.text,
    })
}

/// The file and everything it extends, nearest first.
fn chain(file: &'static File) -> Result<Vec<(&'static File, Table)>> {
    let mut chain = vec![(file, file.parse()?)];
    while let Some(base) = chain[chain.len() - 1].1.get("extends") {
        let from = chain[chain.len() - 1].0.path;
        let broken = |reason: String| Error::Broken { path: from, reason };
        let base = base
            .as_str()
            .ok_or_else(|| broken("extends is not a text".into()))?;
        let found = FILES.iter().find(|file| file.path == base);
        let found =
            found.ok_or_else(|| broken(format!("it extends {base}, which does not exist")))?;
        if chain.iter().any(|(seen, _)| seen.path == found.path) {
            return Err(broken(format!("it extends {base}, which extends it")));
        }
        let table = found.parse()?;
        chain.push((found, table));
    }
    Ok(chain)
}

#[cfg(test)]
mod tests {
    use bridge_train::config::{Platform, ResolveContext, ResolvedConfig, resolve};

    use super::*;

    fn resolved(name: &str, overrides: &[&str]) -> ResolvedConfig {
        let mut layers = layers(name).unwrap();
        overrides.iter().for_each(|o| layers.push_override(o));
        resolve(
            &layers,
            &ResolveContext::new(&bridge_models::registry(), name),
        )
        .unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    #[test]
    fn every_file_on_disk_is_embedded() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        let mut found = Vec::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let relative = path.strip_prefix(&root).unwrap().with_extension("");
                    found.push(relative.to_str().unwrap().to_owned());
                }
            }
        }
        let mut embedded: Vec<_> = FILES.iter().map(|file| file.path).collect();
        found.sort();
        embedded.sort();
        assert_eq!(embedded, found);
    }

    #[test]
    fn every_recipe_resolves_and_its_printed_form_resolves_to_the_same() {
        let registry = bridge_models::registry();
        for recipe in list().unwrap() {
            let config = resolved(recipe.name, &[]);
            let mut again = ConfigLayers::new();
            again
                .push_toml("the printed form", &config.to_toml())
                .unwrap();
            assert_eq!(
                resolve(&again, &ResolveContext::new(&registry, recipe.name)).unwrap(),
                config
            );
        }
    }

    #[test]
    fn every_recipe_allows_a_short_test() {
        for recipe in list().unwrap() {
            let config = resolved(recipe.name, &["train.train_iters=3"]);
            assert_eq!(config.train_iters(), 3, "{}", recipe.name);
        }
    }

    #[test]
    fn the_default_recipe_runs_on_a_cpu() {
        Platform::cpu()
            .check(&resolved(DEFAULT_RECIPE, &[]))
            .unwrap();
    }

    #[test]
    fn llama3_8b_has_the_published_numbers() {
        let config = resolved("llama3_8b", &[]);
        assert_eq!(
            bridge_train::flops::num_parameters(&config.model.decoder),
            8_030_261_248
        );
        let schedule = config.lr_schedule();
        assert_eq!(
            (config.train.global_batch_size, config.data.seq_length),
            (512, 8192)
        );
        assert_eq!(
            (schedule.lr(2000 * 512), schedule.lr(1_168_251 * 512)),
            (3e-4, 3e-5)
        );
        assert_eq!(
            (config.optimizer.adam_beta2, config.optimizer.weight_decay),
            (0.95, 0.1)
        );
    }

    #[test]
    fn sizes_are_the_published_ones() {
        for (name, parameters) in [("llama32_1b", 1_235_814_400), ("smollm2_135m", 134_515_008)] {
            let config = resolved(name, &[]);
            assert_eq!(
                bridge_train::flops::num_parameters(&config.model.decoder),
                parameters,
                "{name}"
            );
        }
    }

    #[test]
    fn an_unknown_recipe_gets_the_nearest_name() {
        let message = get("tiny_lama").unwrap_err().to_string();
        assert!(message.contains("did you mean `tiny_llama`?"), "{message}");
        assert!(get("base").is_err(), "a base is no recipe");
    }
}
