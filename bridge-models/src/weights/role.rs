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
    /// Anything that is added: biases of projections and of norms.
    Bias,
}

impl ParamRole {
    /// The role of the weight called `name`, from the canonical naming scheme: `...bias`, `...norm.weight`,
    /// `embedding.weight`, `...{o,down}_proj.weight`. Any other vector counts as a norm's scale, any other tensor as a
    /// matrix.
    pub fn of(name: &str, shape: &[usize]) -> Self {
        if name.ends_with(".bias") {
            ParamRole::Bias
        } else if name.ends_with("norm.weight") || shape.len() < 2 {
            ParamRole::NormScale
        } else if name == "embedding.weight" || name.ends_with(".embedding.weight") {
            ParamRole::Embedding
        } else if name.ends_with(".o_proj.weight") || name.ends_with(".down_proj.weight") {
            ParamRole::OutputProjection
        } else {
            ParamRole::Matrix
        }
    }

    /// Whether the usual rule of weight decay, "matrices only", takes the weight in. Embeddings count as matrices.
    pub fn is_matrix(self) -> bool {
        !matches!(self, ParamRole::NormScale | ParamRole::Bias)
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
            ("my.gain", &[4], ParamRole::NormScale),
        ] {
            assert_eq!(ParamRole::of(name, shape), role, "{name}");
        }
    }
}
