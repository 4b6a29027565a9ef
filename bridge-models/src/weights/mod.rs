//! Where a model's weights come from and go to: fresh numbers, a Hugging Face folder, a native checkpoint, memory.

mod export;
mod hf;
mod init;
mod native;
mod new_folder;
mod policy;
mod role;
mod source;

pub use export::{WeightBytes, export_weights, param_bytes, stored_dtype, value_bytes};
pub use hf::{HfWeights, load_hf, load_hf_parallel};
pub use init::{Init, RandomInit};
pub use native::{NativeWeights, load_native, load_native_parallel, native_config};
pub use new_folder::write_hf_folder;
pub use policy::DtypePolicy;
pub(crate) use policy::held_tensor;
pub use role::ParamRole;
pub use source::{ParamBuilder, WeightSource, load_param};

#[cfg(test)]
mod tests;
