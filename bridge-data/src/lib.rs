//! Training data: from text to batches.
//!
//! ```text
//! text, JSONL ──preprocess──▶ .bin/.idx (Megatron-Core's indexed dataset) ─┐
//! bundled corpus ──tokenize──▶ MemoryTokens ──────────────────────────────┴▶ dyn TokenSource
//!     ──split, pack, shuffle──▶ GptDataset ──mix──▶ BlendedDataset ─▶ dyn Dataset
//!     ──GlobalBatchSampler──▶ Batch
//! ```
//!
//! Two rules hold throughout. A sample is a pure function of its *global index* (and of the dataset's options): nothing
//! depends on how many ranks there are or how a batch is cut, so a run may be resumed with other sizes and still sees
//! the same samples in the same order. And files are strangers' data: every count, offset and id is checked.
//!
//! ```
//! use std::sync::Arc;
//! use bridge_data::{Batch, Dataset, GlobalBatchSampler, GptOptions, MemoryTokens, Split, gpt_splits};
//! use bridge_tokenizers::Tokenizer;
//!
//! let tokenizer = Tokenizer::bytes();
//! let texts = ["The first document.", "A second one.", "And the third, for validation."];
//! let tokens = MemoryTokens::tokenize("example", texts, &tokenizer)?;
//! let options = GptOptions { eod: tokenizer.eos_id(), ..GptOptions::new(8, 1234) };
//! let splits = gpt_splits(&[(None, Arc::new(tokens))], &"2,1,0".parse()?, &options)?;
//!
//! let train = splits.get(Split::Train).expect("two of three documents");
//! let sampler = GlobalBatchSampler::new(2, 1, 0)?;          // micro-batch of 2, one data-parallel rank
//! for indices in sampler.micro_batches(0, 4)? {             // the first global batch, of 4 samples
//!     let batch = Batch::load(train.as_ref(), &indices)?;
//!     assert_eq!((batch.batch, batch.seq, batch.tokens.len()), (2, 8, 16));
//! }
//! # Ok::<(), bridge_data::DataError>(())
//! ```

mod batch;
mod blend;
pub mod corpus;
mod dataset;
mod error;
mod gpt;
pub mod indexed;
pub mod inspect;
mod loader;
mod mock;
pub mod preprocess;
mod sampler;
pub mod sft;
mod shuffle;
mod split;
mod token_source;

pub use batch::{Batch, IGNORE_INDEX, Sample};
pub use blend::{BlendSpec, BlendedDataset};
pub use dataset::{Dataset, Fingerprint};
pub use error::{DataError, Result};
pub use gpt::{GptDataset, GptOptions};
pub use indexed::{IndexedDataset, IndexedWriter, TokenDtype};
pub use loader::Loader;
pub use mock::MockGptDataset;
pub use sampler::GlobalBatchSampler;
pub use sft::SftDataset;
pub use shuffle::Permutation;
pub use split::{Split, SplitWeights, Splits, gpt_splits};
pub use token_source::{MemoryTokens, TokenSource};
