use proptest::prelude::*;

use super::*;
use crate::error::DataError;
use crate::token_source::TokenSource;

/// Documents of sequences of tokens.
type Documents = Vec<Vec<Vec<u32>>>;

fn write(prefix: &Path, dtype: TokenDtype, documents: &Documents) -> WrittenDataset {
    let mut writer = IndexedWriter::create(prefix, dtype).unwrap();
    for document in documents {
        for sequence in document {
            writer.write_tokens(sequence).unwrap();
            writer.end_sequence().unwrap();
        }
        writer.end_document().unwrap();
    }
    writer.finish().unwrap()
}

fn index_bytes(documents: &Documents) -> (Vec<u8>, u64) {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("d");
    write(&prefix, TokenDtype::U16, documents);
    let len = std::fs::metadata(tokens_path(&prefix)).unwrap().len();
    (std::fs::read(index_path(&prefix)).unwrap(), len)
}

fn documents(max_id: u32) -> impl Strategy<Value = Documents> {
    let sequence = prop::collection::vec(0..=max_id, 0..12);
    prop::collection::vec(prop::collection::vec(sequence, 0..4), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_is_read(
        (dtype, content) in prop::sample::select(vec![
            TokenDtype::U8, TokenDtype::I8, TokenDtype::I16, TokenDtype::I32, TokenDtype::I64, TokenDtype::U16,
        ]).prop_flat_map(|dtype| (Just(dtype), documents(dtype.max_id().unwrap())))
    ) {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("some.data_text_document");
        let report = write(&prefix, dtype, &content);
        let data = IndexedDataset::open(&prefix).unwrap();
        let sequences: Vec<_> = content.concat();
        prop_assert_eq!(data.index().dtype(), dtype);
        prop_assert_eq!((report.documents, report.sequences), (content.len() as u64, sequences.len() as u64));
        prop_assert_eq!(report.tokens as usize, sequences.iter().map(Vec::len).sum::<usize>());
        prop_assert_eq!((data.index().documents(), data.documents()), (report.documents, report.sequences));
        let mut first = 0;
        for (number, document) in content.iter().enumerate() {
            let range = data.index().document(number as u64).unwrap();
            prop_assert_eq!(range.clone(), first..first + document.len() as u64);
            for (sequence, tokens) in range.clone().zip(document) {
                prop_assert_eq!(&data.sequence(sequence).unwrap(), tokens);
                let (start, end) = (tokens.len() / 3, tokens.len() - tokens.len() / 4);
                let mut part = vec![7];
                data.read(sequence, start as u64..end as u64, &mut part).unwrap();
                prop_assert_eq!(&part[1..], &tokens[start..end]);
                prop_assert!(data.read(sequence, 0..tokens.len() as u64 + 1, &mut part).is_err());
            }
            first = range.end;
        }
        let beyond = matches!(data.sequence(first), Err(DataError::NoSequence { .. }));
        prop_assert!(beyond);
        prop_assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "only the two files are left");
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes: Vec<u8>, tokens_len: u64) {
        if let Ok(index) = Index::parse(&bytes, tokens_len) {
            walk(&index);
        }
    }

    /// A valid header with any counts and any rest.
    #[test]
    fn arbitrary_indices_never_panic(
        code in 0u8..10, sequences in prop_oneof![0u64..6, any::<u64>()], borders in prop_oneof![0u64..6, any::<u64>()],
        rest in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..120), tokens_len in prop_oneof![0u64..100, any::<u64>()]
    ) {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.push(code);
        bytes.extend(sequences.to_le_bytes());
        bytes.extend(borders.to_le_bytes());
        bytes.extend(rest);
        if let Ok(index) = Index::parse(&bytes, tokens_len) {
            walk(&index);
        }
    }

    /// Every change of one byte is either an error or still describes sequences inside the file.
    #[test]
    fn a_changed_byte_never_leads_outside(place: prop::sample::Index, value: u8) {
        let (mut bytes, len) = index_bytes(&vec![vec![vec![1, 2, 3], vec![4]], vec![vec![5, 6]]]);
        *place.get_mut(&mut bytes) = value;
        if let Ok(index) = Index::parse(&bytes, len) {
            walk(&index);
        }
    }
}

/// Touches everything an index offers and checks that it lies in the file.
fn walk(index: &Index<&Vec<u8>>) {
    for sequence in 0..index.sequences() {
        index.sequence(sequence).unwrap();
        index.mode(sequence);
    }
    for document in 0..index.documents() {
        assert!(index.document(document).unwrap().end <= index.sequences());
    }
    assert!(index.sequence(index.sequences()).is_err());
    assert!(index.document(index.documents()).is_err());
    assert!(index.document(u64::MAX).is_err() && index.sequence(u64::MAX).is_err());
}

/// Byte for byte what the format table says.
#[test]
fn the_layout_is_that_of_the_format() {
    let (bytes, len) = index_bytes(&vec![vec![vec![1, 2, 3]], vec![vec![4], vec![5, 6]]]);
    assert_eq!(len, 12);
    let mut expected = b"MMIDIDX\0\0".to_vec();
    expected.extend(1u64.to_le_bytes());
    expected.push(8);
    expected.extend(3u64.to_le_bytes());
    expected.extend(3u64.to_le_bytes());
    expected.extend([3i32, 1, 2].map(i32::to_le_bytes).concat());
    expected.extend([0i64, 6, 8].map(i64::to_le_bytes).concat());
    expected.extend([0i64, 1, 3].map(i64::to_le_bytes).concat());
    assert_eq!(bytes, expected);
}

#[test]
fn modes_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("d");
    let mut writer = IndexedWriter::create(&prefix, TokenDtype::I32).unwrap();
    for sequence in 0..5u32 {
        writer.write_tokens(&[sequence, sequence + 1]).unwrap();
        writer.end_sequence().unwrap();
        if sequence == 1 || sequence == 3 {
            writer.set_mode(sequence as i8).unwrap();
        }
    }
    writer.end_document().unwrap();
    writer.finish().unwrap();
    let data = IndexedDataset::open(&prefix).unwrap();
    let modes: Vec<_> = (0..6).map(|sequence| data.index().mode(sequence)).collect();
    assert_eq!(modes, [Some(0), Some(1), Some(0), Some(3), Some(0), None]);
    assert_eq!(data.sequence(4).unwrap(), [4, 5]);
}

#[track_caller]
fn check_bad(change: impl FnOnce(&mut Vec<u8>), expected: &str) {
    let (mut bytes, len) = index_bytes(&vec![vec![vec![1, 2, 3]], vec![vec![4]]]);
    change(&mut bytes);
    let error = Index::parse(&bytes, len).unwrap_err();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn errors_say_what_is_wrong() {
    check_bad(
        |b| b.truncate(20),
        "20 bytes, and the header alone takes 34",
    );
    check_bad(|b| b[0] = b'X', "MMIDIDX");
    check_bad(|b| b[9] = 2, "version 2, expected 1");
    check_bad(|b| b[17] = 9, "dtype code 9");
    check_bad(|b| b[18] = 5, "5 sequences and 3 document borders take 118");
    check_bad(|b| b[25] = 255, "cannot fit into any file");
    check_bad(|b| b.truncate(b.len() - 1), "truncated or damaged");
    check_bad(|b| b[26..34].fill(0), "no document borders");
    check_bad(|b| b[37] = 0x80, "length -2147483645");
    check_bad(
        |b| b[34] = 9,
        "takes 18 bytes from 0 on, but the .bin file has 8 bytes",
    );
    check_bad(|b| b[49] = 0x80, "offset -9223372036854775808");
    check_bad(|b| b[58] = 1, "document 0 begins at sequence 1");
    check_bad(
        |b| b[66] = 3,
        "document 2 begins at sequence 2, before the end of its predecessor (3)",
    );
    check_bad(|b| b[74] = 3, "documents end at sequence 3 of 2");
}

#[test]
fn missing_and_unusable_datasets_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("books");
    let error = IndexedDataset::open(&prefix).unwrap_err().to_string();
    assert!(error.contains("has no books.idx"), "{error}");
    write(&prefix, TokenDtype::U16, &vec![vec![vec![1]]]);
    assert!(IndexedDataset::open(index_path(&prefix)).is_ok());
    std::fs::remove_file(tokens_path(&prefix)).unwrap();
    assert!(
        IndexedDataset::open(&prefix)
            .unwrap_err()
            .to_string()
            .contains("has no books.bin")
    );

    let mut bytes = std::fs::read(index_path(&prefix)).unwrap();
    bytes[17] = 6;
    std::fs::write(index_path(&prefix), bytes).unwrap();
    std::fs::write(tokens_path(&prefix), [0; 8]).unwrap();
    assert!(
        IndexedDataset::open(&prefix)
            .unwrap_err()
            .to_string()
            .contains("float64")
    );
}

#[test]
fn negative_tokens_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("d");
    write(&prefix, TokenDtype::I32, &vec![vec![vec![1, 2]]]);
    std::fs::write(tokens_path(&prefix), [1, 0, 0, 0, 255, 255, 255, 255]).unwrap();
    let error = IndexedDataset::open(&prefix)
        .unwrap()
        .sequence(0)
        .unwrap_err()
        .to_string();
    assert!(error.contains("holds -1 at token 1"), "{error}");
}

#[test]
fn what_cannot_be_stored_is_refused_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("d");
    let mut writer = IndexedWriter::create(&prefix, TokenDtype::U16).unwrap();
    let error = writer.write_tokens(&[1, 65_536]).unwrap_err().to_string();
    assert!(
        error.contains("token id 65536") && error.contains("uint16"),
        "{error}"
    );
    assert!(IndexedWriter::create(&prefix, TokenDtype::F32).is_err());
    drop(writer);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    assert!(IndexedWriter::create(folder.path().join("missing/d"), TokenDtype::U16).is_err());
}

#[test]
fn existing_datasets_are_replaced_only_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("d");
    write(&prefix, TokenDtype::U16, &vec![vec![vec![1, 2]]]);
    assert!(matches!(
        IndexedWriter::create(&prefix, TokenDtype::U16),
        Err(DataError::Exists { .. })
    ));
    let mut writer = IndexedWriter::replace(&prefix, TokenDtype::I32).unwrap();
    writer.write_document(&[70_000]).unwrap();
    assert_eq!(
        IndexedDataset::open(&prefix).unwrap().sequence(0).unwrap(),
        [1, 2],
        "until the new one is finished"
    );
    writer.finish().unwrap();
    assert_eq!(
        IndexedDataset::open(&prefix).unwrap().sequence(0).unwrap(),
        [70_000]
    );
}
