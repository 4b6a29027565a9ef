use bridge_core::config::{Ffn, Mixer};
use serde_json::{Value, json};

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference, parse, written};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(
        &SPEC,
        &[
            ("nemotron_h_4b", 4_489_223_040),
            ("nemotron_h_8b", 8_100_852_736),
            ("nemotron_h_47b", 46_791_554_816),
            ("nemotron_h_56b", 56_324_350_464),
            ("nemotron_nano_v2_9b", 8_888_227_328),
            ("nemotron_nano_v2_12b", 12_310_001_152),
        ],
    );
}

fn with(pairs: &[(&str, Value)]) -> Value {
    let mut json = written(&SPEC, &presets::tiny());
    for (key, value) in pairs {
        json[*key] = value.clone();
    }
    json
}

#[test]
fn a_list_of_layers_says_what_the_pattern_says() {
    let from_pattern = parse(&SPEC, with(&[])).unwrap();
    for key in ["layers_block_type", "layer_types"] {
        for names in [
            ["linear_attention", "mlp", "full_attention"],
            ["mamba", "mlp", "attention"],
        ] {
            let [mamba, mlp, attention] = names;
            let list = json!([mamba, mlp, attention, mamba, mlp]);
            // A stale pattern beside a list says nothing.
            let json = with(&[(key, list), ("hybrid_override_pattern", json!("M"))]);
            assert_eq!(parse(&SPEC, json).unwrap(), from_pattern);
        }
    }
    assert_eq!(from_pattern.layers[0].mixer, Mixer::Mamba2);
    assert_eq!(from_pattern.layers[1].mixer, Mixer::None);
    assert_eq!(from_pattern.layers[2].ffn, Ffn::None);
}

#[test]
fn other_names_of_the_same_number_are_read() {
    let expected = parse(&SPEC, with(&[])).unwrap();
    for (key, other) in [
        ("n_groups", "mamba_n_groups"),
        ("ssm_state_size", "mamba_state_dim"),
        ("chunk_size", "mamba_chunk_size"),
        ("conv_kernel", "mamba_d_conv"),
        ("head_dim", "attention_head_dim"),
        ("time_step_min", "mamba_dt_min"),
        ("use_conv_bias", "mamba_conv_bias"),
    ] {
        let mut json = with(&[]);
        json[other] = json[key].clone();
        json.as_object_mut().unwrap().remove(key);
        assert_eq!(parse(&SPEC, json).unwrap(), expected, "{other}");
    }
}

#[test]
fn what_cannot_be_read_is_refused() {
    for (key, value, expected) in [
        (
            "hybrid_override_pattern",
            json!("M-X"),
            "has 'X' at position 2, expected M, *, - or E",
        ),
        (
            "hybrid_override_pattern",
            Value::Null,
            "neither hybrid_override_pattern nor layers_block_type",
        ),
        (
            "layers_block_type",
            json!(["mamba", "rwkv"]),
            "layers_block_type[1] is \"rwkv\", expected one of linear_attention",
        ),
        (
            "mamba_hidden_act",
            json!("gelu"),
            "mamba_hidden_act is \"gelu\", expected silu",
        ),
        (
            "n_groups",
            json!(3),
            "mamba2: num_heads=4 is not a multiple of num_groups=3",
        ),
        ("chunk_size", json!(0), "mamba2: chunk_size is 0"),
        (
            "mamba_head_dim",
            json!(1u64 << 40),
            "mamba2: head_dim is 1099511627776",
        ),
    ] {
        let error = parse(&SPEC, with(&[(key, value)])).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn the_reference_is_matched() {
    check_reference("nemotron_h");
}
