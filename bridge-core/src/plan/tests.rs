//! Plans of the test family: what fits, what does not, and what the messages say.

use serde_json::json;

use super::*;
use crate::error::Error;
use crate::layout::LayoutSpec;
use crate::test_model::{TestBridge, test_config};

/// The headers of a complete checkpoint.
fn headers(config: serde_json::Value) -> Vec<TensorHeader> {
    let plan = plan_from_shapes(
        &TestBridge,
        &test_config(config),
        DType::BF16,
        &LayoutSpec::default(),
    )
    .unwrap();
    let mapping = plan.mapping();
    let own = mapping
        .foreign
        .iter()
        .filter(|tensor| tensor.role == ForeignRole::Weight);
    own.map(|t| TensorHeader::new(t.name.as_str(), DType::BF16, t.shape.as_slice()))
        .collect()
}

fn plan(config: serde_json::Value, headers: &[TensorHeader]) -> crate::error::Result<Plan> {
    plan_import(
        &TestBridge,
        &test_config(config),
        headers,
        &LayoutSpec::default(),
    )
}

#[track_caller]
fn check_refused(config: serde_json::Value, headers: &[TensorHeader], expected: &str) {
    let error = plan(config, headers).unwrap_err();
    assert!(error.is_input());
    assert_eq!(
        error.to_string(),
        format!("cannot import as test with config.json: {expected}")
    );
}

#[test]
fn a_complete_checkpoint_plans() {
    for config in [
        json!({}),
        json!({"fused": true}),
        json!({"tie_word_embeddings": true}),
    ] {
        let headers = headers(config.clone());
        let plan = plan(config.clone(), &headers).unwrap();
        let tied = config["tie_word_embeddings"] == true;
        let table = 131 * 48;
        let layer = 48 + 48 + (96 + 32 + 32) * 48 + 96 * 48 + 3 * 80 * 48;
        let bias = if config["fused"] == true {
            96 + 32 + 32
        } else {
            0
        };
        let parameters = if tied { table } else { 2 * table } + 48 + 3 * (layer + bias);
        assert_eq!(plan.parameters, parameters as u64);
        assert_eq!(plan.total_bytes, 2 * parameters as u64);
        assert_eq!(plan.ranks.len(), 1);
        assert_eq!(plan.ranks[0].bytes, plan.total_bytes);
        assert_eq!(plan.tied.len(), usize::from(tied));
        let json = serde_json::to_value(&plan).unwrap();
        assert_eq!(
            json["tensors"].as_array().unwrap().len(),
            plan.tensors.len()
        );
        assert_eq!(json["ranks"][0]["bytes"], plan.total_bytes);
    }
}

#[test]
fn every_misfit_is_named_at_once() {
    let mut headers = headers(json!({}));
    headers.retain(|header| header.name != "model.layers.1.mlp.up_proj.weight");
    for header in &mut headers {
        match header.name.as_str() {
            "model.layers.2.mlp.up_proj.weight" => {
                header.shape = vec![64, 48];
                header.file = Some("model-00002-of-00004.safetensors".to_owned());
            }
            "model.norm.weight" => header.dtype = DType::I32,
            _ => {}
        }
    }
    headers.push(TensorHeader::new(
        "model.layers.1.mlp.up_prj.weight",
        DType::BF16,
        [80, 48],
    ));
    headers.push(TensorHeader::new(
        "../../etc/passwd\0\u{1b}[31m",
        DType::BF16,
        [1],
    ));
    headers.push(TensorHeader::new("x".repeat(1000), DType::BF16, [1]));
    check_refused(
        json!({}),
        &headers,
        &format!(
            "6 problems\n  - tensor `model.layers.2.mlp.up_proj.weight` in model-00002-of-00004.safetensors has shape \
             [64, 48], expected [80, 48] from intermediate_size=80; check config.json\n  - tensor \
             `model.layers.1.mlp.up_proj.weight` of shape [80, 48] is missing from the checkpoint\n  - tensor \
             `model.layers.1.mlp.up_prj.weight` of shape [80, 48] is not part of the model; did you mean \
             `model.layers.1.mlp.up_proj.weight`, which is missing?\n  - tensor \
             `../../etc/passwd\\u{{0}}\\u{{1b}}[31m` of shape [1] is not part of the model\n  - tensor `{}...` (1000 bytes) \
             of shape [1] is not part of the model\n  - tensor `model.norm.weight` has dtype I32, expected a \
             floating-point type; quantized weights need a family that reads them",
            "x".repeat(120)
        ),
    );
}

#[test]
fn problems_are_capped_with_a_count() {
    let text = plan(json!({}), &[]).unwrap_err().to_string();
    assert!(text.contains("30 problems"), "{text}");
    assert!(text.ends_with("and 10 more"), "{text}");
}

#[test]
fn a_checkpoint_of_another_family_is_refused_quickly() {
    let config = json!({"num_hidden_layers": 4000});
    let others: Vec<TensorHeader> = (0..40_000)
        .map(|i| {
            TensorHeader::new(
                format!("transformer.h.{i}.attn.c_attn.weight"),
                DType::BF16,
                [2],
            )
        })
        .collect();
    let start = std::time::Instant::now();
    let text = plan(config, &others).unwrap_err().to_string();
    assert!(text.contains("76003 problems"), "{text}");
    assert!(
        start.elapsed() < std::time::Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn quantized_checkpoints_and_duplicate_names_are_refused() {
    let mut headers = headers(json!({}));
    headers.push(headers[0].clone());
    check_refused(
        json!({"quantization_config": {"quant_method": "gptq"}}),
        &headers,
        "2 problems\n  - the checkpoint is quantized (`gptq`), which is not read; known are fp8 in blocks and mxfp4; use such a \
         checkpoint, or one in bf16, fp16 or fp32\n  - tensor `model.embed_tokens.weight` is listed twice",
    );
}

#[test]
fn parts_of_a_fused_tensor_may_have_their_own_files_but_one_dtype() {
    let mut headers = headers(json!({"tie_word_embeddings": true}));
    headers.push(TensorHeader::new("lm_head.weight", DType::F32, [131, 48]));
    check_refused(
        json!({"tie_word_embeddings": true}),
        &headers,
        "tensor `lm_head.weight` has dtype F32, but tensor `model.embed_tokens.weight`, to which it is tied, has BF16",
    );
}

#[test]
fn a_tied_weight_may_be_stored_under_either_name_or_both() {
    let config = json!({"tie_word_embeddings": true});
    let head = TensorHeader::new("lm_head.weight", DType::BF16, [131, 48]);
    let mut both = headers(config.clone());
    both.push(head.clone());
    let only_head: Vec<TensorHeader> = both
        .iter()
        .filter(|header| header.name != "model.embed_tokens.weight")
        .cloned()
        .collect();
    let neither: Vec<TensorHeader> = only_head
        .iter()
        .filter(|h| h.name != "lm_head.weight")
        .cloned()
        .collect();

    let planned = plan(config.clone(), &both).unwrap();
    assert_eq!(planned.tensors[0].foreign, ["model.embed_tokens.weight"]);
    assert!(planned.tied[0].present);
    let planned = plan(config.clone(), &only_head).unwrap();
    assert_eq!(planned.tensors[0].foreign, ["lm_head.weight"]);
    check_refused(
        config,
        &neither,
        "tensor `model.embed_tokens.weight` of shape [131, 48] is missing from the checkpoint",
    );
    // Untied, both must be there.
    check_refused(
        json!({}),
        &headers(json!({"tie_word_embeddings": true})),
        "tensor `lm_head.weight` of shape [131, 48] is missing from the checkpoint; if the output head is the \
         embedding, set tie_word_embeddings to true in config.json",
    );
}

#[test]
fn ignored_tensors_are_listed_with_their_reason() {
    let mut headers = headers(json!({}));
    headers.push(TensorHeader::new(
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        DType::F32,
        [8],
    ));
    let plan = plan(json!({}), &headers).unwrap();
    assert_eq!(plan.ignored.len(), 1);
    assert_eq!(
        (plan.ignored[0].reason.as_str(), plan.ignored[0].bytes),
        ("recomputed from rope_theta", 32)
    );
}

#[test]
fn rank_bytes_add_up() {
    for (tp, pp, dp) in [(2, 1, 1), (1, 3, 1), (2, 3, 2), (2, 2, 1)] {
        let layout = LayoutSpec {
            tp,
            pp,
            dp,
            ..LayoutSpec::default()
        };
        let config = test_config(json!({"tie_word_embeddings": true}));
        let plan = plan_from_shapes(&TestBridge, &config, DType::F32, &layout).unwrap();
        assert_eq!(plan.ranks.len(), tp * pp * dp);
        let total: u64 = plan.ranks.iter().map(|rank| rank.bytes).sum();
        // Norms are on every tensor parallel rank, the embedding on the first and last stage.
        let norms = 4 * 48 * (2 * 3 + 1);
        let table = 4 * 131 * 48;
        let extra = (tp as u64 - 1) * norms + if pp > 1 { table } else { 0 };
        assert_eq!(total, dp as u64 * (plan.total_bytes + extra), "{layout}");
    }
}

#[test]
fn a_layout_that_does_not_fit_is_refused() {
    let config = test_config(json!({}));
    let error =
        plan_from_shapes(&TestBridge, &config, DType::F32, &LayoutSpec::tp_pp(3, 1)).unwrap_err();
    assert!(matches!(error, Error::Layout { .. }), "{error}");
}

#[test]
fn the_table_has_a_line_for_each_kind_of_tensor() {
    let config = json!({"fused": true, "tie_word_embeddings": true});
    let plan = plan_import(
        &TestBridge,
        &test_config(config.clone()),
        &headers(config),
        &LayoutSpec::tp_pp(2, 1),
    )
    .unwrap();
    let text = plan.to_string();
    let expected = [
        "test: 78,528 parameters in 38 tensors, 153.38 KiB",
        "canonical                           in the checkpoint                    shape      dtype  op     sharding               tensors       size",
        "embedding.weight                    model.embed_tokens.weight            [131, 48]  BF16   copy   tp dim 0 (vocabulary)        1  12.28 KiB",
        "layers.0-2.input_norm.weight        model.layers.*.input_norm.weight     [48]       BF16   copy   replicated                   3      288 B",
        "layers.0-2.attention.q_proj.weight  model.layers.*.self_attn.qkv.weight  [96, 48]   BF16   fused  tp dim 0 (6 heads)           3  27.00 KiB",
    ];
    assert!(text.lines().take(expected.len()).eq(expected), "{text}");
    assert_eq!(
        text.lines()
            .filter(|line| line.starts_with("layers.0-2."))
            .count(),
        12,
        "{text}"
    );
    assert!(text.contains("layers.0-2.mlp.gate_proj.weight"), "{text}");
    assert!(
        text.contains("tied: lm_head.weight is embedding.weight (absent)"),
        "{text}"
    );
    assert!(text.contains("layout: tp=2, 2 ranks"), "{text}");
    assert!(!text.contains("layers.1."), "{text}");
}

#[test]
fn a_large_model_plans_in_milliseconds() {
    let config = test_config(json!({
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    }));
    let layout = LayoutSpec {
        tp: 8,
        pp: 9,
        dp: 16,
        ..LayoutSpec::default()
    };
    let start = std::time::Instant::now();
    let plan = plan_from_shapes(&TestBridge, &config, DType::BF16, &layout).unwrap();
    assert_eq!(plan.ranks.len(), 1152);
    assert_eq!(plan.parameters, 405_853_388_800);
    let took = start.elapsed();
    assert!(took < std::time::Duration::from_secs(1), "{took:?}");
}

#[test]
fn exports_name_what_is_missing_and_write_tied_weights_as_the_source_had_them() {
    let config = test_config(json!({"tie_word_embeddings": true}));
    let typed = crate::ModelBridge::config(&TestBridge, &config).unwrap();
    let stored: Vec<TensorHeader> = typed
        .tensors()
        .into_iter()
        .map(|tensor| TensorHeader::new(tensor.name, DType::F32, tensor.shape))
        .collect();
    let names = |had: Option<&[&str]>| -> Vec<String> {
        let header = |name: &&str| TensorHeader::new(*name, DType::F32, [131, 48]);
        let source = had.map(|names| names.iter().map(header).collect::<Vec<_>>());
        let plan = plan_export(
            &TestBridge,
            &typed,
            &stored,
            None,
            source.as_deref(),
            &Default::default(),
        )
        .unwrap();
        let heads = plan.headers().map(|header| header.name);
        heads
            .filter(|name| name.contains("embed") || name.contains("head"))
            .collect()
    };
    assert_eq!(names(None), ["model.embed_tokens.weight"]);
    assert_eq!(
        names(Some(&["model.embed_tokens.weight"])),
        ["model.embed_tokens.weight"]
    );
    assert_eq!(names(Some(&["lm_head.weight"])), ["lm_head.weight"]);
    assert_eq!(
        names(Some(&["model.embed_tokens.weight", "lm_head.weight"])),
        ["model.embed_tokens.weight", "lm_head.weight"]
    );
    // A source that knows neither name still gets the weight written.
    assert_eq!(names(Some(&[])), ["model.embed_tokens.weight"]);

    let cast = plan_export(
        &TestBridge,
        &typed,
        &stored,
        Some(DType::BF16),
        None,
        &Default::default(),
    )
    .unwrap();
    assert!(cast.headers().all(|header| header.dtype == DType::BF16));
    let error = plan_export(
        &TestBridge,
        &typed,
        &stored[1..],
        Some(DType::I8),
        None,
        &Default::default(),
    )
    .unwrap_err()
    .to_string();
    assert_eq!(
        error,
        "cannot export as test: 2 problems\n  - tensor `embedding.weight` of shape [131, 48] is missing from the \
         checkpoint\n  - dtype I8 cannot be written; choose BF16, F16, F32 or F64"
    );
}
