//! Frequencies against numbers computed with transformers 5.23 on torch 2.15 (`ROPE_INIT_FUNCTIONS`, fp32).

use super::*;

/// Relative difference that single-precision rounding of the power function can cause.
const F32_ROUNDING: f64 = 1e-6;

#[track_caller]
fn check(
    rope: RopeConfig,
    rotary_dim: usize,
    seq_len: usize,
    inv_freq: &[f64],
    attention_factor: f64,
) {
    assert!(rope.problems().is_empty(), "{}", rope.problems());
    let found = rope.frequencies(rotary_dim, seq_len);
    assert_eq!(found.inv_freq.len(), inv_freq.len());
    for (index, (found, expected)) in found.inv_freq.iter().zip(inv_freq).enumerate() {
        let difference = (f64::from(*found) - expected).abs() / expected;
        assert!(
            difference < F32_ROUNDING,
            "frequency {index} is {found}, expected {expected}"
        );
    }
    assert!(
        (found.attention_factor - attention_factor).abs() < 1e-12,
        "{}",
        found.attention_factor
    );
    // The typed config survives a round trip through its own serialization.
    let text = serde_json::to_string(&rope).unwrap();
    assert_eq!(serde_json::from_str::<RopeConfig>(&text).unwrap(), rope);
}

#[test]
fn default_frequencies() {
    check(
        RopeConfig::new(500_000.0),
        24,
        256,
        &[
            1.000000000,
            3.350316286e-1,
            1.122461930e-1,
            3.760603070e-2,
            1.259920839e-2,
            4.221134819e-3,
            1.414213446e-3,
            4.738064017e-4,
            1.587400620e-4,
            5.318295734e-5,
            1.781797982e-5,
            5.969583526e-6,
        ],
        1.0,
    );
}

#[test]
fn linear_scaling_divides() {
    check(
        RopeConfig {
            theta: 10_000.0,
            scaling: RopeScaling::Linear { factor: 3.0 },
        },
        16,
        256,
        &[
            3.333333433e-1,
            1.054092571e-1,
            3.333333507e-2,
            1.054092590e-2,
            3.333333181e-3,
            1.054092660e-3,
            3.333333589e-4,
            1.054092645e-4,
        ],
        1.0,
    );
}

#[test]
fn dynamic_scaling_starts_beyond_the_trained_length() {
    let rope = RopeConfig {
        theta: 10_000.0,
        scaling: RopeScaling::Dynamic {
            factor: 2.0,
            max_position_embeddings: 256,
        },
    };
    assert!(rope.depends_on_length());
    check(
        rope.clone(),
        16,
        100,
        &[
            1.000000000,
            3.162277639e-1,
            1.000000015e-1,
            3.162277862e-2,
            9.999999776e-3,
            3.162277862e-3,
            1.000000047e-3,
            3.162277862e-4,
        ],
        1.0,
    );
    check(
        rope,
        16,
        700,
        &[
            1.000000000,
            2.553384900e-1,
            6.519774348e-2,
            1.664749160e-2,
            4.250745289e-3,
            1.085378928e-3,
            2.771390136e-4,
            7.076426118e-5,
        ],
        1.0,
    );
}

#[test]
fn llama3_scaling() {
    check(
        RopeConfig {
            theta: 500_000.0,
            scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            },
        },
        128,
        131_072,
        &[
            1.000000000,
            8.146172166e-1,
            6.636012793e-1,
            5.405809879e-1,
            4.403666258e-1,
            3.587302268e-1,
            2.922278345e-1,
            2.380538136e-1,
            1.939227581e-1,
            1.579728127e-1,
            1.286873817e-1,
            1.048309505e-1,
            8.539710194e-2,
            6.956595182e-2,
            5.666961893e-2,
            4.616405070e-2,
            3.760603070e-2,
            3.063452058e-2,
            2.495540865e-2,
            2.032910474e-2,
            1.656044088e-2,
            1.349041983e-2,
            1.098952908e-2,
            8.952259086e-3,
            7.292665076e-3,
            5.940730684e-3,
            4.839421250e-3,
            3.942275885e-3,
            3.211446106e-3,
            2.166570630e-3,
            1.371893683e-3,
            8.567514597e-4,
            5.248460220e-4,
            3.126936499e-4,
            1.785077911e-4,
            9.556212171e-5,
            7.784655463e-5,
            6.341514381e-5,
            5.165906987e-5,
            4.208236714e-5,
            3.428102355e-5,
            2.792590931e-5,
            2.274892904e-5,
            1.853166941e-5,
            1.509621779e-5,
            1.229763893e-5,
            1.001786859e-5,
            8.160727702e-6,
            6.647869668e-6,
            5.415469332e-6,
            4.411534519e-6,
            3.593711881e-6,
            2.927499736e-6,
            2.384791742e-6,
            1.942692506e-6,
            1.582550794e-6,
            1.289173156e-6,
            1.050182618e-6,
            8.554969213e-7,
            6.969025321e-7,
            5.677088097e-7,
            4.624653798e-7,
            3.767322596e-7,
            3.068925878e-7,
        ],
        1.0,
    );
}

#[test]
fn yarn_with_both_mscales() {
    check(
        RopeConfig {
            theta: 10_000.0,
            scaling: RopeScaling::Yarn {
                factor: 40.0,
                original_max_position_embeddings: 4096,
                beta_fast: 32.0,
                beta_slow: 1.0,
                mscale: Some(0.707),
                mscale_all_dim: Some(1.0),
                attention_factor: None,
                truncate: true,
            },
        },
        64,
        131_072,
        &[
            1.000000000,
            7.498942018e-1,
            5.623413324e-1,
            4.216965139e-1,
            3.162277639e-1,
            2.371373624e-1,
            1.778279394e-1,
            1.333521456e-1,
            1.000000015e-1,
            7.498941571e-2,
            5.623412877e-2,
            3.900692612e-2,
            2.687936090e-2,
            1.837814413e-2,
            1.244795602e-2,
            8.334509097e-3,
            5.500000436e-3,
            3.561997321e-3,
            2.249365207e-3,
            1.370513462e-3,
            7.905694074e-4,
            4.149904125e-4,
            1.778279402e-4,
            3.333803397e-5,
            2.499999937e-5,
            1.874735426e-5,
            1.405853254e-5,
            1.054241238e-5,
            7.905694474e-6,
            5.928434348e-6,
            4.445698323e-6,
            3.333803534e-6,
        ],
        0.921_042_355_316_339_9,
    );
}

#[test]
fn yarn_without_rounded_ramp() {
    check(
        RopeConfig {
            theta: 150_000.0,
            scaling: RopeScaling::Yarn {
                factor: 32.0,
                original_max_position_embeddings: 4096,
                beta_fast: 32.0,
                beta_slow: 1.0,
                mscale: None,
                mscale_all_dim: None,
                attention_factor: None,
                truncate: false,
            },
        },
        64,
        131_072,
        &[
            1.000000000,
            6.890442967e-1,
            4.747820497e-1,
            3.271458745e-1,
            2.254180014e-1,
            1.553229839e-1,
            1.070244238e-1,
            7.374456525e-2,
            5.081327260e-2,
            3.170569614e-2,
            1.933499984e-2,
            1.159204915e-2,
            6.794959307e-3,
            3.860359080e-3,
            2.093792660e-3,
            1.052602194e-3,
            4.564839182e-4,
            1.293186942e-4,
            3.830881178e-5,
            2.639646846e-5,
            1.818833698e-5,
            1.253256960e-5,
            8.635495760e-6,
            5.950239483e-6,
            4.099978469e-6,
            2.825066758e-6,
            1.946596285e-6,
            1.341290954e-6,
            9.242089618e-7,
            6.368209142e-7,
            4.387978549e-7,
            3.023511397e-7,
        ],
        1.346_573_590_279_972_7,
    );
}

#[test]
fn yarn_with_a_given_attention_factor() {
    check(
        RopeConfig {
            theta: 1_000_000.0,
            scaling: RopeScaling::Yarn {
                factor: 4.0,
                original_max_position_embeddings: 32768,
                beta_fast: 32.0,
                beta_slow: 1.0,
                mscale: None,
                mscale_all_dim: None,
                attention_factor: Some(1.25),
                truncate: true,
            },
        },
        32,
        131_072,
        &[
            1.000000000,
            4.216965139e-1,
            1.778279394e-1,
            7.498941571e-2,
            3.162277862e-2,
            1.333521493e-2,
            4.779901356e-3,
            1.659961650e-3,
            5.499999970e-4,
            1.686785836e-4,
            4.445698505e-5,
            1.874735608e-5,
            7.905693565e-6,
            3.333803534e-6,
            1.405853368e-6,
            5.928434348e-7,
        ],
        1.25,
    );
}

#[test]
fn bad_numbers_are_found() {
    let linear = |factor| RopeConfig {
        theta: 10_000.0,
        scaling: RopeScaling::Linear { factor },
    };
    assert!(linear(2.0).problems().is_empty());
    for factor in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(linear(factor).problems().len(), 1, "{factor}");
    }
    for theta in [0.0, 1.0, -5.0, f64::NAN] {
        assert_eq!(RopeConfig::new(theta).problems().len(), 1, "{theta}");
    }
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 4.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 0,
    };
    assert_eq!(
        RopeConfig {
            theta: 10_000.0,
            scaling: llama3
        }
        .problems()
        .len(),
        2
    );
}
