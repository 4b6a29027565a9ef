use bridge_core::dtype::DType;
use bridge_core::plan::plan_from_shapes;
use bridge_core::{HfConfig, LayoutSpec, ModelBridge};
use serde_json::json;

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference, parse, written};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(
        &SPEC,
        &[
            // 671.0 thousand million without the multi-token prediction module.
            ("deepseek_v3", 682_636_487_424),
            ("moonlight_16b_a3b", 15_960_110_208),
        ],
    );
    let mut main = presets::deepseek_v3();
    main.num_mtp_layers = 0;
    let parameters: usize = main.tensors().iter().map(|tensor| tensor.numel()).sum();
    assert_eq!(parameters, 671_026_419_200);
}

#[test]
fn multi_token_prediction_lies_after_the_last_layer_and_shares_embedding_and_head() {
    let config = presets::deepseek_v3();
    let mapping = SPEC.weights(&config).resolve(&config.tensors()).unwrap();
    for (name, shape) in [
        ("model.layers.61.enorm.weight", vec![7168]),
        ("model.layers.61.eh_proj.weight", vec![7168, 14_336]),
        ("model.layers.61.shared_head.norm.weight", vec![7168]),
        ("model.layers.61.embed_tokens.weight", vec![129_280, 7168]),
        (
            "model.layers.61.shared_head.head.weight",
            vec![129_280, 7168],
        ),
        (
            "model.layers.61.self_attn.kv_a_proj_with_mqa.weight",
            vec![576, 7168],
        ),
        (
            "model.layers.61.mlp.gate.e_score_correction_bias",
            vec![256],
        ),
        (
            "model.layers.61.mlp.experts.255.down_proj.weight",
            vec![7168, 2048],
        ),
    ] {
        let index = mapping
            .foreign_index(name)
            .unwrap_or_else(|| panic!("{name}"));
        assert_eq!(mapping.foreign[index].shape, shape, "{name}");
    }
}

#[test]
fn a_plan_over_forty_five_thousand_tensors_takes_a_moment() {
    let serde_json::Value::Object(keys) = written(&SPEC, &presets::deepseek_v3()) else {
        panic!("a config file holds an object")
    };
    let config = HfConfig::from_json(keys, "config.json");
    // 2048 H100s, as the model was trained: 16 stages, experts among 64 ranks.
    let layout = LayoutSpec {
        pp: 16,
        ep: 64,
        dp: 128,
        ..LayoutSpec::default()
    };
    let start = std::time::Instant::now();
    let plan = plan_from_shapes(&SPEC, &config, DType::BF16, &layout).unwrap();
    let took = start.elapsed();
    assert!(plan.mapping().foreign.len() > 45_000);
    assert_eq!(plan.ranks.len(), 2048);
    // Half a second of a processor's time; the limit allows for a machine with other work.
    assert!(took < std::time::Duration::from_secs(10), "{took:?}");
}

#[test]
fn one_group_is_no_group() {
    let mut json = written(&SPEC, &presets::tiny());
    json["n_group"] = json!(1);
    json["topk_group"] = json!(1);
    assert_eq!(parse(&SPEC, json).unwrap().moe.unwrap().router.groups, None);
}

#[test]
fn other_routers_are_refused() {
    let mut json = written(&SPEC, &presets::tiny());
    json["scoring_func"] = json!("softmax");
    json["topk_method"] = json!("greedy");
    let error = parse(&SPEC, json).unwrap_err().to_string();
    assert!(
        error.contains("expected sigmoid") && error.contains("expected noaux_tc"),
        "{error}"
    );
}

#[test]
fn the_references_are_matched() {
    for name in ["deepseek_v3", "deepseek_v3_mtp", "moonlight"] {
        check_reference(name);
    }
}
