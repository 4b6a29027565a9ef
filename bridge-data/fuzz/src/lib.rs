//! What the fuzz target does with its input, as a plain function.
//!
//! It panics when the reader accepts an index that it should not; that the reader itself never panics is the other half
//! of the check.

use bridge_data::indexed::Index;

/// The first two bytes are the length of the `.bin` file, the rest is the `.idx` file.
///
/// An index that is accepted has every sequence inside the `.bin` file, documents that cover every sequence once and in
/// order, and an answer, though an error, for every number beyond the end.
pub fn dataset_index(input: &[u8]) {
    let Some((len, file)) = input.split_first_chunk() else {
        return;
    };
    let tokens_len = u64::from(u16::from_le_bytes(*len));
    let Ok(index) = Index::parse(file, tokens_len) else {
        return;
    };
    let size = index.dtype().size() as u64;
    for sequence in 0..index.sequences() {
        let (tokens, start) = index.sequence(sequence).expect("it was checked");
        assert!(start + tokens * size <= tokens_len);
        index.mode(sequence);
    }
    let mut next = 0;
    for document in 0..index.documents() {
        let sequences = index.document(document).expect("it was checked");
        assert_eq!(sequences.start, next);
        assert!(sequences.start <= sequences.end);
        next = sequences.end;
    }
    assert_eq!(next, index.sequences());
    for beyond in [index.sequences(), u64::MAX] {
        assert!(index.sequence(beyond).is_err());
        assert!(index.mode(beyond).is_none());
    }
    for beyond in [index.documents(), u64::MAX] {
        assert!(index.document(beyond).is_err());
    }
}
