//! bridge-tokenizers
