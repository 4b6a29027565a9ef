//! Config keys of mixtures of experts and of latent attention that several families share.

use bridge_core::DecoderConfig;
use bridge_core::config::{
    ConfigReader, Ffn, GroupScoring, LayerConfig, MlaConfig, MoeConfig, RouterGroups,
};
use serde_json::{Value, json};

use super::keys::read_rope;
use super::spec::ConfigKey;

/// The experts of a config that is being read.
pub(super) fn moe(config: &mut DecoderConfig) -> &mut MoeConfig {
    config.moe.get_or_insert_with(MoeConfig::plain)
}

/// A number of the experts: `moe_size!(key, field)` is required, `moe_size!(key, field, default)` is not.
macro_rules! moe_size {
    ($key:literal, $($field:ident).+) => {
        $crate::families::spec::ConfigKey {
            key: $key,
            read: |keys, config| $crate::families::moe_keys::moe(config).$($field).+ = keys.size($key),
            write: |config| config.moe.as_ref().map(|moe| moe.$($field).+.into()),
        }
    };
    ($key:literal, $($field:ident).+, $default:expr) => {
        $crate::families::spec::ConfigKey {
            key: $key,
            read: |keys, config| {
                $crate::families::moe_keys::moe(config).$($field).+ = keys.size_or($key, $default);
            },
            write: |config| config.moe.as_ref().map(|moe| moe.$($field).+.into()),
        }
    };
}

/// A size of latent attention: `mla_size!(key, field, default)`.
macro_rules! mla_size {
    ($key:literal, $field:ident, $default:expr) => {
        $crate::families::spec::ConfigKey {
            key: $key,
            read: |keys, config| {
                $crate::families::moe_keys::mla(config).$field = keys.size_or($key, $default);
                $crate::families::moe_keys::settle_mla(config);
            },
            write: |config| config.mla.as_ref().map(|mla| mla.$field.into()),
        }
    };
}

pub(super) use {mla_size, moe_size};

/// `norm_topk_prob`, whose absence means `default`.
macro_rules! normalize {
    ($default:expr) => {
        $crate::families::spec::ConfigKey {
            key: "norm_topk_prob",
            read: |keys, config| {
                $crate::families::moe_keys::moe(config).router.normalize =
                    keys.flag_or("norm_topk_prob", $default);
            },
            write: |config| config.moe.as_ref().map(|moe| moe.router.normalize.into()),
        }
    };
}
pub(super) use normalize;

/// `routed_scaling_factor`, whose absence means `default`.
macro_rules! scaling_factor {
    ($default:expr) => {
        $crate::families::spec::ConfigKey {
            key: "routed_scaling_factor",
            read: |keys, config| {
                $crate::families::moe_keys::moe(config)
                    .router
                    .scaling_factor = keys.number_or("routed_scaling_factor", $default);
            },
            write: |config| {
                config
                    .moe
                    .as_ref()
                    .map(|moe| moe.router.scaling_factor.into())
            },
        }
    };
}
pub(super) use scaling_factor;

/// `num_experts`, or `num_local_experts` as transformers 5 spells it. Either way 128 where absent.
pub(super) const NUM_EXPERTS: ConfigKey = ConfigKey {
    key: "num_experts",
    read: |keys, config| {
        let count = keys.size_opt("num_experts");
        moe(config).num_experts = count.unwrap_or_else(|| keys.size_or("num_local_experts", 128));
    },
    write: |config| config.moe.as_ref().map(|moe| moe.num_experts.into()),
};

/// `n_shared_experts`, each as wide as a routed one; comes after `moe_intermediate_size`.
pub(super) const SHARED_EXPERTS: ConfigKey = ConfigKey {
    key: "n_shared_experts",
    read: |keys, config| {
        let count = keys.size_or("n_shared_experts", 0);
        let moe = moe(config);
        moe.shared_intermediate_size =
            (count > 0).then(|| moe.intermediate_size.saturating_mul(count));
    },
    write: |config| {
        let moe = config.moe.as_ref()?;
        let width = moe.shared_intermediate_size.unwrap_or(0);
        Some(width.checked_div(moe.intermediate_size).unwrap_or(0).into())
    },
};

/// `first_k_dense_replace`: this many layers have a plain MLP, those after them experts. 0 where absent; families whose
/// class assumes another number read it themselves.
pub(super) const FIRST_DENSE: ConfigKey = ConfigKey {
    key: "first_k_dense_replace",
    read: |keys, config| read_first_dense(keys, config, 0),
    write: |config| Some(first_dense(config).into()),
};

/// Reads which layers have experts: all from `first_k_dense_replace` on.
pub(super) fn read_first_dense(keys: &ConfigReader<'_>, config: &mut DecoderConfig, absent: usize) {
    let first = keys.size_or("first_k_dense_replace", absent);
    let every = keys.size_or("moe_layer_freq", 1);
    if every != 1 {
        keys.problem(format!(
            "moe_layer_freq is {every}; only 1, experts in every layer from first_k_dense_replace on, is supported"
        ));
    }
    set_first_dense(config, first);
}

/// Experts in every layer from `first` on.
pub(super) fn set_first_dense(config: &mut DecoderConfig, first: usize) {
    for layer in config.layers.iter_mut().skip(first) {
        layer.ffn = Ffn::Moe;
    }
}

/// How many layers come before the first with experts.
pub(super) fn first_dense(config: &DecoderConfig) -> usize {
    let is_moe = |layer: &LayerConfig| layer.ffn == Ffn::Moe;
    let first = config.layers.iter().position(is_moe);
    first.unwrap_or(config.layers.len())
}

/// `mlp_only_layers` and `decoder_sparse_step`: a layer has experts unless it is listed, or its number counted from 1 is
/// no multiple of the step.
pub(super) const DENSE_LAYERS: ConfigKey = ConfigKey {
    key: "mlp_only_layers",
    read: |keys, config| {
        let step = keys.size_or("decoder_sparse_step", 1);
        if step == 0 {
            keys.problem("decoder_sparse_step is 0, expected at least 1");
            return;
        }
        let dense = layer_numbers(keys, "mlp_only_layers");
        for (index, layer) in config.layers.iter_mut().enumerate() {
            if !dense.contains(&index) && (index + 1) % step == 0 {
                layer.ffn = Ffn::Moe;
            }
        }
    },
    write: |config| {
        let dense = config.layers.iter().enumerate();
        let dense = dense.filter(|(_, layer)| layer.ffn != Ffn::Moe);
        Some(json!(dense.map(|(index, _)| index).collect::<Vec<_>>()))
    },
};

/// Read with `mlp_only_layers`, which new files say everything by.
pub(super) const SPARSE_STEP: ConfigKey = ConfigKey {
    key: "decoder_sparse_step",
    read: |_, _| (),
    write: |_| Some(json!(1)),
};

fn layer_numbers(keys: &ConfigReader<'_>, key: &str) -> Vec<usize> {
    let Some(value) = keys.get(key) else {
        return Vec::new();
    };
    let number = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    let numbers = value
        .as_array()
        .and_then(|items| items.iter().map(number).collect());
    numbers.unwrap_or_else(|| {
        keys.problem(format!("{key} is no list of layer numbers"));
        Vec::new()
    })
}

/// Reads `n_group` and `topk_group`. One group is no grouping.
pub(super) fn read_groups(
    keys: &ConfigReader<'_>,
    config: &mut DecoderConfig,
    absent: [usize; 2],
    score: GroupScoring,
) {
    let n_group = keys.size_or("n_group", absent[0]);
    let topk_group = keys.size_or("topk_group", absent[1]);
    moe(config).router.groups = (n_group != 1).then_some(RouterGroups {
        n_group,
        topk_group,
        score,
    });
}

/// `n_group` of a new file.
pub(super) fn n_group(config: &DecoderConfig) -> Option<Value> {
    let groups = config.moe.as_ref()?.router.groups.as_ref();
    Some(groups.map_or(1, |groups| groups.n_group).into())
}

/// `topk_group` of a new file.
pub(super) fn topk_group(config: &DecoderConfig) -> Option<Value> {
    let groups = config.moe.as_ref()?.router.groups.as_ref();
    Some(groups.map_or(1, |groups| groups.topk_group).into())
}

/// `topk_group` where `n_group` has read it already.
pub(super) const TOPK_GROUP: ConfigKey = ConfigKey {
    key: "topk_group",
    read: |_, _| (),
    write: topk_group,
};

/// `n_group` and `topk_group` of DeepSeek-V3's router: `grouped!(what absence means)`.
macro_rules! grouped {
    ($absent:expr) => {
        $crate::families::spec::ConfigKey {
            key: "n_group",
            read: |keys, config| {
                let score = bridge_core::config::GroupScoring::SumOfTopTwo;
                $crate::families::moe_keys::read_groups(keys, config, $absent, score);
            },
            write: $crate::families::moe_keys::n_group,
        }
    };
}
pub(super) use grouped;

/// `topk_method` of DeepSeek-V3's router, which transformers leaves out.
pub(super) const TOPK_METHOD: ConfigKey = ConfigKey {
    key: "topk_method",
    read: |keys, _| expect_text(keys, "topk_method", &["noaux_tc"]),
    write: |_| Some(json!("noaux_tc")),
};

/// `scoring_func` of DeepSeek-V3's router, which transformers leaves out.
pub(super) const SIGMOID: ConfigKey = ConfigKey {
    key: "scoring_func",
    read: |keys, _| expect_text(keys, "scoring_func", &["sigmoid"]),
    write: |_| Some(json!("sigmoid")),
};

/// `num_nextn_predict_layers`, or `num_mtp_layers` as the classes of transformers 5 call it; none where absent.
pub(super) const MTP_LAYERS: ConfigKey = ConfigKey {
    key: "num_nextn_predict_layers",
    read: |keys, config| {
        let count = keys.size_opt("num_nextn_predict_layers");
        config.num_mtp_layers = count.unwrap_or_else(|| keys.size_or("num_mtp_layers", 0));
    },
    write: |config| Some(config.num_mtp_layers.into()),
};

/// The latent attention of a config that is being read. The norms of DeepSeek's latent vectors add 1e-6 whatever
/// `rms_norm_eps` says.
pub(super) fn mla(config: &mut DecoderConfig) -> &mut MlaConfig {
    config.mla.get_or_insert(MlaConfig {
        q_lora_rank: None,
        kv_lora_rank: 0,
        qk_nope_head_dim: 0,
        qk_rope_head_dim: 0,
        v_head_dim: 0,
        norm_eps: 1e-6,
    })
}

/// Draws the consequences of the sizes of latent attention: the width of a head, and the scale of scores.
pub(super) fn settle_mla(config: &mut DecoderConfig) {
    let Some(mla) = &config.mla else { return };
    config.head_dim = mla.qk_head_dim();
    let rope = config.rope.as_ref();
    config.attention_scale = rope.and_then(|rope| mla.attention_scale(rope));
}

/// `q_lora_rank`: null where queries have no latent vector; 1536 where absent.
pub(super) const Q_LORA_RANK: ConfigKey = ConfigKey {
    key: "q_lora_rank",
    read: |keys, config| {
        mla(config).q_lora_rank = if keys.is_null("q_lora_rank") {
            None
        } else {
            Some(keys.size_or("q_lora_rank", 1536))
        };
    },
    write: |config| config.mla.as_ref().map(|mla| json!(mla.q_lora_rank)),
};

/// `rope_theta` of latent attention, read with the rest of the rotary embedding.
pub(super) const MLA_ROPE_THETA: ConfigKey = ConfigKey {
    key: "rope_theta",
    read: |keys, config| {
        read_rope(keys, config, 1.0);
        settle_mla(config);
    },
    write: |config| config.rope.as_ref().map(|rope| rope.to_hf().0),
};

/// Refuses a key with another value than the one that the family is about.
pub(super) fn expect_text(keys: &ConfigReader<'_>, key: &str, expected: &[&str]) {
    if let Some(found) = keys.text_opt(key).filter(|found| !expected.contains(found)) {
        keys.problem(format!(
            "{key} is {found:?}, expected {}",
            expected.join(" or ")
        ));
    }
}
