//! A whole run from a resolved configuration.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bridge_core::checkpoint::native::NativeCheckpoint;
use bridge_core::convert::{HF_DIR, HfModel};
use bridge_core::{CanonicalTensor, HfConfig, LayoutSpec, Registry};
use bridge_data::Split;
use bridge_models::weights::{HfWeights, NativeWeights, load_param, native_config};
use bridge_models::{Decoder, DtypePolicy, Init, RandomInit, SegmentedModel, WeightSource};
use bridge_ops::{DType, Ops, Param};
use bridge_parallel::ParallelContext;
use bridge_peft::{ADAPTER_FILE, AdapterConfig};
use bridge_tokenizers::Tokenizer;

use crate::callback::{Callback, Callbacks, Summary};
use crate::checkpoint::{CONFIG_FILE, CheckpointStore, ZeroSource};
use crate::config::{LoggingConfig, Platform, PrecisionMode, ResolvedConfig};
use crate::error::{Error, Result};
use crate::metrics::{JsonLines, LossPlot, TensorBoard};
use crate::optimizer::Optimizer;
use crate::signals::StopFlag;
use crate::sources::{load_tokenizer, load_training_data};
use crate::trainer::{Trainer, TrainerOptions};

/// How `transformers` is to generate text with a model.
const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// What a run needs beside its configuration.
pub struct PretrainContext<'a, B: Ops> {
    /// This rank's place among those that train the model, and where it computes; for a run on one rank,
    /// [`ParallelContext::single`].
    pub parallel: Arc<ParallelContext<B>>,
    /// What that backend offers.
    pub platform: Platform,
    /// The model families that are known, for weights from a Hugging Face folder.
    pub registry: &'a Registry,
    /// Turns a folder or hub id into a folder, or says why not.
    pub hf_folder: &'a dyn Fn(&str) -> Result<PathBuf, String>,
    /// What the run is called in its reports.
    pub name: &'a str,
    /// Hears what happens, after the reports that the configuration asks for, which the first rank alone makes.
    pub callback: &'a mut dyn Callback,
    /// Ends the run gracefully when raised.
    pub stop: StopFlag,
}

/// What a run leaves in memory.
pub struct PretrainOutcome<B: Ops> {
    /// How it went.
    pub summary: Summary,
    /// The trained model, as far as this rank holds it. With sharded parameters
    /// (`data_parallel_sharding_strategy = "optim_grads_params"`) no rank holds its weights.
    pub model: Decoder<B>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
}

/// Trains the model that `config` describes, from fresh or given weights, or continues the run that
/// `config.checkpoint.dir` holds. With several ranks, every one calls this, with the same configuration.
///
/// # Errors
/// If the configuration asks for what the platform lacks, something it names cannot be read, or the run fails (see
/// [`Trainer::run`]).
pub fn pretrain<B: Ops>(
    config: &ResolvedConfig,
    context: PretrainContext<'_, B>,
) -> Result<PretrainOutcome<B>> {
    context.platform.check(config)?;
    let tokenizer = load_tokenizer(config, context.hf_folder)?;
    let data = load_training_data(config, &tokenizer)?;
    let train = data
        .get(Split::Train)
        .cloned()
        .ok_or_else(|| Error::Setting {
            key: "data.split",
            problem: format!("\"{}\" leaves no documents for training", config.data.split),
        })?;
    let store = checkpoint_store(config, &tokenizer, context.hf_folder)?;
    let resuming = store.has_checkpoint()?;
    let mut model = build_model::<B>(config, &context)?;
    if let Some(adapters) = config.peft.adapters(config.train.seed) {
        let described = adapter_json(config, &adapters, context.hf_folder)?;
        if resuming {
            same_adapters(config, &described)?;
        }
        attach_adapters(config, &context, &mut model, &adapters)?;
    }
    let options = TrainerOptions::from(config);
    let optimizer = with_source(config, &context, resuming, &mut |source| {
        let load = &mut |param: &Param<B>| Ok(load_param(param, source)?);
        let (adamw, data_parallel) = (&options.adamw, &options.data_parallel);
        Optimizer::with_weights(&model, &context.parallel, adamw, data_parallel, load)
    })?;

    let reports = PathBuf::from(
        config
            .logging
            .dir
            .as_deref()
            .unwrap_or(&config.checkpoint.dir),
    );
    let mut callbacks = Callbacks::new();
    let logging = if context.parallel.rank() == 0 {
        config.logging.clone()
    } else {
        LoggingConfig {
            jsonl: false,
            tensorboard: false,
            plot: false,
            ..config.logging.clone()
        }
    };
    if logging.jsonl || logging.tensorboard || logging.plot {
        std::fs::create_dir_all(&reports)
            .map_err(|source| Error::io("create folder", &reports, source))?;
    }
    if logging.jsonl {
        callbacks.push(JsonLines::new(&reports));
    }
    if logging.tensorboard {
        callbacks.push(TensorBoard::create(&reports.join("tensorboard"))?);
    }
    if logging.plot {
        callbacks.push(LossPlot::new(&reports, context.name));
    }
    callbacks.push(context.callback);

    let mut trainer =
        Trainer::with_optimizer(&model, train, &context.parallel, options, optimizer)?
            .with_stop(context.stop)
            .with_callback(&mut callbacks)
            .with_checkpoints(store)?;
    if let Some(valid) = data.get(Split::Valid) {
        trainer = trainer.with_validation(Arc::clone(valid));
    }
    let summary = trainer.run()?;
    drop(callbacks);
    Ok(PretrainOutcome {
        summary,
        model,
        tokenizer,
    })
}

/// This rank's part of the model, without weights: they come one by one, each in the dtype that it is trained in.
fn build_model<B: Ops>(
    config: &ResolvedConfig,
    context: &PretrainContext<'_, B>,
) -> Result<Decoder<B>> {
    let decoder = config.model.decoder.clone();
    let options = config
        .parallel
        .options(&decoder)
        .map_err(|problem| Error::Setting {
            key: "parallel.pipeline_model_parallel_layout",
            problem,
        })?;
    let dtype = match context.platform.precision(config.precision.mode) {
        PrecisionMode::Bf16Mixed => DType::BF16,
        _ => DType::F32,
    };
    let model = Decoder::without_weights(decoder, dtype, &context.parallel, &options)?;
    if config.auxiliary_options().mtp == 0.0 {
        // Without their loss nothing but weight decay would move these.
        for param in SegmentedModel::params(&model) {
            if param.name().starts_with("mtp.") {
                param.set_requires_grad(false);
            }
        }
    }
    Ok(model)
}

/// Loads the model's weights, which stay as they are, and puts fresh adapters beside them.
fn attach_adapters<B: Ops>(
    config: &ResolvedConfig,
    context: &PretrainContext<'_, B>,
    model: &mut Decoder<B>,
    adapters: &AdapterConfig,
) -> Result<()> {
    // A checkpoint of the run holds the adapters alone, so the weights come from where they came from at first.
    with_source(config, context, false, &mut |source| {
        for param in model.params() {
            load_param(&param, source)?;
        }
        Ok(())
    })?;
    bridge_peft::attach(model, adapters)?;
    Ok(())
}

/// What is done with a source of weights.
type WithSource<'f, B, R> = &'f mut dyn FnMut(&mut dyn WeightSource<B>) -> Result<R>;

/// Opens what the run's first weights come from.
fn with_source<B: Ops, R>(
    config: &ResolvedConfig,
    context: &PretrainContext<'_, B>,
    resuming: bool,
    then: WithSource<'_, B, R>,
) -> Result<R> {
    match &config.checkpoint.pretrained {
        // The checkpoint is about to replace every weight.
        _ if resuming => then(&mut ZeroSource),
        Some(pretrained) => with_pretrained(config, context, pretrained, then),
        None => {
            let init = Init {
                seed: config.train.seed,
                ..Init::default()
            };
            then(&mut RandomInit::new(&init, &config.model.decoder))
        }
    }
}

/// Weights from a native checkpoint or a Hugging Face folder.
fn with_pretrained<B: Ops, R>(
    config: &ResolvedConfig,
    context: &PretrainContext<'_, B>,
    pretrained: &str,
    then: WithSource<'_, B, R>,
) -> Result<R> {
    let setting = |problem| Error::Setting {
        key: "checkpoint.pretrained",
        problem,
    };
    let decoder = config.model.decoder.clone();
    // A source may hold more than the model asks for, and then silently give a part of another model.
    let same_weights = |found: &[CanonicalTensor], place: &Path| {
        if found == decoder.tensors() {
            return Ok(());
        }
        let place = place.display();
        Err(setting(format!(
            "{place} holds other weights than the [model] section describes; set model.hf to the folder with its \
             config.json instead of giving dims"
        )))
    };
    let path = Path::new(pretrained);
    if path.is_dir() && !path.join("config.json").exists() {
        let checkpoint = NativeCheckpoint::open(path).map_err(bridge_core::Error::from)?;
        let (bridge, _, found) = native_config(&checkpoint, context.registry)?;
        same_weights(&bridge.tensors(&found), checkpoint.dir())?;
        return then(&mut NativeWeights::new(&checkpoint, DtypePolicy::Float32));
    }
    let dir = (context.hf_folder)(pretrained).map_err(setting)?;
    let model = HfModel::open(&dir, context.registry, &LayoutSpec::default())?;
    same_weights(&model.bridge().tensors(model.config()), &dir)?;
    // The arithmetic is the configuration's, which may differ, in the rotary scaling for example.
    then(&mut HfWeights::new(&model, DtypePolicy::Float32))
}

fn checkpoint_store(
    config: &ResolvedConfig,
    tokenizer: &Tokenizer,
    hf_folder: &dyn Fn(&str) -> Result<PathBuf, String>,
) -> Result<CheckpointStore> {
    let description =
        serde_json::to_value(&config.model.decoder).expect("a model's config is plain data");
    let mut store = CheckpointStore::new(&config.checkpoint.dir, description)
        .keep(config.checkpoint.most_recent_k)
        .save_optim(config.checkpoint.save_optim)
        .save_enabled(config.checkpoint.save)
        .with_file(CONFIG_FILE, config.to_toml().into_bytes())
        .with_file(format!("{HF_DIR}/config.json"), hf_config_json(config)?);
    if let Some(adapters) = config.peft.adapters(config.train.seed) {
        store = store.trained_weights_alone().with_file(
            ADAPTER_FILE,
            serde_json::to_vec_pretty(&adapter_json(config, &adapters, hf_folder)?)
                .expect("plain data"),
        );
    }
    for (name, bytes) in tokenizer_files(tokenizer)? {
        store = store.with_file(format!("{HF_DIR}/{name}"), bytes);
    }
    // How text is to be generated is no part of any section, so it is passed on as it came.
    let generation = config.model.hf_dir.as_ref();
    if let Some(path) = generation
        .map(|dir| dir.join(GENERATION_CONFIG_FILE))
        .filter(|p| p.is_file())
    {
        let bytes = std::fs::read(&path).map_err(|source| Error::io("read", &path, source))?;
        store = store.with_file(format!("{HF_DIR}/{GENERATION_CONFIG_FILE}"), bytes);
    }
    Ok(store)
}

/// What adapters are like, and the model that they were trained beside: its name and a fingerprint of its weights' files.
fn adapter_json(
    config: &ResolvedConfig,
    adapters: &AdapterConfig,
    hf_folder: &dyn Fn(&str) -> Result<PathBuf, String>,
) -> Result<serde_json::Value> {
    let base = config.checkpoint.pretrained.as_deref().unwrap_or_default();
    let path = Path::new(base);
    let dir = if path.is_dir() {
        path.to_owned()
    } else {
        hf_folder(base).map_err(|problem| Error::Setting {
            key: "checkpoint.pretrained",
            problem,
        })?
    };
    Ok(serde_json::json!({
        "config": adapters,
        "base": base,
        "base_fingerprint": bridge_peft::base_fingerprint(&dir)?,
    }))
}

/// Checks that the run to be continued trains such adapters beside the same model.
fn same_adapters(config: &ResolvedConfig, described: &serde_json::Value) -> Result<()> {
    let checkpoint =
        NativeCheckpoint::open(&config.checkpoint.dir).map_err(bridge_core::Error::from)?;
    let refused = |problem: String| Error::Setting {
        key: "checkpoint.dir",
        problem: format!(
            "{} {problem}; give the same settings, or another checkpoint.dir to start anew",
            checkpoint.dir().display()
        ),
    };
    if !checkpoint.dir().join(ADAPTER_FILE).is_file() {
        return Err(refused("trains every weight, not adapters".to_owned()));
    }
    let saved = checkpoint
        .read_file(ADAPTER_FILE)
        .map_err(bridge_core::Error::from)?;
    let saved: serde_json::Value = serde_json::from_slice(&saved)
        .map_err(|error| refused(format!("has an {ADAPTER_FILE} that is no JSON ({error})")))?;
    for key in ["config", "base_fingerprint"] {
        if saved[key] != described[key] {
            return Err(refused(format!(
                "trains other adapters, or beside another model: `{key}` was {} and is {}",
                saved[key], described[key]
            )));
        }
    }
    Ok(())
}

/// The model's `config.json`: as it came, or written anew for a model that was described in the configuration.
fn hf_config_json(config: &ResolvedConfig) -> Result<Vec<u8>> {
    let model = &config.model;
    if model.hf_dir.is_some() {
        return Ok(model.hf_config.raw().to_vec());
    }
    let mut json = model.bridge.hf_config(&model.decoder)?;
    // Master weights are fp32; an export in another type changes this.
    json.entry("torch_dtype")
        .or_insert_with(|| "float32".into());
    Ok(HfConfig::from_json(json, "the model's config.json")
        .raw()
        .to_vec())
}

/// The tokenizer as Hugging Face files; none for one that has no such form.
fn tokenizer_files(tokenizer: &Tokenizer) -> Result<Vec<(String, Vec<u8>)>> {
    let read = |path: PathBuf| {
        let bytes = std::fs::read(&path).map_err(|source| Error::io("read", &path, source))?;
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Ok((name, bytes))
    };
    let sources = tokenizer.source_files();
    if !sources.is_empty() {
        return sources.into_iter().map(read).collect();
    }
    if tokenizer.kind() == bridge_tokenizers::TokenizerKind::Null {
        return Ok(Vec::new());
    }
    let dir = tempfile::tempdir()
        .map_err(|source| Error::io("create folder", std::env::temp_dir(), source))?;
    tokenizer.save(dir.path())?;
    let entries = std::fs::read_dir(dir.path())
        .map_err(|source| Error::io("read folder", dir.path(), source))?;
    let mut files = entries
        .map(|entry| {
            read(
                entry
                    .map_err(|source| Error::io("read folder", dir.path(), source))?
                    .path(),
            )
        })
        .collect::<Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}
