//! Which tensors go into which file, and the names of those files.

use std::collections::{BTreeMap, HashMap};

use serde_json::json;

use super::error::{CheckpointError, Result, quote};
use super::folder::{Checkpoint, INDEX_FILE, SINGLE_FILE};
use super::header::{Header, TensorSpec};
use crate::error::Problems;

/// Shard size of the usual exporters, in bytes.
pub const DEFAULT_MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// One file of an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Plain file name, ending in `.safetensors`.
    pub file_name: String,
    /// Positions of its tensors in the list given to the writer, in the order of their bytes.
    pub tensors: Vec<usize>,
    /// The header's JSON with its padding, to be written as it is; `None` to make one.
    ///
    /// It must describe exactly the tensors above, in that order.
    pub header_json: Option<Vec<u8>>,
}

/// The files of an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardLayout {
    /// The files, in order.
    pub shards: Vec<Shard>,
    /// `model.safetensors.index.json`, as it is to be written; `None` when the output has no index.
    pub index_json: Option<Vec<u8>>,
}

impl ShardLayout {
    /// Fills shards up to `max_shard_bytes` of tensors, in the order given; a larger tensor gets a shard of its own.
    ///
    /// One shard is called `model.safetensors` and has no index; more are `model-00001-of-00002.safetensors` and so
    /// on. Within a file, wider types come first and names are sorted, as the usual writers do, which keeps every
    /// tensor aligned to its element size.
    ///
    /// # Errors
    /// [`CheckpointError::BadLayout`] when a tensor cannot be in a safetensors file.
    pub fn by_size(tensors: &[TensorSpec], max_shard_bytes: u64) -> Result<Self> {
        let lens = checked_lens(tensors)?;
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut open: Vec<usize> = Vec::new();
        let mut open_bytes = 0u64;
        for (tensor, &len) in lens.iter().enumerate() {
            if len > max_shard_bytes {
                groups.push(vec![tensor]);
                continue;
            }
            if open_bytes.saturating_add(len) > max_shard_bytes {
                groups.push(std::mem::take(&mut open));
                open_bytes = 0;
            }
            open.push(tensor);
            open_bytes += len;
        }
        // An output without tensors is still a file.
        if !open.is_empty() || groups.is_empty() {
            groups.push(open);
        }
        let count = groups.len();
        let mut shards: Vec<Shard> = Vec::with_capacity(count);
        for (position, mut group) in groups.into_iter().enumerate() {
            group.sort_by(|&a, &b| {
                let (a, b) = (&tensors[a], &tensors[b]);
                b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name))
            });
            let file_name = match count {
                1 => SINGLE_FILE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", position + 1),
            };
            shards.push(Shard {
                file_name,
                tensors: group,
                header_json: None,
            });
        }
        let index_json = (count > 1).then(|| index_json(tensors, &lens, &shards));
        Ok(Self { shards, index_json })
    }

    /// The files of `source` again: the same names, and the same tensors in the same order in each.
    ///
    /// Headers and index are kept byte for byte where they still hold, so that writing the same tensors gives the
    /// same files.
    ///
    /// # Errors
    /// [`CheckpointError::BadLayout`] when `tensors` does not name the same tensors as the source;
    /// [`CheckpointError::Io`] when the source cannot be read.
    pub fn like(source: &Checkpoint, tensors: &[TensorSpec]) -> Result<Self> {
        let lens = checked_lens(tensors)?;
        let positions: HashMap<&str, usize> = tensors
            .iter()
            .enumerate()
            .map(|(position, spec)| (spec.name.as_str(), position))
            .collect();
        let mut problems = Problems::new();
        for spec in tensors
            .iter()
            .filter(|spec| source.get(&spec.name).is_none())
        {
            problems.push(format!(
                "tensor {} is in no file of {}",
                quote(&spec.name),
                source.describe()
            ));
        }
        let mut shards = Vec::with_capacity(source.files().len());
        let mut same_sizes = true;
        for file in source.files() {
            let mut shard = Shard {
                file_name: file.name().to_owned(),
                tensors: Vec::new(),
                header_json: None,
            };
            let mut same = true;
            for entry in &file.header().entries {
                let Some(&position) = positions.get(entry.spec.name.as_str()) else {
                    problems.push(format!(
                        "tensor {} of {} is not written",
                        quote(&entry.spec.name),
                        file.name()
                    ));
                    continue;
                };
                same &= tensors[position] == entry.spec;
                same_sizes &= lens[position] == entry.len;
                shard.tensors.push(position);
            }
            if same {
                shard.header_json = Some(Header::read_json(file.reader())?);
            }
            shards.push(shard);
        }
        if !problems.is_empty() {
            return Err(CheckpointError::BadLayout { problems });
        }
        let index_json = match source.index_json() {
            Some(bytes) if same_sizes => Some(bytes.to_vec()),
            Some(_) => Some(index_json(tensors, &lens, &shards)),
            None => None,
        };
        Ok(Self { shards, index_json })
    }

    /// The index of these files.
    ///
    /// # Errors
    /// [`CheckpointError::BadLayout`] when a tensor cannot be in a safetensors file.
    pub(crate) fn make_index(&self, tensors: &[TensorSpec]) -> Result<Vec<u8>> {
        Ok(index_json(tensors, &checked_lens(tensors)?, &self.shards))
    }

    /// Every tensor in exactly one shard, every name a plain one.
    pub(super) fn check(&self, tensors: &[TensorSpec]) -> Result<()> {
        let mut problems = Problems::new();
        let mut holders: Vec<Option<&str>> = vec![None; tensors.len()];
        let mut names: HashMap<&str, ()> = HashMap::new();
        for shard in &self.shards {
            if let Some(problem) = file_name_problem(&shard.file_name) {
                problems.push(format!("shard {}: {problem}", quote(&shard.file_name)));
            }
            if names.insert(&shard.file_name, ()).is_some() {
                problems.push(format!("two shards are called {}", quote(&shard.file_name)));
            }
            for &tensor in &shard.tensors {
                match holders.get_mut(tensor) {
                    None => problems.push(format!(
                        "{} names tensor {tensor} of {}",
                        shard.file_name,
                        tensors.len()
                    )),
                    Some(Some(first)) => problems.push(format!(
                        "tensor {} is in both {first} and {}",
                        quote(&tensors[tensor].name),
                        shard.file_name
                    )),
                    Some(holder) => *holder = Some(&shard.file_name),
                }
            }
        }
        for (tensor, _) in tensors
            .iter()
            .zip(&holders)
            .filter(|(_, holder)| holder.is_none())
        {
            problems.push(format!("tensor {} is in no shard", quote(&tensor.name)));
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(CheckpointError::BadLayout { problems })
        }
    }
}

fn checked_lens(tensors: &[TensorSpec]) -> Result<Vec<u64>> {
    let mut problems = Problems::new();
    let mut lens = Vec::with_capacity(tensors.len());
    let mut total = 0u64;
    for tensor in tensors {
        match tensor.checked_len() {
            Ok(len) => lens.push(len),
            Err(problem) => problems.push(problem.to_string()),
        }
        total = total.saturating_add(lens.last().copied().unwrap_or(0));
    }
    if total > i64::MAX as u64 {
        problems.push("the tensors are larger together than any file system");
    }
    if problems.is_empty() {
        Ok(lens)
    } else {
        Err(CheckpointError::BadLayout { problems })
    }
}

/// The index as the usual exporters write it: two spaces, sorted keys, a line end.
fn index_json(tensors: &[TensorSpec], lens: &[u64], shards: &[Shard]) -> Vec<u8> {
    let mut weight_map = BTreeMap::new();
    for shard in shards {
        weight_map.extend(
            shard
                .tensors
                .iter()
                .map(|&tensor| (&tensors[tensor].name, &shard.file_name)),
        );
    }
    let total: u64 = lens.iter().sum();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    format!("{index:#}\n").into_bytes()
}

/// Why `name` cannot be the name of a safetensors file inside a checkpoint's folder; `None` when it can.
///
/// Only plain names pass: an index comes from a stranger and must not lead out of the folder.
pub fn file_name_problem(name: &str) -> Option<&'static str> {
    plain_name_problem(name).or({
        if !name.ends_with(".safetensors") {
            Some("the name does not end in .safetensors; other formats are not read")
        } else if name == INDEX_FILE {
            Some("that is the name of the index")
        } else {
            None
        }
    })
}

/// Why `name` cannot be the plain name of a file of any kind inside a folder; `None` when it can.
pub(super) fn plain_name_problem(name: &str) -> Option<&'static str> {
    /// Longest name that the usual file systems take, in bytes.
    const MAX_FILE_NAME_BYTES: usize = 255;
    if name.is_empty() {
        Some("the name is empty")
    } else if name.len() > MAX_FILE_NAME_BYTES {
        Some("the name is longer than 255 bytes")
    } else if name.contains(['/', '\\']) {
        Some("only plain file names are allowed, not paths")
    } else if name.contains(':') {
        Some("the name holds a colon")
    } else if name.chars().any(char::is_control) {
        Some("the name holds control characters")
    } else if name.starts_with('.') {
        Some("the name starts with a dot")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    #[track_caller]
    fn check(sizes: &[usize], max: u64, expected: &[&[usize]]) {
        let specs: Vec<_> = sizes
            .iter()
            .enumerate()
            .map(|(i, &size)| TensorSpec::new(format!("t{i}"), DType::U8, [size]))
            .collect();
        let layout = ShardLayout::by_size(&specs, max).unwrap();
        let found: Vec<&[usize]> = layout
            .shards
            .iter()
            .map(|shard| shard.tensors.as_slice())
            .collect();
        assert_eq!(found, expected);
        layout.check(&specs).unwrap();
    }

    #[test]
    fn shards_fill_in_order_and_large_tensors_stand_alone() {
        check(&[3, 3, 3], 6, &[&[0, 1], &[2]]);
        check(&[3, 3, 3], 9, &[&[0, 1, 2]]);
        check(&[3, 20, 3], 6, &[&[1], &[0, 2]]);
        check(&[20, 20], 6, &[&[0], &[1]]);
        check(&[], 6, &[&[]]);
        check(&[0, 6, 0], 6, &[&[0, 1, 2]]);
    }

    #[test]
    fn names_index_and_order_follow_the_usual_writers() {
        let specs = [
            TensorSpec::new("b", DType::BF16, [2]),
            TensorSpec::new("a", DType::BF16, [2]),
            TensorSpec::new("c", DType::F32, [2]),
            TensorSpec::new("d", DType::F32, [2]),
        ];
        let layout = ShardLayout::by_size(&specs, 16).unwrap();
        assert_eq!(
            layout.shards[0].file_name,
            "model-00001-of-00002.safetensors"
        );
        assert_eq!(layout.shards[0].tensors, [2, 1, 0]);
        let index = String::from_utf8(layout.index_json.unwrap()).unwrap();
        let expected = r#"{
  "metadata": {
    "total_size": 24
  },
  "weight_map": {
    "a": "model-00001-of-00002.safetensors",
    "b": "model-00001-of-00002.safetensors",
    "c": "model-00001-of-00002.safetensors",
    "d": "model-00002-of-00002.safetensors"
  }
}
"#;
        assert_eq!(index, expected);
        assert_eq!(
            ShardLayout::by_size(&specs, 24).unwrap().shards[0].file_name,
            "model.safetensors"
        );
        assert_eq!(ShardLayout::by_size(&specs, 24).unwrap().index_json, None);
    }

    #[test]
    fn a_layout_that_loses_or_repeats_tensors_is_refused() {
        let specs = [
            TensorSpec::new("a", DType::U8, [1]),
            TensorSpec::new("b", DType::U8, [1]),
        ];
        let shard = |name: &str, tensors: &[usize]| Shard {
            file_name: name.to_owned(),
            tensors: tensors.to_vec(),
            header_json: None,
        };
        let layout = ShardLayout {
            shards: vec![
                shard("x.safetensors", &[0, 0]),
                shard("../y.safetensors", &[7]),
            ],
            index_json: None,
        };
        let text = layout.check(&specs).unwrap_err().to_string();
        for part in [
            "`a` is in both",
            "only plain file names",
            "names tensor 7 of 2",
            "`b` is in no shard",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn only_plain_safetensors_names_are_allowed() {
        for name in [
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "a..b.safetensors",
        ] {
            assert_eq!(file_name_problem(name), None, "{name}");
        }
        let long = format!("{}.safetensors", "x".repeat(250));
        for name in [
            "",
            "../x.safetensors",
            "/x.safetensors",
            "a/b.safetensors",
            "a\\b.safetensors",
            "C:x.safetensors",
            "..",
            "x\0.safetensors",
            "x\n.safetensors",
            ".safetensors",
            "pytorch_model.bin",
            INDEX_FILE,
            &long,
        ] {
            assert!(file_name_problem(name).is_some(), "{name:?}");
        }
    }
}
