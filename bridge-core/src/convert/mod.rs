//! Conversions: Hugging Face folder to native checkpoint, back again, and the proof that both lose nothing.
//!
//! Every conversion is planned first ([`crate::plan`]), so that nothing is written when anything does not fit. Bytes
//! then stream from file to file, in the kernel where elements keep their order and type, through small buffers where
//! they do not; memory stays within [`ConvertOptions::memory_budget`] whatever the size of the model. Results appear
//! under their name only when they are complete.

mod canonical;
mod companions;
mod config_edit;
mod endpoints;
mod export;
mod import;
mod less_one;
mod load;
mod megatron;
mod piece_files;
mod reshard;
mod roundtrip;
mod run_config;
mod source;
mod source_record;
mod strided;
mod transfer;

pub use companions::SkippedFile;
pub use endpoints::{ConvertReport, ModelPlace, convert, open};
pub use export::{ExportOptions, ExportReport, export};
pub use import::{ImportReport, import};
pub use load::HfModel;
pub use reshard::reshard;
pub use roundtrip::{Mismatch, RoundtripReport, roundtrip};
pub use source::Source;

use crate::checkpoint::{Durability, Existing};

/// Name of the folder, in a native checkpoint, of the files that came with a Hugging Face model.
pub const HF_DIR: &str = "hf";

/// How a conversion works.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// Threads that copy and convert. Two keep a disk busy.
    pub threads: usize,
    /// Most bytes of buffers, all threads together. Conversions that only copy need almost none.
    pub memory_budget: usize,
    /// What the finished result survives.
    pub durability: Durability,
    /// What to do about a result of the same name.
    pub existing: Existing,
    /// Whether `*.py` files beside the weights are taken along. They are never run.
    pub copy_code: bool,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            threads: 2,
            memory_budget: 512 << 20,
            durability: Durability::default(),
            existing: Existing::default(),
            copy_code: false,
        }
    }
}

impl ConvertOptions {
    fn resources(&self) -> transfer::Resources {
        transfer::Resources {
            threads: self.threads,
            memory_budget: self.memory_budget,
        }
    }
}

/// Is told how a conversion gets on. `()` listens to nothing.
pub trait Progress: Sync {
    /// A stage of `total_bytes` begins: "import", "export", "compare".
    fn begin(&self, stage: &str, total_bytes: u64) {
        let _ = (stage, total_bytes);
    }

    /// `bytes` more of the stage are done, of tensor `tensor`. Called from several threads. `false` stops the
    /// conversion, which then leaves nothing behind and returns [`crate::Error::Cancelled`].
    fn advance(&self, tensor: &str, bytes: u64) -> bool {
        let _ = (tensor, bytes);
        true
    }
}

impl Progress for () {}

#[cfg(test)]
mod quantized_tests;
#[cfg(test)]
mod tests;
