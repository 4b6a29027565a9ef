//! `train_state.json`: where a run stands, beside weights and optimizer state.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Name of the file.
pub const TRAIN_STATE_FILE: &str = "train_state.json";

/// Version of the file that is written, and the only one that is read.
const VERSION: u32 = 1;

/// Where a run stands. Together with weights, optimizer state and configuration this is all that the next step depends
/// on: learning rate, weight decay and the samples of a step are functions of the samples consumed, and fresh weights of
/// a seed, so there is no random state to keep.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainState {
    /// Optimizer steps done, skipped ones included.
    pub iteration: u64,
    /// Samples consumed, which is the run's place in its data.
    pub consumed_samples: u64,
    /// Steps that left the weights as they were.
    pub skipped_steps: u64,
    /// The training data (see [`bridge_data::Dataset::fingerprint`]), to notice when a run is continued on other data.
    pub data_fingerprint: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    iteration: u64,
    consumed_samples: u64,
    skipped_steps: u64,
    /// Updates of the optimizer, which its bias correction depends on.
    optimizer_steps: u64,
    data_fingerprint: Option<String>,
    /// What the model is, to refuse weights of another one with a word that helps.
    model: serde_json::Value,
}

/// What a file holds.
pub(super) struct Saved {
    pub(super) state: TrainState,
    pub(super) optimizer_steps: u64,
    pub(super) model: serde_json::Value,
}

pub(super) fn to_json(saved: &Saved) -> Vec<u8> {
    let state = &saved.state;
    let file = File {
        version: VERSION,
        iteration: state.iteration,
        consumed_samples: state.consumed_samples,
        skipped_steps: state.skipped_steps,
        optimizer_steps: saved.optimizer_steps,
        data_fingerprint: state.data_fingerprint.clone(),
        model: saved.model.clone(),
    };
    let mut json = serde_json::to_vec_pretty(&file).expect("a struct of plain values is JSON");
    json.push(b'\n');
    json
}

/// Reads the file's bytes; `origin` names it in errors.
pub(super) fn parse(json: &[u8], origin: &str) -> Result<Saved> {
    #[derive(Deserialize)]
    struct Heading {
        version: u32,
    }
    let broken = |problem: String| Error::TrainState {
        origin: origin.to_owned(),
        problem,
    };
    let not_json = |e: serde_json::Error| broken(format!("it is not the JSON it should be: {e}"));
    // A later version may have other fields, so the version is read first.
    let Heading { version } = serde_json::from_slice(json).map_err(not_json)?;
    if version != VERSION {
        return Err(broken(format!(
            "its version is {version}, expected {VERSION}; use the program version that wrote it"
        )));
    }
    let file: File = serde_json::from_slice(json).map_err(not_json)?;
    let state = TrainState {
        iteration: file.iteration,
        consumed_samples: file.consumed_samples,
        skipped_steps: file.skipped_steps,
        data_fingerprint: file.data_fingerprint,
    };
    Ok(Saved {
        state,
        optimizer_steps: file.optimizer_steps,
        model: file.model,
    })
}

/// The places where two descriptions of a model differ, as `path is A there and B here`. `there` came from a file.
pub(super) fn differences(there: &serde_json::Value, here: &serde_json::Value) -> Vec<String> {
    use serde_json::Value;
    // Parsing may miss a number's last bit, so both descriptions are compared as they come out of a file.
    let here: Value = serde_json::from_str(&here.to_string()).expect("JSON that was just printed");
    fn walk(path: &str, there: &Value, here: &Value, found: &mut Vec<String>) {
        match (there, here) {
            (Value::Object(a), Value::Object(b)) => {
                let keys: Vec<&String> = a
                    .keys()
                    .chain(b.keys().filter(|key| !a.contains_key(*key)))
                    .collect();
                for key in keys {
                    let path = if path.is_empty() {
                        key.clone()
                    } else {
                        format!("{path}.{key}")
                    };
                    let of = |map: &serde_json::Map<String, Value>| {
                        map.get(key).cloned().unwrap_or(Value::Null)
                    };
                    walk(&path, &of(a), &of(b), found);
                }
            }
            _ if there != here => found.push(format!(
                "{path} is {} there and {} here",
                short(there),
                short(here)
            )),
            _ => {}
        }
    }
    fn short(value: &Value) -> String {
        match value {
            Value::Array(items) => format!("a list of {}", items.len()),
            other => other.to_string(),
        }
    }
    let mut found = Vec::new();
    walk("", there, &here, &mut found);
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_state_comes_back_as_it_was() {
        let state = TrainState {
            iteration: 12,
            consumed_samples: 96,
            skipped_steps: 1,
            data_fingerprint: Some("0123456789abcdef".into()),
        };
        let saved = Saved {
            state: state.clone(),
            optimizer_steps: 11,
            model: json!({"hidden_size": 48}),
        };
        let back = parse(&to_json(&saved), "here").unwrap();
        assert_eq!(
            (back.state, back.optimizer_steps, back.model),
            (state, 11, saved.model)
        );
    }

    #[test]
    fn a_broken_or_later_file_is_refused() {
        let message = |json: &[u8]| {
            parse(json, "ckpt/train_state.json")
                .err()
                .expect("refused")
                .to_string()
        };
        assert!(message(b"{").contains("ckpt/train_state.json"));
        assert!(message(br#"{"version": 2, "new": 1}"#).contains("its version is 2, expected 1"));
        assert!(message(br#"{"version": 1}"#).contains("iteration"));
    }

    #[test]
    fn differences_name_their_path() {
        let there =
            json!({"hidden_size": 48, "norm": {"eps": 0.25}, "layers": [1, 2], "gone": true});
        let here = json!({"hidden_size": 64, "norm": {"eps": 0.5}, "layers": [1, 2, 3]});
        let expected = [
            "hidden_size is 48 there and 64 here",
            "norm.eps is 0.25 there and 0.5 here",
            "layers is a list of 2 there and a list of 3 here",
            "gone is true there and null here",
        ];
        assert_eq!(differences(&there, &here), expected);
        assert!(differences(&here, &here).is_empty());
    }

    #[test]
    fn numbers_with_many_digits_do_not_differ_from_themselves() {
        for bits in (0..2000u64).map(|i| 0x3e00_0000_0000_0000 + i * 0x0000_0abc_def1_2345) {
            let model = json!({"eps": f64::from_bits(bits)});
            let saved = Saved {
                state: TrainState::default(),
                optimizer_steps: 0,
                model: model.clone(),
            };
            let back = parse(&to_json(&saved), "here").unwrap();
            assert!(differences(&back.model, &model).is_empty());
        }
    }
}
