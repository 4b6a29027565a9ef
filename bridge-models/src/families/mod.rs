//! The model families: one folder each, with the same file names everywhere.
//!
//! | file | holds |
//! | --- | --- |
//! | `mod.rs` | `SPEC`: the family as one value |
//! | `config.rs` | the config map: one table, read in both directions |
//! | `weights.rs` | the weight map: one line per kind of tensor |
//! | `presets.rs` | named sizes, and `tiny()` for tests |
//! | `README.md` | which checkpoints it is for, and what sets it apart |
//!
//! A family adds no code to the model: it says what a [`DecoderConfig`] holds, and the one decoder does the rest.

use bridge_core::registry::nearest;
use bridge_core::{DecoderConfig, Registry};

use crate::error::{Error, Result};

pub mod deepseek_v2;
pub mod deepseek_v3;
pub mod gemma;
pub mod gemma2;
pub mod gemma3;
pub mod glm4_moe;
pub mod gpt_oss;
mod keys;
pub mod llama;
pub mod llama_nemotron;
mod maps;
pub mod mistral;
mod moe_keys;
mod moe_maps;
pub mod nemotron;
pub mod nemotron_h;
pub mod olmoe;
pub mod qwen2;
pub mod qwen3;
pub mod qwen3_moe;
mod qwen_windows;
mod sizes;
mod spec;
#[cfg(test)]
mod testing;
mod windows;

pub use spec::{ConfigKey, FamilySpec, Preset};

/// Every family.
pub static FAMILIES: &[&FamilySpec] = &[
    &llama::SPEC,
    &mistral::SPEC,
    &qwen2::SPEC,
    &qwen3::SPEC,
    &gemma::SPEC,
    &gemma2::SPEC,
    &gemma3::SPEC,
    &nemotron::SPEC,
    &llama_nemotron::SPEC,
    &nemotron_h::SPEC,
    &qwen3_moe::SPEC,
    &olmoe::SPEC,
    &deepseek_v2::SPEC,
    &deepseek_v3::SPEC,
    &glm4_moe::SPEC,
    &gpt_oss::SPEC,
];

/// The registry of every family, for conversion and for finding out what a folder holds.
pub fn registry() -> Registry {
    let mut registry = Registry::new();
    for family in FAMILIES {
        registry.register(*family);
    }
    registry
}

/// The named size `name` of any family.
///
/// # Errors
/// [`Error::UnknownName`] with the nearest known name.
pub fn preset(name: &str) -> Result<(&'static FamilySpec, DecoderConfig)> {
    let all = || {
        FAMILIES
            .iter()
            .flat_map(|family| family.presets.iter().map(move |preset| (*family, preset)))
    };
    if let Some((family, preset)) = all().find(|(_, preset)| preset.name == name) {
        return Ok((family, (preset.config)()));
    }
    let known: Vec<&str> = all().map(|(_, preset)| preset.name).collect();
    Err(Error::UnknownName {
        what: "model preset",
        name: name.to_owned(),
        nearest: nearest(name, known.iter().copied()).map(str::to_owned),
        known: known.join(", "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_lists_every_family_and_published_size() {
        let page = include_str!("../../../docs/families.md");
        for family in FAMILIES {
            let row = page
                .lines()
                .find(|line| line.contains(&format!("`{}`", family.architectures[0])))
                .unwrap_or_else(|| panic!("docs/families.md has no row for {}", family.name));
            let named = family.presets.iter().map(|preset| preset.hub_id);
            for text in family.architectures.iter().copied().chain(named) {
                assert!(row.contains(text), "docs/families.md lacks {text}");
            }
        }
    }

    #[test]
    fn names_of_sizes_are_unique() {
        let names = FAMILIES.iter().flat_map(|family| family.presets);
        let names: Vec<&str> = names.map(|preset| preset.name).collect();
        let unique: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(unique.len(), names.len());
    }
}
