//! What a weight does in a model, told from its canonical name.

/// What a weight does in a model. Initialisation and weight decay go by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ParamRole {
    /// Rows looked up by token id, tied or not.
    Embedding,
    /// A matrix that ends in the residual stream: an attention's or an MLP's last one.
    OutputProjection,
    /// Any other matrix.
    Matrix,
    /// The scale of a norm.
    NormScale,
    /// The scale of a gated norm, which scales by itself also where the model's norms scale by one more than themselves.
    GatedNormScale,
    /// The filters of a short convolution, `[channels, taps]`.
    Convolution,
    /// The logarithm of a recurrent layer's rate of decay.
    DecayRate,
    /// What is added to a recurrent layer's step sizes before softplus.
    StepBias,
    /// The factor of a recurrent layer's skip connection.
    Skip,
    /// Anything that is added: biases of projections and of norms.
    Bias,
}

impl ParamRole {
    /// The role of the weight called `name`, from the canonical naming scheme: `...bias`, `...sinks`, `...norm.weight`,
    /// `embedding.weight`, `...{o,out,down}_proj.weight`, and those of recurrent layers. Any other vector counts as a
    /// norm's scale, any other tensor as a matrix.
    pub fn of(name: &str, shape: &[usize]) -> Self {
        if [".bias", ".correction_bias", ".sinks"]
            .iter()
            .any(|end| name.ends_with(end))
        {
            ParamRole::Bias
        } else if name.ends_with(".gated_norm.weight") {
            ParamRole::GatedNormScale
        } else if name.ends_with("_conv.weight") {
            ParamRole::Convolution
        } else if name.ends_with(".a_log") {
            ParamRole::DecayRate
        } else if name.ends_with(".dt_bias") {
            ParamRole::StepBias
        } else if name.ends_with(".d") {
            ParamRole::Skip
        } else if name.ends_with("norm.weight") || shape.len() < 2 {
            ParamRole::NormScale
        } else if name == "embedding.weight" || name.ends_with(".embedding.weight") {
            ParamRole::Embedding
        } else if [".o_proj.weight", ".out_proj.weight", ".down_proj.weight"]
            .iter()
            .any(|end| name.ends_with(end))
        {
            ParamRole::OutputProjection
        } else {
            ParamRole::Matrix
        }
    }

    /// Whether the usual rule of weight decay, "matrices only", takes the weight in. Embeddings count as matrices.
    pub fn is_matrix(self) -> bool {
        matches!(
            self,
            ParamRole::Embedding
                | ParamRole::OutputProjection
                | ParamRole::Matrix
                | ParamRole::Convolution
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_follow_from_names() {
        for (name, shape, role) in [
            ("embedding.weight", &[7, 4][..], ParamRole::Embedding),
            ("lm_head.weight", &[7, 4], ParamRole::Matrix),
            (
                "layers.0.attention.o_proj.weight",
                &[4, 6],
                ParamRole::OutputProjection,
            ),
            ("layers.0.attention.o_proj.bias", &[4], ParamRole::Bias),
            (
                "layers.11.mlp.down_proj.weight",
                &[4, 6],
                ParamRole::OutputProjection,
            ),
            ("layers.0.mlp.up_proj.weight", &[6, 4], ParamRole::Matrix),
            ("layers.0.input_norm.weight", &[4], ParamRole::NormScale),
            ("layers.0.input_norm.bias", &[4], ParamRole::Bias),
            (
                "layers.0.attention.q_norm.weight",
                &[4],
                ParamRole::NormScale,
            ),
            ("final_norm.weight", &[4], ParamRole::NormScale),
            (
                "layers.0.mamba.gated_norm.weight",
                &[4],
                ParamRole::GatedNormScale,
            ),
            (
                "layers.0.mamba.x_conv.weight",
                &[4, 3],
                ParamRole::Convolution,
            ),
            ("layers.0.mamba.x_conv.bias", &[4], ParamRole::Bias),
            ("layers.0.mamba.a_log", &[4], ParamRole::DecayRate),
            ("layers.0.mamba.dt_bias", &[4], ParamRole::StepBias),
            ("layers.0.mamba.d", &[4], ParamRole::Skip),
            ("layers.0.mamba.dt_proj.bias", &[4], ParamRole::Bias),
            (
                "layers.0.mamba.out_proj.weight",
                &[4, 6],
                ParamRole::OutputProjection,
            ),
            ("layers.0.attention.sinks", &[4], ParamRole::Bias),
            ("layers.0.mlp.router.correction_bias", &[4], ParamRole::Bias),
            (
                "layers.0.mlp.experts.gate_proj.bias",
                &[2, 4],
                ParamRole::Bias,
            ),
            (
                "layers.0.mlp.experts.down_proj.weight",
                &[2, 4, 6],
                ParamRole::OutputProjection,
            ),
            ("layers.0.mlp.router.weight", &[2, 4], ParamRole::Matrix),
            ("my.gain", &[4], ParamRole::NormScale),
        ] {
            assert_eq!(ParamRole::of(name, shape), role, "{name}");
        }
    }
}
