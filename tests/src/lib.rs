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
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v3_mtp",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4_moe",
    "gpt_oss",
    "gpt_oss_mxfp4",
    "llama2",
    "llama3_1",
    "llama3_2",
    "llama_nemotron_nano",
    "llama_nemotron_super",
    "mistral",
    "moonlight",
    "nemotron",
    "nemotron_h",
    "olmoe",
    "qwen2",
    "qwen3",
    "qwen3_moe",
];
