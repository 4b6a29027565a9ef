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
    let attends = config
        .layers
        .iter()
        .any(|layer| matches!(layer.mixer, Mixer::Attention(_)));
    if layout.cp > 1 && options.cp_comm_type == CpCommType::A2a && attends {
        let heads = config.num_attention_heads / layout.tp;
        let kv_heads = (config.num_key_value_heads / layout.tp).max(1);
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
    Ok(())
}
