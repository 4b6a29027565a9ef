//! How much arithmetic a training step is, by the usual count.
//!
//! Model FLOPs only: what the mathematics needs, not what recomputation adds. Per token, `6 N` for the `N` weights that
//! take part in matrix products (two for the forward and four for the backward pass), and for attention `6 L h d s`: the
//! scores and the weighted sum are each `2 h d s` forward and twice that backward, of which the causal half counts.

use bridge_core::{CanonicalTensor, DecoderConfig, ShardRule};

/// Model FLOPs of one token in a training step with sequences of `seq_length` tokens.
pub fn train_flops_per_token(config: &DecoderConfig, seq_length: usize) -> f64 {
    let attention: f64 = config
        .layers
        .iter()
        .filter_map(|layer| layer.attention())
        .map(|attention| {
            let seen = match attention.window {
                // A token at position p sees min(p + 1, window) tokens; twice their mean, since the factor below
                // already halves for causality.
                Some(window) if window < seq_length => {
                    let (s, w) = (seq_length as f64, window as f64);
                    2.0 * (w - w * (w - 1.0) / (2.0 * s))
                }
                _ => seq_length as f64,
            };
            // Scores over the width of queries, the weighted sum over that of values.
            3.0 * (config.query_size() + config.attention_output_size()) as f64 * seen
        })
        .sum();
    6.0 * matmul_parameters(config) as f64 + attention
}

/// Weights that take part in a matrix product: projections, MLPs and the output head (counted once, tied or not). Of routed
/// experts those count that work on a token; multi-token prediction, which only some runs train, does not.
pub fn matmul_parameters(config: &DecoderConfig) -> u64 {
    let active = |tensor: &CanonicalTensor| -> u64 {
        let elements = tensor.numel() as u64;
        match (&tensor.shard, &config.moe) {
            (ShardRule::StackedExperts { .. }, Some(moe)) if tensor.shape.len() == 3 => {
                elements / moe.num_experts as u64 * moe.num_experts_per_tok as u64
            }
            (ShardRule::StackedExperts { .. }, _) => 0,
            _ if tensor.shape.len() == 2 => elements,
            _ => 0,
        }
    };
    let projections: u64 = config
        .tensors()
        .iter()
        .filter(|tensor| {
            let table = ["embedding.weight", "lm_head.weight"].contains(&tensor.name.as_str());
            !table && !tensor.name.ends_with("_conv.weight") && !tensor.name.starts_with("mtp.")
        })
        .map(active)
        .sum();
    projections + (config.hidden_size * config.vocab_size) as u64
}

/// Every weight of the model, each counted once.
pub fn num_parameters(config: &DecoderConfig) -> u64 {
    config
        .tensors()
        .iter()
        .map(|tensor| tensor.numel() as u64)
        .sum()
}
