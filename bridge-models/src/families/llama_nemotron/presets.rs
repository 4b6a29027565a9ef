//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::{
    AttentionLayer, Ffn, LayerConfig, Mixer, MlpLayer, RopeConfig, RopeScaling,
};

use crate::families::keys::plain_decoder;
use crate::families::spec::Preset;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "llama33_nemotron_super_49b",
        hub_id: "nvidia/Llama-3_3-Nemotron-Super-49B-v1",
        config: llama33_nemotron_super_49b,
    },
    Preset {
        name: "llama31_nemotron_ultra_253b",
        hub_id: "nvidia/Llama-3_1-Nemotron-Ultra-253B-v1",
        config: llama31_nemotron_ultra_253b,
    },
    Preset {
        name: "llama_nemotron_tiny",
        hub_id: "",
        config: tiny,
    },
];

/// Layers alike, one after the other: how many, whether they have attention, and the width of their MLP, 0 for none.
type Run = (usize, bool, usize);

const SUPER_49B: &[Run] = &[
    (1, true, 14_336),
    (5, true, 28_672),
    (2, false, 14_336),
    (3, true, 28_672),
    (1, false, 17_920),
    (30, true, 28_672),
    (1, false, 7168),
    (2, false, 14_336),
    (1, false, 7168),
    (1, false, 28_672),
    (1, false, 7168),
    (1, false, 14_336),
    (3, false, 7168),
    (1, true, 28_672),
    (1, false, 7168),
    (2, false, 5632),
    (1, false, 7168),
    (3, false, 5632),
    (2, false, 7168),
    (2, false, 2816),
    (2, false, 5632),
    (2, false, 2816),
    (1, false, 5632),
    (2, false, 2816),
    (9, true, 28_672),
];

const ULTRA_253B: &[Run] = &[
    (1, true, 5376),
    (1, true, 10_752),
    (6, true, 16_128),
    (1, true, 21_504),
    (4, false, 0),
    (3, true, 21_504),
    (2, true, 53_248),
    (6, false, 0),
    (3, true, 53_248),
    (5, false, 0),
    (3, true, 53_248),
    (1, true, 26_624),
    (3, false, 0),
    (3, true, 21_504),
    (1, false, 21_504),
    (1, true, 53_248),
    (1, false, 53_248),
    (5, false, 0),
    (4, true, 53_248),
    (5, false, 0),
    (4, true, 53_248),
    (5, false, 0),
    (4, true, 53_248),
    (5, false, 0),
    (4, true, 53_248),
    (5, false, 0),
    (1, true, 53_248),
    (3, true, 37_376),
    (2, false, 0),
    (1, true, 32_000),
    (3, true, 26_624),
    (2, false, 26_624),
    (1, true, 26_624),
    (1, false, 0),
    (7, false, 26_624),
    (1, true, 26_624),
    (5, false, 0),
    (1, true, 32_000),
    (1, true, 53_248),
    (1, false, 53_248),
    (1, true, 53_248),
    (8, false, 0),
    (1, false, 399_360),
    (8, false, 0),
    (1, false, 425_984),
    (8, false, 0),
    (1, false, 343_040),
    (5, false, 0),
    (1, false, 301_056),
    (1, false, 21_504),
    (1, true, 21_504),
    (1, true, 26_624),
    (1, false, 0),
    (2, true, 26_624),
    (1, true, 37_376),
    (4, true, 53_248),
    (1, true, 26_624),
];

fn llama_nemotron(
    hidden_size: usize,
    heads: usize,
    kv_heads: usize,
    runs: &[Run],
) -> DecoderConfig {
    let layer = |(_, attends, width): &Run| LayerConfig {
        mixer: if *attends {
            Mixer::Attention(AttentionLayer {
                num_key_value_heads: Some(kv_heads),
                ..AttentionLayer::default()
            })
        } else {
            Mixer::None
        },
        ffn: match *width {
            0 => Ffn::None,
            width => Ffn::Mlp(MlpLayer {
                intermediate_size: Some(width),
            }),
        },
    };
    let layers: Vec<LayerConfig> = runs
        .iter()
        .flat_map(|run| vec![layer(run); run.0])
        .collect();
    let mut config = DecoderConfig {
        hidden_size,
        intermediate_size: runs[0].2,
        num_hidden_layers: layers.len(),
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim: 128,
        vocab_size: 128_256,
        max_position_embeddings: 131_072,
        layers,
        bos_token_id: Some(128_000),
        eos_token_ids: vec![128_001, 128_008, 128_009],
        ..plain_decoder()
    };
    config.norm.eps = 1e-5;
    config
}

fn rope(factor: f64) -> RopeConfig {
    RopeConfig {
        scaling: RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        },
        ..RopeConfig::new(500_000.0)
    }
}

/// Llama-Nemotron Super 49B, found by search from Llama 3.3 70B.
pub fn llama33_nemotron_super_49b() -> DecoderConfig {
    DecoderConfig {
        rope: Some(rope(8.0)),
        ..llama_nemotron(8192, 64, 8, SUPER_49B)
    }
}

/// Llama-Nemotron Ultra 253B, found by search from Llama 3.1 405B.
pub fn llama31_nemotron_ultra_253b() -> DecoderConfig {
    DecoderConfig {
        rope: Some(rope(16.0)),
        ..llama_nemotron(16_384, 128, 8, ULTRA_253B)
    }
}

/// A toy with every kind of layer, for tests.
pub fn tiny() -> DecoderConfig {
    let runs = [(1, true, 256), (1, false, 512), (1, true, 0), (1, false, 0)];
    let mut config = llama_nemotron(48, 6, 2, &runs);
    config.layers[0].mixer = Mixer::Linear;
    config.layers[2].ffn = Ffn::Linear;
    config.layers.push(LayerConfig {
        mixer: Mixer::Attention(AttentionLayer {
            num_key_value_heads: Some(3),
            ..AttentionLayer::default()
        }),
        ffn: Ffn::Linear,
    });
    config.num_hidden_layers = config.layers.len();
    config.head_dim = 8;
    config.vocab_size = 131;
    config.max_position_embeddings = 96;
    config.rope = Some(RopeConfig::new(500.0));
    config
}
