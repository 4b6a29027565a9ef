//! The typed config: what is refused, and which tensors it implies.

use serde_json::json;

use super::*;
use crate::bridge::{CanonicalTensor, ModelBridge};
use crate::layout::{Place, ShardRule};
use crate::test_model::{TestBridge, test_config};

fn valid() -> DecoderConfig {
    TestBridge.config(&test_config(json!({}))).unwrap()
}

#[track_caller]
fn check_refused(change: impl FnOnce(&mut DecoderConfig), expected: &[&str]) {
    let mut config = valid();
    change(&mut config);
    let Err(Error::Config { problems, .. }) = config.validate("config.json") else {
        panic!("accepted: {config:?}");
    };
    assert_eq!(problems.listed(), expected);
}

#[test]
fn numbers_that_do_not_fit_together_are_refused() {
    valid().validate("config.json").unwrap();
    check_refused(
        |config| config.num_key_value_heads = 4,
        &["num_attention_heads=6 is not a multiple of num_key_value_heads=4"],
    );
    check_refused(
        |config| config.num_key_value_heads = 12,
        &["num_attention_heads=6 is not a multiple of num_key_value_heads=12"],
    );
    check_refused(
        |config| (config.hidden_size, config.vocab_size) = (0, usize::MAX),
        &[
            "hidden_size is 0, expected 1 to 2097152",
            "vocab_size is 18446744073709551615, expected 1 to 67108864",
        ],
    );
    check_refused(
        |config| {
            (
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
            ) = (2000, 2, 2000)
        },
        &["num_attention_heads=2000 times head_dim=2000 is 4000000, expected at most 2097152"],
    );
    check_refused(
        |config| config.layers.truncate(1),
        &["num_hidden_layers is 3, but 1 layers are described"],
    );
    check_refused(
        |config| config.head_dim = 15,
        &[
            "head_dim=15 times partial_rotary_factor=1 rotates 15 elements, expected an even number above 0",
        ],
    );
    check_refused(
        |config| config.partial_rotary_factor = f64::NAN,
        &["partial_rotary_factor is NaN, expected more than 0 and at most 1"],
    );
    check_refused(
        |config| {
            config.norm.eps = -1.0;
            config.embedding_scale = Some(f64::INFINITY);
            config.attention_softcap = Some(0.0);
        },
        &[
            "norm eps is -1, expected a finite number of at least 0",
            "embedding_scale is inf, expected a finite number above 0",
            "attention_softcap is 0, expected a finite number above 0",
        ],
    );
    check_refused(
        |config| {
            config.layers[1] = LayerConfig::dense_with_window(Some(0));
            config.layers[2].mixer = Mixer::Attention(AttentionLayer {
                rope: LayerRope::Local,
                ..AttentionLayer::default()
            });
            config.layers[2].ffn = Ffn::Mlp(MlpLayer {
                intermediate_size: Some(0),
            });
        },
        &[
            "layer 1: sliding window is 0, expected at least 1 token",
            "layer 2 uses rope_local, which is not set",
            "layer 2: intermediate_size is 0, expected 1 to 2097152",
        ],
    );
    check_refused(
        |config| config.rope_local = Some(RopeConfig::new(0.5)),
        &["rope_local: rope_theta is 0.5, expected a finite number above 1"],
    );
    check_refused(
        |config| {
            config.partial_rotary_factor = 0.125;
            let scaling = RopeScaling::Dynamic {
                factor: 2.0,
                max_position_embeddings: 64,
            };
            config.rope = Some(RopeConfig {
                theta: 1e4,
                scaling,
            });
        },
        &["rope: dynamic scaling needs more than 2 rotated elements per head"],
    );
}

#[test]
fn a_config_survives_its_own_serialization_and_refuses_unknown_keys() {
    let mut config = valid();
    config.layers[1] = LayerConfig::dense_with_window(Some(7));
    config.qk_norm = Some(QkNorm::FullWidth);
    config.norm.eps = 1.000_000_000_000_1e-5;
    let mut json = serde_json::to_value(&config).unwrap();
    assert_eq!(
        serde_json::from_value::<DecoderConfig>(json.clone()).unwrap(),
        config
    );
    json["hiden_size"] = json!(1);
    assert!(serde_json::from_value::<DecoderConfig>(json).is_err());
}

#[test]
fn activation_names_are_those_of_hugging_face() {
    for activation in Activation::ALL {
        assert_eq!(
            Activation::from_hf_name(activation.hf_name()),
            Some(activation)
        );
        assert_eq!(
            serde_json::to_value(activation).unwrap(),
            activation.hf_name()
        );
    }
    assert_eq!(
        Activation::from_hf_name("gelu_new"),
        Some(Activation::GeluTanh)
    );
    assert_eq!(Activation::from_hf_name("mish"), None);
}

#[track_caller]
fn check_tensor(
    tensors: &[CanonicalTensor],
    name: &str,
    shape: &[usize],
    shard: ShardRule,
    place: Place,
) {
    let expected = CanonicalTensor {
        name: name.to_owned(),
        shape: shape.to_vec(),
        shard,
        place,
    };
    assert_eq!(
        tensors.iter().find(|tensor| tensor.name == name),
        Some(&expected)
    );
}

#[test]
fn tensors_follow_from_the_config() {
    let mut config = valid();
    let plain = config.tensors();
    assert_eq!(plain.len(), 1 + 3 * 9 + 2);
    let vocab = ShardRule::Vocab {
        dim: 0,
        multiple: 1,
    };
    check_tensor(
        &plain,
        "embedding.weight",
        &[131, 48],
        vocab.clone(),
        Place::First,
    );
    check_tensor(
        &plain,
        "lm_head.weight",
        &[131, 48],
        vocab.clone(),
        Place::Last,
    );
    check_tensor(
        &plain,
        "final_norm.weight",
        &[48],
        ShardRule::Replicated,
        Place::Last,
    );
    let heads = |dim, heads| ShardRule::Heads { dim, heads };
    check_tensor(
        &plain,
        "layers.1.attention.q_proj.weight",
        &[96, 48],
        heads(0, 6),
        Place::Layer(1),
    );
    check_tensor(
        &plain,
        "layers.1.attention.v_proj.weight",
        &[32, 48],
        heads(0, 2),
        Place::Layer(1),
    );
    check_tensor(
        &plain,
        "layers.1.attention.o_proj.weight",
        &[48, 96],
        heads(1, 6),
        Place::Layer(1),
    );
    check_tensor(
        &plain,
        "layers.2.mlp.up_proj.weight",
        &[80, 48],
        ShardRule::Split { dim: 0 },
        Place::Layer(2),
    );
    check_tensor(
        &plain,
        "layers.2.mlp.down_proj.weight",
        &[48, 80],
        ShardRule::Split { dim: 1 },
        Place::Layer(2),
    );

    config.tie_word_embeddings = true;
    config.attention_bias = true;
    config.attention_output_bias = true;
    config.mlp_bias = true;
    config.gated_mlp = false;
    config.norm.bias = true;
    config.attention_output_norm = true;
    config.mlp_output_norm = true;
    config.qk_norm = Some(QkNorm::FullWidth);
    config.layers[1].ffn = Ffn::Mlp(MlpLayer {
        intermediate_size: Some(20),
    });
    let all = config.tensors();
    check_tensor(
        &all,
        "embedding.weight",
        &[131, 48],
        vocab,
        Place::FirstAndLast,
    );
    assert!(
        all.iter()
            .all(|tensor| tensor.name != "lm_head.weight" && !tensor.name.contains("gate"))
    );
    check_tensor(
        &all,
        "layers.0.attention.k_proj.bias",
        &[32],
        heads(0, 2),
        Place::Layer(0),
    );
    check_tensor(
        &all,
        "layers.0.attention.k_norm.weight",
        &[32],
        heads(0, 2),
        Place::Layer(0),
    );
    check_tensor(
        &all,
        "layers.0.attention.o_proj.bias",
        &[48],
        ShardRule::Replicated,
        Place::Layer(0),
    );
    check_tensor(
        &all,
        "layers.0.mlp.down_proj.bias",
        &[48],
        ShardRule::Replicated,
        Place::Layer(0),
    );
    check_tensor(
        &all,
        "layers.1.mlp.up_proj.bias",
        &[20],
        ShardRule::Split { dim: 0 },
        Place::Layer(1),
    );
    check_tensor(
        &all,
        "layers.0.mlp_output_norm.bias",
        &[48],
        ShardRule::Replicated,
        Place::Layer(0),
    );
    config.qk_norm = Some(QkNorm::PerHead);
    check_tensor(
        &config.tensors(),
        "layers.0.attention.k_norm.weight",
        &[16],
        ShardRule::Replicated,
        Place::Layer(0),
    );
}
