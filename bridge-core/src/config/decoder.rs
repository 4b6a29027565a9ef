//! `DecoderConfig`: every fact about a decoder-only transformer that its weights and its forward pass depend on.

use serde::{Deserialize, Serialize};

use super::{
    GatedDeltaNetConfig, MAX_LAYERS, Mamba2Config, MlaConfig, MoeConfig, RopeConfig, RopeScaling,
};
use crate::error::{Error, Problems, Result};

/// A decoder-only transformer. Words are those of Hugging Face's `config.json`; behaviour comes from a field, never
/// from a model's name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecoderConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of a dense MLP; a layer may override it.
    pub intermediate_size: usize,
    /// Number of decoder layers; equals `layers.len()`.
    pub num_hidden_layers: usize,
    /// Query heads per attention layer.
    pub num_attention_heads: usize,
    /// Key and value heads per attention layer; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head; need not be `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Rows of the embedding as stored, without padding for a layout.
    pub vocab_size: usize,
    /// Longest context that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// The norm used everywhere but on single heads, which share its numbers.
    pub norm: NormConfig,
    /// The MLP's non-linearity.
    pub activation: Activation,
    /// Whether the MLP is `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
    pub gated_mlp: bool,
    /// Whether the q, k and v projections have a bias.
    pub attention_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub attention_output_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// Normalisation of queries and keys before the rotary embedding.
    #[serde(default)]
    pub qk_norm: Option<QkNorm>,
    /// Whether each query head has a learned logit that takes part in the softmax and has no value (gpt-oss).
    #[serde(default)]
    pub attention_sinks: bool,
    /// Latent attention in place of plain projections, in every attention layer (DeepSeek).
    #[serde(default)]
    pub mla: Option<MlaConfig>,
    /// The experts of layers with [`Ffn::Moe`].
    #[serde(default)]
    pub moe: Option<MoeConfig>,
    /// Rotary embedding of layers with [`LayerRope::Global`]; `None` where the model has none.
    #[serde(default)]
    pub rope: Option<RopeConfig>,
    /// Rotary embedding of layers with [`LayerRope::Local`] (Gemma 3's sliding layers).
    #[serde(default)]
    pub rope_local: Option<RopeConfig>,
    /// Share of each head that is rotated, from its start; in (0, 1].
    pub partial_rotary_factor: f64,
    /// Which elements of a head form a rotated pair.
    #[serde(default)]
    pub rope_style: RopeStyle,
    /// What each layer is made of; `num_hidden_layers` entries.
    pub layers: Vec<LayerConfig>,
    /// Number of multi-token prediction modules after the last layer, each of which predicts one token further ahead
    /// (DeepSeek-V3, GLM-4.5). They are trained with a loss of their own, and generation does not use them.
    #[serde(default)]
    pub num_mtp_layers: usize,
    /// Whether the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Factor on the embeddings (Gemma: sqrt(hidden_size)).
    #[serde(default)]
    pub embedding_scale: Option<f64>,
    /// Factor on q.k before softmax; `None` means 1 / sqrt(head_dim).
    #[serde(default)]
    pub attention_scale: Option<f64>,
    /// `cap * tanh(scores / cap)` on attention scores (Gemma 2: 50).
    #[serde(default)]
    pub attention_softcap: Option<f64>,
    /// `cap * tanh(logits / cap)` on the final logits (Gemma 2: 30).
    #[serde(default)]
    pub final_logit_softcap: Option<f64>,
    /// Whether a gate computed from the layer's input, one per element of every head, scales the output of attention by
    /// its sigmoid (Qwen3-Next).
    #[serde(default)]
    pub attention_output_gate: bool,
    /// Dimensions of layers with [`Mixer::Mamba2`].
    #[serde(default)]
    pub mamba2: Option<Mamba2Config>,
    /// Dimensions of layers with [`Mixer::GatedDeltaNet`].
    #[serde(default)]
    pub gated_delta_net: Option<GatedDeltaNetConfig>,
    /// A second norm, on the attention block's output before it joins the residual stream (Gemma 2 and 3).
    #[serde(default)]
    pub attention_output_norm: bool,
    /// A second norm, on the MLP's output before it joins the residual stream (Gemma 2 and 3).
    #[serde(default)]
    pub mlp_output_norm: bool,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Token that starts a text.
    #[serde(default)]
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    #[serde(default)]
    pub eos_token_ids: Vec<u32>,
}

/// A normalisation over the last dimension.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NormConfig {
    /// The formula.
    pub kind: NormKind,
    /// Added to the variance (LayerNorm) or mean square (RMSNorm).
    pub eps: f64,
    /// Whether the stored weight `w` scales by `1 + w` (Gemma, Nemotron).
    #[serde(default)]
    pub unit_offset: bool,
    /// Whether there is an additive bias.
    #[serde(default)]
    pub bias: bool,
}

/// Formula of a normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps) * w`.
    RmsNorm,
    /// `(x - mean(x)) / sqrt(var(x) + eps) * w (+ b)`.
    LayerNorm,
}

/// Where queries and keys are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// Each head by itself; the weight has `head_dim` elements and is shared by all heads (Qwen3, Gemma 3).
    PerHead,
    /// The whole projection at once; the weight has `heads * head_dim` elements (OLMoE).
    FullWidth,
}

/// Non-linearity of an MLP. Names are those of Hugging Face's `hidden_act`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    #[serde(rename = "silu", alias = "swish")]
    Silu,
    /// `x * Phi(x)` with the exact error function.
    #[serde(rename = "gelu")]
    Gelu,
    /// The tanh approximation of GELU.
    #[serde(rename = "gelu_pytorch_tanh", alias = "gelu_new", alias = "gelu_fast")]
    GeluTanh,
    /// `x * sigmoid(1.702 x)`.
    #[serde(rename = "quick_gelu")]
    QuickGelu,
    /// `max(x, 0)`.
    #[serde(rename = "relu")]
    Relu,
    /// `max(x, 0)^2`.
    #[serde(rename = "relu2")]
    Relu2,
    /// `1 / (1 + exp(-x))`.
    #[serde(rename = "sigmoid")]
    Sigmoid,
    /// `tanh(x)`.
    #[serde(rename = "tanh")]
    Tanh,
}

impl Activation {
    /// Every activation, in the order of the declaration.
    pub const ALL: [Activation; 8] = [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::QuickGelu,
        Activation::Relu,
        Activation::Relu2,
        Activation::Sigmoid,
        Activation::Tanh,
    ];

    /// The name that is written to a `config.json`.
    pub fn hf_name(self) -> &'static str {
        match self {
            Activation::Silu => "silu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
            Activation::QuickGelu => "quick_gelu",
            Activation::Relu => "relu",
            Activation::Relu2 => "relu2",
            Activation::Sigmoid => "sigmoid",
            Activation::Tanh => "tanh",
        }
    }

    /// The activation of a `hidden_act` name, aliases included; `None` for an unknown one.
    pub fn from_hf_name(name: &str) -> Option<Self> {
        match name {
            "swish" => Some(Activation::Silu),
            "gelu_new" | "gelu_fast" => Some(Activation::GeluTanh),
            _ => Self::ALL
                .into_iter()
                .find(|activation| activation.hf_name() == name),
        }
    }
}

/// Which elements of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeStyle {
    /// Element `i` with `i + rotary_dim / 2` (Llama and most others).
    #[default]
    Halves,
    /// Element `2i` with `2i + 1` (DeepSeek).
    Pairs,
}

/// What one decoder layer is made of. A part that is absent has no norm either.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerConfig {
    /// The part that mixes tokens.
    pub mixer: Mixer,
    /// The part that works on each token alone.
    pub ffn: Ffn,
}

impl LayerConfig {
    /// A layer with full causal attention under the global rotary embedding, and the model's own MLP.
    pub fn dense() -> Self {
        Self {
            mixer: Mixer::Attention(AttentionLayer::default()),
            ffn: Ffn::Mlp(MlpLayer::default()),
        }
    }

    /// [`LayerConfig::dense`] with attention to the last `window` tokens only, the current one included.
    pub fn dense_with_window(window: Option<usize>) -> Self {
        Self {
            mixer: Mixer::Attention(AttentionLayer {
                window,
                ..AttentionLayer::default()
            }),
            ffn: Ffn::Mlp(MlpLayer::default()),
        }
    }

    /// A layer with full causal attention and the model's mixture of experts.
    pub fn moe() -> Self {
        Self {
            ffn: Ffn::Moe,
            ..Self::dense()
        }
    }

    /// The attention of this layer, if its mixer is attention.
    pub fn attention(&self) -> Option<&AttentionLayer> {
        match &self.mixer {
            Mixer::Attention(attention) => Some(attention),
            _ => None,
        }
    }
}

/// The part of a layer that mixes tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Mixer {
    /// Softmax attention with the heads of [`DecoderConfig`].
    Attention(AttentionLayer),
    /// A Mamba-2 state space layer with the dimensions of [`DecoderConfig::mamba2`].
    Mamba2,
    /// A gated delta net with the dimensions of [`DecoderConfig::gated_delta_net`].
    GatedDeltaNet,
    /// A square matrix in the place of attention (Llama-Nemotron Super and Ultra).
    Linear,
    /// Nothing, not even a norm.
    None,
}

/// What may differ between the attention layers of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionLayer {
    /// How many tokens a query sees, itself included; `None` sees all before it.
    #[serde(default)]
    pub window: Option<usize>,
    /// Which rotary embedding applies.
    #[serde(default)]
    pub rope: LayerRope,
    /// Key and value heads where they differ from [`DecoderConfig::num_key_value_heads`].
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
}

/// Which rotary embedding a layer uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerRope {
    /// [`DecoderConfig::rope`].
    #[default]
    Global,
    /// [`DecoderConfig::rope_local`].
    Local,
    /// None: the layer has no position information of its own.
    None,
}

/// The part of a layer that works on each token alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Ffn {
    /// A dense MLP.
    Mlp(MlpLayer),
    /// A square matrix in the place of the MLP (Llama-Nemotron Super and Ultra).
    Linear,
    /// Nothing, not even a norm.
    None,
    /// The mixture of experts of [`DecoderConfig::moe`].
    Moe,
}

/// What may differ between the dense MLPs of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlpLayer {
    /// Inner width where it differs from [`DecoderConfig::intermediate_size`].
    #[serde(default)]
    pub intermediate_size: Option<usize>,
}

/// Largest width of anything: far above every published model, and low enough that products of three fit 64 bits.
const MAX_WIDTH: usize = 1 << 21;

impl DecoderConfig {
    /// Width of all query heads together: rows of the q projection, and columns of the output projection unless values
    /// have a width of their own.
    pub fn query_size(&self) -> usize {
        self.num_attention_heads.saturating_mul(self.head_dim)
    }

    /// Width of all key (or value) heads together: rows of the k and v projections.
    pub fn key_value_size(&self) -> usize {
        self.num_key_value_heads.saturating_mul(self.head_dim)
    }

    /// Key and value heads of layer `layer`'s attention.
    pub fn layer_key_value_heads(&self, layer: usize) -> usize {
        let own = self.layers.get(layer).and_then(LayerConfig::attention);
        own.and_then(|attention| attention.num_key_value_heads)
            .unwrap_or(self.num_key_value_heads)
    }

    /// Width of all heads' outputs together: columns of the output projection.
    pub fn attention_output_size(&self) -> usize {
        let head = self
            .mla
            .as_ref()
            .map_or(self.head_dim, |mla| mla.v_head_dim);
        self.num_attention_heads.saturating_mul(head)
    }

    /// How many elements of each head are rotated: `head_dim * partial_rotary_factor`, rounded down; in latent
    /// attention, those set apart for it.
    pub fn rotary_dim(&self) -> usize {
        if let Some(mla) = &self.mla {
            return mla.qk_rope_head_dim;
        }
        (self.head_dim as f64 * self.partial_rotary_factor) as usize
    }

    /// Factor on q.k before softmax.
    pub fn attention_scale(&self) -> f64 {
        self.attention_scale
            .unwrap_or_else(|| 1.0 / (self.head_dim as f64).sqrt())
    }

    /// Inner width of layer `layer`'s MLP. Layers beyond the last have the model's own width.
    pub fn mlp_intermediate_size(&self, layer: usize) -> usize {
        match self.layers.get(layer).map(|layer| &layer.ffn) {
            Some(Ffn::Mlp(MlpLayer {
                intermediate_size: Some(size),
            })) => *size,
            _ => self.intermediate_size,
        }
    }

    /// The fields, or products of fields, that are equal to `extent`, as `name=value`: what a tensor's dimension may
    /// come from.
    pub fn fields_of_extent(&self, extent: usize) -> Vec<String> {
        let candidates = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("vocab_size", self.vocab_size),
            ("num_attention_heads*head_dim", self.query_size()),
            ("num_key_value_heads*head_dim", self.key_value_size()),
            ("head_dim", self.head_dim),
        ];
        let moe = self.moe.as_ref().map(|moe| {
            let shared = moe.shared_intermediate_size.unwrap_or(0);
            [
                ("number of experts", moe.num_experts),
                ("intermediate size of experts", moe.intermediate_size),
                ("intermediate size of the shared expert", shared),
            ]
        });
        let mla = self.mla.as_ref().map(|mla| {
            let (nope, rope, value) = (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim);
            let key_value = self.num_attention_heads.saturating_mul(nope + value);
            [
                ("q_lora_rank", mla.q_lora_rank.unwrap_or(0)),
                ("kv_lora_rank", mla.kv_lora_rank),
                ("kv_lora_rank+qk_rope_head_dim", mla.kv_lora_rank + rope),
                (
                    "num_attention_heads*(qk_nope_head_dim+v_head_dim)",
                    key_value,
                ),
                (
                    "num_attention_heads*v_head_dim",
                    self.attention_output_size(),
                ),
            ]
        });
        let candidates = candidates
            .into_iter()
            .chain(moe.into_iter().flatten())
            .chain(mla.into_iter().flatten());
        let equal = candidates.filter(|(_, value)| *value == extent && extent > 0);
        equal
            .map(|(name, value)| format!("{name}={value}"))
            .collect()
    }

    /// Checks that the numbers fit together, and that no size is absurd. `origin` is named in the error.
    ///
    /// # Errors
    /// [`Error::Config`] with every finding.
    pub fn validate(&self, origin: &str) -> Result<()> {
        let problems = self.problems();
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Error::Config {
                file: origin.to_owned(),
                problems,
            })
        }
    }

    fn problems(&self) -> Problems {
        const MAX_VOCAB: usize = 1 << 26;
        const MAX_CONTEXT: usize = 1 << 31;
        let mut problems = Problems::new();
        for (key, value, max) in [
            ("hidden_size", self.hidden_size, MAX_WIDTH),
            ("intermediate_size", self.intermediate_size, MAX_WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_WIDTH),
            ("num_key_value_heads", self.num_key_value_heads, MAX_WIDTH),
            ("head_dim", self.head_dim, MAX_WIDTH),
            ("vocab_size", self.vocab_size, MAX_VOCAB),
            (
                "max_position_embeddings",
                self.max_position_embeddings,
                MAX_CONTEXT,
            ),
        ] {
            if value == 0 || value > max {
                problems.push(format!("{key} is {value}, expected 1 to {max}"));
            }
        }
        if self.query_size() > MAX_WIDTH {
            problems.push(format!(
                "num_attention_heads={} times head_dim={} is {}, expected at most {MAX_WIDTH}",
                self.num_attention_heads,
                self.head_dim,
                self.query_size()
            ));
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if kv_heads > 0 && (kv_heads > heads || heads % kv_heads != 0) {
            problems.push(format!(
                "num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
            ));
        }
        if self.layers.len() != self.num_hidden_layers {
            problems.push(format!(
                "num_hidden_layers is {}, but {} layers are described",
                self.num_hidden_layers,
                self.layers.len()
            ));
        }
        if let Some(mla) = &self.mla {
            mla.problems(self.head_dim, &mut problems);
            if kv_heads != heads {
                problems.push(format!(
                    "num_key_value_heads={kv_heads} in latent attention, expected num_attention_heads={heads}"
                ));
            }
            if self.qk_norm.is_some() {
                problems.push(
                    "latent attention does not go with a norm on queries and keys".to_owned(),
                );
            }
        }
        if let Some(moe) = &self.moe {
            moe.problems(&mut problems);
        }
        if self.num_mtp_layers > MAX_LAYERS {
            problems.push(format!(
                "{} multi-token prediction modules, expected at most {MAX_LAYERS}",
                self.num_mtp_layers
            ));
        }
        self.rope_problems(&mut problems);
        self.layer_problems(&mut problems);
        if let Some(mamba2) = &self.mamba2 {
            problems.extend("mamba2: ", mamba2.problems(MAX_WIDTH));
        }
        if let Some(delta_net) = &self.gated_delta_net {
            problems.extend("gated_delta_net: ", delta_net.problems(MAX_WIDTH));
        }
        self.number_problems(&mut problems);
        problems
    }

    fn rope_problems(&self, problems: &mut Problems) {
        if self.rope.is_none() && self.rope_local.is_none() {
            return;
        }
        if !(self.partial_rotary_factor > 0.0 && self.partial_rotary_factor <= 1.0) {
            problems.push(format!(
                "partial_rotary_factor is {}, expected more than 0 and at most 1",
                self.partial_rotary_factor
            ));
        } else if self.rotary_dim() == 0 || !self.rotary_dim().is_multiple_of(2) {
            problems.push(format!(
                "head_dim={} times partial_rotary_factor={} rotates {} elements, expected an even number above 0",
                self.head_dim,
                self.partial_rotary_factor,
                self.rotary_dim()
            ));
        }
        for (name, rope) in [("rope", &self.rope), ("rope_local", &self.rope_local)] {
            if let Some(rope) = rope {
                if matches!(rope.scaling, RopeScaling::Dynamic { .. }) && self.rotary_dim() == 2 {
                    problems.push(format!(
                        "{name}: dynamic scaling needs more than 2 rotated elements per head"
                    ));
                }
                problems.extend(&format!("{name}: "), rope.problems());
            }
        }
    }

    fn layer_problems(&self, problems: &mut Problems) {
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some(attention) = layer.attention() {
                if attention.window == Some(0) {
                    problems.push(format!(
                        "layer {index}: sliding window is 0, expected at least 1 token"
                    ));
                }
                let (heads, kv_heads) =
                    (self.num_attention_heads, self.layer_key_value_heads(index));
                if attention.num_key_value_heads.is_some()
                    && (kv_heads == 0 || !heads.is_multiple_of(kv_heads))
                {
                    problems.push(format!(
                        "layer {index}: num_attention_heads={heads} is not a multiple of its num_key_value_heads={kv_heads}"
                    ));
                }
                let missing = match attention.rope {
                    LayerRope::Local => self.rope_local.is_none().then_some("rope_local"),
                    LayerRope::Global | LayerRope::None => None,
                };
                if let Some(field) = missing {
                    problems.push(format!("layer {index} uses {field}, which is not set"));
                }
            }
            let missing = match layer.mixer {
                Mixer::Mamba2 => self.mamba2.is_none().then_some("mamba2"),
                Mixer::GatedDeltaNet => self.gated_delta_net.is_none().then_some("gated_delta_net"),
                _ => None,
            };
            if let Some(field) = missing {
                problems.push(format!("layer {index} uses {field}, which is not set"));
            }
            if layer.ffn == Ffn::Moe && self.moe.is_none() {
                problems.push(format!(
                    "layer {index} is a mixture of experts, which are not described"
                ));
            }
            let width = self.mlp_intermediate_size(index);
            if matches!(layer.ffn, Ffn::Mlp(_)) && !(1..=MAX_WIDTH).contains(&width) {
                problems.push(format!(
                    "layer {index}: intermediate_size is {width}, expected 1 to {MAX_WIDTH}"
                ));
            }
        }
    }

    fn number_problems(&self, problems: &mut Problems) {
        for (key, value) in [
            ("norm eps", Some(self.norm.eps)),
            ("initializer_range", Some(self.initializer_range)),
        ] {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value >= 0.0)) {
                problems.push(format!(
                    "{key} is {value}, expected a finite number of at least 0"
                ));
            }
        }
        for (key, value) in [
            ("embedding_scale", self.embedding_scale),
            ("attention_scale", self.attention_scale),
            ("attention_softcap", self.attention_softcap),
            ("final_logit_softcap", self.final_logit_softcap),
        ] {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
                problems.push(format!(
                    "{key} is {value}, expected a finite number above 0"
                ));
            }
        }
    }
}

#[cfg(test)]
#[path = "decoder_tests.rs"]
mod tests;
