//! Tests that cross crates, and where their fixtures are.

use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// A folder under `tests/fixtures`, made by `tests/oracle/make_oracle.py`.
pub fn fixture(name: &str) -> PathBuf {
    fixtures().join(name)
}

/// Every folder under `tests/fixtures` that holds a model with reference numbers, so that adding one is all it takes to
/// have it tested.
///
/// # Panics
/// If the folder cannot be read or holds none.
pub fn families() -> Vec<String> {
    let entries = std::fs::read_dir(fixtures()).expect("tests/fixtures is there");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("a readable folder"))
        .filter(|entry| entry.path().join("oracle.json").is_file())
        .map(|entry| entry.file_name().into_string().expect("a plain name"))
        .collect();
    names.sort();
    assert!(!names.is_empty(), "no references under tests/fixtures");
    names
}

/// The Rust in the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
