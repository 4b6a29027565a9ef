//! How a model is divided among ranks, beyond what its weights' shapes say.

use bridge_core::config::Mixer;
use bridge_core::layout::PipelineSplit;
use bridge_core::{DecoderConfig, LayoutSpec};
use bridge_parallel::CpCommType;

use crate::error::{Error, Result};

/// Choices that a layout leaves open.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ParallelOptions {
    /// How attention reaches the keys and values of other context-parallel ranks.
    pub cp_comm_type: CpCommType,
    /// Which stage has which layers; `None` for an even split.
    pub pipeline: Option<PipelineSplit>,
}

/// Checks that the layers of a model can run at `layout`. That the weights can be divided is
/// [`LayoutSpec::validate`]'s matter.
///
/// # Errors
/// [`Error::Layout`] with what does not fit.
pub fn check_layout(
    config: &DecoderConfig,
    layout: &LayoutSpec,
    options: &ParallelOptions,
) -> Result<()> {
    let refused = |problem: String| {
        Err(Error::Layout {
            layout: layout.to_string(),
            problem,
        })
    };
    if layout.sp && layout.tp == 1 {
        return refused("sequence parallelism needs tp above 1; leave out sp".to_owned());
    }
    let has = |wanted: fn(&Mixer) -> bool| config.layers.iter().any(|layer| wanted(&layer.mixer));
    if layout.cp > 1 && has(|mixer| matches!(mixer, Mixer::Mamba2 | Mixer::GatedDeltaNet)) {
        return refused(
            "recurrent layers (Mamba-2, gated delta net) run over whole sequences; use cp=1, and tp for long ones"
                .to_owned(),
        );
    }
    if layout.cp > 1 && config.num_mtp_layers > 0 {
        return refused(
            "multi-token prediction needs the tokens after each chunk, which other ranks have; use cp=1, or train without its \
             modules (model.num_nextn_predict_layers=0)"
                .to_owned(),
        );
    }
    if let Some(mamba2) = &config.mamba2
        && layout.tp > mamba2.num_groups
    {
        return refused(format!(
            "tp={} would cut through the {} groups of Mamba-2's norms; the most is tp={}",
            layout.tp, mamba2.num_groups, mamba2.num_groups
        ));
    }
    if layout.cp > 1 && options.cp_comm_type == CpCommType::A2a {
        if config.attention_sinks {
            return refused("attention with sinks needs cp_comm_type p2p or all_gather".to_owned());
        }
        for layer in &config.layers {
            let Mixer::Attention(own) = &layer.mixer else {
                continue;
            };
            // Latent attention has keys and values for every head.
            let kv_heads = match &config.mla {
                Some(_) => config.num_attention_heads,
                None => own
                    .num_key_value_heads
                    .unwrap_or(config.num_key_value_heads),
            };
            let heads = config.num_attention_heads / layout.tp;
            let kv_heads = (kv_heads / layout.tp).max(1);
            let fits = heads.is_multiple_of(layout.cp)
                && (kv_heads.is_multiple_of(layout.cp) || layout.cp.is_multiple_of(kv_heads));
            if !fits {
                return refused(format!(
                    "cp_comm_type a2a gives each of cp={} ranks some of a tensor-parallel rank's {heads} query and \
                     {kv_heads} key-value heads, which does not divide; use p2p or all_gather",
                    layout.cp
                ));
            }
        }
    }
    Ok(())
}
