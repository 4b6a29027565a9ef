//! Our files read by Megatron-Core, and its files read by us.
//!
//! Needs a Python with megatron-core and torch: `python3`, or what `BRIDGE_TEST_PYTHON` names. Without one the tests say so
//! and pass, since nothing of this workspace depends on Python.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bridge_data::indexed::tokens_path;
use bridge_data::{IndexedDataset, IndexedWriter, TokenDtype, TokenSource};
use serde_json::json;

fn script(arguments: &[&Path]) -> std::io::Result<Output> {
    let python = std::env::var_os("BRIDGE_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/indexed_dataset.py");
    Command::new(python).arg(script).args(arguments).output()
}

/// Whether Megatron-Core can be imported; says so if not.
fn megatron_is_there() -> bool {
    let missing = match script(&[Path::new("available")]) {
        Ok(output) if output.status.success() => return true,
        Ok(output) => String::from_utf8_lossy(&output.stderr)
            .lines()
            .last()
            .unwrap_or_default()
            .to_owned(),
        Err(error) => error.to_string(),
    };
    eprintln!("skipped: no Python with megatron-core ({missing}); name one in BRIDGE_TEST_PYTHON");
    false
}

fn must_succeed(arguments: &[&Path]) {
    let output = script(arguments).unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

struct Case {
    name: &'static str,
    dtype: TokenDtype,
    documents: Vec<Vec<Vec<u32>>>,
    modes: Option<Vec<i8>>,
}

impl Case {
    fn content(&self, folder: &Path) -> PathBuf {
        let path = folder.join(format!("{}.json", self.name));
        let content =
            json!({"dtype": self.dtype.name(), "documents": self.documents, "modes": self.modes});
        std::fs::write(&path, content.to_string()).unwrap();
        path
    }
}

fn cases() -> Vec<Case> {
    let many: Vec<_> = (0..500u32)
        .map(|d| {
            vec![
                (0..d % 17 + 1)
                    .map(|t| (d * 131 + t * 7) % 65_000)
                    .collect(),
            ]
        })
        .collect();
    let uneven = vec![
        vec![vec![1, 2, 3], vec![4]],
        vec![],
        vec![vec![5], vec![], vec![6, 7]],
    ];
    vec![
        Case {
            name: "many",
            dtype: TokenDtype::U16,
            documents: many,
            modes: None,
        },
        Case {
            name: "wide",
            dtype: TokenDtype::I32,
            documents: vec![vec![vec![0, 128_255, i32::MAX as u32]]],
            modes: None,
        },
        Case {
            name: "long",
            dtype: TokenDtype::I64,
            documents: vec![vec![vec![7, 1 << 30]], vec![vec![9]]],
            modes: None,
        },
        Case {
            name: "byte",
            dtype: TokenDtype::U8,
            documents: vec![vec![vec![0, 255, 3]]],
            modes: None,
        },
        Case {
            name: "uneven",
            dtype: TokenDtype::U16,
            documents: uneven.clone(),
            modes: None,
        },
        Case {
            name: "modes",
            dtype: TokenDtype::U16,
            documents: uneven,
            modes: Some(vec![0, 3, 0, 1, 0]),
        },
    ]
}

#[test]
fn megatron_core_reads_what_we_write() {
    if !megatron_is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for case in cases() {
        let prefix = folder.path().join(case.name);
        let mut writer = IndexedWriter::create(&prefix, case.dtype).unwrap();
        let mut number = 0;
        for document in &case.documents {
            for sequence in document {
                writer.write_tokens(sequence).unwrap();
                writer.end_sequence().unwrap();
                if let Some(modes) = &case.modes {
                    writer.set_mode(modes[number]).unwrap();
                }
                number += 1;
            }
            writer.end_document().unwrap();
        }
        writer.finish().unwrap();
        must_succeed(&[Path::new("read"), &prefix, &case.content(folder.path())]);
    }
}

#[test]
fn we_read_what_megatron_core_writes() {
    if !megatron_is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for case in cases() {
        let prefix = folder.path().join(case.name);
        must_succeed(&[Path::new("write"), &prefix, &case.content(folder.path())]);
        assert!(tokens_path(&prefix).is_file());
        let data = IndexedDataset::open(&prefix).unwrap();
        assert_eq!(data.index().dtype(), case.dtype, "{}", case.name);
        let sequences = case.documents.concat();
        assert_eq!(data.documents(), sequences.len() as u64, "{}", case.name);
        for (number, sequence) in sequences.iter().enumerate() {
            assert_eq!(
                &data.sequence(number as u64).unwrap(),
                sequence,
                "{}",
                case.name
            );
            let mode = case.modes.as_ref().map(|modes| modes[number]);
            assert_eq!(data.index().mode(number as u64), mode, "{}", case.name);
        }
        let documents: Vec<_> = (0..data.index().documents())
            .map(|d| data.index().document(d).unwrap())
            .collect();
        assert_eq!(
            documents
                .iter()
                .map(|range| range.end - range.start)
                .collect::<Vec<_>>(),
            case.documents
                .iter()
                .map(|document| document.len() as u64)
                .collect::<Vec<_>>(),
            "{}",
            case.name
        );
    }
}
