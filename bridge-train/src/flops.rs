//! How much arithmetic a training step is, by the usual count.
//!
//! Model FLOPs only: what the mathematics needs, not what recomputation adds. Per token, `6 N` for the `N` weights that
//! take part in matrix products (two for the forward and four for the backward pass), and for attention `6 L h d s`: the
//! scores and the weighted sum are each `2 h d s` forward and twice that backward, of which the causal half counts.

use bridge_core::DecoderConfig;

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
            6.0 * config.query_size() as f64 * seen
        })
        .sum();
    6.0 * matmul_parameters(config) as f64 + attention
}

/// Weights that take part in a matrix product: projections, MLPs and the output head (counted once, tied or not).
pub fn matmul_parameters(config: &DecoderConfig) -> u64 {
    let projections: u64 = config
        .tensors()
        .iter()
        .filter(|tensor| {
            let table = ["embedding.weight", "lm_head.weight"].contains(&tensor.name.as_str());
            tensor.shape.len() == 2 && !table && !tensor.name.ends_with("_conv.weight")
        })
        .map(|tensor| tensor.numel() as u64)
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
