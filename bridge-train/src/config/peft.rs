//! The `peft` section: adapters.

use super::ModelConfig;
use super::section::{Problems, section};
use super::value::choice;

choice! {
    /// What is trained beside or in the place of the model's weights.
    pub enum PeftScheme {
        /// Nothing: the model's own weights are trained.
        None = "none",
        /// A product of two thin matrices added to each chosen weight.
        Lora = "lora",
        /// As LoRA, and the length of each of the weight's rows.
        Dora = "dora",
    }
}

choice! {
    /// Where an adapter drops values at random.
    pub enum LoraDropoutPosition {
        /// From its input.
        Pre = "pre",
        /// From its output.
        Post = "post",
    }
}

choice! {
    /// How the first matrix of an adapter begins.
    pub enum LoraInit {
        /// Uniform within 1 / sqrt(in_features), as Hugging Face PEFT.
        Kaiming = "kaiming",
        /// Uniform within sqrt(6 / (in_features + dim)).
        Xavier = "xavier",
    }
}

section! {
    /// Adapters, trained in the place of the model's weights. Their seed is train.seed.
    pub struct PeftConfig("peft") {
        /// Kind of adapter.
        scheme: PeftScheme = PeftScheme::None,
        /// Rank.
        dim: usize = 32,
        /// Numerator of the scale alpha / dim.
        alpha: f64 = 32.0,
        /// Probability of dropping a value in training.
        dropout: f64 = 0.0,
        /// Where values are dropped.
        dropout_position: LoraDropoutPosition = LoraDropoutPosition::Pre,
        /// Scale by alpha / sqrt(dim).
        use_rslora: bool = false,
        /// How the first matrix begins; the second is zero.
        lora_a_init: LoraInit = LoraInit::Kaiming,
        /// Layers that get an adapter: last parts of names (q_proj), names with `*`, all-linear, or Megatron's linear_qkv,
        /// linear_proj, linear_fc1, linear_fc2, each part of which gets its own. Default: these four.
        target_modules: Vec<String> = bridge_peft::AdapterConfig::default().target_modules,
        /// Layers among them that get none.
        exclude_modules: Vec<String> = Vec::new(),
        /// Decoder layers that may get one, as 0-3,8. Default: all.
        layers: String = String::new(),
    }
}

impl PeftConfig {
    /// The adapters that the section asks for, if any.
    pub fn adapters(&self, seed: u64) -> Option<bridge_peft::AdapterConfig> {
        use bridge_peft::{AdapterConfig, AdapterKind, DropoutPosition, InitA};
        Some(AdapterConfig {
            kind: match self.scheme {
                PeftScheme::None => return None,
                PeftScheme::Lora => AdapterKind::Lora,
                PeftScheme::Dora => AdapterKind::Dora,
            },
            dim: self.dim,
            alpha: self.alpha,
            dropout: self.dropout,
            dropout_position: match self.dropout_position {
                LoraDropoutPosition::Pre => DropoutPosition::Pre,
                LoraDropoutPosition::Post => DropoutPosition::Post,
            },
            use_rslora: self.use_rslora,
            init: match self.lora_a_init {
                LoraInit::Kaiming => InitA::Kaiming,
                LoraInit::Xavier => InitA::Xavier,
            },
            seed,
            target_modules: self.target_modules.clone(),
            exclude_modules: self.exclude_modules.clone(),
            layers: self.layers.clone(),
        })
    }
}

impl PeftConfig {
    /// Checks the adapters, and that the model has layers for them.
    pub(super) fn check(
        &self,
        seed: u64,
        pretrained: Option<&str>,
        model: Option<&ModelConfig>,
        problems: &mut Problems,
    ) {
        let Some(adapters) = self.adapters(seed) else {
            return;
        };
        let checked = match model {
            Some(model) => bridge_peft::select(&model.decoder, &adapters).map(drop),
            None => adapters.validate(),
        };
        match checked {
            Ok(()) => {}
            Err(bridge_peft::Error::Setting {
                key,
                value,
                problem,
            }) => {
                problems.add(format!("peft.{key}"), format!("is {value}: {problem}"));
            }
            Err(error) => problems.add("peft.target_modules", error.to_string()),
        }
        problems.require(pretrained.is_some(), "checkpoint.pretrained", || {
            "must be set: adapters are trained beside the weights of a model (its folder, or a hub id)".into()
        });
    }
}
