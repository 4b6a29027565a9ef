//! The weight map of one layer.

use super::weights::MegatronForm;
use crate::config::{DecoderConfig, Ffn, LayerConfig, Mixer};
use crate::mapping::{Fused, WeightMap};

/// One layer, or all of them where they are stacked.
pub(super) struct Layer<'a> {
    config: &'a DecoderConfig,
    layer: &'a LayerConfig,
    form: MegatronForm,
    /// What canonical and foreign names begin with.
    own: &'a str,
    theirs: &'a str,
    stacked: bool,
}

impl<'a> Layer<'a> {
    pub(super) fn new(
        config: &'a DecoderConfig,
        layer: &'a LayerConfig,
        form: MegatronForm,
        own: &'a str,
        theirs: &'a str,
        stacked: bool,
    ) -> Self {
        Self {
            config,
            layer,
            form,
            own,
            theirs,
            stacked,
        }
    }

    /// A renamed tensor.
    fn one(&self, map: WeightMap, own: &str, theirs: &str) -> WeightMap {
        let (own, theirs) = (
            format!("{}.{own}", self.own),
            format!("{}.{theirs}", self.theirs),
        );
        if self.stacked {
            map.fuse(Fused::new(&theirs, &[&own]))
        } else {
            map.copy(&own, &theirs)
        }
    }

    /// Tensors that lie in one, along `dim` and in turns of `groups`.
    fn fused(
        &self,
        map: WeightMap,
        parts: &[String],
        theirs: &str,
        dim: usize,
        groups: usize,
    ) -> WeightMap {
        let parts: Vec<String> = parts.iter().map(|p| format!("{}.{p}", self.own)).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let theirs = format!("{}.{theirs}", self.theirs);
        map.fuse(Fused::new(&theirs, &parts).dim(dim).groups(groups))
    }

    pub(super) fn add_to(&self, mut map: WeightMap) -> WeightMap {
        for leaf in ["weight", "bias"] {
            map = match self.layer.mixer {
                Mixer::Attention(_) if self.config.mla.is_some() => {
                    self.latent_attention(map, leaf)
                }
                Mixer::Attention(_) => self.attention(map, leaf),
                Mixer::Mamba2 => self.mamba(map, leaf),
                Mixer::Linear => self.one(
                    map,
                    &format!("attention_linear.{leaf}"),
                    &format!("self_attention.{leaf}"),
                ),
                Mixer::GatedDeltaNet if leaf == "weight" => self.delta_net(map),
                Mixer::GatedDeltaNet | Mixer::None => map,
            };
            map = self.one(
                map,
                &format!("attention_output_norm.{leaf}"),
                &format!("self_attention.linear_proj.post_layernorm.{leaf}"),
            );
            map = self.one(
                map,
                &format!("mlp_output_norm.{leaf}"),
                &format!("mlp.linear_fc2.post_layernorm.{leaf}"),
            );
            map = self.one(map, &format!("input_norm.{leaf}"), &self.input_norm(leaf));
            map = self.one(map, &format!("mlp_norm.{leaf}"), &self.mlp_norm(leaf));
            map = match self.layer.ffn {
                Ffn::Moe => self.experts(map, leaf),
                Ffn::Mlp(_) => self.mlp(map, "mlp", "mlp", leaf),
                Ffn::Linear => self.one(map, &format!("mlp_linear.{leaf}"), &format!("mlp.{leaf}")),
                Ffn::None => map,
            };
        }
        self.one(
            map,
            "attention.sinks",
            "self_attention.core_attention.softmax_offset",
        )
    }

    /// Where the norm before the part that mixes tokens is.
    fn input_norm(&self, leaf: &str) -> String {
        match self.layer.mixer {
            Mixer::Attention(_) if self.config.mla.is_none() => {
                format!("self_attention.linear_qkv.layer_norm_{leaf}")
            }
            Mixer::Linear => format!("self_attention.layer_norm_{leaf}"),
            Mixer::GatedDeltaNet => format!("self_attention.in_proj.layer_norm_{leaf}"),
            Mixer::Mamba2 if self.form.fused_mixer_norm => {
                format!("mixer.in_proj.layer_norm_{leaf}")
            }
            Mixer::Mamba2 => format!("norm.{leaf}"),
            _ => format!("input_layernorm.{leaf}"),
        }
    }

    /// Where the norm before the part that works on each token alone is.
    fn mlp_norm(&self, leaf: &str) -> String {
        match self.layer.ffn {
            Ffn::Linear => format!("mlp.layer_norm_{leaf}"),
            Ffn::Moe if self.form.pre_mlp_norm => format!("pre_mlp_layernorm.{leaf}"),
            Ffn::Mlp(_) if self.form.pre_dense_norm => format!("pre_mlp_layernorm.{leaf}"),
            _ => format!("mlp.linear_fc1.layer_norm_{leaf}"),
        }
    }

    /// The parts of a state space's fused tensors are tensors of their own in a checkpoint.
    fn mamba(&self, mut map: WeightMap, leaf: &str) -> WeightMap {
        for (own, theirs) in [("z", "z"), ("x", "x"), ("b", "B"), ("c", "C"), ("dt", "dt")] {
            map = self.one(
                map,
                &format!("mamba.{own}_proj.{leaf}"),
                &format!("mixer.in_proj.{leaf}.{theirs}"),
            );
            let (own, theirs) = (
                format!("mamba.{own}_conv.{leaf}"),
                format!("mixer.conv1d.{leaf}.{theirs}"),
            );
            map = match (
                own.starts_with("mamba.z") || own.starts_with("mamba.dt"),
                leaf,
            ) {
                (true, _) => map,
                (false, "weight") => self.filters(map, &own, &theirs),
                (false, _) => self.one(map, &own, &theirs),
            };
        }
        for (own, theirs) in [("gated_norm", "norm"), ("out_proj", "out_proj")] {
            map = self.one(
                map,
                &format!("mamba.{own}.{leaf}"),
                &format!("mixer.{theirs}.{leaf}"),
            );
        }
        if leaf == "weight" {
            for (own, theirs) in [("dt_bias", "dt_bias"), ("a_log", "A_log"), ("d", "D")] {
                map = self.one(map, &format!("mamba.{own}"), &format!("mixer.{theirs}"));
            }
        }
        map
    }

    /// [channels, taps] as the weight of a convolution with one filter per channel.
    fn filters(&self, map: WeightMap, own: &str, theirs: &str) -> WeightMap {
        let (own, theirs) = (
            format!("{}.{own}", self.own),
            format!("{}.{theirs}", self.theirs),
        );
        map.map(&own, &theirs, |filters| {
            let channels = filters.shape().first().copied().unwrap_or(0);
            filters.split(0, &[channels, 1])
        })
    }

    /// As with a state space, the parts of fused tensors are tensors of their own in a checkpoint.
    fn delta_net(&self, mut map: WeightMap) -> WeightMap {
        for (own, theirs) in [
            ("q", "query"),
            ("k", "key"),
            ("v", "value"),
            ("z", "z"),
            ("b", "beta"),
            ("a", "alpha"),
        ] {
            map = self.one(
                map,
                &format!("delta_net.{own}_proj.weight"),
                &format!("self_attention.in_proj.weight.{theirs}"),
            );
        }
        for (own, theirs) in [("q", "query"), ("k", "key"), ("v", "value")] {
            map = self.filters(
                map,
                &format!("delta_net.{own}_conv.weight"),
                &format!("self_attention.conv1d.weight.{theirs}"),
            );
        }
        for (own, theirs) in [
            ("dt_bias", "dt_bias"),
            ("a_log", "A_log"),
            ("out_proj.weight", "out_proj.weight"),
        ] {
            map = self.one(
                map,
                &format!("delta_net.{own}"),
                &format!("self_attention.{theirs}"),
            );
        }
        // All norms of a model scale by one plus their weight there, or none does.
        let (own, theirs) = (
            "delta_net.gated_norm.weight",
            "self_attention.out_norm.weight",
        );
        if self.config.norm.unit_offset {
            let (own, theirs) = (
                format!("{}.{own}", self.own),
                format!("{}.{theirs}", self.theirs),
            );
            map.less_one(&own, &theirs)
        } else {
            self.one(map, own, theirs)
        }
    }

    fn attention(&self, mut map: WeightMap, leaf: &str) -> WeightMap {
        map = self.one(
            map,
            &format!("attention.o_proj.{leaf}"),
            &format!("self_attention.linear_proj.{leaf}"),
        );
        for head in ["q", "k"] {
            map = self.one(
                map,
                &format!("attention.{head}_norm.{leaf}"),
                &format!("self_attention.{head}_layernorm.{leaf}"),
            );
        }
        let names: &[&str] = if self.config.attention_output_gate {
            &["q", "gate", "k", "v"]
        } else {
            &["q", "k", "v"]
        };
        let parts: Vec<String> = names
            .iter()
            .map(|name| format!("attention.{name}_proj.{leaf}"))
            .collect();
        let own_heads = match &self.layer.mixer {
            Mixer::Attention(own) => own.num_key_value_heads,
            _ => None,
        };
        // A turn holds the query heads of one group, then its key and value head.
        let groups = own_heads.unwrap_or(self.config.num_key_value_heads);
        let theirs = format!("self_attention.linear_qkv.{leaf}");
        self.fused(map, &parts, &theirs, 0, groups)
    }

    fn latent_attention(&self, mut map: WeightMap, leaf: &str) -> WeightMap {
        map = self.one(
            map,
            &format!("attention.o_proj.{leaf}"),
            &format!("self_attention.linear_proj.{leaf}"),
        );
        for (own, theirs) in [
            ("q_proj", "linear_q_proj"),
            ("q_a_proj", "linear_q_down_proj"),
            ("q_b_proj", "linear_q_up_proj"),
            ("kv_a_proj", "linear_kv_down_proj"),
            ("kv_b_proj", "linear_kv_up_proj"),
        ] {
            map = self.one(
                map,
                &format!("attention.{own}.{leaf}"),
                &format!("self_attention.{theirs}.{leaf}"),
            );
        }
        for part in ["q", "kv"] {
            let theirs = if self.form.fused_latent_norms {
                format!("self_attention.linear_{part}_up_proj.layer_norm_{leaf}")
            } else {
                format!("self_attention.{part}_layernorm.{leaf}")
            };
            map = self.one(map, &format!("attention.{part}_a_norm.{leaf}"), &theirs);
        }
        map
    }

    fn mlp(&self, mut map: WeightMap, own: &str, theirs: &str, leaf: &str) -> WeightMap {
        let up = format!("{own}.up_proj.{leaf}");
        let first = format!("{theirs}.linear_fc1.{leaf}");
        map = match (self.config.gated_mlp, self.form.singleton_shards) {
            (false, _) => self.one(map, &up, &first),
            (true, halves) => {
                let gate = format!("{own}.gate_proj.{leaf}");
                if halves {
                    map = self.one(map, &gate, &format!("{first}_w"));
                    self.one(map, &up, &format!("{first}_v"))
                } else {
                    self.fused(map, &[gate, up], &first, 0, 1)
                }
            }
        };
        let down = format!("{own}.down_proj.{leaf}");
        self.one(map, &down, &format!("{theirs}.linear_fc2.{leaf}"))
    }

    fn experts(&self, mut map: WeightMap, leaf: &str) -> WeightMap {
        map = self.one(
            map,
            &format!("mlp.router.{leaf}"),
            &format!("mlp.router.{leaf}"),
        );
        if leaf == "weight" {
            map = self.one(map, "mlp.router.correction_bias", "mlp.router.expert_bias");
            map = self.one(
                map,
                "mlp.shared_expert_gate.weight",
                "mlp.shared_experts.gate_weight",
            );
        }
        map = if self.form.singleton_shards {
            self.named_experts(map, leaf)
        } else {
            self.stacked_experts(map, leaf)
        };
        self.mlp(map, "mlp.shared_expert", "mlp.shared_experts", leaf)
    }

    /// [experts, rows, columns], or [experts, rows], on both sides: rows are along dim 1.
    fn stacked_experts(&self, map: WeightMap, leaf: &str) -> WeightMap {
        let up = format!("mlp.experts.up_proj.{leaf}");
        let first = format!("mlp.experts.experts.linear_fc1.{leaf}");
        let map = if self.config.gated_mlp {
            let gate = format!("mlp.experts.gate_proj.{leaf}");
            self.fused(map, &[gate, up], &first, 1, 1)
        } else {
            self.one(map, &up, &first)
        };
        self.one(
            map,
            &format!("mlp.experts.down_proj.{leaf}"),
            &format!("mlp.experts.experts.linear_fc2.{leaf}"),
        )
    }

    /// Experts with names of their own, [rows, columns] or [rows] each. Layers have names of their own then, too.
    fn named_experts(&self, map: WeightMap, leaf: &str) -> WeightMap {
        let (up, gate) = match self.config.gated_mlp {
            true => (
                format!("linear_fc1.{leaf}_v"),
                Some(format!("linear_fc1.{leaf}_w")),
            ),
            false => (format!("linear_fc1.{leaf}"), None),
        };
        let parts = [
            ("gate", gate),
            ("up", Some(up)),
            ("down", Some(format!("linear_fc2.{leaf}"))),
        ];
        parts.iter().fold(map, |map, (own, theirs)| match theirs {
            None => map,
            Some(theirs) => map.unstacked_experts(
                &format!("{}.mlp.experts.{own}_proj.{leaf}", self.own),
                &format!("{}.mlp.experts.experts.{{e}}.{theirs}", self.theirs),
            ),
        })
    }
}
