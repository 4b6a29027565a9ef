use std::collections::BTreeMap;

use tempfile::TempDir;

use super::*;
use crate::checkpoint::{HeaderError, MemoryReader, TensorSpec};

/// A file of U8 tensors whose bytes count up from the first letter of their name.
fn shard(tensors: &[(&str, usize)]) -> Vec<u8> {
    let specs: Vec<_> = tensors
        .iter()
        .map(|(name, len)| TensorSpec::new(*name, DType::U8, [*len]))
        .collect();
    let (mut bytes, _) = Header::encode(&specs, &[]).unwrap();
    for (name, len) in tensors {
        bytes.extend((0..*len).map(|i| name.as_bytes()[0].wrapping_add(i as u8)));
    }
    bytes
}

fn folder(files: &[(&str, Vec<u8>)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn index(pairs: &[(&str, &str)]) -> Vec<u8> {
    let map: BTreeMap<_, _> = pairs.iter().copied().collect();
    serde_json::to_vec(&serde_json::json!({"metadata": {"total_size": 0}, "weight_map": map}))
        .unwrap()
}

/// The text of the error that opening gives, with its causes.
#[track_caller]
fn refusal(dir: &TempDir) -> (CheckpointError, String) {
    let error = Checkpoint::open(dir.path()).expect_err("an error");
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    assert!(error.is_input(), "{text}");
    (error, text)
}

#[track_caller]
fn assert_names(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

#[test]
fn a_single_file_is_a_checkpoint() {
    let dir = folder(&[
        ("model.safetensors", shard(&[("b", 3), ("a", 2)])),
        ("other.safetensors", vec![]),
    ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let names: Vec<_> = checkpoint
        .tensors()
        .iter()
        .map(|info| info.name.as_str())
        .collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(checkpoint.total_bytes(), 5);
    let b = checkpoint.tensor("b").unwrap();
    assert_eq!(checkpoint.read(b).unwrap(), *b"bcd");
    let mut part = [0; 2];
    checkpoint.read_range(b, 1..3, &mut part).unwrap();
    assert_eq!(part, *b"cd");
    for range in [2..4, 0..3] {
        let refused = checkpoint.read_range(b, range, &mut part);
        assert!(matches!(refused, Err(CheckpointError::BadRange { .. })));
    }
    assert!(checkpoint.get("c").is_none());
}

#[test]
fn an_index_joins_shards() {
    let (one, two) = (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    );
    let json = index(&[("a", one), ("b", two), ("c", two)]);
    let dir = folder(&[
        (one, shard(&[("a", 1)])),
        (two, shard(&[("b", 2), ("c", 3)])),
        (INDEX_FILE, json.clone()),
    ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(
        checkpoint
            .files()
            .iter()
            .map(SafetensorsFile::name)
            .collect::<Vec<_>>(),
        [one, two]
    );
    assert_eq!(
        checkpoint.read(checkpoint.get("c").unwrap()).unwrap(),
        *b"cde"
    );
    assert_eq!(checkpoint.index_json(), Some(&json[..]));
}

#[test]
fn a_complete_set_needs_no_index() {
    let files = [
        ("x-00001-of-00002.safetensors", shard(&[("a", 1)])),
        ("x-00002-of-00002.safetensors", shard(&[("b", 1)])),
    ];
    assert_eq!(
        Checkpoint::open(folder(&files).path())
            .unwrap()
            .tensors()
            .len(),
        2
    );
    let (error, text) = refusal(&folder(&files[1..]));
    assert!(matches!(error, CheckpointError::MissingShards { .. }));
    assert_names(&text, &["`x-00001-of-00002.safetensors`"]);
    assert_eq!(
        Checkpoint::open(folder(&[("adapter.safetensors", shard(&[("a", 1)]))]).path())
            .unwrap()
            .tensors()
            .len(),
        1
    );
}

#[test]
fn files_that_do_not_make_a_set_are_named() {
    for other in [
        "y.safetensors",
        "y-00001-of-00001.safetensors",
        "x-00001-of-00003.safetensors",
        "x-+0001-of-00001.safetensors",
    ] {
        let dir = folder(&[
            ("x-00001-of-00001.safetensors", shard(&[])),
            (other, shard(&[])),
        ]);
        let (error, text) = refusal(&dir);
        assert!(
            matches!(error, CheckpointError::AmbiguousFiles { .. }),
            "{text}"
        );
        assert_names(&text, &[other, "x-00001-of-00001.safetensors", INDEX_FILE]);
    }
}

#[test]
fn folders_without_weights_say_what_they_are() {
    #[track_caller]
    fn check(files: &[(&str, Vec<u8>)], part: &str) {
        let (error, text) = refusal(&folder(files));
        assert!(matches!(error, CheckpointError::NoWeights { .. }));
        assert_names(&text, &[part]);
    }
    check(&[], "is it the right folder");
    check(&[("pytorch_model.bin", vec![])], "pickled weights");
    check(&[("latest", vec![])], "native checkpoint");
    let dir = folder(&[("file", vec![])]);
    let missing = Checkpoint::open(dir.path().join("missing")).unwrap_err();
    assert!(
        missing.is_input() && missing.to_string().contains("missing"),
        "{missing}"
    );
    let file = Checkpoint::open(dir.path().join("file")).unwrap_err();
    assert!(matches!(file, CheckpointError::NotAFolder { .. }), "{file}");
}

#[test]
fn an_index_cannot_lead_out_of_the_folder() {
    let long = format!("{}.safetensors", "x".repeat(300));
    for bad in [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "x\0.safetensors",
        "..",
        &long,
        "x.bin",
    ] {
        let dir = folder(&[(INDEX_FILE, index(&[("tensor", bad), ("other", bad)]))]);
        let (error, text) = refusal(&dir);
        assert!(
            matches!(error, CheckpointError::IndexFileNames { .. }),
            "{text}"
        );
        assert!(!text.contains('\0') && text.len() < 700, "{text}");
        assert_eq!(text.matches("of tensor").count(), 1, "{text}");
    }
}

#[test]
fn broken_indexes_are_refused() {
    for (json, part) in [
        ("", "EOF"),
        ("[]", "expected struct"),
        ("{}", "missing field `weight_map`"),
        (r#"{"weight_map":{"a":1}}"#, "expected a string"),
        (
            r#"{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}"#,
            "key `a` appears twice",
        ),
        (r#"{"weight_map":{},"weight_map":{}}"#, "duplicate field"),
    ] {
        let (error, text) = refusal(&folder(&[(INDEX_FILE, json.into())]));
        assert!(matches!(error, CheckpointError::IndexJson { .. }), "{text}");
        assert_names(&text, &[part, INDEX_FILE]);
    }
    let dir = folder(&[]);
    fs::File::create(dir.path().join(INDEX_FILE))
        .unwrap()
        .set_len(MAX_INDEX_BYTES + 1)
        .unwrap();
    let (error, _) = refusal(&dir);
    assert!(matches!(
        error,
        CheckpointError::IndexTooLarge {
            found: 100_000_001,
            ..
        }
    ));
}

#[test]
fn all_missing_shards_are_named_together() {
    let dir = folder(&[(
        INDEX_FILE,
        index(&[
            ("a", "1.safetensors"),
            ("b", "2.safetensors"),
            ("c", "3.safetensors"),
        ]),
    )]);
    fs::write(dir.path().join("2.safetensors"), shard(&[("b", 1)])).unwrap();
    let (error, text) = refusal(&dir);
    assert!(matches!(error, CheckpointError::MissingShards { .. }));
    assert_names(&text, &["`1.safetensors`", "`3.safetensors`", "2 problems"]);
}

#[test]
fn index_and_shards_must_agree() {
    let (one, two) = ("1.safetensors", "2.safetensors");
    let dir = folder(&[
        (INDEX_FILE, index(&[("a", one), ("b", one), ("gone", two)])),
        (one, shard(&[("a", 1), ("extra", 1)])),
        (two, shard(&[("b", 1)])),
    ]);
    let (error, text) = refusal(&dir);
    assert!(matches!(error, CheckpointError::Inconsistent { .. }));
    assert_names(
        &text,
        &[
            "tensor `b` is in 2.safetensors, but the index says 1.safetensors",
            "tensor `gone` is not in 2.safetensors",
            "tensor `extra` of 1.safetensors is not in the index",
        ],
    );
}

#[test]
fn a_tensor_in_two_shards_is_named_and_long_lists_are_cut() {
    let names: Vec<String> = (0..50).map(|i| format!("t{i:02}")).collect();
    let tensors: Vec<_> = names.iter().map(|name| (name.as_str(), 1)).collect();
    let (one, two) = ("1.safetensors", "2.safetensors");
    let pairs: Vec<_> = names
        .iter()
        .map(|name| (name.as_str(), one))
        .chain([("z", two)])
        .collect();
    let dir = folder(&[
        (INDEX_FILE, index(&pairs)),
        (one, shard(&tensors)),
        (two, shard(&tensors)),
    ]);
    let (_, text) = refusal(&dir);
    assert_names(
        &text,
        &[
            "50 problems",
            "tensor `t00` is in both 1.safetensors and 2.safetensors",
            "and 30 more",
        ],
    );
}

#[test]
fn a_bad_shard_is_named_with_its_problem() {
    let mut bytes = shard(&[("a", 100)]);
    bytes.truncate(bytes.len() - 1);
    let (error, text) = refusal(&folder(&[("model.safetensors", bytes)]));
    assert!(matches!(
        error,
        CheckpointError::Header {
            problem: HeaderError::OffsetsLeaveFile { .. },
            ..
        }
    ));
    assert_names(
        &text,
        &[
            "model.safetensors is not a usable",
            "`a` ends at byte 100",
            "fetch it again",
        ],
    );
    for empty in ["model.safetensors", "x.safetensors"] {
        let (_, text) = refusal(&folder(&[(empty, vec![])]));
        assert_names(&text, &[empty, "0 bytes"]);
    }
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert!(matches!(refusal(&dir).0, CheckpointError::NotAFile { .. }));
}

#[test]
fn unknown_names_get_the_nearest() {
    let reader = MemoryReader::new("m", shard(&[("model.layers.0.weight", 1)]));
    let file = SafetensorsFile::new("m.safetensors", Box::new(reader)).unwrap();
    let checkpoint = Checkpoint::from_files("somewhere", vec![file]).unwrap();
    let text = checkpoint
        .tensor("model.layer.0.weight")
        .unwrap_err()
        .to_string();
    assert_names(
        &text,
        &["somewhere", "did you mean `model.layers.0.weight`?"],
    );
    let text = checkpoint.tensor("q").unwrap_err().to_string();
    assert!(!text.contains("did you mean"), "{text}");
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_pipes_are_not_opened() {
    let blobs = folder(&[("blob", shard(&[("a", 1)]))]);
    let dir = folder(&[]);
    std::os::unix::fs::symlink(
        blobs.path().join("blob"),
        dir.path().join("model.safetensors"),
    )
    .unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().tensors().len(), 1);

    let dir = folder(&[]);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        dir.path().join("model.safetensors"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    assert!(matches!(refusal(&dir).0, CheckpointError::NotAFile { .. }));
}

#[cfg(unix)]
#[test]
fn unreadable_folders_are_named() {
    use std::os::unix::fs::PermissionsExt;

    let dir = folder(&[("model.safetensors", shard(&[("a", 1)]))]);
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o000)).unwrap();
    // The superuser may read everything, and then there is nothing to see.
    if fs::read_dir(dir.path()).is_err() {
        let (error, text) = refusal(&dir);
        assert!(
            matches!(
                error,
                CheckpointError::Io {
                    action: "open folder",
                    ..
                }
            ),
            "{text}"
        );
        assert_names(&text, &[&dir.path().display().to_string()]);
    }
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
}
