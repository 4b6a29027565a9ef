//! The configuration of a run: TOML sections with strict keys.
//!
//! It passes through two stages. [`ConfigLayers`] is what was written: a recipe, a file over it, `key=value` over that.
//! [`resolve`] checks it against the schema and itself, fills in every default and reports every problem at once; the
//! [`ResolvedConfig`] that comes out is what a run uses, prints and saves beside its checkpoints.

mod auxiliary;
mod layers;
pub mod model;
mod peft;
mod platform;
mod resolve;
mod section;
mod sections;
mod suggest;
mod value;

#[cfg(test)]
mod tests;

pub use layers::ConfigLayers;
pub use model::ModelConfig;
pub use peft::{LoraDropoutPosition, LoraInit, PeftConfig, PeftScheme};
pub use platform::Platform;
pub use resolve::{ResolveContext, ResolvedConfig, resolve};
pub use section::{Key, Problem, Problems, Section, SectionSchema};
pub use sections::*;
pub use value::{ConfigValue, Kind};

pub(crate) use suggest::unknown_choice;
pub(crate) use value::choice;

/// Sections in the order they are documented and printed.
const SECTION_ORDER: &[&str] = &[
    "model",
    "train",
    "optimizer",
    "scheduler",
    "parallel",
    "precision",
    "data",
    "tokenizer",
    "checkpoint",
    "eval",
    "logging",
    "peft",
];

/// Every section with its keys.
pub fn schema() -> &'static [SectionSchema] {
    static SCHEMA: &[SectionSchema] = &[
        model::SCHEMA,
        TrainConfig::SCHEMA,
        OptimizerConfig::SCHEMA,
        SchedulerConfig::SCHEMA,
        ParallelConfig::SCHEMA,
        PrecisionConfig::SCHEMA,
        DataConfig::SCHEMA,
        TokenizerConfig::SCHEMA,
        CheckpointConfig::SCHEMA,
        EvalConfig::SCHEMA,
        LoggingConfig::SCHEMA,
        PeftConfig::SCHEMA,
    ];
    SCHEMA
}
