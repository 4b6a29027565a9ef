//! Conversions of quantized checkpoints: dequantized exactly, quantized back to the same bytes, or written as bf16.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::bf16;
use serde_json::json;

use super::*;
use crate::checkpoint::native::{Group, NativeCheckpoint};
use crate::checkpoint::{Checkpoint, ShardedWriter, TensorSpec, WriterOptions};
use crate::config::HfConfig;
use crate::dtype::{DType, float8_value};
use crate::layout::LayoutSpec;
use crate::plan::plan_from_shapes;
use crate::registry::Registry;
use crate::test_model::{TestBridge, test_config};

const BLOCK: usize = 32;

fn registry() -> Registry {
    let mut registry = Registry::new();
    registry.register(&TestBridge);
    registry
}

fn config() -> HfConfig {
    test_config(json!({
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    }))
}

/// A checkpoint whose projections are quantized, with every code but NaN in use.
fn write_hf(root: &Path) -> PathBuf {
    let plain = test_config(json!({}));
    let plan = plan_from_shapes(&TestBridge, &plain, DType::BF16, &LayoutSpec::default()).unwrap();
    let mut tensors: BTreeMap<String, (DType, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 40) as u32
    };
    for tensor in &plan.mapping().foreign {
        let (name, shape) = (&tensor.name, &tensor.shape);
        let numel: usize = shape.iter().product();
        if name.ends_with("_proj.weight") {
            let code = |n: u32| if n & 0x7f == 0x7f { 0 } else { n as u8 };
            let codes = (0..numel).map(|_| code(next())).collect();
            let blocks = vec![shape[0].div_ceil(BLOCK), shape[1].div_ceil(BLOCK)];
            let scales = (0..blocks[0] * blocks[1])
                .flat_map(|_| (0.001 + (next() % 1000) as f32 * 1.7e-5).to_le_bytes());
            let scales = scales.collect();
            tensors.insert(format!("{name}_scale_inv"), (DType::F32, blocks, scales));
            tensors.insert(name.clone(), (DType::F8E4M3, shape.clone(), codes));
        } else {
            let values =
                (0..numel).flat_map(|_| bf16::from_f32(next() as f32 / 1e7 - 0.8).to_le_bytes());
            let values = values.collect();
            tensors.insert(name.clone(), (DType::BF16, shape.clone(), values));
        }
    }
    let dir = root.join("hf");
    let specs = tensors
        .iter()
        .map(|(name, (dtype, shape, _))| TensorSpec::new(name.as_str(), *dtype, shape.as_slice()));
    let options = WriterOptions {
        max_shard_bytes: 20_000,
        ..WriterOptions::default()
    };
    let writer = ShardedWriter::create(&dir, specs.collect(), options).unwrap();
    for (position, (_, _, bytes)) in tensors.values().enumerate() {
        writer.write_at(position, 0, bytes).unwrap();
    }
    writer.add_file("config.json", config().raw()).unwrap();
    writer.finish().unwrap()
}

fn read(checkpoint: &Checkpoint, name: &str) -> Vec<u8> {
    checkpoint.read(checkpoint.tensor(name).unwrap()).unwrap()
}

/// What a quantized weight stands for.
fn dequantized(hf: &Checkpoint, name: &str) -> Vec<bf16> {
    let cols = hf.tensor(name).unwrap().shape[1];
    let scales = read(hf, &format!("{name}_scale_inv"));
    let scale = |row: usize, col: usize| {
        let index = row / BLOCK * cols.div_ceil(BLOCK) + col / BLOCK;
        f32::from_le_bytes(scales.as_chunks::<4>().0[index])
    };
    let value = |(i, code): (usize, &u8)| {
        let value = float8_value(DType::F8E4M3, *code).unwrap();
        bf16::from_f32(value * scale(i / cols, i % cols))
    };
    read(hf, name).iter().enumerate().map(value).collect()
}

#[test]
fn fp8_blocks_come_back_byte_for_byte_at_any_layout() {
    let root = tempfile::tempdir().unwrap();
    let hf = write_hf(root.path());
    for layout in [LayoutSpec::default(), LayoutSpec::tp_pp(2, 3)] {
        let options = ConvertOptions::default();
        let report = roundtrip(&hf, &registry(), &layout, None, &options, &()).unwrap();
        assert!(report.passed(), "{:?}", report.mismatches);
        assert_eq!(report.files, report.identical_files);
    }
}

#[test]
fn an_import_holds_the_values_in_bf16() {
    let root = tempfile::tempdir().unwrap();
    let hf = write_hf(root.path());
    let native = root.path().join("native");
    let report = import(&hf, &native, &registry(), &ConvertOptions::default(), &()).unwrap();
    let planned = |name: &str| report.plan.tensors.iter().find(|t| t.canonical == name);
    let up = planned("layers.1.mlp.up_proj.weight").unwrap();
    assert_eq!((up.dtype, up.op), (DType::BF16, "dequantized"));
    assert_eq!(planned("embedding.weight").unwrap().op, "copy");

    let source = Checkpoint::open(&hf).unwrap();
    let native = NativeCheckpoint::open(&native).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let expected: Vec<u8> = dequantized(&source, name)
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let found = native
        .read(Group::Model, "layers.1.mlp.up_proj.weight")
        .unwrap();
    assert_eq!(found, expected);
    // A rank reads its own part of it.
    let model = HfModel::open(&hf, &registry(), &LayoutSpec::default()).unwrap();
    let part = model
        .read_slice("layers.1.mlp.up_proj.weight", &[40..80, 7..48])
        .unwrap();
    let rows = expected.chunks(2 * 48).skip(40);
    let expected: Vec<u8> = rows.flat_map(|row| row[14..].to_vec()).collect();
    assert_eq!(part, expected);
}

#[test]
fn an_export_may_be_plain_bf16_and_then_says_so() {
    let root = tempfile::tempdir().unwrap();
    let hf = write_hf(root.path());
    let (native, out) = (root.path().join("native"), root.path().join("out"));
    import(&hf, &native, &registry(), &ConvertOptions::default(), &()).unwrap();
    let options = ExportOptions {
        dtype: Some(DType::BF16),
        ..ExportOptions::default()
    };
    export(&native, &out, &registry(), &options, &()).unwrap();
    let (source, plain) = (
        Checkpoint::open(&hf).unwrap(),
        Checkpoint::open(&out).unwrap(),
    );
    let scales = |tensors: &Checkpoint| {
        let names = tensors.tensors().iter();
        names.filter(|t| t.name.ends_with("_scale_inv")).count()
    };
    assert_eq!((scales(&source), scales(&plain)), (21, 0));
    for info in plain.tensors() {
        assert_eq!(info.dtype, DType::BF16, "{}", info.name);
    }
    let name = "model.layers.0.self_attn.q_proj.weight";
    let expected: Vec<u8> = dequantized(&source, name)
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    assert_eq!(read(&plain, name), expected);
    let config = HfConfig::load(&out).unwrap();
    assert!(config.json()["quantization_config"].is_null());
    assert_eq!(config.json()["torch_dtype"], "bfloat16");
    // And what it says can be read again.
    HfModel::open(&out, &registry(), &LayoutSpec::default()).unwrap();
}

#[test]
fn a_plain_model_may_be_written_in_fp8_and_comes_back_close() {
    let root = tempfile::tempdir().unwrap();
    let hf = write_hf(root.path());
    let (native, plain) = (root.path().join("native"), root.path().join("plain"));
    import(&hf, &native, &registry(), &ConvertOptions::default(), &()).unwrap();
    let options = ExportOptions {
        dtype: Some(DType::BF16),
        ..ExportOptions::default()
    };
    export(&native, &plain, &registry(), &options, &()).unwrap();

    let (again, small) = (root.path().join("again"), root.path().join("small"));
    import(&plain, &again, &registry(), &ConvertOptions::default(), &()).unwrap();
    let options = ExportOptions {
        quantize: Some(crate::quant::QuantScheme::FP8),
        ..ExportOptions::default()
    };
    export(&again, &small, &registry(), &options, &()).unwrap();
    let config = HfConfig::load(&small).unwrap();
    assert_eq!(
        config.json()["quantization_config"]["weight_block_size"],
        json!([128, 128])
    );
    let open = |dir: &Path| HfModel::open(dir, &registry(), &LayoutSpec::default()).unwrap();
    let (before, after) = (open(&plain), open(&small));
    assert!(!before.plan().is_quantized() && after.plan().is_quantized());
    let values = |model: &HfModel, name: &str| -> Vec<f32> {
        let bytes = model.read(name).unwrap();
        let values = bytes.as_chunks::<2>().0.iter();
        values.map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
    };
    for tensor in &before.plan().tensors {
        let name = tensor.canonical.as_str();
        let (old, new) = (values(&before, name), values(&after, name));
        let largest = old.iter().fold(0f32, |a, x| a.max(x.abs()));
        for (old, new) in old.iter().zip(&new) {
            // Half a step of a 3-bit mantissa, or of the smallest codes; then the result is rounded to bf16.
            let half_a_step = (old.abs() / 16.0).max(largest / 448.0 / 1024.0);
            let limit = half_a_step * 1.01 + new.abs() / 256.0;
            let limit = if name.contains("_proj") { limit } else { 0.0 };
            assert!((old - new).abs() <= limit, "{name}: {old} became {new}");
        }
    }
    let both = ExportOptions {
        dtype: Some(DType::F32),
        ..options
    };
    let nowhere = root.path().join("nowhere");
    let error = export(&again, &nowhere, &registry(), &both, &()).unwrap_err();
    assert!(error.is_input() && !nowhere.exists());
    let mxfp4 = ExportOptions {
        quantize: Some(crate::quant::QuantScheme::Mxfp4),
        ..ExportOptions::default()
    };
    let error = export(&again, &nowhere, &registry(), &mxfp4, &()).unwrap_err();
    assert!(
        error.to_string().contains("it is a form of gpt-oss"),
        "{error}"
    );
}
