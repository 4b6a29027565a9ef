//! Ready configurations, embedded in the program as TOML.
//!
//! A recipe states what differs from the one it `extends`: every family has a base, and a size names its dims and little
//! else. [`layers`] gives the chain as configuration layers, over which a file and `key=value` overrides go.
//!
//! ```
//! let mut layers = bridge_recipes::layers("tiny_llama")?;
//! layers.push_override("train.train_iters=20");
//! assert_eq!(layers.get("train", "train_iters").and_then(|v| v.as_integer()), Some(20));
//! # Ok::<(), bridge_recipes::Error>(())
//! ```

mod registry;

pub use registry::{DEFAULT_RECIPE, Error, Recipe, Result, get, layers, list};
