//! The body of the `run_config` target.

use bridge_core::checkpoint::megatron::RunConfig;

/// A `run_config.yaml` that is accepted describes a sound model, and what is written for that model says the same again.
pub fn run_config(bytes: &[u8]) {
    let Ok(run) = RunConfig::parse(bytes) else { return };
    run.model.validate("run_config.yaml").expect("what is read is sound");
    let Ok(yaml) = run.to_yaml() else { return };
    let again = RunConfig::parse(yaml.as_bytes());
    assert_eq!(again.expect("what was written can be read").model, run.model);
}

/// Good inputs to damage: a dense model, experts with latent attention, and a hybrid.
pub fn run_config_seeds() -> Vec<Vec<u8>> {
    let common = "hidden_size: 64\n  num_attention_heads: 4\n  vocab_size: 160\n  seq_length: 256\n  \
                  normalization: RMSNorm\n  gated_linear_unit: true\n  activation_func: &a\n    _target_: \
                  torch.nn.functional.silu\n    _call_: false\n";
    [
        "_target_: megatron.bridge.models.gpt_provider.GPTModelProvider\n  num_layers: 3\n  num_query_groups: 2\n  \
         kv_channels: 24\n  position_embedding_type: rope\n  rotary_base: 1.0e+6\n  window_size: [7, 0]\n  \
         window_attn_skip_freq: 2\n",
        "_target_: megatron.bridge.models.mla_provider.MLAModelProvider\n  num_layers: 2\n  \
         multi_latent_attention: true\n  num_moe_experts: 8\n  moe_layer_freq: [0, 1]\n  q_lora_rank: null\n  \
         kv_lora_rank: 20\n  moe_router_score_function: sigmoid\n",
        "_target_: megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider\n  hybrid_layer_pattern: M*-ME\n  \
         num_moe_experts: 4\n  mamba_num_heads: 8\n  alias: *a\n",
    ]
    .map(|own| format!("model:\n  {common}  {own}").into_bytes())
    .to_vec()
}
