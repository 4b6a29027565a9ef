use std::fs;

use tempfile::TempDir;

use super::*;
use crate::checkpoint::{Checkpoint, FileReader, HeaderError, MemoryReader, SINGLE_FILE};
use crate::dtype::DType;

fn specs() -> Vec<TensorSpec> {
    vec![
        TensorSpec::new("embed", DType::BF16, [7, 4]),
        TensorSpec::new("norm", DType::F32, [4]),
        TensorSpec::new("scalar", DType::F64, []),
        TensorSpec::new("nothing", DType::F16, [0, 4]),
        TensorSpec::new("ids", DType::I64, [3]),
    ]
}

fn data(spec: &TensorSpec) -> Vec<u8> {
    let seed = spec.name.len() as u8 * 31;
    (0..spec.dtype.byte_len(&spec.shape).unwrap())
        .map(|i| (i as u8).wrapping_mul(7) ^ seed)
        .collect()
}

fn options(max_shard_bytes: u64) -> WriterOptions {
    WriterOptions {
        max_shard_bytes,
        ..WriterOptions::default()
    }
}

fn write_all(writer: &ShardedWriter) {
    for (tensor, spec) in writer.tensors().iter().enumerate() {
        writer.write_at(tensor, 0, &data(spec)).unwrap();
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Writes the usual tensors and opens them.
fn written(max_shard_bytes: u64) -> (TempDir, Checkpoint) {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let writer = ShardedWriter::create(&out, specs(), options(max_shard_bytes)).unwrap();
    write_all(&writer);
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    (root, checkpoint)
}

#[test]
fn what_is_written_is_read_at_any_shard_size() {
    for (max, files) in [(u64::MAX, 1), (64, 2), (40, 3), (1, 5)] {
        let (root, checkpoint) = written(max);
        assert_eq!(checkpoint.files().len(), files, "{max}");
        assert_eq!(checkpoint.tensors().len(), 5);
        for spec in specs() {
            let info = checkpoint.tensor(&spec.name).unwrap();
            assert_eq!((info.dtype, &info.shape), (spec.dtype, &spec.shape));
            assert_eq!(checkpoint.read(info).unwrap(), data(&spec), "{}", spec.name);
        }
        assert_eq!(names(root.path()), ["out"]);
        assert_eq!(
            checkpoint.files()[0].header().metadata,
            [("format".to_owned(), "pt".to_owned())]
        );
        assert!(
            checkpoint
                .files()
                .iter()
                .all(|file| file.header().data_start.is_multiple_of(8))
        );
    }
}

#[test]
fn an_output_without_tensors_is_a_file() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    ShardedWriter::create(&out, vec![], options(1))
        .unwrap()
        .finish()
        .unwrap();
    assert_eq!(names(&out), [SINGLE_FILE]);
    assert!(Checkpoint::open(&out).unwrap().tensors().is_empty());
}

#[test]
fn ranges_come_in_any_order_from_any_thread_and_source() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let spec = TensorSpec::new("w", DType::U8, [300_000]);
    let bytes = data(&spec);
    let source_path = root.path().join("source");
    fs::write(&source_path, &bytes).unwrap();
    let file = FileReader::open(&source_path).unwrap();
    let memory = MemoryReader::new("memory", bytes.clone());
    let writer = ShardedWriter::create(&out, vec![spec], options(u64::MAX)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..3usize {
            let (writer, bytes, file, memory) = (&writer, &bytes, &file, &memory);
            scope.spawn(move || {
                for part in (0..100).rev().filter(|part| part % 3 == thread) {
                    let at = part * 3000;
                    match thread {
                        0 => writer
                            .write_at(0, at as u64, &bytes[at..at + 3000])
                            .unwrap(),
                        1 => writer
                            .copy_from(0, at as u64, file, at as u64, 3000)
                            .unwrap(),
                        _ => writer
                            .copy_from(0, at as u64, memory, at as u64, 3000)
                            .unwrap(),
                    }
                }
            });
        }
    });
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_eq!(checkpoint.read(&checkpoint.tensors()[0]).unwrap(), bytes);
}

#[test]
fn bytes_are_written_once_and_within_their_tensor() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let writer = ShardedWriter::create(&out, specs(), options(u64::MAX)).unwrap();
    let norm = writer.position("norm").unwrap();
    writer.write_at(norm, 4, &[1; 4]).unwrap();
    let twice = writer.write_at(norm, 6, &[1; 4]).unwrap_err();
    assert!(
        matches!(&twice, CheckpointError::WrittenTwice { start: 6, end: 10, name } if name == "norm"),
        "{twice:?}"
    );
    for (offset, len) in [(13, 4), (17, 0), (u64::MAX, 2)] {
        let outside = writer.write_at(norm, offset, &vec![0; len]).unwrap_err();
        assert!(
            matches!(outside, CheckpointError::BadRange { .. }),
            "{outside:?}"
        );
    }
    let incomplete = writer.finish().unwrap_err().to_string();
    for part in [
        "4 problems",
        "`norm`: bytes 0..4 of 16",
        "`embed`: bytes 0..56",
        "`scalar`",
        "`ids`",
        "not published",
    ] {
        assert!(incomplete.contains(part), "{part} in {incomplete}");
    }
    assert_eq!(names(root.path()), [""; 0]);
}

#[test]
fn a_failed_write_keeps_the_output_from_being_published() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let writer = ShardedWriter::create(
        &out,
        vec![TensorSpec::new("w", DType::U8, [8])],
        options(u64::MAX),
    )
    .unwrap();
    let short = MemoryReader::new("short", vec![1; 4]);
    writer.copy_from(0, 0, &short, 0, 8).unwrap_err();
    let error = writer.finish().unwrap_err();
    assert!(
        matches!(&error, CheckpointError::Incomplete { .. })
            && error.to_string().contains("cannot read short"),
        "{error}"
    );
    assert!(!error.is_input());
    assert_eq!(names(root.path()), [""; 0]);
}

#[test]
fn a_full_disk_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("deep/out");
    let huge = vec![TensorSpec::new("w", DType::U8, [1 << 60])];
    let error = ShardedWriter::create(&out, huge, options(u64::MAX)).unwrap_err();
    assert!(
        matches!(error, CheckpointError::DiskFull { .. }) && !error.is_input(),
        "{error:?}"
    );
    assert_eq!(names(root.path()), [""; 0]);
}

#[test]
fn what_cannot_be_written_is_refused_beforehand() {
    let root = tempfile::tempdir().unwrap();
    #[track_caller]
    fn check(root: &TempDir, tensors: &[TensorSpec], part: &str) {
        let error = ShardedWriter::create(&root.path().join("out"), tensors.to_vec(), options(10))
            .unwrap_err();
        assert!(
            matches!(error, CheckpointError::BadLayout { .. }) && error.to_string().contains(part),
            "{error}"
        );
        assert_eq!(names(root.path()), [""; 0]);
    }
    let spec = |name: &str| TensorSpec::new(name, DType::U8, [1]);
    check(&root, &[spec("a"), spec("a")], "`a` is declared again");
    check(&root, &[spec("")], "empty name");
    check(&root, &[spec("a\0")], "NUL");
    check(
        &root,
        &[TensorSpec::new("a", DType::F4, [3])],
        "whole bytes",
    );
    check(
        &root,
        &[TensorSpec::new("a", DType::F32, [usize::MAX, 8])],
        "larger than any file",
    );
    let many: Vec<_> = (0..8)
        .map(|i| TensorSpec::new(format!("t{i}"), DType::U8, [1 << 60]))
        .collect();
    check(&root, &many, "together");
}

#[test]
fn files_are_reproduced_byte_for_byte() {
    // A source with odd spacing, metadata at the end, tensors in no usual order and padding of its own.
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("source");
    fs::create_dir(&source).unwrap();
    let json = r#"{ "b": {"shape": [2], "dtype":"U8", "data_offsets":[4,6]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
        "e": {"dtype":"F32","shape":[0],"data_offsets":[4,4]}, "__metadata__":{"z":"1","a":"2"}}   "#;
    let mut one = (json.len() as u64).to_le_bytes().to_vec();
    one.extend(json.bytes().chain(*b"123456"));
    let (mut two, _) = Header::encode(&[TensorSpec::new("c", DType::U8, [3])], &[]).unwrap();
    two.extend(b"789");
    let index = r#"{"weight_map": {"c":"y.safetensors", "a":"x.safetensors","b":"x.safetensors","e":"x.safetensors"},
        "metadata":{"total_size":9,"note":"kept"}}"#;
    fs::write(source.join("x.safetensors"), &one).unwrap();
    fs::write(source.join("y.safetensors"), &two).unwrap();
    fs::write(source.join(INDEX_FILE), index).unwrap();

    let checkpoint = Checkpoint::open(&source).unwrap();
    let spec = |info: &crate::checkpoint::TensorInfo| {
        TensorSpec::new(&*info.name, info.dtype, &*info.shape)
    };
    let tensors: Vec<_> = checkpoint.tensors().iter().rev().map(spec).collect();
    let layout = ShardLayout::like(&checkpoint, &tensors).unwrap();
    let out = root.path().join("out");
    let writer = ShardedWriter::create(
        &out,
        tensors.clone(),
        WriterOptions {
            layout: Some(layout),
            ..options(1)
        },
    )
    .unwrap();
    for (tensor, spec) in tensors.iter().enumerate() {
        let info = checkpoint.tensor(&spec.name).unwrap();
        writer
            .copy_from(tensor, 0, checkpoint.reader(info), info.offset, info.len)
            .unwrap();
    }
    writer.finish().unwrap();
    assert_eq!(names(&out), [INDEX_FILE, "x.safetensors", "y.safetensors"]);
    for name in names(&out) {
        assert_eq!(
            fs::read(out.join(&name)).unwrap(),
            fs::read(source.join(&name)).unwrap(),
            "{name}"
        );
    }

    // Another type: the files stay, the header of the file concerned and the total are made anew.
    let wider: Vec<_> = tensors
        .iter()
        .map(|spec| TensorSpec {
            dtype: if spec.name == "c" {
                DType::F32
            } else {
                spec.dtype
            },
            ..spec.clone()
        })
        .collect();
    let layout = ShardLayout::like(&checkpoint, &wider).unwrap();
    assert_eq!(
        layout
            .shards
            .iter()
            .map(|shard| shard.header_json.is_some())
            .collect::<Vec<_>>(),
        [true, false]
    );
    assert!(
        String::from_utf8(layout.index_json.unwrap())
            .unwrap()
            .contains("\"total_size\": 18")
    );

    // Other tensors: refused, each named.
    let text = ShardLayout::like(&checkpoint, &[TensorSpec::new("new", DType::U8, [1])])
        .unwrap_err()
        .to_string();
    for part in [
        "`new` is in no file",
        "`c` of y.safetensors is not written",
        "5 problems",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn a_given_header_must_describe_the_tensors() {
    let root = tempfile::tempdir().unwrap();
    let tensors = vec![TensorSpec::new("a", DType::U8, [2])];
    let create = |json: &str| {
        let shard = Shard {
            file_name: "m.safetensors".to_owned(),
            tensors: vec![0],
            header_json: Some(json.as_bytes().to_vec()),
        };
        let layout = ShardLayout {
            shards: vec![shard],
            index_json: None,
        };
        let options = WriterOptions {
            layout: Some(layout),
            ..options(1)
        };
        ShardedWriter::create(&root.path().join("out"), tensors.clone(), options)
    };
    assert!(create(r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#).is_ok());
    let other = create(r#"{"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#).unwrap_err();
    assert!(
        matches!(other, CheckpointError::BadLayout { .. }),
        "{other:?}"
    );
    let wrong = create(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#).unwrap_err();
    assert!(
        matches!(
            wrong,
            CheckpointError::Header {
                problem: HeaderError::TrailingBytes { .. },
                ..
            }
        ),
        "{wrong:?}"
    );
}
