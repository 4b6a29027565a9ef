use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    bytes: 1 << 20,
    nodes: 1000,
};

fn parse(bytes: &[u8]) -> Result<Pickle, String> {
    Pickle::parse(bytes.to_vec(), LIMITS)
}

#[track_caller]
fn refused(bytes: &[u8], part: &str) {
    let error = parse(bytes).unwrap_err();
    assert!(error.contains(part), "{error}");
}

#[test]
fn values_of_every_kind_are_read() {
    // pickle.dumps({"a": [1, -2, 70000, 2**40, 1.5, None, True], b"x": ("y",)}, protocol=4), by hand.
    let mut bytes =
        b"\x80\x04\x95\x40\0\0\0\0\0\0\0}\x94(\x8c\x01a\x94](K\x01J\xfe\xff\xff\xff".to_vec();
    bytes.extend_from_slice(b"J\x70\x11\x01\0\x8a\x06\0\0\0\0\0\x01G\x3f\xf8\0\0\0\0\0\0N\x88e");
    bytes.extend_from_slice(b"C\x01x\x8c\x01y\x85u.");
    let pickle = parse(&bytes).unwrap();
    let list = pickle.get(pickle.root(), "a").unwrap();
    let items = pickle.sequence(list).unwrap();
    let ints: Vec<_> = items[..4].iter().map(|id| pickle.int(*id)).collect();
    assert_eq!(ints, [Some(1), Some(-2), Some(70000), Some(1 << 40)]);
    assert_eq!(*pickle.node(items[4]), Node::Float(1.5));
    assert_eq!(*pickle.node(items[5]), Node::None);
    assert_eq!(*pickle.node(items[6]), Node::Bool(true));
    let (key, value) = pickle.items(pickle.root()).unwrap()[1];
    assert_eq!(pickle.bytes(key), Some(&b"x"[..]));
    assert_eq!(pickle.str(pickle.sequence(value).unwrap()[0]), Some("y"));
}

#[test]
fn calls_are_noted_and_never_made() {
    // os.system("true"), as the classic attack has it.
    let pickle = parse(b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.").unwrap();
    let (module, name, args) = pickle.call(pickle.root()).unwrap();
    assert_eq!((module, name), ("os", "system"));
    assert_eq!(pickle.str(args[0]), Some("true"));
    assert_eq!(pickle.describe(pickle.root()), "an object of os.system");
    assert_eq!(pickle.items(pickle.root()), None);
    assert_eq!(pickle.sequence(pickle.root()), None);
}

#[test]
fn a_value_that_contains_itself_is_a_node_like_others() {
    let pickle = parse(b"\x80\x02]q\0h\0a.").unwrap();
    assert_eq!(pickle.sequence(pickle.root()), Some(&[pickle.root()][..]));
}

#[test]
fn damaged_programs_are_refused() {
    refused(b"", "ends early");
    refused(b"\x80\x02N", "ends early");
    refused(b"\x80\x02.", "stack is empty");
    refused(b"\x80\x07N.", "protocol 7");
    refused(b"\x80\x02N.N", "follow the end");
    refused(b"\x80\x02h\x05.", "memo entry 5");
    refused(b"\x80\x02(K\x01K\x02u.", "stack is empty");
    refused(b"\x80\x02}(K\x01u.", "no value");
    refused(b"\x80\x02N(K\x01K\x02u.", "no dict");
    refused(b"\x80\x02NNb.", "no object");
    refused(b"\x80\x02K\x01K\x02\x93.", "no text");
    refused(b"\x80\x02t.", "mark is missing");
    refused(b"\x80\x02X\xff\xff\xff\xffab.", "ends early");
    refused(
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xffab.",
        "ends early",
    );
    refused(b"\x80\x02X\x01\0\0\0\xff.", "not valid UTF-8");
    refused(b"\x80\x02\x8b\xff\xff\xff\xff.", "ends early");
    refused(b"\x80\x02i.", "opcode 0x69");
    // A mark below which nothing may be taken.
    refused(b"\x80\x02K\x01(0.", "stack is empty");
    let mut many = b"\x80\x02".to_vec();
    many.resize(1500, b'N');
    refused(&many, "more values");
    let mut copies = b"\x80\x02N".to_vec();
    copies.resize(1500, b'2');
    refused(&copies, "more values");
}

#[test]
fn integers_of_every_length_come_back() {
    let powers = (0..63).flat_map(|bits| [(1u64 << bits) - 1, 1 << bits]);
    for value in powers.chain([i64::MAX as u64]) {
        let mut writer = crate::checkpoint::torch::write::PickleWriter::new();
        writer.int(value);
        let pickle = parse(&writer.finish()).unwrap();
        assert_eq!(pickle.int(pickle.root()), Some(value as i64), "{value:#x}");
    }
}

#[test]
fn large_integers_and_memo_numbers_are_harmless() {
    let pickle = parse(b"\x80\x02\x8a\x09\0\0\0\0\0\0\0\0\x01.").unwrap();
    assert_eq!(*pickle.node(pickle.root()), Node::LargeInt);
    assert_eq!(pickle.size(pickle.root()), None);
    let pickle = parse(b"\x80\x02K\x07r\xff\xff\xff\xff0j\xff\xff\xff\xff.").unwrap();
    assert_eq!(pickle.size(pickle.root()), Some(7));
}

proptest! {
    #[test]
    fn any_bytes_parse_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut input = vec![0x80, 4];
        input.extend(bytes);
        if let Ok(pickle) = parse(&input) {
            let root = pickle.root();
            let _ = (pickle.describe(root), pickle.sizes(root), pickle.call(root), pickle.get(root, "x"));
        }
    }

    /// Programs made of known opcodes get further than random bytes do.
    #[test]
    fn any_program_parses_or_is_refused(
        opcodes in prop::collection::vec(
            prop::sample::select(b"N(]})tlde\x85\x86\x87aubRQ02q\0h\0K\x01\x88\x94\x93\x81".to_vec()), 0..60),
    ) {
        let mut input = vec![0x80, 2];
        input.extend(opcodes);
        input.push(b'.');
        let _ = parse(&input);
    }
}
