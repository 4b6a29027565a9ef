use proptest::prelude::*;

use super::super::source::MemoryReader;
use super::*;

fn file(json: &str, data_len: usize) -> Vec<u8> {
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json.bytes());
    bytes.resize(bytes.len() + data_len, 7);
    bytes
}

/// Parses a file of that header and so many bytes of data, and wants an error that `expected` recognises and whose
/// text holds `text`.
#[track_caller]
fn refused(json: &str, data_len: usize, expected: fn(&HeaderError) -> bool, text: &str) {
    let error = Header::parse(&file(json, data_len)).unwrap_err();
    assert!(expected(&error), "{error:?}");
    assert!(error.to_string().contains(text), "{error}");
}

macro_rules! is {
    ($variant:ident) => {
        |error| matches!(error, HeaderError::$variant { .. })
    };
}

fn entry(dtype: &str, shape: &str, start: u64, end: u64) -> String {
    format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
}

#[test]
fn tensors_come_in_the_order_of_their_bytes() {
    let (a, b, empty) = (
        entry("F32", "[2]", 2, 10),
        entry("BF16", "[]", 0, 2),
        entry("U8", "[3,0]", 10, 10),
    );
    let json =
        format!(r#"{{"a":{a},"__metadata__":{{"y":"1","x":"2"}},"b":{b},"empty":{empty}}}   "#);
    let header = Header::parse(&file(&json, 10)).unwrap();
    let names: Vec<_> = header
        .entries
        .iter()
        .map(|entry| entry.spec.name.as_str())
        .collect();
    assert_eq!(names, ["b", "a", "empty"]);
    assert_eq!(
        header.entries[1],
        HeaderEntry {
            spec: TensorSpec::new("a", DType::F32, [2]),
            offset: 2,
            len: 8
        }
    );
    assert_eq!(
        header.metadata,
        [
            ("y".to_owned(), "1".to_owned()),
            ("x".to_owned(), "2".to_owned())
        ]
    );
    assert_eq!(header.data_start, 8 + json.len() as u64);
    assert_eq!(header.data_len(), 10);
}

#[test]
fn a_header_without_tensors_is_a_file() {
    for json in [
        "{}",
        "{ }  ",
        r#"{"__metadata__":{}}"#,
        r#"{"__metadata__":null}"#,
    ] {
        let header = Header::parse(&file(json, 0)).unwrap();
        assert_eq!(
            (header.entries.len(), header.metadata.len()),
            (0, 0),
            "{json}"
        );
    }
}

#[test]
fn the_length_is_checked_before_anything_is_read() {
    #[track_caller]
    fn check(bytes: &[u8], expected: fn(&HeaderError) -> bool, text: &str) {
        let error = Header::parse(bytes).unwrap_err();
        assert!(
            expected(&error) && error.to_string().contains(text),
            "{error:?} {error}"
        );
        let reader = MemoryReader::new("some.safetensors", bytes);
        let Err(CheckpointError::Header { file, problem }) = Header::read(&reader) else {
            panic!("{text}")
        };
        assert!(expected(&problem) && file == "some.safetensors");
    }
    check(&[], is!(TooShort), "has 0 bytes");
    check(&[1, 0, 0, 0, 0, 0, 0], is!(TooShort), "has 7 bytes");
    check(&u64::MAX.to_le_bytes(), is!(TooLarge), "limit of 100000000");
    check(&100_000_001u64.to_le_bytes(), is!(TooLarge), "100000001");
    check(
        &100_000_000u64.to_le_bytes(),
        is!(LeavesFile),
        "only 0 follow",
    );
    check(&3u64.to_le_bytes(), is!(LeavesFile), "fetch it again");
    check(&0u64.to_le_bytes(), is!(Empty), "two braces");
    check(
        b"PK\x03\x04\0\0\0\0............",
        is!(LeavesFile),
        "no safetensors file",
    );
}

#[test]
fn headers_that_are_no_such_json_are_refused() {
    refused("[]", 0, is!(NotAnObject), "0x5b");
    refused(" {}", 0, is!(NotAnObject), "0x20");
    refused("{", 0, |e| matches!(e, HeaderError::Json(_)), "JSON");
    refused("{}x", 0, |e| matches!(e, HeaderError::Json(_)), "JSON");
    refused(
        r#"{"__metadata__":{"a":1}}"#,
        0,
        |e| matches!(e, HeaderError::Json(_)),
        "JSON",
    );
    refused(
        r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
        4,
        |e| matches!(e, HeaderError::Json(_)),
        "JSON",
    );
    refused(
        r#"{"a":{"dtype":"F32","shape":[1]}}"#,
        4,
        |e| matches!(e, HeaderError::Json(_)),
        "JSON",
    );
    refused(
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}"#,
        4,
        |e| matches!(e, HeaderError::Json(_)),
        "JSON",
    );
    refused(&"[".repeat(100_000), 0, is!(NotAnObject), "0x5b");
    refused(
        &r#"{"a":"#.repeat(100_000),
        0,
        |e| matches!(e, HeaderError::Json(_)),
        "JSON",
    );
    let error = Header::parse(&[2, 0, 0, 0, 0, 0, 0, 0, b'{', 0xff]).unwrap_err();
    assert!(matches!(error, HeaderError::NotUtf8(_)), "{error:?}");
}

#[test]
fn repeated_keys_are_refused_wherever_they_stand() {
    let (first, second) = (entry("U8", "[1]", 0, 1), entry("U8", "[1]", 1, 2));
    refused(
        &format!(r#"{{"a":{first},"a":{second}}}"#),
        2,
        is!(DuplicateTensors),
        "`a` appears twice",
    );
    // Equal once unescaped.
    refused(
        &format!(r#"{{"a":{first},"\u0061":{second}}}"#),
        2,
        is!(DuplicateTensors),
        "`a` appears twice",
    );
    refused(
        r#"{"__metadata__":{},"__metadata__":{}}"#,
        0,
        is!(DuplicateTensors),
        "__metadata__",
    );
    refused(
        r#"{"__metadata__":{"a":"1","a":"2"}}"#,
        0,
        |e| matches!(e, HeaderError::Json(_)),
        "JSON",
    );
    let twice = r#"{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}"#;
    refused(twice, 1, |e| matches!(e, HeaderError::Json(_)), "JSON");
}

#[test]
fn hostile_names_are_refused_and_paths_are_just_names() {
    let one = entry("U8", "[1]", 0, 1);
    refused(&format!(r#"{{"":{one}}}"#), 1, is!(EmptyName), "empty");
    refused(
        &format!(r#"{{"a\u0000b":{one}}}"#),
        1,
        is!(NulInName),
        "`a\\u{0}b`",
    );
    refused(
        &format!(r#"{{"{}":{one}}}"#, "x".repeat(1025)),
        1,
        is!(LongName),
        "1025 bytes",
    );
    // A tensor's name never becomes a path, so this one is odd but harmless.
    assert!(Header::parse(&file(&format!(r#"{{"../x":{one}}}"#), 1)).is_ok());
    assert!(Header::parse(&file(&format!(r#"{{"{}":{one}}}"#, "x".repeat(1024)), 1)).is_ok());
}

#[test]
fn types_and_shapes_are_checked_without_overflow() {
    let huge = u64::MAX;
    refused(
        &format!(r#"{{"a":{}}}"#, entry("F128", "[1]", 0, 1)),
        1,
        is!(DType),
        "F128",
    );
    refused(
        &format!(
            r#"{{"a":{}}}"#,
            entry("F32", "[4294967296,4294967296]", 0, 0)
        ),
        0,
        is!(ShapeOverflow),
        "4294967296",
    );
    refused(
        &format!(r#"{{"a":{}}}"#, entry("U8", &format!("[{huge}]"), 0, huge)),
        1,
        is!(ShapeOverflow),
        "larger",
    );
    refused(
        &format!(r#"{{"a":{}}}"#, entry("F4", "[3]", 0, 2)),
        2,
        is!(PartialByte),
        "whole bytes",
    );
    let many = format!("[{}1]", "1,".repeat(64));
    refused(
        &format!(r#"{{"a":{}}}"#, entry("U8", &many, 0, 1)),
        1,
        is!(TooManyDims),
        "65 dims",
    );
    // A zero makes the product zero, however large the rest.
    let empty = entry("F64", &format!("[0,{},{}]", usize::MAX, usize::MAX), 0, 0);
    assert!(Header::parse(&file(&format!(r#"{{"a":{empty}}}"#), 0)).is_ok());
}

#[test]
fn offsets_must_fit_the_type_the_file_and_each_other() {
    refused(
        &format!(r#"{{"a":{}}}"#, entry("U8", "[1]", 1, 0)),
        1,
        is!(ReversedOffsets),
        "[1, 0]",
    );
    refused(
        &format!(r#"{{"a":{}}}"#, entry("F32", "[2]", 0, 7)),
        8,
        is!(SizeMismatch),
        "7 bytes by its offsets, but 8",
    );
    refused(
        &format!(r#"{{"a":{}}}"#, entry("F32", "[2]", 0, 8)),
        7,
        is!(OffsetsLeaveFile),
        "only 7",
    );
    let far = entry("U8", "[1]", u64::MAX - 1, u64::MAX);
    refused(
        &format!(r#"{{"a":{far}}}"#),
        1,
        is!(OffsetsLeaveFile),
        "cut off",
    );
    let pair = |a: String, b: String| format!(r#"{{"a":{a},"b":{b}}}"#);
    let overlap = pair(entry("U8", "[4]", 0, 4), entry("U8", "[4]", 3, 7));
    refused(&overlap, 7, is!(Overlap), "`a` and `b` overlap");
    refused(
        &pair(entry("U8", "[4]", 0, 4), entry("U8", "[4]", 0, 4)),
        4,
        is!(Overlap),
        "overlap",
    );
    refused(
        &pair(entry("U8", "[4]", 0, 4), entry("U8", "[0]", 2, 2)),
        4,
        is!(Overlap),
        "overlap",
    );
    refused(
        &pair(entry("U8", "[4]", 0, 4), entry("U8", "[4]", 5, 9)),
        9,
        is!(Hole),
        "4..5",
    );
    refused(
        &format!(r#"{{"a":{}}}"#, entry("U8", "[1]", 1, 2)),
        2,
        is!(Hole),
        "0..1",
    );
    refused(
        &format!(r#"{{"a":{}}}"#, entry("U8", "[1]", 0, 1)),
        3,
        is!(TrailingBytes),
        "2 bytes follow",
    );
    refused("{}", 1, is!(TrailingBytes), "1 bytes follow");
}

#[test]
fn headers_have_the_bytes_of_the_usual_writers() {
    let specs = [
        TensorSpec::new("w\"é", DType::F8E4M3, [2, 3]),
        TensorSpec::new("s", DType::F32, []),
    ];
    let (bytes, header) =
        Header::encode(&specs, &[("format".to_owned(), "pt".to_owned())]).unwrap();
    let json = r#"{"__metadata__":{"format":"pt"},"w\"é":{"dtype":"F8_E4M3","shape":[2,3],"data_offsets":[0,6]},"s":{"dtype":"F32","shape":[],"data_offsets":[6,10]}}"#;
    let padded = json.len().next_multiple_of(8);
    assert_eq!(bytes[..8], (padded as u64).to_le_bytes());
    assert_eq!(
        std::str::from_utf8(&bytes[8..]).unwrap(),
        format!("{json:padded$}", padded = padded - 1)
    );
    assert_eq!(header.data_start, bytes.len() as u64);
    assert_eq!(Header::encode(&[], &[]).unwrap().0[8..], *b"{}      ");
}

#[test]
fn what_a_reader_would_refuse_is_not_written() {
    let spec = |name: &str, shape: &[usize]| TensorSpec::new(name, DType::F32, shape);
    assert!(matches!(
        Header::encode(&[spec("a", &[]), spec("a", &[])], &[]),
        Err(HeaderError::DuplicateTensors { .. })
    ));
    assert!(matches!(
        Header::encode(&[spec("__metadata__", &[])], &[]),
        Err(HeaderError::ReservedName)
    ));
    assert!(matches!(
        Header::encode(&[spec("", &[])], &[]),
        Err(HeaderError::EmptyName)
    ));
    let large = spec("a", &[1 << 62]);
    assert!(matches!(
        Header::encode(&[large], &[]),
        Err(HeaderError::ShapeOverflow { .. })
    ));
    let two = [
        TensorSpec::new("a", DType::U8, [usize::MAX]),
        TensorSpec::new("b", DType::U8, [usize::MAX]),
    ];
    assert!(matches!(
        Header::encode(&two, &[]),
        Err(HeaderError::ShapeOverflow { .. })
    ));
}

fn any_specs() -> impl Strategy<Value = Vec<TensorSpec>> {
    let dtypes: Vec<DType> = DType::all().collect();
    let shape = proptest::collection::vec(0usize..5, 0..4);
    let spec = (".{1,12}", proptest::sample::select(dtypes), shape);
    proptest::collection::vec(spec, 0..8).prop_map(|specs| {
        let made = specs
            .into_iter()
            .enumerate()
            .map(|(i, (name, dtype, mut shape))| {
                // Packed types need whole bytes.
                if dtype.bytes().is_none() {
                    shape.push(4);
                }
                TensorSpec::new(format!("{}{i}", name.replace('\0', "")), dtype, shape)
            });
        made.collect()
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(specs in any_specs(), metadata in proptest::collection::btree_map(".*", ".*", 0..4)) {
        let metadata: Vec<_> = metadata.into_iter().collect();
        let (mut bytes, written) = Header::encode(&specs, &metadata).unwrap();
        prop_assert!(bytes.len().is_multiple_of(8));
        bytes.resize(bytes.len() + written.data_len() as usize, 0);
        prop_assert_eq!(Header::parse(&bytes).unwrap(), written.clone());
        let found: Vec<_> = written.entries.into_iter().map(|entry| entry.spec).collect();
        prop_assert_eq!(found, specs);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Header::parse(&bytes);
    }

    #[test]
    fn arbitrary_json_never_panics(
        dtype in "(F32|U8|F4|BOOL|X)", shape in proptest::collection::vec(any::<u64>(), 0..4),
        start in any::<u64>(), end in any::<u64>(), small in 0u64..9, data in 0usize..9,
    ) {
        for (start, end) in [(start, end), (small, end), (0, small), (small, small)] {
            let json = format!(r#"{{"a":{}}}"#, entry(&dtype, &format!("{shape:?}"), start, end));
            if let Ok(header) = Header::parse(&file(&json, data)) {
                prop_assert_eq!(header.data_len(), data as u64);
            }
        }
    }

    /// One changed byte in a good file is refused or gives a header that still covers the data.
    #[test]
    fn damaged_files_are_refused_or_consistent(specs in any_specs(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let (mut bytes, written) = Header::encode(&specs, &[]).unwrap();
        bytes.resize(bytes.len() + written.data_len() as usize, 0);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(header) = Header::parse(&bytes) {
            prop_assert_eq!(header.data_start + header.data_len(), bytes.len() as u64);
        }
    }
}
