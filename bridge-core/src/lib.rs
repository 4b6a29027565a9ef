//! What a checkpoint is: typed model configs, safetensors files, weight mappings and conversion plans.
//!
//! This crate knows neither Burn nor any device, and no process groups: a plan is a pure function of a config, the
//! file headers and a layout.
//!
//! The way through it, from the outside in: [`convert`] moves a model between a Hugging Face folder and a native
//! checkpoint, after [`plan`] has shown from headers alone that nothing is lost; what belongs where is said by a
//! [`bridge::ModelBridge`], found by [`registry::Registry`], in terms of a typed [`config`] and a weight [`mapping`];
//! bytes are read and written by [`checkpoint`].

pub mod bridge;
pub mod checkpoint;
pub mod config;
pub mod convert;
pub mod dtype;
pub mod error;
pub mod layout;
pub mod mapping;
pub mod plan;
pub mod quant;
pub mod registry;
mod simd;

#[cfg(test)]
mod test_model;

pub use bridge::{CanonicalTensor, ModelBridge};
pub use config::{DecoderConfig, HfConfig};
pub use error::{Error, Problems, Result};
pub use layout::{LayoutSpec, ShardRule};
pub use mapping::WeightMap;
pub use registry::Registry;
