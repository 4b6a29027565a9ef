//! The list of bridges, and finding the one that a config asks for.

use crate::bridge::ModelBridge;
use crate::config::HfConfig;
use crate::error::{Error, Result};

/// The model bridges that a program knows.
#[derive(Clone, Default)]
pub struct Registry {
    bridges: Vec<&'static dyn ModelBridge>,
}

impl Registry {
    /// Knows no model.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a bridge. Where two claim one architecture, the one added last is used, so that a program can replace a
    /// family.
    pub fn register(&mut self, bridge: &'static dyn ModelBridge) -> &mut Self {
        self.bridges.push(bridge);
        self
    }

    /// The bridges, in the order they were added.
    pub fn iter(&self) -> impl Iterator<Item = &'static dyn ModelBridge> + '_ {
        self.bridges.iter().copied()
    }

    /// The bridge called `name`, if any.
    pub fn get(&self, name: &str) -> Option<&'static dyn ModelBridge> {
        self.bridges
            .iter()
            .rev()
            .find(|bridge| bridge.name() == name)
            .copied()
    }

    /// The bridge for the architecture that `config` names.
    ///
    /// # Errors
    /// [`Error::UnknownArchitecture`] with the supported names and the nearest one.
    pub fn detect(&self, config: &HfConfig) -> Result<&'static dyn ModelBridge> {
        let asked = config.architectures();
        let claims = |name: &str| {
            self.bridges
                .iter()
                .rev()
                .find(|bridge| bridge.architectures().contains(&name))
        };
        if let Some(bridge) = asked.iter().find_map(|name| claims(name)) {
            return Ok(*bridge);
        }
        let mut supported: Vec<&str> = self
            .bridges
            .iter()
            .flat_map(|b| b.architectures())
            .copied()
            .collect();
        supported.sort_unstable();
        supported.dedup();
        let found = match asked.as_slice() {
            [] => "names no architecture (key architectures)".to_owned(),
            names => format!("architecture {} is not supported", show_names(names)),
        };
        Err(Error::UnknownArchitecture {
            file: config.origin().to_owned(),
            found,
            nearest: asked
                .first()
                .and_then(|name| nearest(name, supported.iter().copied()))
                .map(str::to_owned),
            supported: supported.join(", "),
        })
    }
}

/// Names from a file, quoted and cut to a length that suits an error message.
fn show_names(names: &[&str]) -> String {
    let shown: Vec<String> = names
        .iter()
        .take(4)
        .map(|name| format!("{:?}", name.chars().take(80).collect::<String>()))
        .collect();
    shown.join(", ")
}

/// The candidate spelt most like `name`, if one is near enough to be meant.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    const NEAR_ENOUGH: f64 = 0.6;
    // The distance takes time in the square of the length, and `name` may come from a hostile file.
    let name: String = name.chars().take(256).collect();
    candidates
        .into_iter()
        .map(|candidate| {
            (
                strsim::normalized_damerau_levenshtein(&name, candidate),
                candidate,
            )
        })
        .filter(|(similarity, _)| *similarity >= NEAR_ENOUGH)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::DecoderConfig;
    use crate::mapping::WeightMap;
    use crate::test_model::{TestBridge, test_config};

    /// Claims the test family's architecture under another name.
    struct Replacement;

    impl ModelBridge for Replacement {
        fn name(&self) -> &'static str {
            "replacement"
        }

        fn architectures(&self) -> &'static [&'static str] {
            &["TestForCausalLM", "OtherForCausalLM"]
        }

        fn config(&self, config: &HfConfig) -> Result<DecoderConfig> {
            TestBridge.config(config)
        }

        fn hf_config(
            &self,
            config: &DecoderConfig,
        ) -> Result<serde_json::Map<String, serde_json::Value>> {
            TestBridge.hf_config(config)
        }

        fn weights(&self, config: &DecoderConfig) -> WeightMap {
            TestBridge.weights(config)
        }
    }

    #[test]
    fn the_bridge_added_last_wins() {
        let mut registry = Registry::new();
        registry.register(&TestBridge);
        let config = test_config(json!({}));
        assert_eq!(registry.detect(&config).unwrap().name(), "test");
        registry.register(&Replacement);
        assert_eq!(registry.detect(&config).unwrap().name(), "replacement");
        let second = test_config(json!({"architectures": ["Unknown", "OtherForCausalLM"]}));
        assert_eq!(registry.detect(&second).unwrap().name(), "replacement");
        assert_eq!(registry.get("test").map(ModelBridge::name), Some("test"));
        assert_eq!(registry.iter().count(), 2);
    }

    #[track_caller]
    fn check_refused(architectures: serde_json::Value, expected: &str) {
        let mut registry = Registry::new();
        registry.register(&TestBridge).register(&Replacement);
        let config = test_config(json!({ "architectures": architectures }));
        let error = registry.detect(&config).err().unwrap();
        assert!(error.is_input());
        let supported = "supported architectures: OtherForCausalLM, TestForCausalLM";
        assert_eq!(
            error.to_string(),
            format!("config.json: {expected}").replace("SUPPORTED", supported)
        );
    }

    #[test]
    fn unknown_architectures_are_refused_with_the_nearest_name() {
        check_refused(
            json!(["TsetForCausalLM"]),
            "architecture \"TsetForCausalLM\" is not supported; SUPPORTED; did you mean TestForCausalLM?",
        );
        check_refused(
            json!(["\u{1b}[31m"]),
            "architecture \"\\u{1b}[31m\" is not supported; SUPPORTED",
        );
        check_refused(
            json!([]),
            "names no architecture (key architectures); SUPPORTED",
        );
        check_refused(
            json!(7),
            "names no architecture (key architectures); SUPPORTED",
        );
        let long = "x".repeat(100_000);
        check_refused(
            json!([long]),
            &format!(
                "architecture \"{}\" is not supported; SUPPORTED",
                "x".repeat(80)
            ),
        );
    }
}
