//! Model configs: a lossless `config.json`, typed access to its keys in every spelling, and the one typed config that
//! all decoder families are described by.

mod decoder;
mod hf_json;
mod mla;
mod moe;
mod plain;
mod reader;
mod recurrent;
mod rope;
mod rope_hf;
mod tensors;

pub use decoder::{
    Activation, AttentionLayer, DecoderConfig, Ffn, LayerConfig, LayerRope, Mixer, MlpLayer,
    NormConfig, NormKind, QkNorm, RopeStyle,
};
pub use hf_json::{HfConfig, MAX_CONFIG_BYTES};
pub use mla::MlaConfig;
pub use moe::{ClampedSwiglu, GroupScoring, MoeConfig, RouterConfig, RouterGroups, RouterScoring};
pub use reader::{ConfigReader, MAX_LAYERS};
pub use recurrent::{GatedDeltaNetConfig, Mamba2Config};
pub use rope::{Frequencies, RopeConfig, RopeScaling};
pub use rope_hf::RopeDefaults;
