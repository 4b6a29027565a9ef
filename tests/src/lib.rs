//! Tests that cross crates, and where their fixtures are.

use std::path::PathBuf;

/// A folder under `tests/fixtures`, made by `tests/oracle/make_oracle.py`.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(name)
}

/// The families that have a fixture.
pub const FAMILIES: &[&str] = &[
    "gemma",
    "gemma2",
    "gemma3_text",
    "llama2",
    "llama3_1",
    "llama3_2",
    "llama_nemotron_nano",
    "llama_nemotron_super",
    "mistral",
    "nemotron",
    "nemotron_h",
    "qwen2",
    "qwen3",
];
