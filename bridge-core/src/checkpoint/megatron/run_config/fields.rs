//! The fields that are one number or flag on both sides: one table, read in both directions.

use serde_json::{Map, Value};

use crate::config::{DecoderConfig, MlaConfig, MoeConfig};
use crate::error::Problems;

/// One direction of the exchange between a config and the keywords of a class.
pub(super) trait Exchange {
    /// A size; a keyword that is missing or null leaves it as it is.
    fn size(&mut self, key: &str, value: &mut usize);
    /// A size that may be absent.
    fn optional_size(&mut self, key: &str, value: &mut Option<usize>);
    /// A number.
    fn number(&mut self, key: &str, value: &mut f64);
    /// A flag.
    fn flag(&mut self, key: &str, value: &mut bool);
}

pub(super) fn decoder(exchange: &mut dyn Exchange, config: &mut DecoderConfig) {
    exchange.size("num_layers", &mut config.num_hidden_layers);
    exchange.size("hidden_size", &mut config.hidden_size);
    exchange.size("ffn_hidden_size", &mut config.intermediate_size);
    exchange.size("num_attention_heads", &mut config.num_attention_heads);
    exchange.size("num_query_groups", &mut config.num_key_value_heads);
    exchange.size("kv_channels", &mut config.head_dim);
    exchange.size("vocab_size", &mut config.vocab_size);
    exchange.size("seq_length", &mut config.max_position_embeddings);
    exchange.number("layernorm_epsilon", &mut config.norm.eps);
    exchange.flag(
        "layernorm_zero_centered_gamma",
        &mut config.norm.unit_offset,
    );
    exchange.flag("gated_linear_unit", &mut config.gated_mlp);
    exchange.flag(
        "share_embeddings_and_output_weights",
        &mut config.tie_word_embeddings,
    );
    exchange.number("rotary_percent", &mut config.partial_rotary_factor);
    exchange.number("init_method_std", &mut config.initializer_range);
    exchange.flag("attention_output_gate", &mut config.attention_output_gate);
    exchange.size("mtp_num_layers", &mut config.num_mtp_layers);
}

pub(super) fn experts(exchange: &mut dyn Exchange, moe: &mut MoeConfig) {
    exchange.size("num_moe_experts", &mut moe.num_experts);
    exchange.size("moe_router_topk", &mut moe.num_experts_per_tok);
    exchange.size("moe_ffn_hidden_size", &mut moe.intermediate_size);
    exchange.optional_size(
        "moe_shared_expert_intermediate_size",
        &mut moe.shared_intermediate_size,
    );
    exchange.flag("moe_shared_expert_gate", &mut moe.shared_expert_gate);
    exchange.number(
        "moe_router_topk_scaling_factor",
        &mut moe.router.scaling_factor,
    );
    exchange.flag(
        "moe_router_enable_expert_bias",
        &mut moe.router.correction_bias,
    );
}

pub(super) fn latent(exchange: &mut dyn Exchange, mla: &mut MlaConfig) {
    exchange.optional_size("q_lora_rank", &mut mla.q_lora_rank);
    exchange.size("kv_lora_rank", &mut mla.kv_lora_rank);
    exchange.size("qk_head_dim", &mut mla.qk_nope_head_dim);
    exchange.size("qk_pos_emb_head_dim", &mut mla.qk_rope_head_dim);
    exchange.size("v_head_dim", &mut mla.v_head_dim);
}

/// Reads keywords, and collects what is wrong with them.
pub(super) struct Reader<'a> {
    keywords: &'a Map<String, Value>,
    pub(super) problems: Problems,
}

impl<'a> Reader<'a> {
    pub(super) fn new(keywords: &'a Map<String, Value>) -> Self {
        Self {
            keywords,
            problems: Problems::new(),
        }
    }

    /// A keyword that is there and not null.
    pub(super) fn value(&self, key: &str) -> Option<&'a Value> {
        self.keywords.get(key).filter(|value| !value.is_null())
    }

    /// The dotted name that a keyword's `_target_` is, or its text.
    pub(super) fn name(&self, key: &str) -> Option<&'a str> {
        let value = self.value(key)?;
        value
            .as_str()
            .or_else(|| value.get("_target_").and_then(Value::as_str))
    }

    pub(super) fn is_true(&self, key: &str) -> bool {
        self.value(key) == Some(&Value::Bool(true))
    }

    /// Notes that a keyword holds something else than `expected`.
    pub(super) fn wrong(&mut self, key: &str, expected: &str) {
        let found: String = match self.value(key) {
            Some(value) => value.to_string().chars().take(80).collect(),
            None => "nothing".to_owned(),
        };
        self.problems
            .push(format!("{key} is {found}, expected {expected}"));
    }

    pub(super) fn size_of(&mut self, key: &str) -> Option<usize> {
        let mut value = None;
        self.optional_size(key, &mut value);
        value
    }

    pub(super) fn number_of(&mut self, key: &str) -> Option<f64> {
        let value = self.value(key)?;
        match value.as_f64() {
            Some(number) if number.is_finite() => Some(number),
            _ => {
                self.wrong(key, "a finite number");
                None
            }
        }
    }
}

impl Exchange for Reader<'_> {
    fn size(&mut self, key: &str, value: &mut usize) {
        if let Some(found) = self.size_of(key) {
            *value = found;
        }
    }

    fn optional_size(&mut self, key: &str, value: &mut Option<usize>) {
        match self.value(key).map(Value::as_u64) {
            None => {}
            Some(Some(found)) => *value = usize::try_from(found).ok(),
            Some(None) => self.wrong(key, "a size"),
        }
    }

    fn number(&mut self, key: &str, value: &mut f64) {
        if let Some(found) = self.number_of(key) {
            *value = found;
        }
    }

    fn flag(&mut self, key: &str, value: &mut bool) {
        match self.value(key).map(Value::as_bool) {
            None => {}
            Some(Some(found)) => *value = found,
            Some(None) => self.wrong(key, "true or false"),
        }
    }
}

/// Collects keywords.
pub(super) struct Writer(pub(super) Map<String, Value>);

impl Writer {
    pub(super) fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_owned(), value.into());
    }
}

impl Exchange for Writer {
    fn size(&mut self, key: &str, value: &mut usize) {
        self.set(key, *value);
    }

    fn optional_size(&mut self, key: &str, value: &mut Option<usize>) {
        self.set(key, *value);
    }

    fn number(&mut self, key: &str, value: &mut f64) {
        self.set(key, *value);
    }

    fn flag(&mut self, key: &str, value: &mut bool) {
        self.set(key, *value);
    }
}
