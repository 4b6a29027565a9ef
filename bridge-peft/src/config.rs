//! What adapters are like and where they go.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The kind of adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterKind {
    /// A product of two thin matrices is added to the weight.
    Lora,
    /// As LoRA, and the length of each of the weight's rows is trained by itself.
    Dora,
}

/// Where values are dropped at random in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DropoutPosition {
    /// From the adapter's input, as Hugging Face PEFT does.
    Pre,
    /// From the adapter's output.
    Post,
}

/// How the first matrix of an adapter begins. The second begins at zero, so that a fresh adapter changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitA {
    /// Uniform within `1 / sqrt(in_features)`: `kaiming_uniform_` with `a = sqrt(5)`, the default of Hugging Face PEFT.
    Kaiming,
    /// Uniform within `sqrt(6 / (in_features + dim))`: `xavier_uniform_`.
    Xavier,
}

/// What adapters are like and which linear layers get one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// Kind.
    pub kind: AdapterKind,
    /// Rank of the two matrices.
    pub dim: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Probability of dropping a value in training, in 0..1.
    pub dropout: f64,
    /// Where.
    pub dropout_position: DropoutPosition,
    /// Whether the scale is `alpha / sqrt(dim)` (arXiv 2312.03732) rather than `alpha / dim`.
    pub use_rslora: bool,
    /// How the first matrix begins.
    pub init: InitA,
    /// Seed of the first matrix and of what is dropped.
    pub seed: u64,
    /// Layers that get an adapter: the last part of a name (`q_proj`), a whole name with `*` for any text
    /// (`layers.*.mlp.*`), a Megatron name for a fused layer (`linear_qkv`, `linear_proj`, `linear_fc1`, `linear_fc2`), or
    /// `all-linear`.
    pub target_modules: Vec<String>,
    /// Of these, layers that get none, named likewise.
    pub exclude_modules: Vec<String>,
    /// Decoder layers that may get one, as `0-3,8`; all if empty.
    pub layers: String,
}

impl Default for AdapterConfig {
    /// LoRA of rank 32 with scale 1 on the projections of attention and MLP, which Megatron-Bridge starts from as well.
    fn default() -> Self {
        Self {
            kind: AdapterKind::Lora,
            dim: 32,
            alpha: 32.0,
            dropout: 0.0,
            dropout_position: DropoutPosition::Pre,
            use_rslora: false,
            init: InitA::Kaiming,
            seed: 1234,
            target_modules: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
                .map(str::to_owned)
                .to_vec(),
            exclude_modules: Vec::new(),
            layers: String::new(),
        }
    }
}

impl AdapterConfig {
    /// The factor of the product of the two matrices.
    pub fn scale(&self) -> f64 {
        let dim = self.dim as f64;
        self.alpha / if self.use_rslora { dim.sqrt() } else { dim }
    }

    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// [`Error::Setting`] for the first setting that makes no sense.
    pub fn validate(&self) -> Result<()> {
        let wrong = |key, value: String, problem: &str| {
            Err(Error::Setting {
                key,
                value,
                problem: problem.to_owned(),
            })
        };
        if self.dim == 0 {
            return wrong("dim", "0".into(), "must be at least 1");
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 {
            return wrong("alpha", self.alpha.to_string(), "must be above 0");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong("dropout", self.dropout.to_string(), "must be in 0..1");
        }
        if self.kind == AdapterKind::Dora
            && self.dropout > 0.0
            && self.dropout_position == DropoutPosition::Post
        {
            return wrong(
                "dropout_position",
                "post".into(),
                "DoRA drops values of its input alone; set it to pre",
            );
        }
        if self.target_modules.is_empty() {
            return wrong(
                "target_modules",
                "[]".into(),
                "names no layer; all-linear stands for all of them",
            );
        }
        self.layer_ranges().map(drop)
    }

    /// The ranges in [`layers`](Self::layers), ends included; none stands for all layers.
    ///
    /// # Errors
    /// If the text is no list of numbers and ranges.
    pub(crate) fn layer_ranges(&self) -> Result<Vec<(usize, usize)>> {
        let parts = self.layers.split(',').map(str::trim);
        let parse = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            (first <= last).then_some((first, last))
        };
        parts
            .filter(|part| !part.is_empty())
            .map(|part| {
                parse(part).ok_or_else(|| Error::Setting {
                    key: "layers",
                    value: format!("\"{}\"", self.layers),
                    problem: format!("`{part}` is neither a layer nor a range such as 0-3"),
                })
            })
            .collect()
    }
}
