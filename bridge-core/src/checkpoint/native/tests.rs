use std::fs;
use std::path::Path;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::checkpoint::{CheckpointError, Durability, FileReader, Region};
use crate::dtype::DType;

mod strict_index;

/// The bytes of a whole tensor of `elements` i16 counting up.
fn counting(elements: usize) -> Vec<u8> {
    (0..elements as i16).flat_map(i16::to_le_bytes).collect()
}

/// The part `region` of a row-major buffer of i16.
fn cut(whole: &[u8], shape: &[usize], region: &Region) -> Vec<u8> {
    let mut out = vec![0; region.elements().unwrap() as usize * 2];
    for run in region.runs(&Region::whole(shape), region, 2) {
        let bytes = &whole[run.src as usize..][..run.len as usize];
        out[run.dst as usize..][..run.len as usize].copy_from_slice(bytes);
    }
    out
}

fn piece(name: &str, shape: &[usize], region: Region) -> PieceSpec {
    PieceSpec {
        name: name.to_owned(),
        dtype: DType::I16,
        shape: shape.to_vec(),
        region,
    }
}

/// Writes a tensor `w` of `shape` in the given parts, each a list of regions.
fn save(
    root: &Path,
    iteration: u64,
    shape: &[usize],
    parts: &[Vec<Region>],
) -> Result<std::path::PathBuf, CheckpointError> {
    let whole = counting(shape.iter().product());
    let writer = NativeWriter::begin(root, iteration, Durability::Cached)?;
    for (part, regions) in parts.iter().enumerate() {
        let pieces = regions
            .iter()
            .map(|region| piece("w", shape, region.clone()))
            .collect();
        let file = writer.piece_file(Group::Model, part, pieces)?;
        for (position, region) in regions.iter().enumerate() {
            file.write_at(position, 0, &cut(&whole, shape, region))?;
        }
        file.finish()?;
    }
    writer.finish(parts.len(), 0)
}

fn rows(shape: &[usize], cuts: &[usize]) -> Vec<Region> {
    let mut regions = Vec::new();
    for pair in cuts.windows(2) {
        let mut region = Region::whole(shape);
        region.offset[0] = pair[0];
        region.shape[0] = pair[1] - pair[0];
        regions.push(region);
    }
    regions
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Error text with its causes.
fn text(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", text(cause)),
        None => error.to_string(),
    }
}

fn saved() -> TempDir {
    let root = tempfile::tempdir().unwrap();
    save(root.path(), 100, &[4, 3], &[rows(&[4, 3], &[0, 1, 4])]).unwrap();
    root
}

#[test]
fn a_checkpoint_has_the_documented_layout() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path().join("made/for/it");
    let writer = NativeWriter::begin(&root, 100, Durability::Synced).unwrap();
    let whole = PieceSpec::whole("norm.weight", DType::F32, [2]);
    let scalar = PieceSpec::whole("step", DType::I64, []);
    let empty = PieceSpec::whole("empty", DType::F32, [0, 3]);
    let model = writer
        .piece_file(Group::Model, 0, vec![whole.clone(), empty.clone()])
        .unwrap();
    let optimizer = writer
        .piece_file(Group::Optimizer, 0, vec![scalar])
        .unwrap();
    model.write_at(0, 0, &[1; 8]).unwrap();
    optimizer.write_at(0, 0, &7i64.to_le_bytes()).unwrap();
    writer.add_file("train_state.json", b"{}").unwrap();
    writer.add_file("hf/config.json", b"{\"a\":1}").unwrap();
    model.finish().unwrap();
    optimizer.finish().unwrap();
    assert_eq!(names(&root).len(), 1, "nothing but the hidden folder");
    assert_eq!(
        writer.finish(1, 1).unwrap().file_name().unwrap(),
        "iter_0000100"
    );

    assert_eq!(names(&root), ["iter_0000100", "latest"]);
    assert_eq!(
        fs::read_to_string(root.join("latest")).unwrap(),
        "iter_0000100\n"
    );
    let dir = root.join("iter_0000100");
    assert_eq!(
        names(&dir),
        ["hf", "index.json", "model", "optimizer", "train_state.json"]
    );
    assert_eq!(names(&dir.join("model")), ["rank_00000.safetensors"]);
    let json = fs::read_to_string(dir.join("index.json")).unwrap();
    let expected = r#"{"format":"bridge-native-checkpoint","version":1,"iteration":100,"groups":{
"model":{
"empty":{"dtype":"F32","shape":[0,3],"pieces":[{"file":"model/rank_00000.safetensors","key":"empty","offset":[0,0],"shape":[0,3]}]},
"norm.weight":{"dtype":"F32","shape":[2],"pieces":[{"file":"model/rank_00000.safetensors","key":"norm.weight","offset":[0],"shape":[2]}]}},
"optimizer":{
"step":{"dtype":"I64","shape":[],"pieces":[{"file":"optimizer/rank_00000.safetensors","key":"step","offset":[],"shape":[]}]}}}}
"#;
    assert_eq!(json, expected);

    for path in [&root, &dir] {
        let checkpoint = NativeCheckpoint::open(path).unwrap();
        assert_eq!((checkpoint.iteration(), checkpoint.notes().len()), (100, 0));
        checkpoint.check_files().unwrap();
        assert_eq!(
            checkpoint.read(Group::Model, "norm.weight").unwrap(),
            [1; 8]
        );
        assert!(checkpoint.read(Group::Model, "empty").unwrap().is_empty());
        assert_eq!(
            checkpoint.read(Group::Optimizer, "step").unwrap(),
            7i64.to_le_bytes()
        );
        assert_eq!(
            checkpoint.read_file("hf/config.json").unwrap(),
            b"{\"a\":1}"
        );
    }
}

#[test]
fn ranks_that_are_processes_need_only_the_folder() {
    let root = tempfile::tempdir().unwrap();
    let shape = [5, 4];
    let whole = counting(20);
    let source = root.path().join("source");
    fs::write(&source, &whole).unwrap();
    let source = FileReader::open(source).unwrap();
    let root = root.path().join("ckpt");
    let writer = NativeWriter::begin(&root, 3, Durability::Cached).unwrap();
    let staging = writer.staging_dir().to_path_buf();
    std::thread::scope(|scope| {
        for (rank, region) in rows(&shape, &[0, 2, 2, 5]).into_iter().enumerate() {
            let (staging, source) = (&staging, &source);
            scope.spawn(move || {
                let offset = region.offset[0] as u64 * 8;
                let len = region.elements().unwrap() * 2;
                let pieces = vec![piece("w", &shape, region)];
                let file =
                    PieceWriter::create(staging, Group::Model, rank, pieces, Durability::Cached)
                        .unwrap();
                file.copy_from(0, 0, source, offset, len).unwrap();
                file.finish().unwrap();
            });
        }
    });
    writer.finish(3, 0).unwrap();
    assert_eq!(
        NativeCheckpoint::open(&root)
            .unwrap()
            .read(Group::Model, "w")
            .unwrap(),
        whole
    );
}

#[test]
fn pieces_must_make_up_every_tensor_exactly_once() {
    #[track_caller]
    fn check(shape: &[usize], parts: &[Vec<Region>], part: &str) {
        let root = saved();
        let error = save(root.path(), 101, shape, parts).unwrap_err();
        assert!(text(&error).contains(part), "{}", text(&error));
        // The earlier checkpoint stands, the failed one has left nothing.
        assert_eq!(names(root.path()), ["iter_0000100", "latest"]);
        assert_eq!(
            NativeCheckpoint::open(root.path()).unwrap().iteration(),
            100
        );
    }
    let shape = [4, 3];
    check(
        &shape,
        &[rows(&shape, &[0, 1]), rows(&shape, &[2, 4])],
        "2 pieces of tensor `w` do not hold each",
    );
    check(
        &shape,
        &[rows(&shape, &[0, 3]), rows(&shape, &[2, 4])],
        "exactly once",
    );
    check(
        &shape,
        &[rows(&shape, &[0, 4]), rows(&shape, &[0, 4])],
        "exactly once",
    );
    check(
        &shape,
        &[vec![Region::new([3, 0], [2, 3])]],
        "not within tensor `w`",
    );
}

#[test]
fn ranks_must_agree_and_all_be_there() {
    let root = tempfile::tempdir().unwrap();
    let begin = || NativeWriter::begin(root.path(), 1, Durability::Cached).unwrap();
    let part = |writer: &NativeWriter, part: usize, spec: PieceSpec| {
        let file = writer.piece_file(Group::Model, part, vec![spec]).unwrap();
        file.write_at(0, 0, &vec![0; file_len(part)]).unwrap();
        file
    };
    fn file_len(part: usize) -> usize {
        if part == 0 { 4 } else { 2 }
    }

    let writer = begin();
    part(&writer, 0, piece("w", &[3], Region::new([0], [2])))
        .finish()
        .unwrap();
    let unfinished = part(&writer, 1, piece("w", &[3], Region::new([2], [1])));
    let error = writer.finish(3, 0).unwrap_err();
    assert!(matches!(error, CheckpointError::MissingShards { .. }));
    for name in [
        "model/rank_00001.safetensors",
        "model/rank_00002.safetensors",
    ] {
        assert!(error.to_string().contains(name), "{error}");
    }
    drop(unfinished);

    let writer = begin();
    part(&writer, 0, piece("w", &[3], Region::new([0], [2])))
        .finish()
        .unwrap();
    part(&writer, 1, piece("w", &[4], Region::new([2], [1])))
        .finish()
        .unwrap();
    let error = writer.finish(2, 0).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("is a piece of a I16 tensor of shape [4], but other pieces are of I16 [3]"),
        "{error}"
    );

    let writer = begin();
    part(&writer, 0, piece("w", &[2], Region::new([0], [2])))
        .finish()
        .unwrap();
    part(&writer, 1, piece("v", &[1], Region::new([0], [1])))
        .finish()
        .unwrap();
    let error = writer.finish(1, 0).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("rank_00001.safetensors is beyond the 1 parts"),
        "{error}"
    );

    let writer = begin();
    let file = writer
        .piece_file(
            Group::Model,
            0,
            vec![piece("w", &[2], Region::new([0], [2]))],
        )
        .unwrap();
    file.write_at(0, 2, &[0; 2]).unwrap();
    assert!(matches!(
        file.finish(),
        Err(CheckpointError::Incomplete { .. })
    ));
    drop(writer);
    assert_eq!(names(root.path()), [""; 0]);
}

#[test]
fn latest_is_believed_when_it_can_be() {
    let root = saved();
    save(root.path(), 200, &[2], &[rows(&[2], &[0, 2])]).unwrap();
    let open = || NativeCheckpoint::open(root.path()).unwrap();
    assert_eq!((open().iteration(), open().notes().len()), (200, 0));
    let latest = root.path().join("latest");
    fs::write(&latest, "iter_0000100").unwrap();
    assert_eq!((open().iteration(), open().notes().len()), (100, 0));
    for (broken, note) in [
        ("iter_0000300\n", "which is not there"),
        ("../../etc\n", "no iteration's name"),
        ("", "no iteration's name"),
        ("iter_100\n", "no iteration's name"),
        (&"x".repeat(1000), "no iteration's name"),
    ] {
        fs::write(&latest, broken).unwrap();
        let checkpoint = open();
        assert_eq!(checkpoint.iteration(), 200, "{broken}");
        assert!(
            checkpoint.notes()[0].contains(note),
            "{:?}",
            checkpoint.notes()
        );
        assert!(
            checkpoint.notes()[0].contains("using iter_0000200, the newest complete"),
            "{:?}",
            checkpoint.notes()
        );
    }
    fs::remove_file(&latest).unwrap();
    assert!(open().notes()[0].contains("there is no"));
    // The newest is damaged: the one before it is used, and the note says why.
    fs::remove_file(
        root.path()
            .join("iter_0000200/model/rank_00000.safetensors"),
    )
    .unwrap();
    assert_eq!(open().iteration(), 100);
    assert!(
        open().notes()[1].contains("rank_00000.safetensors"),
        "{:?}",
        open().notes()
    );
    // The one that `latest` names is damaged: an error, since it was asked for.
    fs::write(&latest, "iter_0000200\n").unwrap();
    assert!(matches!(
        NativeCheckpoint::open(root.path()),
        Err(CheckpointError::MissingShards { .. })
    ));
}

#[test]
fn folders_that_are_no_checkpoint_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let error = NativeCheckpoint::open(root.path()).unwrap_err();
    assert!(
        matches!(error, CheckpointError::NoCheckpoint { .. })
            && error.to_string().contains("there is no"),
        "{error}"
    );
    fs::create_dir(root.path().join("iter_0000001")).unwrap();
    let error = NativeCheckpoint::open(root.path()).unwrap_err().to_string();
    assert!(
        error.contains("iter_0000001") && error.contains("2 problems"),
        "{error}"
    );
    fs::write(root.path().join("file"), "").unwrap();
    assert!(matches!(
        NativeCheckpoint::open(root.path().join("file")),
        Err(CheckpointError::NotAFolder { .. })
    ));
    assert!(
        NativeCheckpoint::open(root.path().join("missing"))
            .unwrap_err()
            .is_input()
    );
}

#[test]
fn a_checkpoint_of_the_same_iteration_is_replaced() {
    let root = saved();
    save(root.path(), 100, &[2, 2], &[rows(&[2, 2], &[0, 2])]).unwrap();
    assert_eq!(names(root.path()), ["iter_0000100", "latest"]);
    assert_eq!(
        NativeCheckpoint::open(root.path())
            .unwrap()
            .read(Group::Model, "w")
            .unwrap(),
        counting(4)
    );
}

#[test]
fn files_are_compared_with_the_index() {
    #[track_caller]
    fn check(other: PieceSpec, bytes: usize, part: &str) {
        let root = saved();
        let writer = NativeWriter::begin(root.path(), 7, Durability::Cached).unwrap();
        let file = writer.piece_file(Group::Model, 0, vec![other]).unwrap();
        file.write_at(0, 0, &vec![0; bytes]).unwrap();
        file.finish().unwrap();
        fs::rename(
            writer.staging_dir().join("model/rank_00000.safetensors"),
            root.path()
                .join("iter_0000100/model/rank_00000.safetensors"),
        )
        .unwrap();
        let checkpoint = NativeCheckpoint::open(root.path()).unwrap();
        let error = text(&checkpoint.read(Group::Model, "w").unwrap_err());
        assert!(
            error.contains(part) && error.contains("rank_00000"),
            "{error}"
        );
        assert_eq!(text(&checkpoint.check_files().unwrap_err()), error);
    }
    check(
        PieceSpec::whole("x", DType::U8, [3]),
        3,
        "holds `x`, which the index does not list",
    );
    check(
        piece("w", &[4, 3], Region::new([0, 0], [1, 3])),
        6,
        "lacks `w@1,0`",
    );
    check(
        piece("w", &[4, 3], Region::new([0, 0], [2, 3])),
        12,
        "`w@0,0` is I16 [2, 3] there, but I16 [1, 3] in the index",
    );
}

#[test]
fn slices_are_checked_against_the_tensor_and_the_buffer() {
    let root = saved();
    let checkpoint = NativeCheckpoint::open(root.path()).unwrap();
    let mut out = [0; 6];
    for region in [
        Region::new([3, 0], [2, 3]),
        Region::new([0], [3]),
        Region::new([0, usize::MAX], [1, 2]),
    ] {
        let error = checkpoint
            .read_slice(Group::Model, "w", &region, &mut out)
            .unwrap_err();
        assert!(
            matches!(&error, CheckpointError::BadRange { .. })
                && error.to_string().contains("not within"),
            "{error}"
        );
    }
    let error = checkpoint
        .read_slice(Group::Model, "w", &Region::new([0, 0], [2, 3]), &mut out)
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("does not fit a buffer of 6 bytes"),
        "{error}"
    );
    let error = checkpoint
        .read(Group::Optimizer, "w")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("the optimizer part of") && error.contains("no tensor `w`"),
        "{error}"
    );
}

#[test]
fn retention_keeps_the_newest_the_current_and_the_latest() {
    let root = tempfile::tempdir().unwrap();
    for iteration in [10, 20, 30, 40, 5] {
        save(root.path(), iteration, &[1], &[rows(&[1], &[0, 1])]).unwrap();
    }
    fs::write(root.path().join("latest"), "iter_0000020\n").unwrap();
    fs::create_dir(root.path().join("iter_notes")).unwrap();
    assert_eq!(retain(root.path(), 2, 5).unwrap(), [10]);
    assert_eq!(retain(root.path(), 0, 40).unwrap(), [30, 5]);
    assert_eq!(
        names(root.path()),
        ["iter_0000020", "iter_0000040", "iter_notes", "latest"]
    );
}

#[test]
fn iteration_names_are_read_back() {
    for iteration in [0, 7, 9_999_999, 10_000_000, u64::MAX] {
        let dir = iteration_dir(Path::new("x"), iteration);
        assert_eq!(
            parse_iteration(dir.file_name().unwrap().to_str().unwrap()),
            Some(iteration)
        );
    }
    for name in [
        "iter_1",
        "iter_00000001",
        "iter_+000001",
        "iter_99999999999999999999999",
        "iter_",
        "x",
    ] {
        assert_eq!(parse_iteration(name), None, "{name}");
    }
}

fn tiled() -> impl Strategy<Value = (Vec<usize>, Vec<Vec<Region>>, Region)> {
    // A grid of cuts along every dim, its cells dealt to ranks; and a slice to read.
    let dim = (1usize..9).prop_flat_map(|dim| {
        let cuts = proptest::collection::btree_set(1..=dim, 0..3);
        (Just(dim), cuts, 0..dim).prop_flat_map(|(dim, cuts, start)| {
            (Just(dim), Just(cuts), Just(start), 0..=dim - start)
        })
    });
    let dims = proptest::collection::vec(dim, 0..4);
    (dims, 1usize..4).prop_map(|(dims, ranks)| {
        let shape: Vec<usize> = dims.iter().map(|dim| dim.0).collect();
        let mut cells = vec![Region::new([], [])];
        for (dim, cuts, _, _) in &dims {
            let bounds: Vec<usize> = [0]
                .into_iter()
                .chain(cuts.iter().copied().filter(|cut| cut < dim))
                .chain([*dim])
                .collect();
            let extend = |cell: &Region| -> Vec<Region> {
                let with = |pair: &[usize]| {
                    let mut cell = cell.clone();
                    cell.offset.push(pair[0]);
                    cell.shape.push(pair[1] - pair[0]);
                    cell
                };
                bounds.windows(2).map(with).collect()
            };
            cells = cells.iter().flat_map(extend).collect();
        }
        let mut parts = vec![Vec::new(); ranks];
        for (position, cell) in cells.into_iter().enumerate() {
            parts[position % ranks].push(cell);
        }
        let slice = Region {
            offset: dims.iter().map(|dim| dim.2).collect(),
            shape: dims.iter().map(|dim| dim.3).collect(),
        };
        (shape, parts, slice)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_slice_is_read_from_any_pieces((shape, parts, slice) in tiled()) {
        let root = tempfile::tempdir().unwrap();
        save(root.path(), 1, &shape, &parts).unwrap();
        let whole = counting(shape.iter().product());
        let checkpoint = NativeCheckpoint::open(root.path()).unwrap();
        prop_assert_eq!(checkpoint.read(Group::Model, "w").unwrap(), whole.clone());
        let expected = cut(&whole, &shape, &slice);
        let mut out = vec![0xee; expected.len()];
        checkpoint.read_slice(Group::Model, "w", &slice, &mut out).unwrap();
        prop_assert_eq!(&out, &expected);
        out.fill(0xee);
        checkpoint.for_each_run(Group::Model, "w", &slice, |run| {
            run.reader.read_exact_at(run.offset, &mut out[run.dst as usize..][..run.len as usize])
        }).unwrap();
        prop_assert_eq!(&out, &expected);
    }

    #[test]
    fn arbitrary_bytes_never_panic_the_index_parser(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = NativeIndex::parse(&bytes);
    }

    #[test]
    fn indexes_are_read_as_they_were_written((shape, parts, _slice) in tiled(), iteration in any::<u64>()) {
        let pieces = parts.into_iter().flatten().enumerate();
        let pieces = pieces.map(|(i, region)| Piece {
            file: format!("model/rank_{:05}.safetensors", i % 3), key: format!("k{i}"), offset: region.offset, shape: region.shape,
        });
        let tensor = NativeTensor { dtype: DType::BF16, shape, pieces: pieces.collect() };
        let model = [("w \"é\"".to_owned(), tensor)].into();
        let index = NativeIndex { iteration, model, optimizer: GroupIndex::new() };
        prop_assert_eq!(NativeIndex::parse(&index.to_json().unwrap()).unwrap(), index);
    }
}

/// Columns of a wide matrix take the buffered way through short runs, and long runs the direct one.
#[test]
fn wide_slices_are_gathered_through_the_buffer() {
    let root = tempfile::tempdir().unwrap();
    let shape = [600, 5000];
    let whole: Vec<u8> = (0..3_000_000u32)
        .flat_map(|i| (i as u16).to_le_bytes())
        .collect();
    let writer = NativeWriter::begin(root.path(), 1, Durability::Cached).unwrap();
    let file = writer
        .piece_file(
            Group::Model,
            0,
            vec![piece("w", &shape, Region::whole(&shape))],
        )
        .unwrap();
    file.write_at(0, 0, &whole).unwrap();
    file.finish().unwrap();
    writer.finish(1, 0).unwrap();
    let checkpoint = NativeCheckpoint::open(root.path()).unwrap();
    for (start, count) in [(0, 2500), (2500, 2500), (7, 3), (1, 4998)] {
        let slice = Region::new([0, start], [600, count]);
        let expected = cut(&whole, &shape, &slice);
        let mut out = vec![0; expected.len()];
        checkpoint
            .read_slice(Group::Model, "w", &slice, &mut out)
            .unwrap();
        assert!(out == expected, "columns {start}..{}", start + count);
    }
}
