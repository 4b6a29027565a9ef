//! Tokenizers and chat templates give what `transformers` gives.
//!
//! The cases are made by `tests/interop/make_cases.py`. Besides the committed ones, `BRIDGE_TEST_TOKENIZERS` may name more
//! tokenizer folders with a `cases.json` (separated by `:`), and `BRIDGE_TEST_CHAT_CASES` a file of chat cases.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bridge_tokenizers::{ChatRequest, ChatTemplate, SpecialTokens, Tokenizer};
use serde::Deserialize;

#[derive(Deserialize)]
struct TokenizerCases {
    vocab_size: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    cases: Vec<TextCase>,
    chats: Vec<Chat>,
}

#[derive(Deserialize)]
struct TextCase {
    text: String,
    ids: Vec<u32>,
    ids_special: Vec<u32>,
    decoded: String,
    decoded_plain: String,
}

#[derive(Deserialize)]
struct Chat {
    request: ChatRequest,
    text: Option<String>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct ChatCase {
    name: String,
    template: String,
    request: ChatRequest,
    bos_token: String,
    eos_token: String,
    text: Option<String>,
    #[serde(default)]
    assistant: Vec<(usize, usize)>,
    error: Option<String>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Noon, so that the date is the same in nearly every time zone; the cases print the date alone.
fn frozen_time() -> Option<SystemTime> {
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_721_995_200)) // 2024-07-26 12:00 UTC
}

fn check_tokenizer(folder: &Path) {
    let name = folder.display();
    let cases: TokenizerCases =
        serde_json::from_slice(&std::fs::read(folder.join("cases.json")).unwrap()).unwrap();
    let tokenizer = Tokenizer::from_folder(folder).unwrap();
    assert_eq!(tokenizer.vocab_size(), cases.vocab_size, "{name}");
    assert_eq!(
        (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()),
        (cases.bos, cases.eos, cases.pad),
        "{name}"
    );
    for case in &cases.cases {
        let text = &case.text;
        assert_eq!(
            tokenizer.encode(text, SpecialTokens::Omit).unwrap(),
            case.ids,
            "{name}: {text:?}"
        );
        assert_eq!(
            tokenizer.encode(text, SpecialTokens::Add).unwrap(),
            case.ids_special,
            "{name}: {text:?}"
        );
        assert_eq!(
            tokenizer
                .decode(&case.ids_special, SpecialTokens::Add)
                .unwrap(),
            case.decoded,
            "{name}: {text:?}"
        );
        assert_eq!(
            tokenizer
                .decode(&case.ids_special, SpecialTokens::Omit)
                .unwrap(),
            case.decoded_plain,
            "{name}: {text:?}"
        );
        for special in [SpecialTokens::Add, SpecialTokens::Omit] {
            let mut stream = tokenizer.decode_stream(special);
            let mut text: String = case
                .ids_special
                .iter()
                .map(|&id| stream.push(id).unwrap())
                .collect();
            text += &stream.finish().unwrap();
            assert_eq!(
                text,
                tokenizer.decode(&case.ids_special, special).unwrap(),
                "{name}: {:?} streamed",
                case.text
            );
        }
    }
    for chat in &cases.chats {
        let request = ChatRequest {
            now: frozen_time(),
            ..chat.request.clone()
        };
        match (tokenizer.render_chat(&request), &chat.text) {
            (Ok(rendered), Some(text)) => assert_eq!(&rendered.text, text, "{name}"),
            (Err(_), None) => {}
            (found, _) => panic!(
                "{name}: {found:?}, expected {:?} or {:?}",
                chat.text, chat.error
            ),
        }
    }
}

#[test]
fn tokenizers_agree_with_transformers() {
    check_tokenizer(&fixtures().join("byte_bpe"));
    check_tokenizer(&fixtures().join("sentencepiece"));
    for folder in std::env::var("BRIDGE_TEST_TOKENIZERS")
        .unwrap_or_default()
        .split(':')
        .filter(|folder| !folder.is_empty())
    {
        check_tokenizer(Path::new(folder));
    }
}

#[test]
fn chat_templates_agree_with_transformers() {
    let mut files = vec![fixtures().join("chat_cases.json")];
    files.extend(std::env::var_os("BRIDGE_TEST_CHAT_CASES").map(PathBuf::from));
    let mut differences = Vec::new();
    for file in files {
        let cases: Vec<ChatCase> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        for case in cases {
            let request = ChatRequest {
                now: frozen_time(),
                ..case.request.clone()
            };
            let template = ChatTemplate::new(case.template.as_str(), case.name.as_str());
            let tokens = [
                ("bos_token", case.bos_token.as_str()),
                ("eos_token", case.eos_token.as_str()),
            ];
            let found = template.render(&request, tokens);
            let agree = match (&found, &case.text, &case.error) {
                (Ok(found), Some(text), _) => {
                    let ranges: Vec<_> = found
                        .assistant
                        .iter()
                        .map(|range| (range.start, range.end))
                        .collect();
                    &found.text == text && ranges == case.assistant
                }
                // What the template says of a conversation it refuses is passed on word for word.
                (Err(found), None, Some(error)) => match error.strip_prefix("TemplateError: ") {
                    Some(message) => found.to_string().contains(message),
                    None => true,
                },
                _ => false,
            };
            if !agree {
                let messages = serde_json::to_string(&case.request.messages).unwrap();
                let expected = (&case.text, &case.assistant, &case.error);
                differences.push(format!(
                    "{} for {messages}\n found    {found:?}\n expected {expected:?}",
                    case.name
                ));
            }
        }
    }
    assert!(
        differences.is_empty(),
        "{} differences:\n{}",
        differences.len(),
        differences.join("\n")
    );
}
