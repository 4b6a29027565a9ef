use std::collections::BTreeMap;
use std::path::Path;

use super::*;
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::header::TensorSpec;
use crate::checkpoint::store::BlockStore;
use crate::dtype::DType;

/// The bytes of every tensor, row by row.
fn contents(store: &BlockStore) -> BTreeMap<String, (DType, Vec<usize>, Vec<u8>)> {
    store
        .tensors()
        .iter()
        .map(|tensor| {
            let element = tensor.dtype.bytes().unwrap();
            let mut bytes = vec![0; tensor.shape.iter().product::<usize>() * element];
            for block in &tensor.blocks {
                let len = block.region.shape.iter().product::<usize>() * element;
                let mut own = vec![0; len];
                store
                    .reader(block)
                    .read_exact_at(block.offset, &mut own)
                    .unwrap();
                let whole = crate::checkpoint::Region::whole(&tensor.shape);
                for run in block.region.runs(&block.region, &whole, element) {
                    let (src, dst, len) = (run.src as usize, run.dst as usize, run.len as usize);
                    bytes[dst..dst + len].copy_from_slice(&own[src..src + len]);
                }
            }
            (
                tensor.name.clone(),
                (tensor.dtype, tensor.shape.clone(), bytes),
            )
        })
        .collect()
}

fn write(target: &Path) -> BTreeMap<String, (DType, Vec<usize>, Vec<u8>)> {
    let tensors = vec![
        tensor("embedding.word_embeddings.weight", DType::F32, &[5, 3], 0),
        tensor(
            "decoder.layers.mlp.linear_fc2.weight",
            DType::BF16,
            &[4, 2, 3],
            1,
        ),
        tensor(
            "decoder.layers.mlp.experts.experts.linear_fc1.weight",
            DType::F16,
            &[2, 3, 4],
            2,
        ),
        tensor("decoder.final_layernorm.weight", DType::F32, &[3], 0),
    ];
    let objects = ["decoder.layers.mlp.linear_fc2._extra_state/shard_0_4".to_owned()];
    let options = MegatronWriterOptions {
        iteration: 7,
        ..MegatronWriterOptions::default()
    };
    let writer = MegatronWriter::create(target, tensors.clone(), &objects, options).unwrap();
    let mut written = BTreeMap::new();
    for (index, MegatronTensor { spec, .. }) in tensors.iter().enumerate() {
        let len = spec.dtype.byte_len(&spec.shape).unwrap() as usize;
        let bytes: Vec<u8> = (0..len).map(|at| (at * 31 + index * 7) as u8).collect();
        // In two parts, the second one first, cut where no box ends.
        let half = len / 2 + 1;
        writer.write_at(index, half as u64, &bytes[half..]).unwrap();
        writer.write_at(index, 0, &bytes[..half]).unwrap();
        let entry = (spec.dtype, spec.shape.clone(), bytes);
        written.insert(spec.name.clone(), entry);
    }
    writer.finish().unwrap();
    written
}

fn tensor(name: &str, dtype: DType, shape: &[usize], stacked: usize) -> MegatronTensor {
    MegatronTensor {
        spec: TensorSpec::new(name, dtype, shape),
        stacked,
    }
}

#[test]
fn what_is_written_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("ckpt");
    let written = write(&target);
    assert!(MegatronCheckpoint::is_in(&target));
    for dir in [target.clone(), target.join("iter_0000007")] {
        let checkpoint = MegatronCheckpoint::open(&dir).unwrap();
        assert_eq!(contents(checkpoint.store()), written);
        assert_eq!(checkpoint.objects().len(), 2);
        assert!(!checkpoint.has_layer_names());
    }
    let experts = MegatronCheckpoint::open(&target).unwrap();
    let experts = experts
        .store()
        .tensor("decoder.layers.mlp.experts.experts.linear_fc1.weight")
        .unwrap();
    assert_eq!(experts.blocks.len(), 6);
}

#[test]
fn rows_that_only_pad_the_vocabulary_are_cut() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("ckpt");
    let written = write(&target);
    let store = MegatronCheckpoint::open(&target).unwrap().into_store(4);
    let found = contents(&store);
    let (_, shape, bytes) = &found["embedding.word_embeddings.weight"];
    assert_eq!(*shape, [4, 3]);
    assert_eq!(bytes, &written["embedding.word_embeddings.weight"].2[..48]);
}

#[test]
fn optimizer_state_is_listed_and_never_read() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("ckpt");
    let state = [
        "optimizer.state.exp_avg.decoder.final_layernorm.weight",
        "chained_1.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.param",
    ];
    let mut tensors = vec![tensor(
        "decoder.final_layernorm.weight",
        DType::F32,
        &[3],
        0,
    )];
    tensors.extend(state.map(|name| tensor(name, DType::F64, &[3], 0)));
    let options = MegatronWriterOptions::default();
    let writer = MegatronWriter::create(&target, tensors, &[], options).unwrap();
    writer.write_at(0, 0, &[1; 12]).unwrap();
    writer.write_at(1, 0, &[2; 24]).unwrap();
    writer.write_at(2, 0, &[3; 24]).unwrap();
    writer.finish().unwrap();
    // Archives that nobody could read.
    let path = target.join("iter_0000000/__0_0.distcp");
    let mut bytes = std::fs::read(&path).unwrap();
    let class = b"DoubleStorage";
    let places: Vec<usize> = (0..bytes.len() - class.len())
        .filter(|at| bytes[*at..].starts_with(class))
        .collect();
    assert_eq!(places.len(), 2);
    for at in places {
        bytes[at..at + 5].copy_from_slice(b"Error");
    }
    std::fs::write(path, bytes).unwrap();
    let checkpoint = MegatronCheckpoint::open(&target).unwrap();
    let found = contents(checkpoint.store());
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        ["decoder.final_layernorm.weight"]
    );
    assert_eq!(
        checkpoint.other_state(),
        state.map(|name| (name.to_owned(), 24))
    );
}

#[test]
fn an_unfinished_write_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("ckpt");
    let tensors = vec![tensor(
        "decoder.final_layernorm.weight",
        DType::F32,
        &[3],
        0,
    )];
    let options = MegatronWriterOptions::default();
    let writer = MegatronWriter::create(&target, tensors, &[], options).unwrap();
    writer.write_at(0, 0, &[1; 8]).unwrap();
    assert!(writer.write_at(0, 4, &[1; 4]).is_err());
    assert!(writer.write_at(0, 12, &[1; 1]).is_err());
    assert!(matches!(
        writer.finish(),
        Err(CheckpointError::Incomplete { .. })
    ));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn damage_is_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let check = |damage: &dyn Fn(&Path), part: &str| {
        let target = folder.path().join("ckpt");
        write(&target);
        damage(&target.join("iter_0000007"));
        let error = MegatronCheckpoint::open(&target).unwrap_err();
        assert!(error.is_input(), "{error}");
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(inner) = source {
            text = format!("{text}: {inner}");
            source = inner.source();
        }
        assert!(text.contains(part), "{part} in {text}");
        std::fs::remove_dir_all(&target).unwrap();
    };
    let edit = |dir: &Path, file: &str, from: &[u8], to: &[u8]| {
        let path = dir.join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.windows(from.len()).position(|part| part == from);
        let at = at.unwrap();
        bytes.splice(at..at + from.len(), to.iter().copied());
        std::fs::write(path, bytes).unwrap();
    };
    check(
        &|dir| std::fs::remove_file(dir.join("__0_0.distcp")).unwrap(),
        "__0_0.distcp",
    );
    check(
        &|dir| {
            let file = std::fs::File::options()
                .write(true)
                .open(dir.join("__0_0.distcp"))
                .unwrap();
            file.set_len(3000).unwrap();
        },
        "leaves its file",
    );
    check(
        &|dir| edit(dir, "__0_0.distcp", b"FloatStorage", b"ErrorStorage"),
        "ErrorStorage",
    );
    check(
        &|dir| edit(dir, ".metadata", b"__0_0.distcp", b"../_0.distcp"),
        "cannot be a file",
    );
    check(
        &|dir| edit(dir, ".metadata", b"MetadataIndex\n", b"MetadataIndey\n"),
        "storage_data is malformed",
    );
    check(
        &|dir| {
            edit(
                dir,
                ".metadata",
                b"metadata\nMetadata\n",
                b"metadata\nMetadatb\n",
            )
        },
        "not the Metadata",
    );
    check(
        &|dir| std::fs::write(dir.join("metadata.json"), r#"{"sharded_backend": "zarr"}"#).unwrap(),
        "`zarr`",
    );
    // The second box of a tensor lies where the first one does.
    check(
        &|dir| {
            let path = dir.join(".metadata");
            let bytes = std::fs::read(&path).unwrap();
            let field = b"X\x06\0\0\0offsetM".as_slice();
            let places: Vec<usize> = (0..bytes.len() - field.len())
                .filter(|at| bytes[*at..].starts_with(field))
                .map(|at| at + field.len())
                .collect();
            let mut bytes = bytes.clone();
            let (first, second) = (places[1], places[2]);
            bytes.copy_within(first..first + 2, second);
            std::fs::write(path, bytes).unwrap();
        },
        "overlaps",
    );
}
