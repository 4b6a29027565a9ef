//! Supervised fine-tuning: conversations and prompts with answers, of which the answers alone count in the loss.
//!
//! A file has one JSON object a line, of one of these forms:
//!
//! ```text
//! {"messages": [{"role": "user", "content": ".."}, {"role": "assistant", "content": ".."}]}     chat template
//! {"prompt": "..", "completion": ".."}        also {"input": .., "output": ..}                   as they are, end of text
//! ```
//!
//! What the assistant wrote is what the template marks (`{% generation %}`), or else what a turn adds to the text that asks
//! for it, the end of the turn included. Answer and question are tokenized apart, as they are when text is generated.

use std::path::Path;

use bridge_tokenizers::{ChatRequest, SpecialTokens, Tokenizer};
use serde_json::Value;

use crate::batch::{IGNORE_INDEX, Sample};
use crate::dataset::{Dataset, Fingerprint};
use crate::error::{DataError, Result};
use crate::shuffle::{Permutation, Purpose, derive_key};

/// Tokens of one example, and which of them are part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whether each counts in the loss.
    pub answer: Vec<bool>,
}

impl Example {
    fn push(
        &mut self,
        text: &str,
        answer: bool,
        special: SpecialTokens,
        tokenizer: &Tokenizer,
    ) -> Result<()> {
        let tokens = tokenizer.encode(text, special)?;
        self.answer.resize(self.answer.len() + tokens.len(), answer);
        self.tokens.extend(tokens);
        Ok(())
    }

    /// One line of a file, parsed.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn of(line: &Value, tokenizer: &Tokenizer) -> std::result::Result<Self, String> {
        let mut example = Self {
            tokens: Vec::new(),
            answer: Vec::new(),
        };
        if let Some(messages) = line.get("messages") {
            let messages = messages.as_array().ok_or("`messages` is no list")?;
            let tools = line.get("tools").and_then(Value::as_array).cloned();
            example.chat(messages, tools, tokenizer)?;
        } else {
            let text = |keys: [&str; 2]| keys.iter().find_map(|key| line.get(key)?.as_str());
            let (prompt, answer) = (text(["prompt", "input"]), text(["completion", "output"]));
            let (Some(prompt), Some(answer)) = (prompt, answer) else {
                return Err("has neither `messages` nor texts under `prompt` and `completion` (or `input` and `output`)".to_owned());
            };
            let failed = |error: DataError| error.to_string();
            (example.push(prompt, false, SpecialTokens::Add, tokenizer)).map_err(failed)?;
            // Some tokenizers end every text; the prompt goes on.
            if example.tokens.len() > 1 && example.tokens.last().copied() == tokenizer.eos_id() {
                example.tokens.pop();
                example.answer.pop();
            }
            (example.push(answer, true, SpecialTokens::Omit, tokenizer)).map_err(failed)?;
            example.tokens.extend(tokenizer.eos_id());
            example.answer.resize(example.tokens.len(), true);
        }
        // The first token is predicted from nothing.
        if !example.answer.iter().skip(1).any(|answer| *answer) {
            return Err("has no answer to learn from".to_owned());
        }
        Ok(example)
    }

    fn chat(
        &mut self,
        messages: &[Value],
        tools: Option<Vec<Value>>,
        tokenizer: &Tokenizer,
    ) -> std::result::Result<(), String> {
        let render = |messages: &[Value], add_generation_prompt| {
            let request = ChatRequest {
                tools: tools.clone(),
                add_generation_prompt,
                ..ChatRequest::new(messages.to_vec())
            };
            tokenizer
                .render_chat(&request)
                .map_err(|error| error.to_string())
        };
        let whole = render(messages, false)?;
        let mut spans = whole.assistant;
        if spans.is_empty() {
            for (turn, message) in messages.iter().enumerate() {
                if message["role"] != "assistant" {
                    continue;
                }
                if turn == 0 {
                    return Err(
                        "begins with the assistant's turn, which answers nothing".to_owned()
                    );
                }
                let (asked, answered) = (
                    render(&messages[..turn], true)?.text,
                    render(&messages[..=turn], false)?.text,
                );
                if !answered.starts_with(&asked) || !whole.text.starts_with(&answered) {
                    return Err(format!(
                        "the chat template changes earlier turns when turn {} is added, so that answers cannot be told from \
                         the rest; use a template with {{% generation %}} blocks",
                        turn + 1
                    ));
                }
                spans.push(asked.len()..answered.len());
            }
        }
        let mut at = 0;
        for span in spans {
            for (range, answer) in [(at..span.start, false), (span.clone(), true)] {
                let text = whole
                    .text
                    .get(range)
                    .ok_or("the chat template marks answers that overlap")?;
                (self.push(text, answer, SpecialTokens::Omit, tokenizer))
                    .map_err(|error| error.to_string())?;
            }
            at = span.end;
        }
        let rest = whole.text.get(at..).unwrap_or_default();
        (self.push(rest, false, SpecialTokens::Omit, tokenizer)).map_err(|error| error.to_string())
    }
}

/// Reads the examples of a file, in order.
///
/// # Errors
/// If it cannot be read, or the first line that is of no known form.
pub fn read_examples(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<Example>> {
    let text = std::fs::read_to_string(path).map_err(DataError::io("read", path))?;
    let lines = (text.lines().zip(1u64..)).filter(|(line, _)| !line.trim().is_empty());
    lines
        .map(|(line, number)| {
            let parsed = serde_json::from_str(line).map_err(|error| format!("is no JSON: {error}"));
            parsed
                .and_then(|line: Value| Example::of(&line, tokenizer))
                .map_err(|reason| DataError::BadLine {
                    path: path.to_owned(),
                    line: number,
                    reason,
                })
        })
        .collect()
}

/// Windows of examples for supervised fine-tuning, in another order in each epoch.
#[derive(Clone, Debug)]
pub struct SftDataset {
    examples: Vec<Example>,
    /// The examples in each window.
    windows: Vec<Vec<usize>>,
    seq_length: usize,
    pad: u32,
    seed: u64,
    place: String,
    cut: usize,
}

impl SftDataset {
    /// Windows of `seq_length` tokens with one example each, or with `packing` as many as fit: the longest first, each into
    /// the first window with room. Examples that are longer are cut at the end, and left out if that cuts off the answer.
    /// Positions begin again with each example, and attention stays inside. `place` says in messages where they came from.
    ///
    /// # Errors
    /// If no example is left.
    pub fn new(
        place: impl Into<String>,
        examples: Vec<Example>,
        seq_length: usize,
        packing: bool,
        pad: u32,
        seed: u64,
    ) -> Result<Self> {
        let (place, given) = (place.into(), examples.len());
        let mut cut = 0;
        let fitting = examples.into_iter().filter_map(|mut example| {
            // A window of n inputs holds n + 1 tokens, the last as a target alone.
            if example.tokens.len() > seq_length + 1 {
                cut += 1;
                example.tokens.truncate(seq_length + 1);
                example.answer.truncate(seq_length + 1);
            }
            example
                .answer
                .iter()
                .skip(1)
                .any(|answer| *answer)
                .then_some(example)
        });
        let examples: Vec<Example> = fitting.collect();
        if examples.is_empty() {
            return Err(DataError::BadOption {
                option: "data_path",
                value: place,
                reason: format!(
                    "none of its {given} examples has an answer within {seq_length} tokens"
                ),
            });
        }
        let inputs = |index: &usize| examples[*index].tokens.len() - 1;
        let mut order: Vec<usize> = (0..examples.len()).collect();
        let windows = if packing {
            order.sort_by_key(|index| std::cmp::Reverse(inputs(index)));
            pack(&order, inputs, seq_length)
        } else {
            order.into_iter().map(|index| vec![index]).collect()
        };
        Ok(Self {
            examples,
            windows,
            seq_length,
            pad,
            seed,
            place,
            cut,
        })
    }

    /// Its examples.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }
}

/// First fit: each of `order` into the first window with room for it. A tree of the largest room below each node finds it.
fn pack(order: &[usize], len: impl Fn(&usize) -> usize, capacity: usize) -> Vec<Vec<usize>> {
    let leaves = order.len().next_power_of_two();
    let mut room = vec![capacity; 2 * leaves];
    let mut windows: Vec<Vec<usize>> = Vec::new();
    for index in order {
        let need = len(index);
        let mut node = 1;
        while node < leaves {
            node *= 2;
            if room[node] < need {
                node += 1;
            }
        }
        let window = node - leaves;
        if window >= windows.len() {
            windows.resize_with(window + 1, Vec::new);
        }
        windows[window].push(*index);
        room[node] -= need;
        while node > 1 {
            node /= 2;
            room[node] = room[2 * node].max(room[2 * node + 1]);
        }
    }
    windows
}

impl Dataset for SftDataset {
    fn seq_length(&self) -> usize {
        self.seq_length
    }

    fn samples_per_epoch(&self) -> u64 {
        self.windows.len() as u64
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let count = self.samples_per_epoch();
        let order = Permutation::new(
            count,
            derive_key(self.seed, Purpose::Samples, index / count),
        );
        let window = &self.windows[order.get(index % count) as usize];
        let mut sample = Sample {
            tokens: Vec::with_capacity(self.seq_length),
            labels: Vec::with_capacity(self.seq_length),
            position_ids: Vec::with_capacity(self.seq_length),
            boundaries: vec![0],
        };
        for example in window.iter().map(|index| &self.examples[*index]) {
            let inputs = example.tokens.len() - 1;
            sample
                .tokens
                .extend(example.tokens[..inputs].iter().map(|id| i64::from(*id)));
            let targets = example.tokens[1..].iter().zip(&example.answer[1..]);
            sample.labels.extend(targets.map(|(id, answer)| {
                if *answer {
                    i64::from(*id)
                } else {
                    IGNORE_INDEX
                }
            }));
            sample.position_ids.extend(0..inputs as i64);
            sample.boundaries.push(sample.tokens.len());
        }
        let padding = self.seq_length - sample.tokens.len();
        if padding > 0 {
            sample.tokens.resize(self.seq_length, i64::from(self.pad));
            sample.labels.resize(self.seq_length, IGNORE_INDEX);
            sample.position_ids.extend(0..padding as i64);
            sample.boundaries.push(self.seq_length);
        }
        Ok(sample)
    }

    fn describe(&self) -> String {
        format!(
            "{}: {} examples in {} windows of {} tokens{}",
            self.place,
            self.examples.len(),
            self.windows.len(),
            self.seq_length,
            match self.cut {
                0 => String::new(),
                cut => format!("; {cut} were longer and have been cut"),
            }
        )
    }

    fn fingerprint(&self) -> Fingerprint {
        let lens = self
            .examples
            .iter()
            .map(|example| example.tokens.len() as u64);
        let start = Fingerprint::new("sft")
            .number(self.seq_length as u64)
            .number(self.seed)
            .number(self.windows.len() as u64);
        lens.fold(start, Fingerprint::number)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn supervised(example: &Example, tokenizer: &Tokenizer) -> String {
        let ids = example.tokens.iter().zip(&example.answer);
        let ids: Vec<u32> = ids
            .filter(|(_, answer)| **answer)
            .map(|(id, _)| *id)
            .collect();
        tokenizer.decode(&ids, SpecialTokens::Omit).unwrap()
    }

    #[test]
    fn answers_alone_count() {
        let tokenizer = Tokenizer::bytes();
        for line in [
            json!({"prompt": "2+2=", "completion": "4"}),
            json!({"input": "2+2=", "output": "4"}),
        ] {
            let example = Example::of(&line, &tokenizer).unwrap();
            assert_eq!(supervised(&example, &tokenizer), "4");
            assert_eq!(example.tokens.last().copied(), tokenizer.eos_id());
            assert_eq!(example.answer.last(), Some(&true));
        }
        for line in [
            json!({"text": "x"}),
            json!({"messages": 3}),
            json!({"messages": [{"role": "user", "content": "hi"}]}),
        ] {
            assert!(Example::of(&line, &tokenizer).is_err());
        }
    }

    #[test]
    fn packed_windows_hold_every_example_once_and_keep_them_apart() {
        let example = |len: usize, first: u32| Example {
            tokens: (0..len as u32).map(|i| first + i).collect(),
            answer: (0..len).map(|i| i + 2 >= len).collect(),
        };
        let lens = [5, 9, 3, 4, 8, 2, 30];
        let examples: Vec<Example> = lens
            .iter()
            .enumerate()
            .map(|(i, len)| example(*len, 100 * i as u32))
            .collect();
        let data = SftDataset::new("here", examples, 8, true, 7, 1).unwrap();
        // The last one is cut, and its answer with it.
        assert_eq!(data.examples().len(), 6);
        let mut seen = 0;
        for index in 0..data.samples_per_epoch() {
            let sample = data.sample(index).unwrap();
            assert_eq!(
                (
                    sample.tokens.len(),
                    sample.labels.len(),
                    sample.position_ids.len()
                ),
                (8, 8, 8)
            );
            assert_eq!(sample.boundaries.last(), Some(&8));
            for bounds in sample.boundaries.windows(2) {
                let (start, end) = (bounds[0], bounds[1]);
                assert_eq!(sample.position_ids[start], 0);
                let labels: Vec<i64> = sample.labels[start..end].to_vec();
                let own = labels
                    .iter()
                    .filter(|label| **label != IGNORE_INDEX)
                    .count();
                seen += usize::from(own > 0);
                for (at, label) in labels
                    .iter()
                    .enumerate()
                    .filter(|(_, label)| **label != IGNORE_INDEX)
                {
                    assert_eq!(*label, sample.tokens[start + at] + 1);
                }
            }
        }
        assert_eq!(seen, 6);
        assert!(data.samples_per_epoch() < 5);
        let order = |epoch: u64| -> Vec<Vec<i64>> {
            let n = data.samples_per_epoch();
            (0..n)
                .map(|i| data.sample(epoch * n + i).unwrap().tokens)
                .collect()
        };
        assert!((1..20).any(|epoch| order(epoch) != order(0)));
    }
}
