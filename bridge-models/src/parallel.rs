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
    // Recurrent heads, and the groups of heads that share something.
    let mamba2 = config.mamba2.as_ref();
    let delta = config.gated_delta_net.as_ref();
    let recurrent = [
        mamba2.map(|own| ("Mamba-2", own.num_heads, own.num_groups)),
        delta.map(|own| ("gated delta net", own.num_value_heads, own.num_key_heads)),
    ];
    for (name, heads, groups) in recurrent.into_iter().flatten() {
        let (heads, per_group) = (heads / layout.tp, heads / groups.max(1));
        let share = heads / layout.cp;
        let fits = heads.is_multiple_of(layout.cp)
            && (share.is_multiple_of(per_group.max(1)) || per_group.is_multiple_of(share.max(1)));
        if layout.cp > 1 && !fits {
            return refused(format!(
                "recurrent layers ({name}) run whole sequences, each of cp={} ranks some of a tensor-parallel rank's {heads} \
                 heads, {per_group} of which share a group; that does not divide, choose another cp",
                layout.cp
            ));
        }
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
