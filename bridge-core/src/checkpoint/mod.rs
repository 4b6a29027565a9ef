//! Checkpoint files: safetensors folders as Hugging Face lays them out, and this project's own sharded form.
//!
//! Reading goes through byte ranges ([`RangeReader`]), so that a conversion holds a few buffers and never a mapped
//! file; each file is opened once and its header parsed once. Nothing in a file is believed before it is checked: no
//! allocation is sized by an unchecked number, and no name in a file leads out of its folder.
//!
//! | to read | to write |
//! | --- | --- |
//! | [`Checkpoint`]: a folder of safetensors files | [`ShardedWriter`]: the same, streamed, published by one rename |
//! | [`native::NativeCheckpoint`]: any slice of a canonical tensor | [`native::NativeWriter`]: pieces by many ranks |

mod copy;
mod coverage;
mod error;
mod folder;
mod header;
pub mod megatron;
pub mod native;
mod output_file;
mod region;
mod shards;
mod source;
mod staging;
mod store;
mod tiling;
pub mod torch;
mod unique_map;
mod writer;

pub(crate) use error::quote;
pub use error::{CheckpointError, Result};
pub use folder::{Checkpoint, INDEX_FILE, SINGLE_FILE, SafetensorsFile, TensorInfo};
pub use header::{Header, HeaderEntry, HeaderError, MAX_HEADER_BYTES, TensorSpec};
pub use region::{Region, Run};
pub use shards::{DEFAULT_MAX_SHARD_BYTES, Shard, ShardLayout, file_name_problem};
pub use source::{FileReader, MemoryReader, RangeReader};
pub use staging::{Durability, Existing};
pub use store::{BlockStore, StoredBlock, StoredTensor};
pub use writer::{ShardedWriter, WriterOptions};
