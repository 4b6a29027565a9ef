//! The model that `--hf` or `--checkpoint` names: its config, its tokenizer, its weights.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bridge_core::checkpoint::native::NativeCheckpoint;
use bridge_core::convert::{HF_DIR, HfModel};
use bridge_core::{DecoderConfig, LayoutSpec};
use bridge_models::weights::{
    load_hf, load_hf_parallel, load_native, load_native_parallel, native_config,
};
use bridge_models::{Decoder, DtypePolicy, ParallelOptions};
use bridge_ops::Ops;
use bridge_parallel::ParallelContext;
use bridge_peft::AdapterWeights;
use bridge_tokenizers::{Tokenizer, TokenizerSource};

use crate::adapter;
use crate::failure::{Blame, Result};
use crate::flags::hugging_face_folder;

/// Where a model's weights come from.
#[derive(clap::Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct ModelFlags {
    /// Hugging Face folder or hub id (org/name[@revision]).
    #[arg(long, value_name = "DIR")]
    pub(crate) hf: Option<String>,
    /// Native checkpoint: a run's folder (its newest iteration) or one iteration's.
    #[arg(long, value_name = "CKPT")]
    pub(crate) checkpoint: Option<PathBuf>,
}

/// A model on disk, its headers read.
pub(crate) struct ModelOnDisk {
    weights: Weights,
    /// Where the weights are, as they were named.
    place: PathBuf,
    /// The folder of `config.json` and the tokenizer.
    folder: PathBuf,
    /// What stands beside the weights, if anything does.
    adapter: Option<AdapterWeights>,
}

enum Weights {
    HuggingFace(Box<HfModel>),
    Native(Box<NativeCheckpoint>),
}

impl ModelOnDisk {
    /// Opens what the flags name.
    pub(crate) fn open(flags: &ModelFlags) -> Result<Self> {
        if let Some(path) = &flags.checkpoint {
            let native = NativeCheckpoint::open(path)?;
            let folder = native.dir().join(HF_DIR);
            return Ok(Self {
                weights: Weights::Native(Box::new(native)),
                place: path.clone(),
                folder,
                adapter: None,
            });
        }
        let folder = hugging_face_folder(flags.hf.as_deref().unwrap_or_default())?;
        let model = HfModel::open(&folder, &bridge_models::registry(), &LayoutSpec::default())?;
        Ok(Self {
            weights: Weights::HuggingFace(Box::new(model)),
            place: folder.clone(),
            folder,
            adapter: None,
        })
    }

    /// The adapter at `path` for this model: a PEFT folder, or a checkpoint of adapters, which is refused where it was
    /// trained beside another model unless `any_base` says so.
    pub(crate) fn read_adapter(&self, path: &Path, any_base: bool) -> Result<AdapterWeights> {
        match &self.weights {
            Weights::HuggingFace(model) => {
                let (bridge, config) = (model.bridge(), model.config());
                adapter::read(path, &self.place, bridge, config, any_base)
            }
            Weights::Native(native) => {
                let (bridge, _, config) = native_config(native, &bridge_models::registry())?;
                adapter::read(path, &self.place, bridge, &config, any_base)
            }
        }
    }

    /// The same model with that adapter.
    pub(crate) fn with_adapter(mut self, path: &Path, any_base: bool) -> Result<Self> {
        self.adapter = Some(self.read_adapter(path, any_base)?);
        Ok(self)
    }

    /// Loads the model with its weights held as `policy` says.
    pub(crate) fn load<B: Ops>(
        &self,
        device: &B::Device,
        policy: DtypePolicy,
    ) -> Result<Decoder<B>> {
        let mut model = match &self.weights {
            Weights::HuggingFace(model) => load_hf(model, policy, device)?,
            Weights::Native(native) => {
                load_native(native, &bridge_models::registry(), policy, device)?
            }
        };
        if let Some(adapter) = &self.adapter {
            bridge_peft::attach_weights(&mut model, adapter)?;
        }
        Ok(model)
    }

    /// Loads a rank's part of the model.
    pub(crate) fn load_parallel<B: Ops>(
        &self,
        ctx: &Arc<ParallelContext<B>>,
        policy: DtypePolicy,
    ) -> bridge_models::Result<Decoder<B>> {
        let options = ParallelOptions::default();
        let mut model = match &self.weights {
            Weights::HuggingFace(model) => load_hf_parallel(model, policy, ctx, &options)?,
            Weights::Native(native) => {
                load_native_parallel(native, &bridge_models::registry(), policy, ctx, &options)?
            }
        };
        if let Some(adapter) = &self.adapter {
            bridge_peft::attach_weights(&mut model, adapter)
                .map_err(|error| bridge_models::Error::Adapter(error.to_string()))?;
        }
        Ok(model)
    }

    /// The model's config.
    pub(crate) fn config(&self) -> Result<DecoderConfig> {
        Ok(match &self.weights {
            Weights::HuggingFace(model) => model.config().clone(),
            Weights::Native(native) => native_config(native, &bridge_models::registry())?.2,
        })
    }

    /// The tokenizer beside the weights, if there is one.
    pub(crate) fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        // Anything that says tokenizer must load; a folder without is a model of bare ids.
        let has_one = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
            .map(|n| self.folder.join(n).exists());
        if has_one.contains(&true) {
            Ok(Some(Tokenizer::from_folder(&self.folder)?))
        } else {
            Ok(None)
        }
    }

    /// The folder of `config.json` and the tokenizer.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Tokens that end a text: what `generation_config.json` says, else the config.
    pub(crate) fn stop_ids(&self, config: &DecoderConfig) -> Result<Vec<u32>> {
        let path = self.folder.join("generation_config.json");
        if !path.exists() {
            return Ok(config.eos_token_ids.clone());
        }
        let bytes = fs::read(&path).input(format!("cannot read {}", path.display()))?;
        let json: serde_json::Value =
            serde_json::from_slice(&bytes).input(format!("{} is not JSON", path.display()))?;
        let id = |v: &serde_json::Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        Ok(match &json["eos_token_id"] {
            serde_json::Value::Array(ids) => ids.iter().filter_map(id).collect(),
            one => id(one).map_or_else(|| config.eos_token_ids.clone(), |id| vec![id]),
        })
    }
}

/// The tokenizer that `--tokenizer` names: `bytes`, `null:SIZE`, a folder or a hub id.
pub(crate) fn tokenizer(source: &str) -> Result<Tokenizer> {
    Ok(match source.parse::<TokenizerSource>()? {
        TokenizerSource::Folder(folder) => {
            Tokenizer::from_folder(hugging_face_folder(&folder.to_string_lossy())?)?
        }
        other => other.load()?,
    })
}
