//! Adapters as Hugging Face PEFT folders: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! A layer's tensors are `base_model.model.<module>.lora_A.weight` `[dim, in]`, `.lora_B.weight` `[out, dim]` and, of DoRA,
//! `.lora_magnitude_vector` `[out]`, where `<module>` is the layer's name in the family's Hugging Face form.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use bridge_core::checkpoint::{
    Checkpoint, Shard, ShardLayout, ShardedWriter, TensorSpec, WriterOptions,
};
use bridge_core::dtype::{DType, decode_f32, encode_f32};
use bridge_core::{DecoderConfig, ModelBridge};
use serde_json::{Value, json};

use crate::config::{AdapterConfig, AdapterKind, DropoutPosition};
use crate::error::{Error, Result};
use crate::low_rank::{LORA_A, LORA_B, MAGNITUDE};
use crate::target::linear_names;
use crate::weights::AdapterWeights;

/// Name of the config.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the weights.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What names in the weights begin with.
const PREFIX: &str = "base_model.model.";
/// What names in the weights end with, and what that is here.
const PARTS: [(&str, &str); 3] = [
    (".lora_A.weight", LORA_A),
    (".lora_B.weight", LORA_B),
    (".lora_magnitude_vector", MAGNITUDE),
];

/// The module of each linear layer in a family's Hugging Face form, by canonical name; of a layer that is part of a
/// fused one, the name of that as an error.
pub fn modules(
    bridge: &dyn ModelBridge,
    config: &DecoderConfig,
) -> Result<BTreeMap<String, Result<String, String>>> {
    let mapping = bridge
        .weights(config)
        .resolve(&bridge.tensors(config))
        .map_err(|problems| {
            let what = format!("the weight map of {}", bridge.name());
            Error::Core(bridge_core::Error::Plan { what, problems })
        })?;
    let linears: BTreeSet<String> = linear_names(config).into_iter().collect();
    let mut modules = BTreeMap::new();
    for (index, tensor) in mapping.canonical.iter().enumerate() {
        let name = tensor.name.strip_suffix(".weight");
        let Some(name) = name.filter(|name| linears.contains(*name)) else {
            continue;
        };
        let Some(first) = mapping.pieces_of_canonical(index).next() else {
            continue;
        };
        let foreign = &mapping.foreign[first.foreign];
        // All elements of one are all elements of the other, in the same places.
        let alone = mapping.pieces_of_canonical(index).count() == 1
            && mapping.pieces_of_foreign(first.foreign).count() == 1
            && foreign.shape == tensor.shape
            && first.canonical_view == first.foreign_view;
        let module = match foreign.name.strip_suffix(".weight") {
            Some(module) if alone => Ok(module.to_owned()),
            _ => Err(foreign.name.clone()),
        };
        modules.insert(name.to_owned(), module);
    }
    Ok(modules)
}

/// Reads a PEFT folder of LoRA or DoRA for the model that `config` describes.
///
/// # Errors
/// If a file cannot be read, asks for something that is not supported, or does not fit the model.
pub fn import(
    dir: &Path,
    bridge: &dyn ModelBridge,
    config: &DecoderConfig,
) -> Result<AdapterWeights> {
    let path = dir.join(CONFIG_FILE);
    let text =
        std::fs::read(&path).map_err(|error| bridge_core::Error::io("read", &path, error))?;
    let file = |path: &Path, problem: String| Error::File {
        path: path.to_owned(),
        problem,
    };
    let json: Value = serde_json::from_slice(&text)
        .map_err(|error| file(&path, format!("is no JSON: {error}")))?;
    let mut adapters = read_config(&json).map_err(|problem| file(&path, problem))?;

    let by_module: BTreeMap<String, String> = modules(bridge, config)?
        .into_iter()
        .filter_map(|(name, module)| Some((module.ok()?, name)))
        .collect();
    let checkpoint = Checkpoint::open_files(dir, [WEIGHTS_FILE.to_owned()])?;
    let path = dir.join(WEIGHTS_FILE);
    let mut parts: BTreeMap<String, BTreeMap<String, Vec<f32>>> = BTreeMap::new();
    let mut problems = Vec::new();
    for tensor in checkpoint.tensors() {
        let known = tensor.name.strip_prefix(PREFIX).and_then(|rest| {
            let named = |(end, part): &(&str, &'static str)| Some((rest.strip_suffix(end)?, *part));
            PARTS.iter().find_map(named)
        });
        let found = known.and_then(|(module, part)| Some((by_module.get(module)?, part)));
        let Some((layer, part)) = found else {
            problems.push(format!(
                "`{}` is no LoRA tensor of a linear layer of this {} model",
                tensor.name,
                bridge.name()
            ));
            continue;
        };
        let mut values = vec![0.0; tensor.shape.iter().product()];
        decode_f32(&checkpoint.read(tensor)?, tensor.dtype, &mut values)
            .map_err(|error| file(&path, format!("`{}`: {error}", tensor.name)))?;
        (parts.entry(layer.clone()).or_default()).insert(part.to_owned(), values);
    }
    if !problems.is_empty() {
        return Err(Error::DoesNotFit(problems));
    }
    // Names by which PEFT chose modules are another family of words; these are the layers that it chose.
    adapters.target_modules = parts.keys().cloned().collect();
    let weights =
        AdapterWeights::from_parts(adapters, parts).map_err(|problem| file(&path, problem))?;
    weights.check(config)?;
    Ok(weights)
}

/// What an `adapter_config.json` says, without its target modules, or what in it is not supported.
fn read_config(json: &Value) -> Result<AdapterConfig, String> {
    let kind = json["peft_type"].as_str().unwrap_or("none");
    if kind != "LORA" {
        return Err(format!(
            "peft_type is {kind}; LORA (with or without use_dora) is supported"
        ));
    }
    for key in [
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "target_parameters",
        "trainable_token_indices",
    ] {
        let empty = match &json[key] {
            Value::Null => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        if !empty {
            return Err(format!(
                "{key} = {} is not supported; merge such an adapter with PEFT",
                json[key]
            ));
        }
    }
    if json["bias"].as_str().is_some_and(|bias| bias != "none") {
        return Err(format!(
            "bias = {} is not supported; \"none\" is",
            json["bias"]
        ));
    }
    for key in ["fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora"] {
        if json[key].as_bool() == Some(true) {
            return Err(format!("{key} = true is not supported"));
        }
    }
    let flag = |key: &str| json[key].as_bool().unwrap_or(false);
    let dim = json["r"]
        .as_u64()
        .filter(|r| *r > 0)
        .ok_or("r must be a number above 0")?;
    let config = AdapterConfig {
        kind: if flag("use_dora") {
            AdapterKind::Dora
        } else {
            AdapterKind::Lora
        },
        dim: usize::try_from(dim).map_err(|error| error.to_string())?,
        alpha: json["lora_alpha"]
            .as_f64()
            .ok_or("lora_alpha must be a number")?,
        dropout: json["lora_dropout"].as_f64().unwrap_or(0.0),
        dropout_position: DropoutPosition::Pre,
        use_rslora: flag("use_rslora"),
        ..AdapterConfig::default()
    };
    config.validate().map_err(|error| error.to_string())?;
    Ok(config)
}

/// Writes a PEFT folder at `dir`. `base` names the model that the adapter belongs to, for whoever loads it.
///
/// # Errors
/// [`Error::Fused`] for a layer without a module of its own, and what stands in the way of writing.
pub fn export(
    weights: &AdapterWeights,
    bridge: &dyn ModelBridge,
    config: &DecoderConfig,
    base: &str,
    dir: &Path,
) -> Result<PathBuf> {
    weights.check(config)?;
    if weights.config.dropout > 0.0 && weights.config.dropout_position == DropoutPosition::Post {
        return Err(Error::Setting {
            key: "dropout_position",
            value: "post".into(),
            problem: "PEFT knows dropout before the adapter alone".into(),
        });
    }
    let modules = modules(bridge, config)?;
    let mut tensors: Vec<(TensorSpec, &[f32])> = Vec::new();
    let mut chosen = BTreeSet::new();
    for (layer, factors) in &weights.layers {
        let module = match &modules[layer] {
            Ok(module) => module,
            Err(fused) => {
                return Err(Error::Fused {
                    name: layer.clone(),
                    fused: fused.clone(),
                });
            }
        };
        chosen.insert(module.as_str());
        let dim = weights.config.dim;
        let mut add = |end: &str, shape: Vec<usize>, values| {
            let name = format!("{PREFIX}{module}{end}");
            tensors.push((TensorSpec::new(name, DType::F32, shape), values));
        };
        add(PARTS[0].0, vec![dim, factors.a.len() / dim], &factors.a);
        add(PARTS[1].0, vec![factors.b.len() / dim, dim], &factors.b);
        if let Some(magnitude) = &factors.magnitude {
            add(PARTS[2].0, vec![magnitude.len()], magnitude);
        }
    }
    tensors.sort_by(|a, b| a.0.name.cmp(&b.0.name));
    let all: BTreeSet<&str> = modules.values().filter_map(|m| m.as_deref().ok()).collect();
    let targets = target_words(&chosen, &all);
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let options = WriterOptions {
        layout: Some(ShardLayout {
            shards: vec![Shard {
                file_name: WEIGHTS_FILE.to_owned(),
                tensors: (0..specs.len()).collect(),
                header_json: None,
            }],
            index_json: None,
        }),
        ..WriterOptions::default()
    };
    let writer = ShardedWriter::create(dir, specs, options)?;
    for (index, (_, values)) in tensors.iter().enumerate() {
        let mut bytes = vec![0; 4 * values.len()];
        encode_f32(values, DType::F32, &mut bytes).expect("fp32 is written as it is");
        writer.write_at(index, 0, &bytes)?;
    }
    let json = config_json(&weights.config, base, &targets);
    let json = serde_json::to_string_pretty(&json).expect("plain data");
    writer.add_file(CONFIG_FILE, json.as_bytes())?;
    Ok(writer.finish()?)
}

/// The last parts of the modules' names where these choose exactly them, else the whole names.
fn target_words<'a>(chosen: &BTreeSet<&'a str>, all: &BTreeSet<&'a str>) -> Vec<&'a str> {
    let leaf = |module: &&'a str| module.rsplit('.').next().unwrap_or_default();
    let leaves: BTreeSet<&str> = chosen.iter().map(leaf).collect();
    let meant = all.iter().filter(|module| leaves.contains(leaf(module)));
    if meant.count() == chosen.len() {
        leaves.into_iter().collect()
    } else {
        chosen.iter().copied().collect()
    }
}

fn config_json(config: &AdapterConfig, base: &str, targets: &[&str]) -> Value {
    let alpha = if config.alpha.fract() == 0.0 {
        json!(config.alpha as i64)
    } else {
        json!(config.alpha)
    };
    json!({
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": config.dim,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": config.kind == AdapterKind::Dora,
        "use_rslora": config.use_rslora,
    })
}
