//! What a checkpoint is: typed model configs, safetensors files, weight mappings and conversion plans.
//!
//! This crate knows neither Burn nor any device, and no process groups: a plan is a pure function of a config, the
//! file headers and a layout.

pub mod bridge;
pub mod checkpoint;
pub mod config;
pub mod convert;
pub mod dtype;
pub mod layout;
pub mod mapping;
pub mod plan;
pub mod registry;
