//! `index.json`: which canonical tensors there are and where their pieces lie.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::super::error::{Shape, quote};
use super::super::region::Region;
use super::super::shards::file_name_problem;
use super::super::tiling::{self, MAX_CUT_DIMS, TilingFault};
use super::super::unique_map::UniqueMap;
use crate::dtype::DType;

/// What the `format` field of an index holds.
pub const FORMAT: &str = "bridge-native-checkpoint";
/// The version of the index that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// Largest index that is read, in bytes.
pub const MAX_INDEX_BYTES: u64 = 500_000_000;
/// Longest name of a tensor or key, in bytes.
const MAX_NAME_BYTES: usize = 1024;
/// Most dims of a tensor.
const MAX_DIMS: usize = 64;

/// One of the two sets of tensors in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// The weights.
    Model,
    /// What the optimizer keeps for them.
    Optimizer,
}

impl Group {
    /// Both, in order.
    pub const ALL: [Group; 2] = [Group::Model, Group::Optimizer];

    /// Its name, which is also that of its folder.
    pub fn as_str(self) -> &'static str {
        match self {
            Group::Model => "model",
            Group::Optimizer => "optimizer",
        }
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A part of a tensor that lies in one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// The file, relative to the iteration's folder: `model/rank_00003.safetensors`.
    pub file: String,
    /// Name of the piece in that file.
    pub key: String,
    /// Where it lies in the whole tensor, per dim.
    pub offset: Vec<usize>,
    /// Its extents.
    pub shape: Vec<usize>,
}

impl Piece {
    /// The part of the tensor that it holds.
    pub fn region(&self) -> Region {
        Region {
            offset: self.offset.clone(),
            shape: self.shape.clone(),
        }
    }
}

/// A canonical tensor in a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NativeTensor {
    /// Element type.
    pub dtype: DType,
    /// Dims of the whole tensor, outermost first.
    pub shape: Vec<usize>,
    /// The pieces, which hold every element exactly once.
    pub pieces: Vec<Piece>,
}

/// The tensors of a group by name.
pub type GroupIndex = BTreeMap<String, NativeTensor>;

/// The index of one iteration, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NativeIndex {
    /// The iteration that the checkpoint was taken after.
    pub iteration: u64,
    /// Weights by canonical name.
    pub model: GroupIndex,
    /// Optimizer state by name; empty when there is none.
    pub optimizer: GroupIndex,
}

/// What is wrong with the index of a native checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NativeIndexError {
    /// Larger than any index.
    #[error("it has {found} bytes, more than the {MAX_INDEX_BYTES} that an index may have")]
    TooLarge {
        /// Size of the file, in bytes.
        found: u64,
    },
    /// Broken JSON, unknown or missing fields, repeated keys.
    #[error("it is not the JSON it should be")]
    Json(#[source] serde_json::Error),
    /// The index of something else.
    #[error("its format is {}, expected `{FORMAT}`", quote(.found))]
    Format {
        /// The format found.
        found: String,
    },
    /// Written by another version of this program.
    #[error("its version is {found}, expected {VERSION}; use the program version that wrote it")]
    Version {
        /// The version found.
        found: u32,
    },
    /// A name of no or too many bytes, or with a NUL character.
    #[error("{} cannot name a tensor (empty, over {MAX_NAME_BYTES} bytes, or with a NUL character)", quote(.name))]
    BadName {
        /// The name.
        name: String,
    },
    /// A tensor that cannot be stored in pieces.
    #[error("tensor {} of type {dtype} and shape {}: {problem}", quote(.name), Shape(.shape))]
    BadTensor {
        /// The tensor.
        name: String,
        /// Its element type.
        dtype: DType,
        /// Its shape.
        shape: Vec<usize>,
        /// Why not.
        problem: &'static str,
    },
    /// A piece in a file that cannot be part of the checkpoint.
    #[error("tensor {} has a piece in {}: {problem}", quote(.name), quote(.file))]
    BadFile {
        /// The tensor.
        name: String,
        /// The file named.
        file: String,
        /// Why not.
        problem: &'static str,
    },
    /// A piece that is not within its tensor.
    #[error(
        "tensor {} of shape {} has a piece at {} of shape {}, which is not within it",
        quote(.name), Shape(.shape), Shape(&.piece.offset), Shape(&.piece.shape)
    )]
    PieceOutside {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The piece.
        piece: Box<Piece>,
    },
    /// Pieces that leave elements out or hold them twice.
    #[error(
        "the {pieces} pieces of tensor {} do not hold each of its elements exactly once (shape {})",
        quote(.name), Shape(.shape)
    )]
    NotTiled {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// How many pieces it has.
        pieces: usize,
    },
    /// Pieces cut along more dims than are supported.
    #[error("tensor {} is cut along more than {MAX_CUT_DIMS} dims", quote(.name))]
    TooManyCuts {
        /// The tensor.
        name: String,
    },
    /// A file whose tensors are not the pieces that the index lists.
    #[error("{}: {problem}", quote(.file))]
    FileDisagrees {
        /// The file.
        file: String,
        /// What differs.
        problem: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawIndex<G> {
    format: String,
    version: u32,
    iteration: u64,
    groups: RawGroups<G>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGroups<G> {
    model: G,
    optimizer: G,
}

/// The part of an index that tells whether the rest can be understood.
#[derive(Deserialize)]
struct Heading {
    format: String,
    version: u32,
}

impl NativeIndex {
    /// The tensors of a group.
    pub fn group(&self, group: Group) -> &GroupIndex {
        match group {
            Group::Model => &self.model,
            Group::Optimizer => &self.optimizer,
        }
    }

    /// The tensors of a group, to change.
    pub fn group_mut(&mut self, group: Group) -> &mut GroupIndex {
        match group {
            Group::Model => &mut self.model,
            Group::Optimizer => &mut self.optimizer,
        }
    }

    /// Parses and checks an index: names, shapes, file names, and that pieces hold every element exactly once.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn parse(json: &[u8]) -> Result<Self, NativeIndexError> {
        // A later version may have other fields, so the heading is read first.
        let heading: Heading = serde_json::from_slice(json).map_err(NativeIndexError::Json)?;
        if heading.format != FORMAT {
            return Err(NativeIndexError::Format {
                found: heading.format,
            });
        }
        if heading.version != VERSION {
            return Err(NativeIndexError::Version {
                found: heading.version,
            });
        }
        let raw: RawIndex<UniqueMap<NativeTensor>> =
            serde_json::from_slice(json).map_err(NativeIndexError::Json)?;
        let RawGroups { model, optimizer } = raw.groups;
        let map = |group: UniqueMap<NativeTensor>| group.0.into_iter().collect();
        let index = Self {
            iteration: raw.iteration,
            model: map(model),
            optimizer: map(optimizer),
        };
        index.check()?;
        Ok(index)
    }

    /// The JSON that [`NativeIndex::parse`] reads, one tensor a line.
    ///
    /// # Errors
    /// [`NativeIndexError`] when the index would be refused by its reader.
    pub fn to_json(&self) -> Result<Vec<u8>, NativeIndexError> {
        self.check()?;
        let heading = format!(
            "{{\"format\":\"{FORMAT}\",\"version\":{VERSION},\"iteration\":{}",
            self.iteration
        );
        let mut json = heading.into_bytes();
        json.extend(b",\"groups\":{");
        for group in Group::ALL {
            let comma = if group == Group::Model { "" } else { "," };
            json.extend(format!("{comma}\n\"{group}\":{{").bytes());
            for (position, (name, tensor)) in self.group(group).iter().enumerate() {
                json.extend(if position == 0 { "\n" } else { ",\n" }.bytes());
                serde_json::to_writer(&mut json, name).map_err(NativeIndexError::Json)?;
                json.push(b':');
                serde_json::to_writer(&mut json, tensor).map_err(NativeIndexError::Json)?;
            }
            json.push(b'}');
        }
        json.extend(b"}}\n");
        if json.len() as u64 > MAX_INDEX_BYTES {
            return Err(NativeIndexError::TooLarge {
                found: json.len() as u64,
            });
        }
        Ok(json)
    }

    /// Checks every statement against the others.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn check(&self) -> Result<(), NativeIndexError> {
        for group in Group::ALL {
            for (name, tensor) in self.group(group) {
                check_name(name)?;
                check_tensor(group, name, tensor)?;
            }
        }
        Ok(())
    }
}

fn check_name(name: &str) -> Result<(), NativeIndexError> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains('\0') {
        return Err(NativeIndexError::BadName {
            name: name.to_owned(),
        });
    }
    Ok(())
}

fn check_tensor(group: Group, name: &str, tensor: &NativeTensor) -> Result<(), NativeIndexError> {
    let NativeTensor {
        dtype,
        shape,
        pieces,
    } = tensor;
    if let Some(problem) = tensor_problem(*dtype, shape) {
        let (name, shape) = (name.to_owned(), shape.clone());
        return Err(NativeIndexError::BadTensor {
            name,
            dtype: *dtype,
            shape,
            problem,
        });
    }
    let mut regions = Vec::with_capacity(pieces.len());
    for piece in pieces {
        check_name(&piece.key)?;
        if let Some(problem) = file_problem(group, &piece.file) {
            return Err(NativeIndexError::BadFile {
                name: name.to_owned(),
                file: piece.file.clone(),
                problem,
            });
        }
        let region = piece.region();
        if !region.fits(shape) {
            let (name, shape) = (name.to_owned(), shape.clone());
            return Err(NativeIndexError::PieceOutside {
                name,
                shape,
                piece: Box::new(piece.clone()),
            });
        }
        regions.push(region);
    }
    match tiling::check(shape, &regions.iter().collect::<Vec<_>>()) {
        Ok(()) => Ok(()),
        Err(TilingFault::NotExact) => Err(NativeIndexError::NotTiled {
            name: name.to_owned(),
            shape: shape.clone(),
            pieces: pieces.len(),
        }),
        Err(TilingFault::TooManyCutDims) => Err(NativeIndexError::TooManyCuts {
            name: name.to_owned(),
        }),
    }
}

fn tensor_problem(dtype: DType, shape: &[usize]) -> Option<&'static str> {
    if shape.len() > MAX_DIMS {
        Some("it has more than 64 dims")
    } else if dtype.bytes().is_none() {
        Some("packed types smaller than a byte cannot be cut into pieces")
    } else if dtype
        .byte_len(shape)
        .is_none_or(|len| len > i64::MAX as u64)
    {
        Some("it is larger than any file system")
    } else {
        None
    }
}

/// Files are `GROUP/NAME.safetensors`, so that no path leads out of the checkpoint.
fn file_problem(group: Group, file: &str) -> Option<&'static str> {
    match file
        .strip_prefix(group.as_str())
        .and_then(|rest| rest.strip_prefix('/'))
    {
        Some(name) => file_name_problem(name),
        None => Some("pieces of a group lie in the folder of that name"),
    }
}
