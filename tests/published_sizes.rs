//! Quantized checkpoints as they are published, at their real sizes: files with the real headers and no contents (they are
//! holes on the disk), for which plans must use every code and every scale once.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use bridge_core::convert::HfModel;
use bridge_core::dtype::DType;
use bridge_core::plan::plan_from_shapes;
use bridge_core::{HfConfig, LayoutSpec, ModelBridge};
use bridge_models::families::preset;
use bridge_models::registry;
use serde_json::{Map, Value, json};

/// A stored tensor: name, dtype as headers spell it, bytes of an element, shape.
type Stored = (String, &'static str, usize, Vec<usize>);

/// Writes the folder of a checkpoint whose tensors are `of` the bf16 ones of a named size.
fn write(
    dir: &Path,
    name: &str,
    quantization: Value,
    of: impl Fn(&str, &[usize]) -> Vec<Stored>,
) -> u64 {
    let (family, config) = preset(name).expect("a named size");
    let mut keys = family.hf_config(&config).expect("a config file");
    let hf = HfConfig::from_json(keys.clone(), "config.json");
    let plan = plan_from_shapes(family, &hf, DType::BF16, &LayoutSpec::default()).expect("a plan");
    keys.insert("quantization_config".to_owned(), quantization);
    std::fs::write(dir.join("config.json"), Value::Object(keys).to_string()).expect("written");

    let mut header = Map::new();
    let mut end = 0;
    for tensor in &plan.mapping().foreign {
        for (name, dtype, size, shape) in of(&tensor.name, &tensor.shape) {
            let start = end;
            end += (size * shape.iter().product::<usize>()) as u64;
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
            assert!(header.insert(name, entry).is_none(), "a name twice");
        }
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(dir.join("model.safetensors")).expect("a file");
    file.write_all(&(header.len() as u64).to_le_bytes())
        .and_then(|()| file.write_all(header.as_bytes()))
        .and_then(|()| file.set_len(8 + header.len() as u64 + end))
        .expect("a file system with holes");
    plan.parameters
}

#[track_caller]
fn check(dir: &Path, layout: LayoutSpec, parameters: u64) {
    let model = HfModel::open(dir, &registry(), &layout).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(model.plan().parameters, parameters);
    assert_eq!(model.plan().ranks.len(), layout.world_size());
}

/// DeepSeek-V3: every projection, of the multi-token prediction module too, has FP8 codes and a scale per 128 by 128 of
/// them; the router, `eh_proj`, norms, embedding and head do not.
#[test]
fn deepseek_v3_in_fp8_blocks() {
    let dir = tempfile::tempdir().expect("a folder");
    let settings = json!({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128]});
    let parameters = write(dir.path(), "deepseek_v3", settings, |name, shape| {
        let plain = [
            "gate.weight",
            "eh_proj.weight",
            "embed_tokens.weight",
            "head.weight",
        ];
        match shape {
            [out, inner] if !plain.iter().any(|end| name.ends_with(end)) => {
                let scales = vec![out.div_ceil(128), inner.div_ceil(128)];
                vec![
                    (name.to_owned(), "F8_E4M3", 1, shape.to_vec()),
                    (format!("{name}_scale_inv"), "F32", 4, scales),
                ]
            }
            _ if name.ends_with("e_score_correction_bias") => {
                vec![(name.to_owned(), "F32", 4, shape.to_vec())]
            }
            _ => vec![(name.to_owned(), "BF16", 2, shape.to_vec())],
        }
    });
    assert_eq!(parameters, 682_636_487_424);
    let layout = LayoutSpec {
        tp: 2,
        pp: 8,
        ep: 32,
        dp: 16,
        ..LayoutSpec::default()
    };
    check(dir.path(), layout, parameters);
}

/// gpt-oss: the two products of experts are FP4 codes, two in a byte, and a scale per 32 along the inputs, which lie last.
#[test]
fn gpt_oss_in_mxfp4() {
    for (name, published) in [
        ("gpt_oss_20b", 20_914_757_184),
        ("gpt_oss_120b", 116_829_156_672),
    ] {
        let dir = tempfile::tempdir().expect("a folder");
        let settings = json!({"quant_method": "mxfp4", "modules_to_not_convert":
            ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]});
        let parameters = write(dir.path(), name, settings, |name, shape| match shape {
            [experts, inputs, outputs] => {
                let scales = vec![*experts, *outputs, inputs / 32];
                let codes = [scales.as_slice(), &[16]].concat();
                vec![
                    (format!("{name}_blocks"), "U8", 1, codes),
                    (format!("{name}_scales"), "U8", 1, scales),
                ]
            }
            _ => vec![(name.to_owned(), "BF16", 2, shape.to_vec())],
        });
        assert_eq!(parameters, published, "{name}");
        let layout = LayoutSpec {
            tp: 8,
            ep: 8,
            dp: 2,
            ..LayoutSpec::default()
        };
        check(dir.path(), layout, parameters);
    }
}
