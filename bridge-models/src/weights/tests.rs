use std::path::PathBuf;

use bridge_core::LayoutSpec;
use bridge_core::checkpoint::native::{Group, NativeCheckpoint, NativeWriter, PieceSpec};
use bridge_core::convert::{ConvertOptions, HfModel, import};
use bridge_core::dtype::DType;
use bridge_ops::{Ops, to_f32_vec};
use burn_flex::Flex;

use super::*;
use crate::context::ForwardContext;
use crate::decoder::Decoder;
use crate::families::llama::{self, presets::tiny};
use crate::{Error, registry};
use bridge_core::ModelBridge;

fn fixture(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(family)
}

fn open(dir: &std::path::Path) -> HfModel {
    HfModel::open(dir, &registry(), &LayoutSpec::default()).unwrap()
}

fn all_values<B: Ops>(model: &Decoder<B>) -> Vec<(String, Vec<f32>)> {
    model
        .params()
        .into_iter()
        .map(|p| (p.name().to_owned(), to_f32_vec::<B>(p.value())))
        .collect()
}

/// Saves `model` as iteration `iteration` of the native checkpoint `root`, with weights as `dtype`.
fn save(model: &Decoder<Flex>, root: &std::path::Path, dtype: DType) {
    let writer = NativeWriter::begin(root, 7, Default::default()).unwrap();
    let config = serde_json::Value::Object(llama::SPEC.hf_config(model.config()).unwrap());
    writer
        .add_file("hf/config.json", config.to_string().as_bytes())
        .unwrap();
    let pieces = model
        .params()
        .iter()
        .map(|p| PieceSpec::whole(p.name(), dtype, p.shape()))
        .collect();
    let file = writer.piece_file(Group::Model, 0, pieces).unwrap();
    let mut index = 0;
    export_weights::<Flex, Error>(model, Some(dtype), |weight| {
        file.write_at(index, 0, weight.bytes)
            .map_err(bridge_core::Error::from)?;
        index += 1;
        Ok(())
    })
    .unwrap();
    file.finish().unwrap();
    writer.finish(1, 0).unwrap();
}

#[test]
fn an_imported_checkpoint_loads_as_its_source_does() {
    for family in ["llama2", "llama3_1", "llama3_2"] {
        let source = load_hf::<Flex>(
            &open(&fixture(family)),
            DtypePolicy::Float32,
            &Default::default(),
        )
        .unwrap();
        let out = tempfile::tempdir().unwrap();
        import(
            &fixture(family),
            out.path(),
            &registry(),
            &ConvertOptions::default(),
            &(),
        )
        .unwrap();
        let native = NativeCheckpoint::open(out.path()).unwrap();
        let loaded = load_native::<Flex>(
            &native,
            &registry(),
            DtypePolicy::Float32,
            &Default::default(),
        )
        .unwrap();
        assert_eq!(loaded.config(), source.config(), "{family}");
        assert_eq!(all_values(&loaded), all_values(&source), "{family}");
    }
}

#[test]
fn a_fresh_model_survives_saving_and_loading() {
    let config = tiny();
    let mut weights = RandomInit::new(
        &Init {
            seed: 5,
            ..Init::default()
        },
        &config,
    );
    let model = Decoder::<Flex>::build(config, &mut weights, &Default::default()).unwrap();
    let root = tempfile::tempdir().unwrap();
    save(&model, root.path(), DType::F32);
    let native = NativeCheckpoint::open(root.path()).unwrap();
    let loaded = load_native::<Flex>(
        &native,
        &registry(),
        DtypePolicy::Float32,
        &Default::default(),
    )
    .unwrap();
    assert_eq!(loaded.config(), model.config());
    assert_eq!(all_values(&loaded), all_values(&model));
}

#[test]
fn half_precision_matrices_are_kept_and_computed_in_full() {
    let config = tiny();
    let init = Init {
        std: Some(0.1),
        ..Init::default()
    };
    let model = Decoder::<Flex>::build(
        config.clone(),
        &mut RandomInit::new(&init, &config),
        &Default::default(),
    )
    .unwrap();
    for dtype in [DType::BF16, DType::F16] {
        let root = tempfile::tempdir().unwrap();
        save(&model, root.path(), dtype);
        let native = NativeCheckpoint::open(root.path()).unwrap();
        let load = |policy| {
            load_native::<Flex>(&native, &registry(), policy, &Default::default()).unwrap()
        };
        let (kept, full) = (load(DtypePolicy::Source), load(DtypePolicy::Float32));
        assert_eq!(all_values(&kept), all_values(&full), "{dtype:?}");
        for param in kept.params() {
            let held = if param.shape().len() == 2 {
                dtype
            } else {
                DType::F32
            };
            assert_eq!(stored_dtype(&param), held, "{}", param.name());
        }
        assert!(
            full.params()
                .iter()
                .all(|param| stored_dtype(param) == DType::F32)
        );
        // The same numbers and the same f32 arithmetic: only the order of sums may differ.
        let logits = |model: &Decoder<Flex>| {
            to_f32_vec::<Flex>(model.forward(&ForwardContext::new(
                &[1, 2, 3, 4, 5, 6],
                [2, 3],
                &Default::default(),
            )))
        };
        let worst = logits(&kept)
            .iter()
            .zip(logits(&full))
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst < 1e-5, "{dtype:?}: {worst} apart");
    }
}

#[test]
fn weights_are_exported_as_they_are_held_or_as_asked() {
    let source = load_hf::<Flex>(
        &open(&fixture("llama2")),
        DtypePolicy::Float32,
        &Default::default(),
    )
    .unwrap();
    let collect = |dtype| {
        let mut all = Vec::new();
        export_weights::<Flex, Error>(&source, dtype, |weight| {
            all.push((
                weight.name.to_owned(),
                weight.shape.to_vec(),
                weight.dtype,
                weight.bytes.to_vec(),
            ));
            Ok(())
        })
        .unwrap();
        all
    };
    let folder = open(&fixture("llama2"));
    for (name, shape, dtype, bytes) in collect(None) {
        let (stored_shape, stored_dtype) = folder.tensor(&name).unwrap();
        assert_eq!((shape.as_slice(), dtype), (stored_shape, stored_dtype));
        assert_eq!(bytes, folder.read(&name).unwrap(), "{name}");
    }
    for ((_, shape, dtype, bytes), tensor) in collect(Some(DType::BF16))
        .into_iter()
        .zip(source.config().tensors())
    {
        assert_eq!(
            (shape, dtype, bytes.len()),
            (tensor.shape.clone(), DType::BF16, 2 * tensor.numel())
        );
    }
    let stopped = export_weights::<Flex, &str>(&source, None, |_| Err("full"));
    assert_eq!(stopped, Err("full"));
}

#[test]
fn a_native_checkpoint_that_does_not_fit_its_config_is_refused() {
    let mut config = tiny();
    let mut weights = RandomInit::new(&Init::default(), &config);
    let model = Decoder::<Flex>::build(config.clone(), &mut weights, &Default::default()).unwrap();
    let root = tempfile::tempdir().unwrap();
    save(&model, root.path(), DType::F32);
    let native = NativeCheckpoint::open(root.path()).unwrap();
    config.intermediate_size = 88;
    config.tie_word_embeddings = true;
    config.mlp_bias = true;
    let json = serde_json::Value::Object(llama::SPEC.hf_config(&config).unwrap());
    std::fs::write(native.dir().join("hf/config.json"), json.to_string()).unwrap();
    let error = load_native::<Flex>(
        &native,
        &registry(),
        DtypePolicy::Float32,
        &Default::default(),
    )
    .unwrap_err();
    let text = error.to_string();
    for expected in [
        "`layers.0.mlp.up_proj.weight` has shape [80, 48], expected [88, 48]",
        "`layers.0.mlp.gate_proj.bias` [88] is missing",
        "`lm_head.weight` is none of the model's",
    ] {
        assert!(text.contains(expected), "{text}");
    }
    assert!(error.is_input());
}

#[test]
fn weights_that_are_no_floats_are_refused() {
    let bytes = vec![0; 6];
    for dtype in [DType::I8, DType::F8E4M3] {
        let error = held_tensor::<Flex>(
            DtypePolicy::Source,
            "w",
            &[2, 3],
            dtype,
            bytes.clone(),
            &Default::default(),
            || "somewhere".to_owned(),
        );
        let error = error.unwrap_err();
        assert!(
            error.to_string().contains(dtype.as_str()) && error.is_input(),
            "{error}"
        );
    }
}
