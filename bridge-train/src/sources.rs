//! The tokenizer and the data that a configuration names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bridge_data::sft::{Example, read_examples};
use bridge_data::{
    BlendSpec, Dataset, GptOptions, IndexedDataset, MemoryTokens, MockGptDataset, SftDataset,
    Split, SplitWeights, Splits, TokenSource, corpus, gpt_splits,
};
use bridge_tokenizers::Tokenizer;

use crate::config::{DataSource, ResolvedConfig, TokenizerKind};
use crate::error::{Error, Result};

/// Loads or makes the tokenizer. `hf_folder` turns a folder or hub id into a folder, or says why not.
///
/// # Errors
/// If it cannot be loaded, or the model has no rows for some of its tokens.
pub fn load_tokenizer(
    config: &ResolvedConfig,
    hf_folder: &dyn Fn(&str) -> Result<PathBuf, String>,
) -> Result<Tokenizer> {
    let vocab_size = config.model.decoder.vocab_size;
    let tokenizer = match config.tokenizer.kind {
        TokenizerKind::HuggingFace => {
            let dir = match (&config.tokenizer.path, &config.model.hf_dir) {
                (Some(path), _) => hf_folder(path).map_err(|problem| Error::Setting {
                    key: "tokenizer.path",
                    problem,
                })?,
                (None, Some(dir)) => dir.clone(),
                (None, None) => unreachable!("resolve() asks for tokenizer.path without model.hf"),
            };
            Tokenizer::from_folder(dir)?
        }
        TokenizerKind::Bytes => Tokenizer::bytes(),
        TokenizerKind::Bpe => {
            let texts = load_texts(config)?;
            Tokenizer::train_bpe(
                texts
                    .iter()
                    .flat_map(|(_, texts)| texts)
                    .map(String::as_str),
                vocab_size,
            )?
        }
        // One id is the end of a document.
        TokenizerKind::Null => Tokenizer::null(u32::try_from(vocab_size - 1).unwrap_or(u32::MAX))?,
    };
    if tokenizer.vocab_size() > vocab_size {
        return Err(Error::VocabularyTooSmall {
            tokenizer: tokenizer.describe(),
            tokens: tokenizer.vocab_size(),
            vocab_size,
        });
    }
    Ok(tokenizer)
}

/// Opens or tokenizes the data and splits it into training, validation and test.
///
/// # Errors
/// If something cannot be read or does not hold enough.
pub fn load_training_data(config: &ResolvedConfig, tokenizer: &Tokenizer) -> Result<Splits> {
    let data = &config.data;
    let seed = data.seed.unwrap_or(config.train.seed);
    let sources: Vec<(Option<f64>, Arc<dyn TokenSource>)> = match data.source {
        DataSource::Mock => {
            let mock =
                |seed| MockGptDataset::new(data.seq_length, config.model.decoder.vocab_size, seed);
            // Another seed gives another language, so held-out samples come from the same one, further on.
            return Ok(Splits::new(Some(Arc::new(mock(seed)?)), None, None));
        }
        DataSource::Sft => return load_sft(config, tokenizer, seed),
        DataSource::Indexed => BlendSpec::parse(&data.data_path)?
            .entries
            .into_iter()
            .map(|(weight, prefix)| {
                Ok((
                    weight,
                    Arc::new(IndexedDataset::open(prefix)?) as Arc<dyn TokenSource>,
                ))
            })
            .collect::<Result<_>>()?,
        DataSource::Corpus | DataSource::Text => {
            let weights = match data.source {
                DataSource::Text => BlendSpec::parse(&data.data_path)?
                    .entries
                    .into_iter()
                    .map(|e| e.0)
                    .collect(),
                _ => vec![None],
            };
            let tokenized =
                load_texts(config)?
                    .into_iter()
                    .zip(weights)
                    .map(|((name, texts), weight)| {
                        let tokens = MemoryTokens::tokenize(name, texts, tokenizer)?;
                        Ok((weight, Arc::new(tokens) as Arc<dyn TokenSource>))
                    });
            tokenized.collect::<Result<_>>()?
        }
    };
    let options = GptOptions {
        eod: tokenizer.eos_id(),
        vocab_size: Some(config.model.decoder.vocab_size),
        reset_position_ids: data.reset_position_ids,
        reset_attention_mask: data.reset_attention_mask,
        eod_mask_loss: data.eod_mask_loss,
        ..GptOptions::new(data.seq_length, seed)
    };
    Ok(gpt_splits(
        &sources,
        &data.split.parse::<SplitWeights>()?,
        &options,
    )?)
}

/// Examples of `data_path` for training and of `validation_path` for evaluation; without the latter, those at the end of
/// the former, as many as `split` says.
fn load_sft(config: &ResolvedConfig, tokenizer: &Tokenizer, seed: u64) -> Result<Splits> {
    let data = &config.data;
    let read = |paths: &[String]| -> Result<Vec<Example>> {
        let mut examples = Vec::new();
        for path in paths {
            examples.extend(read_examples(Path::new(path), tokenizer)?);
        }
        Ok(examples)
    };
    let pad = tokenizer.pad_id().or(tokenizer.eos_id()).unwrap_or(0);
    let dataset = |paths: &[String], examples| -> Result<Arc<dyn Dataset>> {
        let place = paths.join(", ");
        let data = SftDataset::new(place, examples, data.seq_length, data.packing, pad, seed)?;
        Ok(Arc::new(data))
    };
    let mut train = read(&data.data_path)?;
    let (held_out, from) = if data.validation_path.is_empty() {
        let weights = data.split.parse::<SplitWeights>()?;
        let share = |split| weights.documents(split, train.len() as u64);
        let (first, held_out) = (share(Split::Train), share(Split::Valid));
        let rest = train.split_off(first.end as usize);
        let count = (held_out.end - held_out.start) as usize;
        (rest.into_iter().take(count).collect(), &data.data_path)
    } else {
        (read(&data.validation_path)?, &data.validation_path)
    };
    let valid = if held_out.is_empty() {
        None
    } else {
        Some(dataset(from, held_out)?)
    };
    Ok(Splits::new(
        Some(dataset(&data.data_path, train)?),
        valid,
        None,
    ))
}

/// The documents of each source of text, with its name.
fn load_texts(config: &ResolvedConfig) -> Result<Vec<(String, Vec<String>)>> {
    if config.data.source == DataSource::Corpus {
        return Ok(vec![(
            corpus::NAME.to_owned(),
            corpus::documents().map(str::to_owned).collect(),
        )]);
    }
    let paths = BlendSpec::parse(&config.data.data_path)?
        .entries
        .into_iter()
        .map(|(_, path)| path);
    paths
        .map(|path| {
            Ok((
                path.clone(),
                read_documents(Path::new(&path), &config.data.json_key)?,
            ))
        })
        .collect()
}

/// The documents of a file: the texts under `json_key` of a `.jsonl`, `.ndjson` or `.json` file with one object a line;
/// any other file is one document. All in memory: large data belongs into an indexed dataset.
fn read_documents(path: &Path, json_key: &str) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::io("read", path, source))?;
    if !path.extension().is_some_and(|ending| {
        ["jsonl", "ndjson", "json"]
            .iter()
            .any(|known| ending == *known)
    }) {
        return Ok(vec![text]);
    }
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            let bad = |problem: String| Error::Setting {
                key: "data.data_path",
                problem: format!("{} line {}: {problem}", path.display(), number + 1),
            };
            let json: serde_json::Value =
                serde_json::from_str(line).map_err(|e| bad(format!("not JSON: {e}")))?;
            let text = json
                .get(json_key)
                .and_then(|text| text.as_str())
                .map(str::to_owned);
            text.ok_or_else(|| {
                bad(format!(
                    "no text under the key \"{json_key}\" (data.json_key)"
                ))
            })
        })
        .collect()
}
