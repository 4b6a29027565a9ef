use std::sync::Arc;

use bridge_core::config::{
    Activation, AttentionLayer, GatedDeltaNetConfig, LayerConfig, LayerRope, Mixer, NormKind,
    QkNorm, RopeConfig,
};
use bridge_ops::to_f32_vec;
use burn_flex::Flex;

use super::*;
use crate::context::Positions;
use crate::families::llama::presets::tiny;
use crate::families::{deepseek_v2, gpt_oss, llama_nemotron, nemotron_h, qwen3_moe};
use crate::run::loss_and_gradients;
use crate::{Init, RandomInit};

/// Every trait that a config can ask for, in a few models.
fn varied() -> Vec<(&'static str, DecoderConfig)> {
    let mut plain_mlp = tiny();
    plain_mlp.gated_mlp = false;
    plain_mlp.mlp_bias = true;
    plain_mlp.activation = Activation::Relu2;
    plain_mlp.norm.kind = NormKind::LayerNorm;
    plain_mlp.norm.bias = true;
    plain_mlp.norm.unit_offset = true;
    plain_mlp.partial_rotary_factor = 0.5;

    let mut norms = tiny();
    norms.tie_word_embeddings = true;
    norms.attention_bias = true;
    norms.attention_output_bias = true;
    norms.qk_norm = Some(QkNorm::PerHead);
    norms.attention_output_norm = true;
    norms.mlp_output_norm = true;
    norms.embedding_scale = Some(48f64.sqrt());
    norms.attention_scale = Some(0.2);
    norms.attention_softcap = Some(2.0);
    norms.final_logit_softcap = Some(3.0);
    norms.rope_local = Some(RopeConfig::new(500.0));
    norms.layers[0] = LayerConfig {
        mixer: Mixer::Attention(AttentionLayer {
            window: Some(5),
            rope: LayerRope::Local,
            ..AttentionLayer::default()
        }),
        ..LayerConfig::dense()
    };
    norms.layers[1] = LayerConfig {
        mixer: Mixer::Attention(AttentionLayer {
            rope: LayerRope::None,
            ..AttentionLayer::default()
        }),
        ..LayerConfig::dense()
    };

    let mut full_width = tiny();
    full_width.qk_norm = Some(QkNorm::FullWidth);

    let mut gated = tiny();
    gated.norm.unit_offset = true;
    gated.attention_output_gate = true;
    gated.gated_delta_net = Some(GatedDeltaNetConfig {
        num_key_heads: 2,
        num_value_heads: 4,
        key_head_dim: 10,
        value_head_dim: 7,
        conv_kernel: 3,
    });
    gated.layers[1].mixer = Mixer::GatedDeltaNet;
    vec![
        ("llama", tiny()),
        ("plain mlp", plain_mlp),
        ("norms", norms),
        ("full width", full_width),
        ("gated", gated),
        ("thinned out", llama_nemotron::presets::tiny()),
        ("state space", nemotron_h::presets::tiny()),
        (
            "latent attention",
            every_expert(deepseek_v2::presets::tiny()),
        ),
        ("sinks and biases", every_expert(gpt_oss::presets::tiny())),
        ("experts", every_expert(qwen3_moe::presets::tiny())),
    ]
}

/// The model with all its experts at work on every token, so that the loss has no jumps where a choice changes.
fn every_expert(mut config: DecoderConfig) -> DecoderConfig {
    if let Some(moe) = &mut config.moe {
        moe.num_experts_per_tok = moe.num_experts;
        moe.router.groups = None;
    }
    config
}

fn build(config: &DecoderConfig) -> Decoder<Flex> {
    let init = Init {
        std: Some(0.15),
        ..Init::default()
    };
    let model = Decoder::build(
        config.clone(),
        &mut RandomInit::new(&init, config),
        &Default::default(),
    )
    .unwrap();
    // Norms and biases off their neutral values, so that leaving one out shows.
    for param in model
        .params()
        .into_iter()
        .filter(|param| param.shape().len() == 1)
    {
        let values: Vec<f32> = to_f32_vec::<Flex>(param.value());
        let moved: Vec<f32> = values
            .iter()
            .enumerate()
            .map(|(i, v)| v + 0.2 * (i as f32 * 1.7).sin())
            .collect();
        param.set_value(bridge_ops::float_from_f32::<Flex>(
            &moved,
            &param.shape(),
            &Default::default(),
        ));
    }
    model
}

/// `count` token ids in no particular order.
fn ids(count: usize, seed: usize) -> Vec<u32> {
    (0..count)
        .map(|i| ((i * 37 + seed * 11 + i * i * 5) % 131) as u32)
        .collect()
}

fn context(ids: &[u32], shape: [usize; 2]) -> ForwardContext<'static, Flex> {
    ForwardContext::new(ids, shape, &Default::default())
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let worst = found
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(worst <= tolerance, "{what}: {worst} apart");
}

/// Rounding differs where sums are cut differently.
const ROUNDING: f32 = 2e-5;

#[test]
fn weights_are_those_that_the_config_lists() {
    for (what, config) in varied() {
        let found: Vec<(String, Vec<usize>)> = build(&config)
            .params()
            .iter()
            .map(|p| (p.name().to_owned(), p.shape()))
            .collect();
        let expected: Vec<(String, Vec<usize>)> = config
            .tensors()
            .into_iter()
            .map(|tensor| (tensor.name, tensor.shape))
            .collect();
        assert_eq!(found, expected, "{what}");
    }
}

#[test]
fn gradients_match_finite_differences() {
    for (what, config) in varied() {
        let model = build(&config);
        let (ids, shape) = (ids(22, 3), [2, 11]);
        let mut targets: Vec<i64> = ids.iter().map(|id| i64::from((id * 7 + 1) % 131)).collect();
        targets[4] = IGNORED;
        let step = loss_and_gradients(&model, &context(&ids, shape), &targets);
        assert_eq!(step.num_tokens, 21);
        let loss = || {
            let tape = Tape::inference();
            let ctx = context(&ids, shape);
            let hidden = model.hidden_states(&tape, &ctx);
            let targets = Targets::new(&targets, &Default::default());
            let losses =
                to_f32_vec::<Flex>(model.head_loss(&tape, &hidden, &targets, &ctx).into_value());
            losses.iter().map(|loss| f64::from(*loss)).sum::<f64>() / 21.0
        };
        for param in model.params() {
            let gradient = to_f32_vec::<Flex>(
                param
                    .grad()
                    .unwrap_or_else(|| panic!("{what}: {}", param.name())),
            );
            // Along the gradient itself the slope is its norm: the direction in which f32 noise matters least.
            let norm = gradient
                .iter()
                .map(|g| f64::from(*g).powi(2))
                .sum::<f64>()
                .sqrt();
            if norm < 1e-4 {
                continue; // Keys' biases move no softmax; their gradient is rounding.
            }
            let start = to_f32_vec::<Flex>(param.value());
            let reach = 3e-3;
            let at = |step: f64| {
                let moved: Vec<f32> = start
                    .iter()
                    .zip(&gradient)
                    .map(|(v, g)| v + (step * f64::from(*g) / norm) as f32)
                    .collect();
                param.set_value(bridge_ops::float_from_f32::<Flex>(
                    &moved,
                    &param.shape(),
                    &Default::default(),
                ));
                loss()
            };
            let slope = (at(reach) - at(-reach)) / (2.0 * reach);
            at(0.0);
            assert!(
                (slope - norm).abs() <= 0.02 * norm + 2e-4,
                "{what}: {}: slope {slope}, {norm}",
                param.name()
            );
        }
    }
}

#[test]
fn rows_of_a_batch_do_not_see_each_other() {
    for (what, config) in varied() {
        let model = build(&config);
        let (first, second) = (ids(9, 1), ids(9, 2));
        let together = to_f32_vec::<Flex>(
            model.forward(&context(&[first.clone(), second.clone()].concat(), [2, 9])),
        );
        let alone: Vec<f32> = [first, second]
            .iter()
            .flat_map(|row| to_f32_vec::<Flex>(model.forward(&context(row, [1, 9]))))
            .collect();
        assert_close(&together, &alone, ROUNDING, what);
    }
}

#[test]
fn packed_documents_do_not_see_each_other() {
    for (what, config) in varied() {
        let model = build(&config);
        let (first, second) = (ids(7, 4), ids(5, 5));
        let positions: Vec<u32> = (0..7).chain(0..5).collect();
        let packed = context(&[first.clone(), second.clone()].concat(), [1, 12])
            .with_positions(Positions::Explicit(positions.into()))
            .with_documents(Arc::from([0, 7, 12]));
        let packed = to_f32_vec::<Flex>(model.forward(&packed));
        let alone = [
            to_f32_vec::<Flex>(model.forward(&context(&first, [1, 7]))),
            to_f32_vec::<Flex>(model.forward(&context(&second, [1, 5]))),
        ]
        .concat();
        assert_close(&packed, &alone, ROUNDING, what);
    }
}

#[test]
fn a_text_in_pieces_through_the_cache_equals_the_text_in_one() {
    for (what, config) in varied() {
        let model = build(&config);
        let ids = ids(17, 6);
        let whole = to_f32_vec::<Flex>(model.forward(&context(&ids, [1, 17])));
        // A first piece larger than the cache's room makes it grow; single tokens are how generation goes on.
        let cache = model.new_cache(4);
        let mut pieces = Vec::new();
        let mut start = 0;
        for len in [6, 1, 1, 5, 1, 3] {
            let ctx = context(&ids[start..start + len], [1, len]).with_cache(&cache);
            pieces.extend(to_f32_vec::<Flex>(model.forward(&ctx)));
            start += len;
            assert_eq!(cache.len(), start);
        }
        assert_close(&pieces, &whole, ROUNDING, what);
    }
}

#[test]
fn the_last_token_alone_has_the_logits_it_has_among_all() {
    let model = build(&tiny());
    let all = to_f32_vec::<Flex>(model.forward(&context(&ids(10, 7), [2, 5])));
    let last = to_f32_vec::<Flex>(model.forward_last(&context(&ids(10, 7), [2, 5])));
    assert_close(
        &last,
        &[&all[4 * 131..5 * 131], &all[9 * 131..]].concat(),
        ROUNDING,
        "last",
    );
}

#[test]
fn a_known_loss_gradient_changes_nothing() {
    for (what, config) in varied() {
        let model = build(&config);
        let (ids, shape) = (ids(12, 8), [3, 4]);
        let targets: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        let run = |targets: &Targets<Flex>| {
            let ctx = context(&ids, shape);
            let hidden = model.hidden_states(&Tape::inference(), &ctx).into_value();
            let tape = Tape::new();
            let input = tape.leaf(hidden);
            let losses = model.head_loss(&tape, &input, targets, &ctx);
            let seed = bridge_ops::float_from_f32::<Flex>(&[0.25; 12], &[12], &Default::default());
            let values = to_f32_vec::<Flex>(losses.value());
            let gradient = tape
                .backward(vec![(losses, seed)], &[&input])
                .remove(0)
                .unwrap();
            (
                values,
                to_f32_vec::<Flex>(gradient),
                to_f32_vec::<Flex>(model.head_weight().take_grad().unwrap()),
            )
        };
        let unknown = run(&Targets::new(&targets, &Default::default()));
        let known = run(&Targets::weighted(&targets, 0.25, &Default::default()));
        assert_close(&known.0, &unknown.0, ROUNDING, what);
        assert_close(&known.1, &unknown.1, ROUNDING, what);
        assert_close(&known.2, &unknown.2, ROUNDING, what);
    }
}

#[test]
fn every_weight_belongs_to_the_segments_that_use_it() {
    for (what, config) in varied() {
        let model = build(&config);
        let layers = config.layers.len();
        assert_eq!(model.num_segments(), layers + 2);
        let names = |segment| {
            model
                .segment_params(segment)
                .iter()
                .map(|p| p.name().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(0), ["embedding.weight"], "{what}");
        assert!((1..=layers).all(|layer| {
            names(layer)
                .iter()
                .all(|name| name.starts_with(&format!("layers.{}.", layer - 1)))
        }));
        let head = if config.tie_word_embeddings {
            "embedding.weight"
        } else {
            "lm_head.weight"
        };
        assert_eq!(
            names(layers + 1).last().map(String::as_str),
            Some(head),
            "{what}"
        );
    }
}

#[test]
fn frozen_weights_get_no_gradient() {
    let model = build(&tiny());
    for param in model.params() {
        param.set_requires_grad(param.name().starts_with("layers.1.mlp"));
    }
    let ids = ids(8, 9);
    let targets: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    loss_and_gradients(&model, &context(&ids, [1, 8]), &targets);
    for param in model.params() {
        assert_eq!(
            param.grad().is_some(),
            param.requires_grad(),
            "{}",
            param.name()
        );
    }
}

#[test]
fn a_config_that_does_not_hold_together_is_refused() {
    let mut config = tiny();
    config.num_key_value_heads = 4;
    let error = Decoder::<Flex>::build(
        config.clone(),
        &mut RandomInit::new(&Init::default(), &config),
        &Default::default(),
    );
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("num_key_value_heads=4")
    );
}

#[test]
fn dynamic_scaling_stretches_the_context() {
    let mut config = tiny();
    assert_eq!(build(&config).context_length(), 96);
    config.rope = Some(RopeConfig {
        theta: 10_000.0,
        scaling: bridge_core::config::RopeScaling::Dynamic {
            factor: 2.5,
            max_position_embeddings: 96,
        },
    });
    assert_eq!(build(&config).context_length(), 240);
}

const IGNORED: i64 = crate::context::IGNORED_TARGET;

#[test]
fn ignored_targets_count_for_nothing() {
    let model = build(&tiny());
    let ids = ids(6, 10);
    let step = loss_and_gradients(&model, &context(&ids, [1, 6]), &[IGNORED; 6]);
    assert_eq!((step.num_tokens, step.mean_loss()), (0, 0.0));
    for param in model.params() {
        if let Some(grad) = param.take_grad() {
            assert!(
                to_f32_vec::<Flex>(grad).iter().all(|g| *g == 0.0),
                "{}",
                param.name()
            );
        }
    }
}
