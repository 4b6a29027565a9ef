//! Which linear layers get an adapter.

use std::collections::BTreeSet;

use bridge_core::DecoderConfig;
use bridge_core::registry::nearest;

use crate::config::AdapterConfig;
use crate::error::{Error, Result};

/// Names of Megatron-Core for layers that it fuses, and the parts that stand for them here.
const FUSED: &[(&str, &[&str])] = &[
    (
        "linear_qkv",
        &["attention.q_proj", "attention.k_proj", "attention.v_proj"],
    ),
    ("linear_proj", &["attention.o_proj"]),
    ("linear_fc1", &["gate_proj", "up_proj"]),
    ("linear_fc2", &["down_proj"]),
];
/// Every linear layer.
const ALL: &str = "all-linear";

/// The canonical names of all linear layers that can get an adapter, on whatever rank they are, in order. Routers and the
/// stacked matrices of experts are not among them, nor are embedding and head.
pub fn linear_names(config: &DecoderConfig) -> Vec<String> {
    let tensors = config.tensors().into_iter();
    let matrices = tensors.filter(|tensor| tensor.shape.len() == 2);
    let names = matrices.filter_map(|t| Some(t.name.strip_suffix(".weight")?.to_owned()));
    let inside = |name: &String| name.starts_with("layers.") || name.starts_with("mtp.");
    let other = |name: &String| name.ends_with(".router") || name.ends_with("_conv");
    names.filter(|name| inside(name) && !other(name)).collect()
}

/// The canonical names of the layers that `adapters` chooses.
///
/// # Errors
/// [`Error::NoMatch`] for a pattern that matches nothing, or if nothing is left.
pub fn select(config: &DecoderConfig, adapters: &AdapterConfig) -> Result<BTreeSet<String>> {
    adapters.validate()?;
    let names = linear_names(config);
    let ranges = adapters.layer_ranges()?;
    let matching = |key, patterns: &[String]| -> Result<BTreeSet<String>> {
        let mut found = BTreeSet::new();
        for pattern in patterns {
            let before = found.len();
            let chosen = names.iter().filter(|name| matches(pattern, name));
            let chosen: Vec<String> = chosen.cloned().collect();
            if chosen.is_empty() {
                return Err(Error::NoMatch {
                    key,
                    pattern: pattern.clone(),
                    hint: hint(pattern, &names),
                });
            }
            found.extend(chosen);
            debug_assert!(found.len() >= before);
        }
        Ok(found)
    };
    let chosen = matching("target_modules", &adapters.target_modules)?;
    let excluded = matching("exclude_modules", &adapters.exclude_modules)?;
    let within = |name: &String| {
        ranges.is_empty()
            || layer_of(name).is_some_and(|layer| {
                (ranges.iter()).any(|(first, last)| (*first..=*last).contains(&layer))
            })
    };
    let chosen: BTreeSet<String> = (chosen.difference(&excluded).filter(|name| within(name)))
        .cloned()
        .collect();
    if chosen.is_empty() {
        return Err(Error::Setting {
            key: "target_modules",
            value: format!("{:?}", adapters.target_modules),
            problem: format!(
                "nothing is left of it after exclude_modules = {:?} and layers = \"{}\" (the model has {} layers)",
                adapters.exclude_modules, adapters.layers, config.num_hidden_layers
            ),
        });
    }
    Ok(chosen)
}

fn layer_of(name: &str) -> Option<usize> {
    let rest = name.strip_prefix("layers.")?;
    rest.split_once('.')?.0.parse().ok()
}

fn matches(pattern: &str, name: &str) -> bool {
    if pattern == ALL {
        return true;
    }
    if let Some((_, parts)) = FUSED.iter().find(|(fused, _)| *fused == pattern) {
        return parts.iter().any(|part| ends_with_parts(name, part));
    }
    if pattern.contains('*') {
        return wildcard(pattern, name);
    }
    ends_with_parts(name, pattern)
}

/// Whether `name` is `end` or ends with it after a dot.
fn ends_with_parts(name: &str, end: &str) -> bool {
    name.strip_suffix(end)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Whether `name` matches `pattern`, in which each `*` stands for any text.
fn wildcard(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(left) = name.strip_prefix(start) else {
        return false;
    };
    (0..=left.len()).any(|at| left.is_char_boundary(at) && wildcard_rest(rest, &left[at..]))
}

fn wildcard_rest(rest: &str, left: &str) -> bool {
    if rest.contains('*') {
        wildcard(rest, left)
    } else {
        rest == left
    }
}

/// The nearest name to a pattern that matches nothing, and what may be named.
fn hint(pattern: &str, names: &[String]) -> String {
    if pattern.contains("expert") || pattern.contains("router") {
        return "; routers and the stacked matrices of experts take no adapters here".to_owned();
    }
    let leaves: BTreeSet<&str> = names
        .iter()
        .filter_map(|name| name.rsplit('.').next())
        .collect();
    let candidates = (leaves.iter().copied()).chain(names.iter().map(String::as_str));
    let near = nearest(
        pattern,
        candidates.chain(FUSED.iter().map(|(name, _)| *name)),
    );
    let near = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
    let leaves: Vec<&str> = leaves.into_iter().collect();
    format!("{near} (it has {})", leaves.join(", "))
}

#[cfg(test)]
mod tests {
    use bridge_models::families::{deepseek_v3, llama};

    use super::*;

    fn chosen(targets: &[&str], exclude: &[&str], layers: &str) -> Result<Vec<String>> {
        let owned = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect();
        let config = AdapterConfig {
            target_modules: owned(targets),
            exclude_modules: owned(exclude),
            layers: layers.to_owned(),
            ..AdapterConfig::default()
        };
        let found = select(&llama::presets::tiny(), &config)?;
        Ok(found.into_iter().collect())
    }

    #[test]
    fn patterns_name_layers() {
        assert_eq!(chosen(&["all-linear"], &[], "").unwrap().len(), 3 * 7);
        assert_eq!(chosen(&["linear_qkv"], &[], "").unwrap().len(), 9);
        assert_eq!(
            chosen(&["q_proj", "o_proj"], &["layers.1.*"], "0-1").unwrap(),
            ["layers.0.attention.o_proj", "layers.0.attention.q_proj"]
        );
        assert_eq!(chosen(&["layers.*.mlp.*_proj"], &[], "2").unwrap().len(), 3);
        assert_eq!(
            chosen(&["attention.k_proj"], &[], "2, 0").unwrap(),
            ["layers.0.attention.k_proj", "layers.2.attention.k_proj"]
        );
    }

    #[test]
    fn a_pattern_that_matches_nothing_gets_the_nearest_name() {
        for (targets, exclude, layers, expected) in [
            (&["q_porj"][..], &[][..], "", "did you mean `q_proj`?"),
            (&["q_proj"], &["layers.9.*"], "", "exclude_modules"),
            (&["q_proj"], &[], "7", "the model has 3 layers"),
            (&["q_proj"], &[], "3-1", "neither a layer nor a range"),
            (&["mlp.experts.*"], &[], "", "stacked matrices of experts"),
        ] {
            let error = chosen(targets, exclude, layers).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn routers_and_experts_are_no_linear_layers() {
        let names = linear_names(&deepseek_v3::presets::tiny());
        assert!(
            names
                .iter()
                .any(|name| name.ends_with("attention.kv_a_proj"))
        );
        assert!(
            names
                .iter()
                .any(|name| name.contains("shared_expert.up_proj"))
        );
        assert!(
            names
                .iter()
                .all(|name| !name.contains("router") && !name.contains(".experts."))
        );
    }
}
