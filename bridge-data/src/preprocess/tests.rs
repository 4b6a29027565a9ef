use std::path::Path;

use super::*;
use crate::indexed::IndexedDataset;

const EOD: u32 = 256;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn options(&self, inputs: &[PathBuf]) -> PreprocessOptions {
        PreprocessOptions::new(inputs.to_vec(), self.0.path().join("out"))
    }
}

fn run(options: &PreprocessOptions) -> Result<Vec<WrittenDataset>> {
    preprocess(options, &Tokenizer::bytes(), &mut |_| {})
}

/// The documents of a dataset as text; the end-of-document token is `$`.
fn texts(prefix: &Path) -> Vec<String> {
    let data = IndexedDataset::open(prefix).unwrap();
    let text = |ids: Vec<u32>| {
        ids.into_iter()
            .map(|id| if id == EOD { '$' } else { char::from(id as u8) })
            .collect()
    };
    (0..data.index().sequences())
        .map(|sequence| text(data.sequence(sequence).unwrap()))
        .collect()
}

#[test]
fn jsonl_gives_a_dataset_a_key() {
    let folder = Folder::new();
    let a = folder.file(
        "a.jsonl",
        "{\"text\": \"one\", \"title\": \"1\"}\n\n{\"title\": \"2\", \"text\": \"two\"}\r\n",
    );
    let b = folder.file(
        "b.json",
        "{\"text\": \"\", \"title\": \"3\"}\n{\"text\": \"four\", \"title\": \"4\"}",
    );
    let mut options = folder.options(&[a, b]);
    options.json_keys = vec!["text".into(), "title".into()];
    let written = run(&options).unwrap();
    assert_eq!(
        texts(&options.dataset("text")),
        ["one$", "two$", "four$"],
        "a document without tokens is left out"
    );
    assert_eq!(texts(&options.dataset("title")), ["1$", "2$", "3$", "4$"]);
    assert_eq!(
        (
            written[0].documents,
            written[0].tokens,
            written[1].documents
        ),
        (3, 13, 4)
    );
    assert!(
        options
            .dataset("text")
            .to_string_lossy()
            .ends_with("out_text_document")
    );
}

#[test]
fn text_is_divided_as_asked() {
    let folder = Folder::new();
    let a = folder.file("a.txt", "\u{feff}first\nline\n\n\nsecond\r\n\nthird");
    let b = folder.file("b.txt", "last\n");
    let mut options = folder.options(&[a, b]);
    let mut check = |text_documents, append_eod, expected: &[&str]| {
        options.text_documents = text_documents;
        options.append_eod = append_eod;
        options.overwrite = true;
        run(&options).unwrap();
        assert_eq!(texts(&options.dataset("text")), expected);
    };
    check(
        TextDocuments::File,
        true,
        &["first\nline\n\n\nsecond\r\n\nthird$", "last\n$"],
    );
    check(
        TextDocuments::Line,
        false,
        &["first", "line", "second", "third", "last"],
    );
    check(
        TextDocuments::Separator(String::new()),
        true,
        &["first\nline\n$", "second\r\n$", "third$", "last\n$"],
    );
    check(
        TextDocuments::Separator("second".into()),
        true,
        &["first\nline\n\n\n$", "\nthird$", "last\n$"],
    );
}

#[test]
fn long_documents_are_tokenized_in_pieces_and_stay_whole() {
    let folder = Folder::new();
    let long: String = (0..400_000).map(|i| format!("line {i}\n")).collect();
    assert!(long.len() > 4 << 20);
    let (a, b) = (folder.file("a.txt", &long), folder.file("b.txt", "short\n"));
    let mut options = folder.options(&[a, b]);
    options.prepend_bos = true;
    let mut seen = Vec::new();
    let written = preprocess(&options, &Tokenizer::bytes(), &mut |progress| {
        seen.push(progress)
    })
    .unwrap();
    assert_eq!(
        texts(&options.dataset("text")),
        [format!("${long}$"), "$short\n$".into()]
    );
    assert_eq!(written[0].tokens, long.len() as u64 + 6 + 4);
    let last = seen.last().unwrap();
    assert_eq!(
        (last.bytes, last.documents, last.tokens),
        (last.total_bytes, 2, written[0].tokens)
    );
}

#[track_caller]
fn check_error(
    name: &str,
    content: impl AsRef<[u8]>,
    change: impl FnOnce(&mut PreprocessOptions),
    expected: &str,
) {
    let folder = Folder::new();
    let input = folder.file(name, content);
    let mut options = folder.options(&[input]);
    change(&mut options);
    let error = run(&options).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
    assert_eq!(
        std::fs::read_dir(folder.0.path()).unwrap().count(),
        1,
        "nothing is left"
    );
}

#[test]
fn bad_input_is_named_and_nothing_is_left() {
    check_error(
        "a.jsonl",
        "{\"text\": \"a\"}\n{\"text\": 3}\n",
        |_| {},
        "a.jsonl:2: `text` is a number",
    );
    check_error(
        "a.jsonl",
        "{\"body\": \"a\"}",
        |_| {},
        "a.jsonl:1: the object has no key `text`; it has `body`",
    );
    check_error(
        "a.jsonl",
        "[1]",
        |_| {},
        "a.jsonl:1: expected one JSON object a line, found a list",
    );
    check_error(
        "a.jsonl",
        "{\"text\": \"a\"",
        |_| {},
        "a.jsonl:1: not a JSON object",
    );
    check_error(
        "a.txt",
        b"ab\ncd\xff",
        |_| {},
        "a.txt:2: byte 3 of the line is not UTF-8",
    );
    check_error(
        "a.txt",
        "a",
        |o| o.inputs.push("/missing/file".into()),
        "cannot read /missing/file",
    );
    check_error(
        "a.txt",
        "a",
        |o| o.json_keys = vec!["body".into()],
        "plain-text inputs",
    );
    check_error(
        "a.jsonl",
        "{}",
        |o| o.json_keys = vec!["../a".into()],
        "rename it",
    );
    check_error(
        "a.jsonl",
        "{}",
        |o| o.json_keys = vec![],
        "at least one key",
    );
    check_error("a.jsonl", "{}", |o| o.inputs.clear(), "at least one file");
}

#[test]
fn a_finished_dataset_is_not_overwritten_by_accident() {
    let folder = Folder::new();
    let mut options = folder.options(&[folder.file("a.txt", "a")]);
    run(&options).unwrap();
    assert!(matches!(run(&options), Err(DataError::Exists { .. })));
    options.overwrite = true;
    assert!(run(&options).is_ok());
}

#[test]
fn tokens_asked_for_must_exist() {
    let folder = Folder::new();
    let mut options = folder.options(&[folder.file("a.txt", "1 2 3")]);
    options.prepend_bos = true;
    let error = preprocess(&options, &Tokenizer::null(10).unwrap(), &mut |_| {})
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("prepend_bos") && error.contains("null:10"),
        "{error}"
    );
}
