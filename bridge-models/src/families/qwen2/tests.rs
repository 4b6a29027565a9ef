use serde_json::{Value, json};

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference, parse, written};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(
        &SPEC,
        &[
            ("qwen25_0_5b", 494_032_768),
            ("qwen25_1_5b", 1_543_714_304),
            ("qwen25_3b", 3_085_938_688),
            ("qwen25_7b", 7_615_616_512),
            ("qwen25_14b", 14_770_033_664),
            ("qwen25_32b", 32_763_876_352),
            ("qwen25_72b", 72_706_203_648),
        ],
    );
}

#[test]
fn windows_need_the_switch() {
    let windows = |pairs: &[(&str, Value)]| {
        let mut json = written(&SPEC, &presets::tiny());
        for (key, value) in pairs {
            json[*key] = value.clone();
        }
        let config = parse(&SPEC, json)?;
        // What was read can be written and read again.
        assert_eq!(parse(&SPEC, written(&SPEC, &config)).unwrap(), config);
        Ok::<_, bridge_core::Error>(
            config
                .layers
                .iter()
                .map(|layer| layer.attention().unwrap().window)
                .collect::<Vec<_>>(),
        )
    };
    let (on, window, first) = (
        ("use_sliding_window", json!(true)),
        ("sliding_window", json!(9)),
        json!(1),
    );
    let first = ("max_window_layers", first);
    let types = (
        "layer_types",
        json!(["sliding_attention", "full_attention", "sliding_attention"]),
    );
    assert_eq!(
        windows(&[window.clone(), first.clone()]).unwrap(),
        [None; 3]
    );
    assert_eq!(
        windows(&[on.clone(), window.clone(), first.clone()]).unwrap(),
        [None, Some(9), Some(9)]
    );
    let chosen = windows(&[on.clone(), window.clone(), first, types.clone()]).unwrap();
    assert_eq!(chosen, [Some(9), None, Some(9)]);
    assert!(
        windows(&[window, types])
            .unwrap_err()
            .to_string()
            .contains("use_sliding_window is false")
    );
    let short = ("layer_types", json!(["full_attention"]));
    assert!(
        windows(&[on, short])
            .unwrap_err()
            .to_string()
            .contains("1 entries, expected 3")
    );
}

#[test]
fn the_reference_is_matched() {
    check_reference("qwen2");
}
