//! The body of the `hf_config` target.

use bridge_core::config::{
    Activation, ConfigReader, DecoderConfig, HfConfig, LayerConfig, NormConfig, NormKind,
    RopeDefaults,
};
use bridge_core::layout::LayoutSpec;

/// A `config.json` that is accepted keeps its bytes, and its typed form is sound: no size overflows, every frequency
/// is a number, and writing it and reading it again gives the same.
pub fn hf_config(bytes: &[u8]) {
    /// Above this many layers, listing their tensors would dominate the run.
    const MAX_LISTED: usize = 16;
    let Ok(config) = HfConfig::from_slice(bytes, "config.json") else {
        return;
    };
    assert_eq!(config.raw(), bytes);
    config.architectures();
    let keys = config.reader();
    let typed = read(&keys);
    if keys.finish().is_err() || typed.validate(config.origin()).is_err() {
        return;
    }
    let text = serde_json::to_string(&typed).expect("a typed config is JSON");
    assert_eq!(
        serde_json::from_str::<DecoderConfig>(&text).expect("what was written can be read"),
        typed
    );
    for rope in [&typed.rope, &typed.rope_local].into_iter().flatten() {
        let rotary_dim = typed.rotary_dim().min(1024) & !1;
        let frequencies = rope.frequencies(rotary_dim, typed.max_position_embeddings);
        assert_eq!(frequencies.inv_freq.len(), rotary_dim / 2);
        // Absurd but legal numbers may overflow to infinity or vanish; none may become NaN.
        assert!(
            frequencies
                .inv_freq
                .iter()
                .all(|frequency| !frequency.is_nan()),
            "{rope:?}"
        );
        let (theta, scaling) = rope.to_hf();
        assert!(theta.is_number() && (scaling.is_object() || scaling.is_null()));
    }
    if typed.num_hidden_layers <= MAX_LISTED {
        let tensors = typed.tensors();
        let numel = |shape: &[usize]| {
            shape
                .iter()
                .try_fold(1usize, |product, extent| product.checked_mul(*extent))
        };
        assert!(
            tensors
                .iter()
                .all(|tensor| numel(&tensor.shape).is_some_and(|numel| numel > 0))
        );
        LayoutSpec::default()
            .validate(&tensors, typed.num_hidden_layers)
            .expect("one rank holds everything");
    }
}

/// Reads every key that some dense family has.
fn read(keys: &ConfigReader<'_>) -> DecoderConfig {
    let layers = keys.num_layers("num_hidden_layers");
    let heads = keys.size("num_attention_heads");
    let hidden_size = keys.size("hidden_size");
    let max_position_embeddings = keys.size_or("max_position_embeddings", 2048);
    let defaults = RopeDefaults::new(max_position_embeddings);
    let (rope, partial_rotary_factor) = keys.rope(defaults);
    let rope_local = keys
        .rope_of_layer_type("sliding_attention", defaults)
        .map(|(rope, _)| rope);
    let types = keys.layer_types(layers, &["full_attention", "sliding_attention"]);
    let window = keys.size_opt("sliding_window");
    keys.dtype();
    keys.has("text_config");
    if let Some(section) = keys.section("text_config") {
        section.size_or("hidden_size", 1);
        keys.absorb(section);
    }
    let layer = |index: usize| match &types {
        Some(types) if types[index] == "sliding_attention" => {
            LayerConfig::dense_with_window(window)
        }
        _ => LayerConfig::dense(),
    };
    DecoderConfig {
        hidden_size,
        intermediate_size: keys.size("intermediate_size"),
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: keys.size_or("num_key_value_heads", heads),
        head_dim: keys
            .size_opt("head_dim")
            .or_else(|| hidden_size.checked_div(heads))
            .unwrap_or(0),
        vocab_size: keys.size("vocab_size"),
        max_position_embeddings,
        norm: NormConfig {
            kind: NormKind::RmsNorm,
            eps: keys.number_or("rms_norm_eps", 1e-6),
            unit_offset: false,
            bias: keys.flag_or("norm_bias", false),
        },
        activation: keys.activation_or("hidden_act", Activation::Silu),
        attention_bias: keys.flag_or("attention_bias", false),
        attention_output_bias: keys.flag_or("attention_bias", false),
        mlp_bias: keys.flag_or("mlp_bias", false),
        rope: Some(rope),
        rope_local,
        partial_rotary_factor,
        layers: (0..layers).map(layer).collect(),
        tie_word_embeddings: keys.flag_or("tie_word_embeddings", false),
        embedding_scale: keys.number_opt("embedding_multiplier"),
        attention_scale: keys.number_opt("query_pre_attn_scalar"),
        attention_softcap: keys.number_opt("attn_logit_softcapping"),
        final_logit_softcap: keys.number_opt("final_logit_softcapping"),
        initializer_range: keys.number_or("initializer_range", 0.02),
        bos_token_id: keys.token_id("bos_token_id"),
        eos_token_ids: keys.token_ids("eos_token_id"),
        ..DecoderConfig::plain()
    }
}

/// Good inputs to damage: both spellings, and every kind of rope scaling.
pub fn hf_config_seeds() -> Vec<Vec<u8>> {
    let sizes = r#""hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 64"#;
    [
        r#""rope_theta": 1e4, "rope_scaling": null, "torch_dtype": "bfloat16", "eos_token_id": [1, 2]"#,
        r#""rope_theta": 500, "rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 32, "mscale": 0.7,
            "mscale_all_dim": 1.0, "truncate": false, "original_max_position_embeddings": 16}"#,
        r#""rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "partial_rotary_factor": 0.5}"#,
        r#""rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "hidden_act": "gelu_new", "limit": [0.0, Infinity]"#,
        r#""layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 7,
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}, "text_config": {"hidden_size": 5}"#,
    ]
    .map(|keys| format!(r#"{{"architectures": ["LlamaForCausalLM"], {sizes}, {keys}}}"#).into_bytes())
    .to_vec()
}
