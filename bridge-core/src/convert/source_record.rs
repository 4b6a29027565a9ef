//! What an import remembers of the files it read, so that an export can write the same files again.

use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::companions::write_new;
use crate::checkpoint::{
    Checkpoint, CheckpointError, Header, RangeReader, SafetensorsFile, ShardLayout, TensorSpec,
};
use crate::error::{Error, Result};

/// Name of the record in a native checkpoint's `hf` folder.
pub(super) const RECORD_FILE: &str = "source.json";
/// Folder, in the `hf` folder, of tensors that the model does not use and an export gives back.
pub(super) const CARRIED_DIR: &str = "carried";
/// Largest record that is read, in bytes: the header limit of a few files and some room.
const MAX_RECORD_BYTES: u64 = 512 << 20;
const VERSION: u32 = 1;

/// The files of an imported checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SourceRecord {
    version: u32,
    files: Vec<FileRecord>,
    /// `model.safetensors.index.json`, verbatim.
    index: Option<String>,
}

/// One safetensors file without its data.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRecord {
    name: String,
    /// The JSON of the header with its padding, verbatim.
    header: String,
    data_bytes: u64,
}

impl SourceRecord {
    /// Remembers the files of `checkpoint`.
    pub(super) fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let utf8 = |bytes: Vec<u8>, file: &str| {
            String::from_utf8(bytes).map_err(|_| Error::malformed(file, "is not valid UTF-8"))
        };
        let files = checkpoint.files().iter().map(|file| {
            Ok(FileRecord {
                name: file.name().to_owned(),
                header: utf8(Header::read_json(file.reader())?, file.name())?,
                data_bytes: file.header().data_len(),
            })
        });
        let index = checkpoint
            .index_json()
            .map(|json| utf8(json.to_vec(), "model.safetensors.index.json"));
        Ok(Self {
            version: VERSION,
            files: files.collect::<Result<_>>()?,
            index: index.transpose()?,
        })
    }

    /// Writes the record into folder `hf`.
    pub(super) fn save(&self, hf: &Path) -> Result<()> {
        let mut json = serde_json::to_vec(self)
            .map_err(|error| Error::malformed(RECORD_FILE, error.to_string()))?;
        json.push(b'\n');
        write_new(hf.join(RECORD_FILE), &json)
    }

    /// Reads the record from folder `hf`; `None` if there is none, as beside a model trained from scratch.
    pub(super) fn load(hf: &Path) -> Result<Option<Self>> {
        let path = hf.join(RECORD_FILE);
        let file = match std::fs::File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", path, error)),
        };
        let mut json = Vec::new();
        file.take(MAX_RECORD_BYTES + 1)
            .read_to_end(&mut json)
            .map_err(|source| Error::io("read", &path, source))?;
        let wrong = |problem: String| Error::malformed(path.display().to_string(), problem);
        if json.len() as u64 > MAX_RECORD_BYTES {
            return Err(wrong(format!(
                "is larger than {MAX_RECORD_BYTES} bytes; import the checkpoint again"
            )));
        }
        let record: Self = serde_json::from_slice(&json).map_err(|error| {
            wrong(format!(
                "is not a record of an import ({error}); import the checkpoint again"
            ))
        })?;
        if record.version != VERSION {
            return Err(wrong(format!(
                "has version {}, expected {VERSION}; import again",
                record.version
            )));
        }
        Ok(Some(record))
    }

    /// The imported checkpoint without its data: names, types, shapes and files.
    pub(super) fn headers(&self) -> Result<Checkpoint> {
        let open = |file: &FileRecord| {
            SafetensorsFile::new(file.name.as_str(), Box::new(HeaderOnly(file.clone())))
                .map_err(Error::from)
        };
        let files = self.files.iter().map(open).collect::<Result<_>>()?;
        Ok(Checkpoint::from_files(RECORD_FILE, files)?)
    }

    /// The files again for the same tensors, perhaps of other types. Bytes that still hold are kept.
    pub(super) fn layout(
        &self,
        headers: &Checkpoint,
        tensors: &[TensorSpec],
    ) -> Result<ShardLayout> {
        let mut layout = ShardLayout::like(headers, tensors)?;
        if let Some(index) = &self.index {
            let unchanged = layout
                .shards
                .iter()
                .all(|shard| shard.header_json.is_some());
            layout.index_json = Some(if unchanged {
                index.clone().into_bytes()
            } else {
                layout.make_index(tensors)?
            });
        }
        Ok(layout)
    }
}

/// A safetensors file of which only the header is left.
struct HeaderOnly(FileRecord);

impl RangeReader for HeaderOnly {
    fn len(&self) -> u64 {
        (8 + self.0.header.len() as u64).saturating_add(self.0.data_bytes)
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), CheckpointError> {
        let mut bytes = (self.0.header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(self.0.header.as_bytes());
        let start = usize::try_from(offset).ok();
        match start.and_then(|start| bytes.get(start..start.checked_add(buf.len())?)) {
            Some(found) => {
                buf.copy_from_slice(found);
                Ok(())
            }
            None => Err(CheckpointError::Io {
                action: "read",
                path: self.0.name.clone().into(),
                source: std::io::ErrorKind::UnexpectedEof.into(),
            }),
        }
    }

    fn describe(&self) -> String {
        format!("{} of {RECORD_FILE}", self.0.name)
    }
}
