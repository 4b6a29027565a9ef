use serde_json::{Value, json};

use super::model::RunConfig;
use super::yaml;
use crate::dtype::DType;

/// As Megatron-Bridge 0.6 writes it for a small Qwen3, without most of the keywords that are at their defaults.
const QWEN3: &str = "
model:
  _target_: megatron.bridge.models.gpt_provider.GPTModelProvider
  activation_func:
    _call_: false
    _target_: torch.nn.functional.silu
  add_bias_linear: false
  add_qkv_bias: false
  attention_backend:
    _args_:
    - 5
    _call_: true
    _name_: auto
    _target_: megatron.core.transformer.enums.AttnBackend
  bf16: true
  ffn_hidden_size: 112
  gated_linear_unit: true
  hidden_size: 64
  init_method_std: 0.02
  kv_channels: 24
  layernorm_epsilon: 1.0e-06
  normalization: RMSNorm
  num_attention_heads: 4
  num_layers: 3
  num_moe_experts: null
  num_query_groups: 2
  params_dtype:
    _call_: false
    _target_: torch.bfloat16
  position_embedding_type: rope
  qk_layernorm: true
  rotary_base: 1000000.0
  seq_length: 256
  share_embeddings_and_output_weights: false
  softmax_type: vanilla
  transformer_layer_spec:
    _call_: false
    _target_: megatron.bridge.models.gpt_provider.default_layer_spec
  vocab_size: 160
";

#[track_caller]
fn refused(text: &str, part: &str) {
    let problems = RunConfig::parse(text.as_bytes()).unwrap_err();
    let listed = problems.listed().join("; ");
    assert!(listed.contains(part), "{part} in {listed}");
    assert!(listed.len() < 2000, "{} bytes", listed.len());
}

#[test]
fn what_megatron_bridge_writes_is_read() {
    let run = RunConfig::parse(QWEN3.as_bytes()).unwrap();
    assert_eq!(run.dtype, Some(DType::BF16));
    let model = &run.model;
    assert_eq!((model.head_dim, model.num_key_value_heads), (24, 2));
    assert_eq!((model.norm.eps, model.layers.len()), (1e-6, 3));
    assert!(model.qk_norm.is_some() && !model.attention_bias);
    assert_eq!(model.rope.as_ref().map(|rope| rope.theta), Some(1e6));
    let again = RunConfig::parse(run.to_yaml().unwrap().as_bytes()).unwrap();
    assert_eq!(again, run);
}

#[test]
fn what_is_not_known_is_named() {
    let edit = |from: &str, to: &str| QWEN3.replace(from, to);
    refused("other: 1", "no section model");
    refused(
        &edit(
            "gpt_provider.GPTModelProvider",
            "t5_provider.T5ModelProvider",
        ),
        "T5ModelProvider",
    );
    refused(&edit("torch.nn.functional.silu", "os.system"), "os.system");
    refused(&edit("default_layer_spec", "my_spec"), "my_spec");
    refused(
        &edit("hidden_size: 64", "hidden_size: -64"),
        "hidden_size is -64",
    );
    refused(&edit("num_layers: 3", "num_layers: 99999999"), "num_layers");
    refused(
        &edit(
            "position_embedding_type: rope",
            "position_embedding_type: mrope",
        ),
        "mrope",
    );
    refused(&edit("kv_channels: 24", "kv_channels: 23"), "head_dim");
    refused(
        &edit("softmax_type: vanilla", "softmax_type: off-by-one"),
        "off-by-one",
    );
    refused(
        &edit(
            "  seq_length: 256\n",
            "  moe_latent_size: 7\n  seq_length: 256\n",
        ),
        "latent",
    );
    refused(
        &edit(
            "num_moe_experts: null",
            "num_moe_experts: 4\n  moe_layer_freq: [0, 1]",
        ),
        "3 flags",
    );
}

#[test]
fn hostile_yaml_is_refused() {
    refused("model: [", "");
    refused("", "empty");
    refused("\u{0}", "");
    refused(&"[".repeat(100_000), "recursion");
    refused(&format!("model: {}", "{a: ".repeat(100)), "levels");
    // Nesting by aliases.
    let deeper = |level: usize| format!("a{level}: &a{level} [*a{}]\n", level - 1);
    let chain: String = (1..100).map(deeper).collect();
    refused(&format!("a0: &a0 []\n{chain}"), "levels");
    // Nine levels of nine aliases each.
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..9 {
        let aliases = vec![format!("*a{}", level - 1); 9].join(", ");
        bomb.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
    }
    refused(&(bomb + QWEN3), "values");
    refused(&format!("a: &a [*a]\n{QWEN3}"), "contains it");
    refused(&format!("<<: {{model: 1}}\n{QWEN3}"), "merge");
    refused(&format!("{QWEN3}  vocab_size: 160\n"), "twice");
    refused(&format!("{QWEN3}---\n{QWEN3}"), "second document");
    refused(&format!("a: {}", "x".repeat(5 << 20)), "bytes");
    refused(&format!("a: [{}]", "1, ".repeat(300_000)), "values");
    // A tag of PyYAML that would call something.
    refused(
        "model: !!python/object/apply:os.system ['true']",
        "python/object",
    );
    assert!(RunConfig::parse(b"model:\n  hidden_size: 64\n\xff").is_err());
}

#[test]
fn values_that_two_fields_share_are_read() {
    let text = "model: &m {x: &x [1, 2], y: *x}\nother: *m";
    let found = yaml::parse(text.as_bytes()).unwrap();
    assert_eq!(found["other"], json!({"x": [1, 2], "y": [1, 2]}));
}

#[test]
fn what_is_written_reads_alike_in_both_versions_of_yaml() {
    let value = json!({
        "plain": "a.b_c",
        "quoted": ["yes", "off", "1e5", "", "a: b", "- x", "null", "\u{e9}\n\"", "y", "NaN", "0x1"],
        "numbers": [1, -2, 1e-7, 1e22, 0.5, 1.0, 1e300],
        "empty": [{}, []],
        "nested": [[1, 2], {"a": {"b": null, "c": true}}],
        "true": 1,
    });
    let text = yaml::write(&value);
    assert_eq!(yaml::parse(text.as_bytes()).unwrap(), value, "{text}");
    // PyYAML takes a float for text unless it has a point and a signed exponent.
    assert!(
        text.contains("- 1.0e-7\n") && text.contains("- 1.0e+22\n"),
        "{text}"
    );
    assert!(
        text.contains("- \"yes\"\n") && text.contains("\"true\": 1\n"),
        "{text}"
    );
    let spelt = yaml::parse(b"[~, .inf, 1.0e-06, -3, 0x10, 1_000, +7, 1e400]").unwrap();
    let expected = json!([null, ".inf", 1e-6, -3, "0x10", "1_000", 7, "1e400"]);
    assert_eq!(spelt, expected);
    assert_eq!(spelt[0], Value::Null);
}
