//! A model that goes from Hugging Face to native and back comes back byte for byte, at every layout. What is compared is
//! read without this project's reader.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bridge_core::convert::{ConvertOptions, ExportOptions, HfModel, export, import, roundtrip};
use bridge_core::dtype::DType;
use bridge_core::quant::QuantScheme;
use bridge_core::{Error, LayoutSpec};
use bridge_models::registry;
use bridge_tests::{families, fixture};
use serde_json::Value;

/// Dtype, shape and bytes of every tensor in a folder's `model*.safetensors`.
fn tensors(folder: &Path) -> BTreeMap<String, (String, Value, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("model") || !name.ends_with(".safetensors") {
            continue;
        }
        let bytes = fs::read(entry.path()).expect("a safetensors file");
        let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a JSON header");
        for (tensor, info) in header
            .as_object()
            .expect("an object")
            .iter()
            .filter(|(n, _)| *n != "__metadata__")
        {
            let at = |i: usize| {
                8 + length + info["data_offsets"][i].as_u64().expect("an offset") as usize
            };
            let value = (
                info["dtype"].to_string(),
                info["shape"].clone(),
                bytes[at(0)..at(1)].to_vec(),
            );
            assert!(
                all.insert(tensor.clone(), value).is_none(),
                "{tensor} stands twice"
            );
        }
    }
    all
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |e: fs::DirEntry| {
        (
            e.file_name().to_string_lossy().into_owned(),
            fs::read(e.path()).expect("a file"),
        )
    };
    fs::read_dir(folder)
        .expect("a folder")
        .flatten()
        .filter(|e| e.path().is_file())
        .map(read)
        .collect()
}

/// Imports the folder and exports it again into `back`.
fn there_and_back(hf: &Path, scratch: &Path, options: &ExportOptions) -> std::path::PathBuf {
    let (native, back) = (scratch.join("native"), scratch.join("back"));
    import(hf, &native, &registry(), &ConvertOptions::default(), &()).expect("an import");
    export(&native, &back, &registry(), options, &()).expect("an export");
    back
}

#[test]
fn tensors_config_and_companions_come_back_byte_for_byte() {
    for name in &families() {
        let scratch = tempfile::tempdir().expect("a temporary folder");
        let back = there_and_back(&fixture(name), scratch.path(), &ExportOptions::default());
        assert_eq!(tensors(&fixture(name)), tensors(&back), "{name}");
        let source = files(&fixture(name));
        for (file, bytes) in files(&back) {
            assert!(
                source.get(&file) == Some(&bytes),
                "{name}: {file} differs from the source"
            );
        }
        for file in ["config.json", "generation_config.json"] {
            let left_behind = source.contains_key(file) && !back.join(file).is_file();
            assert!(!left_behind, "{name}: {file} was left behind");
        }
    }
}

#[test]
fn every_legal_layout_gives_the_same_bytes() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let dense = [
        (1, 1),
        (2, 1),
        (4, 1),
        (1, 2),
        (1, 3),
        (2, 2),
        (2, 3),
        (4, 3),
    ];
    let dense = dense.map(|(tp, pp)| LayoutSpec::tp_pp(tp, pp));
    // Experts among two ranks, and each expert among two more.
    let experts = [(1, 1), (2, 2)].map(|(tp, etp)| LayoutSpec {
        tp,
        etp,
        ep: 2,
        dp: 2,
        ..LayoutSpec::default()
    });
    for name in &families() {
        let mut tried = 0;
        for layout in dense.iter().chain(&experts) {
            let report = match roundtrip(
                &fixture(name),
                &registry(),
                layout,
                Some(scratch.path()),
                &ConvertOptions::default(),
                &(),
            ) {
                // Heads or layers that do not divide, or no experts to divide: refused with the reason.
                Err(Error::Layout { .. }) => continue,
                other => other.unwrap_or_else(|e| panic!("{name} at {layout}: {e}")),
            };
            assert!(
                report.passed(),
                "{name} at {layout}: {:?}",
                report.mismatches
            );
            assert_eq!(report.tensors, tensors(&fixture(name)).len());
            tried += 1;
        }
        assert!(tried >= 3, "{name}: only {tried} layouts are legal");
    }
    assert_eq!(
        fs::read_dir(scratch.path()).expect("the folder").count(),
        0,
        "nothing is left behind"
    );
}

#[test]
fn another_shard_size_changes_files_but_no_tensor() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let options = ExportOptions {
        max_shard_bytes: Some(100_000),
        ..ExportOptions::default()
    };
    let back = there_and_back(&fixture("llama2"), scratch.path(), &options);
    assert_eq!(tensors(&fixture("llama2")), tensors(&back));
    let shards: Vec<u64> = fs::read_dir(&back)
        .expect("a folder")
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().ends_with(".safetensors"))
        .map(|e| e.metadata().expect("a size").len())
        .collect();
    assert!(
        shards.len() > 5 && shards.iter().all(|size| *size < 110_000),
        "{shards:?}"
    );
    assert!(back.join("model.safetensors.index.json").is_file());
}

#[test]
fn another_dtype_is_rounded_to_nearest_even_and_stated_in_the_config() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let options = ExportOptions {
        dtype: Some(DType::BF16),
        ..ExportOptions::default()
    };
    let back = there_and_back(&fixture("llama3_2"), scratch.path(), &options);
    let (before, after) = (tensors(&fixture("llama3_2")), tensors(&back));
    for (name, (dtype, shape, bytes)) in &after {
        assert_eq!((dtype.as_str(), shape), ("\"BF16\"", &before[name].1));
        let rounded: Vec<u8> = before[name]
            .2
            .as_chunks::<4>()
            .0
            .iter()
            .flat_map(|f| bf16(f32::from_le_bytes(*f)))
            .collect();
        assert!(*bytes == rounded, "{name}");
    }
    let config: Value =
        serde_json::from_slice(&fs::read(back.join("config.json")).expect("config")).expect("json");
    assert_eq!(config["dtype"], "bfloat16");
}

/// Rounds to the nearest bf16, ties to even.
fn bf16(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    let half = 0x7fff + (bits >> 16 & 1);
    (((bits + half) >> 16) as u16).to_le_bytes()
}

#[test]
fn mxfp4_can_be_taken_apart_and_put_together() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let source = fixture("gpt_oss_mxfp4");
    let options = ExportOptions {
        dtype: Some(DType::BF16),
        ..ExportOptions::default()
    };
    let plain = there_and_back(&source, scratch.path(), &options);
    let stored = tensors(&plain);
    // Not quantized, the experts are stored transposed, as in published bf16 files.
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    assert_eq!(stored[name].1, serde_json::json!([6, 64, 64]));
    assert!(!stored.contains_key(&format!("{name}_blocks")));

    let options = ExportOptions {
        quantize: Some(QuantScheme::Mxfp4),
        ..ExportOptions::default()
    };
    let second = tempfile::tempdir().expect("a temporary folder");
    let packed = there_and_back(&plain, second.path(), &options);
    assert!(tensors(&packed).contains_key(&format!("{name}_blocks")));
    let open =
        |dir: &Path| HfModel::open(dir, &registry(), &LayoutSpec::default()).expect("a model");
    let (before, after) = (open(&source), open(&packed));
    for tensor in &before.plan().tensors {
        let read = |model: &HfModel| model.read(&tensor.canonical).expect("a tensor");
        if tensor.op == "dequantized" {
            // Scales may differ from the source's; what they stand for does not.
            assert!(read(&before) == read(&after), "{}", tensor.canonical);
        }
    }
}
