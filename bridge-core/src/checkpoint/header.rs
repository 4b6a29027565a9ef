//! The header of a safetensors file: eight bytes of length, then JSON that says where each tensor lies.
//!
//! Source: the format section of the safetensors README. The checks are those of the reference parser, and some
//! that it leaves open: repeated keys, unknown fields, over-long names.

use serde::Deserialize;

use super::error::{CheckpointError, Result, Shape, quote};
use super::source::RangeReader;
use super::unique_map::{UniqueMap, repeated};
use crate::dtype::{DType, UnknownDType};

/// Largest header that is read, in bytes: the limit of the reference implementation, room for about a million tensors.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Longest tensor name, in bytes.
const MAX_NAME_BYTES: usize = 1024;
/// Most dims of a tensor.
const MAX_DIMS: usize = 64;
/// Key of the free-form string map that may stand beside the tensors.
const METADATA_KEY: &str = "__metadata__";
/// The length field before the JSON.
pub(super) const LENGTH_BYTES: u64 = 8;

/// What a tensor is, apart from where its bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name, unique in its checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dims, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A description of a tensor.
    pub fn new(name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            name: name.into(),
            dtype,
            shape: shape.into(),
        }
    }

    /// Size in bytes.
    ///
    /// # Errors
    /// When the name or shape cannot stand in a header.
    pub(super) fn checked_len(&self) -> Result<u64, HeaderError> {
        check_name(&self.name)?;
        let (name, dtype, shape) = (&self.name, self.dtype, &self.shape);
        if shape.len() > MAX_DIMS {
            return Err(HeaderError::TooManyDims {
                name: name.clone(),
                dims: shape.len(),
            });
        }
        byte_len(name, dtype, shape)
    }
}

/// One tensor of a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderEntry {
    /// Name, type and shape.
    pub spec: TensorSpec,
    /// First byte, counted from the end of the header.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// A header whose every statement has been checked against the others and against the file's length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The tensors in the order of their bytes.
    pub entries: Vec<HeaderEntry>,
    /// The `__metadata__` pairs, in the order of the file.
    pub metadata: Vec<(String, String)>,
    /// Bytes before the first tensor: the length field, the JSON and its padding.
    pub data_start: u64,
}

/// What is wrong with a safetensors header.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Shorter than the length field.
    #[error(
        "the file has {found} bytes, fewer than the 8 that give the header's length; it is empty or cut off"
    )]
    TooShort {
        /// Size of the file, in bytes.
        found: u64,
    },
    /// A length beyond the limit.
    #[error(
        "the header claims {found} bytes, more than the limit of {MAX_HEADER_BYTES}; this is no safetensors file, or a damaged one"
    )]
    TooLarge {
        /// The length claimed, in bytes.
        found: u64,
    },
    /// A length beyond the end of the file.
    #[error(
        "the header claims {claimed} bytes, but only {available} follow; the file is cut off (fetch it again) or no \
         safetensors file"
    )]
    LeavesFile {
        /// The length claimed, in bytes.
        claimed: u64,
        /// Bytes after the length field.
        available: u64,
    },
    /// The first character is not an opening brace.
    #[error(
        "the header does not start with an opening brace but with byte {found:#04x}; this is no safetensors file"
    )]
    NotAnObject {
        /// The first byte.
        found: u8,
    },
    /// A header of no bytes.
    #[error("the header is empty; even a file without tensors has a header of two braces")]
    Empty,
    /// The header is not UTF-8.
    #[error("the header is not valid UTF-8")]
    NotUtf8(#[source] std::str::Utf8Error),
    /// The JSON is broken, or has other fields than the format's.
    #[error("the header is not the JSON it should be")]
    Json(#[source] serde_json::Error),
    /// Keys that appear more than once.
    #[error("tensor {} appears twice in the header{}", quote(.first), more_text(*.more))]
    DuplicateTensors {
        /// The first such tensor.
        first: String,
        /// How many others there are.
        more: usize,
    },
    /// A name of no characters.
    #[error("a tensor has an empty name")]
    EmptyName,
    /// A name that is too long.
    #[error("tensor name {} has {} bytes, more than {MAX_NAME_BYTES}", quote(.name), .name.len())]
    LongName {
        /// The name.
        name: String,
    },
    /// A name with a NUL character, which other programs cut there.
    #[error("tensor name {} holds a NUL character", quote(.name))]
    NulInName {
        /// The name.
        name: String,
    },
    /// The name that the format keeps for metadata.
    #[error("a tensor cannot be called {METADATA_KEY}")]
    ReservedName,
    /// An element type that the format does not have.
    #[error("tensor {}: {problem}", quote(.name))]
    DType {
        /// The tensor.
        name: String,
        /// The type found.
        problem: UnknownDType,
    },
    /// More dims than any real tensor.
    #[error("tensor {} has {dims} dims, more than {MAX_DIMS}", quote(.name))]
    TooManyDims {
        /// The tensor.
        name: String,
        /// Its number of dims.
        dims: usize,
    },
    /// A shape whose size is no 64-bit number.
    #[error("tensor {} of type {dtype} and shape {} is larger than any file", quote(.name), Shape(.shape))]
    ShapeOverflow {
        /// The tensor.
        name: String,
        /// Its element type.
        dtype: DType,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// Packed elements that do not fill their last byte.
    #[error("tensor {} of packed type {dtype} and shape {} does not fill whole bytes", quote(.name), Shape(.shape))]
    PartialByte {
        /// The tensor.
        name: String,
        /// Its element type.
        dtype: DType,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Offsets that end before they start.
    #[error("tensor {} has offsets [{start}, {end}], which end before they start", quote(.name))]
    ReversedOffsets {
        /// The tensor.
        name: String,
        /// First byte.
        start: u64,
        /// End.
        end: u64,
    },
    /// Offsets past the end of the file.
    #[error(
        "tensor {} ends at byte {end} of the data, but the file has only {available}; it is cut off, fetch it again",
        quote(.name)
    )]
    OffsetsLeaveFile {
        /// The tensor.
        name: String,
        /// End of the tensor, counted from the end of the header.
        end: u64,
        /// Bytes after the header.
        available: u64,
    },
    /// Offsets that give another size than type and shape.
    #[error(
        "tensor {} has {found} bytes by its offsets, but {expected} by its type {dtype} and shape {}",
        quote(.name), Shape(.shape)
    )]
    SizeMismatch {
        /// The tensor.
        name: String,
        /// Its element type.
        dtype: DType,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes by type and shape.
        expected: u64,
        /// Bytes by offsets.
        found: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors {} and {} overlap: the first ends at byte {end}, the second starts at {start}", quote(.first), quote(.second))]
    Overlap {
        /// The tensor that starts first.
        first: String,
        /// The other.
        second: String,
        /// End of the first.
        end: u64,
        /// Start of the second.
        start: u64,
    },
    /// Bytes that belong to no tensor.
    #[error("bytes {start}..{end} of the data, before tensor {}, belong to no tensor", quote(.before))]
    Hole {
        /// First such byte.
        start: u64,
        /// End of the hole.
        end: u64,
        /// The tensor after the hole.
        before: String,
    },
    /// Bytes after the last tensor.
    #[error("{extra} bytes follow the last tensor and belong to none")]
    TrailingBytes {
        /// How many.
        extra: u64,
    },
}

fn more_text(more: usize) -> String {
    if more == 0 {
        String::new()
    } else {
        format!(", and so do {more} others")
    }
}

/// A tensor as the header states it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's JSON: tensors, and the metadata under its own key.
struct RawHeader {
    tensors: Vec<(String, RawEntry)>,
    metadata: Vec<Option<UniqueMap<String>>>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> serde::de::Visitor<'de> for Object {
            type Value = RawHeader;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                mut map: A,
            ) -> Result<RawHeader, A::Error> {
                let mut raw = RawHeader {
                    tensors: Vec::new(),
                    metadata: Vec::new(),
                };
                while let Some(key) = map.next_key::<String>()? {
                    if key == METADATA_KEY {
                        raw.metadata.push(map.next_value()?);
                    } else {
                        raw.tensors.push((key, map.next_value()?));
                    }
                }
                Ok(raw)
            }
        }

        deserializer.deserialize_map(Object)
    }
}

impl Header {
    /// Reads and checks the header of a file.
    ///
    /// # Errors
    /// [`CheckpointError::Header`] when the file breaks the format, [`CheckpointError::Io`] when it cannot be read.
    pub fn read(reader: &dyn RangeReader) -> Result<Self> {
        let json = Self::read_json(reader)?;
        let wrong = |problem| CheckpointError::Header {
            file: reader.describe(),
            problem,
        };
        // `read_json` has checked that the header lies within the file.
        let data_len = reader.len() - LENGTH_BYTES - json.len() as u64;
        Self::parse_json(&json, data_len).map_err(wrong)
    }

    /// Reads the header's JSON, with its padding, without parsing it.
    ///
    /// # Errors
    /// As [`Header::read`], for the length alone.
    pub fn read_json(reader: &dyn RangeReader) -> Result<Vec<u8>> {
        let wrong = |problem| CheckpointError::Header {
            file: reader.describe(),
            problem,
        };
        if reader.len() < LENGTH_BYTES {
            return Err(wrong(HeaderError::TooShort {
                found: reader.len(),
            }));
        }
        let mut length = [0; LENGTH_BYTES as usize];
        reader.read_exact_at(0, &mut length)?;
        let len = checked_length(length, reader.len()).map_err(wrong)?;
        let mut json = vec![0; len];
        reader.read_exact_at(LENGTH_BYTES, &mut json)?;
        Ok(json)
    }

    /// Parses and checks a whole file held in memory.
    ///
    /// # Errors
    /// The first rule of the format that the file breaks.
    pub fn parse(file: &[u8]) -> Result<Self, HeaderError> {
        let Some((length, rest)) = file.split_first_chunk::<{ LENGTH_BYTES as usize }>() else {
            return Err(HeaderError::TooShort {
                found: file.len() as u64,
            });
        };
        let len = checked_length(*length, file.len() as u64)?;
        let (json, data) = rest.split_at(len);
        Self::parse_json(json, data.len() as u64)
    }

    /// Parses the JSON of a header before `data_len` bytes of tensors.
    ///
    /// # Errors
    /// The first rule of the format that it breaks.
    pub(super) fn parse_json(json: &[u8], data_len: u64) -> Result<Self, HeaderError> {
        match json.first() {
            None => return Err(HeaderError::Empty),
            Some(b'{') => {}
            Some(&found) => return Err(HeaderError::NotAnObject { found }),
        }
        let text = std::str::from_utf8(json).map_err(HeaderError::NotUtf8)?;
        let raw: RawHeader = serde_json::from_str(text).map_err(HeaderError::Json)?;
        let duplicates = repeated(raw.tensors.iter().map(|(name, _)| name.as_str()));
        if let Some(first) = duplicates.first() {
            return Err(HeaderError::DuplicateTensors {
                first: (*first).to_owned(),
                more: duplicates.len() - 1,
            });
        }
        if raw.metadata.len() > 1 {
            return Err(HeaderError::DuplicateTensors {
                first: METADATA_KEY.to_owned(),
                more: 0,
            });
        }
        let metadata = raw
            .metadata
            .into_iter()
            .flatten()
            .next()
            .map(|map| map.0)
            .unwrap_or_default();
        let mut entries = Vec::with_capacity(raw.tensors.len());
        for (name, entry) in raw.tensors {
            entries.push(check_entry(name, entry, data_len)?);
        }
        // Empty tensors sort before the one that starts at the same byte, so that a stable order remains.
        entries.sort_by_key(|entry| (entry.offset, entry.len));
        check_contiguous(&entries, data_len)?;
        Ok(Self {
            entries,
            metadata,
            data_start: LENGTH_BYTES + json.len() as u64,
        })
    }

    /// Bytes of all tensors together.
    pub fn data_len(&self) -> u64 {
        self.entries
            .last()
            .map_or(0, |entry| entry.offset + entry.len)
    }

    /// The bytes before the first tensor (length, JSON, padding to 8 bytes) for tensors that follow each other in
    /// the order given, and the header that a reader will make of them.
    ///
    /// # Errors
    /// [`HeaderError`] when a name, shape or the header as a whole is beyond the limits that a reader imposes.
    pub fn encode(
        specs: &[TensorSpec],
        metadata: &[(String, String)],
    ) -> Result<(Vec<u8>, Self), HeaderError> {
        let duplicates = repeated(specs.iter().map(|spec| spec.name.as_str()));
        if let Some(first) = duplicates.first() {
            return Err(HeaderError::DuplicateTensors {
                first: (*first).to_owned(),
                more: duplicates.len() - 1,
            });
        }
        let mut entries = Vec::with_capacity(specs.len());
        let mut end = 0u64;
        for spec in specs {
            let len = spec.checked_len()?;
            entries.push(HeaderEntry {
                spec: spec.clone(),
                offset: end,
                len,
            });
            end = end
                .checked_add(len)
                .ok_or_else(|| shape_overflow(&spec.name, spec.dtype, &spec.shape))?;
        }
        let mut json = encode_json(&entries, metadata);
        json.resize(json.len().next_multiple_of(LENGTH_BYTES as usize), b' ');
        let json_len = json.len() as u64;
        if json_len > MAX_HEADER_BYTES {
            return Err(HeaderError::TooLarge { found: json_len });
        }
        let mut bytes = json_len.to_le_bytes().to_vec();
        bytes.append(&mut json);
        Ok((
            bytes,
            Self {
                entries,
                metadata: metadata.to_vec(),
                data_start: LENGTH_BYTES + json_len,
            },
        ))
    }
}

/// The length field as a number that is within the limits and the file.
fn checked_length(field: [u8; 8], file_len: u64) -> Result<usize, HeaderError> {
    let claimed = u64::from_le_bytes(field);
    if claimed > MAX_HEADER_BYTES {
        return Err(HeaderError::TooLarge { found: claimed });
    }
    let available = file_len - LENGTH_BYTES;
    if claimed > available {
        return Err(HeaderError::LeavesFile { claimed, available });
    }
    Ok(claimed as usize)
}

fn check_name(name: &str) -> Result<(), HeaderError> {
    match name {
        "" => Err(HeaderError::EmptyName),
        METADATA_KEY => Err(HeaderError::ReservedName),
        _ if name.len() > MAX_NAME_BYTES => Err(HeaderError::LongName {
            name: name.to_owned(),
        }),
        _ if name.contains('\0') => Err(HeaderError::NulInName {
            name: name.to_owned(),
        }),
        _ => Ok(()),
    }
}

fn check_entry(name: String, raw: RawEntry, data_len: u64) -> Result<HeaderEntry, HeaderError> {
    check_name(&name)?;
    let dtype: DType = match raw.dtype.parse() {
        Ok(dtype) => dtype,
        Err(problem) => return Err(HeaderError::DType { name, problem }),
    };
    if raw.shape.len() > MAX_DIMS {
        return Err(HeaderError::TooManyDims {
            name,
            dims: raw.shape.len(),
        });
    }
    let dims: Result<Vec<usize>, _> = raw.shape.iter().map(|&dim| usize::try_from(dim)).collect();
    let Ok(shape) = dims else {
        return Err(HeaderError::ShapeOverflow {
            name,
            dtype,
            shape: raw.shape,
        });
    };
    let expected = byte_len(&name, dtype, &shape)?;
    let (start, end) = raw.data_offsets;
    if end < start {
        return Err(HeaderError::ReversedOffsets { name, start, end });
    }
    if end - start != expected {
        return Err(HeaderError::SizeMismatch {
            name,
            dtype,
            shape,
            expected,
            found: end - start,
        });
    }
    if end > data_len {
        return Err(HeaderError::OffsetsLeaveFile {
            name,
            end,
            available: data_len,
        });
    }
    Ok(HeaderEntry {
        spec: TensorSpec { name, dtype, shape },
        offset: start,
        len: expected,
    })
}

fn byte_len(name: &str, dtype: DType, shape: &[usize]) -> Result<u64, HeaderError> {
    dtype.byte_len(shape).ok_or_else(|| {
        let bits = shape.iter().try_fold(dtype.bits() as u64, |product, &dim| {
            product.checked_mul(dim as u64)
        });
        match bits {
            Some(_) => HeaderError::PartialByte {
                name: name.to_owned(),
                dtype,
                shape: shape.to_vec(),
            },
            None => shape_overflow(name, dtype, shape),
        }
    })
}

fn shape_overflow(name: &str, dtype: DType, shape: &[usize]) -> HeaderError {
    let shape = shape.iter().map(|&dim| dim as u64).collect();
    HeaderError::ShapeOverflow {
        name: name.to_owned(),
        dtype,
        shape,
    }
}

/// Every byte of the data belongs to exactly one tensor. `entries` are in the order of their offsets.
fn check_contiguous(entries: &[HeaderEntry], data_len: u64) -> Result<(), HeaderError> {
    let mut end = 0;
    let mut last: Option<&HeaderEntry> = None;
    for entry in entries {
        if let (true, Some(last)) = (entry.offset < end, last) {
            let (first, second) = (last.spec.name.clone(), entry.spec.name.clone());
            return Err(HeaderError::Overlap {
                first,
                second,
                end,
                start: entry.offset,
            });
        }
        if entry.offset > end {
            return Err(HeaderError::Hole {
                start: end,
                end: entry.offset,
                before: entry.spec.name.clone(),
            });
        }
        end = entry.offset + entry.len;
        last = Some(entry);
    }
    match data_len - end {
        0 => Ok(()),
        extra => Err(HeaderError::TrailingBytes { extra }),
    }
}

/// The JSON in the form that the usual writers give it: metadata first, no spaces, fields in a fixed order.
fn encode_json(entries: &[HeaderEntry], metadata: &[(String, String)]) -> Vec<u8> {
    let mut json = String::from("{");
    if !metadata.is_empty() {
        push_string(&mut json, METADATA_KEY);
        json.push_str(":{");
        for (key, value) in metadata {
            push_string(&mut json, key);
            json.push(':');
            push_string(&mut json, value);
            json.push(',');
        }
        json.pop();
        json.push_str("},");
    }
    for HeaderEntry { spec, offset, len } in entries {
        push_string(&mut json, &spec.name);
        let shape: Vec<String> = spec.shape.iter().map(usize::to_string).collect();
        let (dtype, shape, end) = (spec.dtype, shape.join(","), offset + len);
        json.push_str(&format!(
            r#":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{offset},{end}]}},"#
        ));
    }
    if json.ends_with(',') {
        json.pop();
    }
    json.push('}');
    json.into_bytes()
}

fn push_string(json: &mut String, text: &str) {
    json.push_str(&serde_json::Value::from(text).to_string());
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
