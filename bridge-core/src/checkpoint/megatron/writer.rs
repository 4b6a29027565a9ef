//! Writing a Megatron-Core checkpoint.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::reader::TRACKER_FILE;
use crate::checkpoint::error::{CheckpointError, Result, quote};
use crate::checkpoint::header::TensorSpec;
use crate::checkpoint::output_file::OutputFiles;
use crate::checkpoint::region::Region;
use crate::checkpoint::source::RangeReader;
use crate::checkpoint::staging::{Durability, Existing, Staging, write_file};
use crate::checkpoint::torch::{PickleWriter, TensorBlob, archive_bytes, torch_name};
use crate::error::Problems;

/// Bytes of tensors per file, about: the loader of PyTorch reads files in parallel.
const FILE_BYTES: u64 = 4 << 30;
/// Dims of a stack along which each index gets a box of its own: layer, expert. The loader reads a box whole, so boxes
/// must not be larger than what a rank holds.
const MAX_CUT_DIMS: usize = 2;

/// How a [`MegatronWriter`] writes.
#[derive(Debug, Clone, Default)]
pub struct MegatronWriterOptions {
    /// The iteration, which names the folder.
    pub iteration: u64,
    /// Whether each layer's tensors have names of their own.
    pub layer_names: bool,
    /// What the finished folder survives.
    pub durability: Durability,
    /// What to do about a folder in the target's place.
    pub existing: Existing,
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MegatronTensor {
    /// Name, type and global shape.
    pub spec: TensorSpec,
    /// Number of leading dims that count layers or experts.
    pub stacked: usize,
}

/// A Megatron-Core checkpoint while it is written, in the same way as a
/// [`ShardedWriter`](crate::checkpoint::ShardedWriter): everything is declared up front, every byte is written once, and
/// the folder appears under its name only in [`MegatronWriter::finish`].
#[derive(Debug)]
pub struct MegatronWriter {
    staging: Staging,
    iteration_dir: PathBuf,
    files: OutputFiles,
    tensors: Vec<MegatronTensor>,
    /// For each tensor, its boxes in row-major order.
    boxes: Vec<Vec<BoxPlan>>,
    options: MegatronWriterOptions,
}

/// A box: one archive in one file.
#[derive(Debug)]
struct BoxPlan {
    region: Region,
    /// Bytes of elements.
    len: u64,
    file: usize,
    /// First byte of the archive in the file, and its size.
    start: u64,
    blob_len: u64,
    /// Its number among the tensors of the output files.
    slot: usize,
    /// Checksums of the parts written so far, by first byte: (length, checksum).
    sums: Mutex<BTreeMap<u64, (u64, u32)>>,
}

impl MegatronWriter {
    /// Lays out `tensors`, and the `objects` (keys of the `_extra_state` of layers, which hold nothing), and creates the
    /// files beside `target`.
    ///
    /// # Errors
    /// [`CheckpointError::BadLayout`] for tensors that PyTorch has no type for, and as
    /// [`ShardedWriter::create`](crate::checkpoint::ShardedWriter::create).
    pub fn create(
        target: &Path,
        tensors: Vec<MegatronTensor>,
        objects: &[String],
        options: MegatronWriterOptions,
    ) -> Result<Self> {
        let mut problems = Problems::new();
        let mut regions: Vec<Vec<(Region, u64, u64)>> = Vec::with_capacity(tensors.len());
        for MegatronTensor { spec, stacked } in &tensors {
            let mut own = Vec::new();
            for region in cut(&spec.shape, *stacked) {
                let bytes = spec.dtype.byte_len(&region.shape);
                match (bytes, TensorBlob::new(spec.dtype, &region.shape)) {
                    (Some(bytes), Some(blob)) => own.push((region, bytes, blob.zip.len())),
                    _ => {
                        problems.push(format!(
                            "tensor {} has type {}, which a Megatron-Core checkpoint cannot hold",
                            quote(&spec.name),
                            spec.dtype
                        ));
                        break;
                    }
                }
            }
            regions.push(own);
        }
        if !problems.is_empty() {
            return Err(CheckpointError::BadLayout { problems });
        }
        let staging = Staging::create(target, options.existing)?;
        let needed = regions.iter().flatten().map(|(.., blob)| *blob);
        staging.check_room(needed.fold(0, u64::saturating_add))?;
        let iteration_dir = staging.dir().join(format!("iter_{:07}", options.iteration));
        std::fs::create_dir(&iteration_dir)
            .map_err(|error| CheckpointError::io("create folder", &iteration_dir, error))?;

        // The objects come first in the first file.
        let objects = object_blobs(objects, &options);
        let objects_len: u64 = objects.iter().map(|(_, blob)| blob.len() as u64).sum();
        let mut files = OutputFiles::default();
        let mut boxes: Vec<Vec<BoxPlan>> = Vec::with_capacity(tensors.len());
        let (mut file, mut at, mut slot) = (0, objects_len, 0);
        let mut pending: Vec<(String, u64, u64)> = Vec::new();
        let mut lens = Vec::new();
        let mut contents = Vec::new();
        for (tensor, regions) in tensors.iter().zip(regions) {
            let mut own = Vec::with_capacity(regions.len());
            for (region, len, blob_len) in regions {
                if at > 0 && at.saturating_add(blob_len) > FILE_BYTES {
                    lens.push(at);
                    contents.push(std::mem::take(&mut pending));
                    (file, at) = (file + 1, 0);
                }
                let data_at = TensorBlob::new(tensor.spec.dtype, &region.shape)
                    .map_or(0, |blob| blob.data_at);
                pending.push((tensor.spec.name.clone(), at + data_at, len));
                own.push(BoxPlan {
                    region,
                    len,
                    file,
                    start: at,
                    blob_len,
                    slot,
                    sums: Mutex::default(),
                });
                at += blob_len;
                slot += 1;
            }
            boxes.push(own);
        }
        lens.push(at);
        contents.push(pending);
        for (index, (len, tensors)) in lens.into_iter().zip(contents).enumerate() {
            let path = iteration_dir.join(file_name(index));
            files.add_raw(path, len, tensors.into_iter())?;
        }
        let mut object_places = Vec::with_capacity(objects.len());
        let mut at = 0;
        for (key, blob) in &objects {
            files.write_raw(0, at, blob)?;
            object_places.push((key.as_str(), at, blob.len() as u64));
            at += blob.len() as u64;
        }
        let metadata = metadata(&tensors, &boxes, &object_places);
        let durability = options.durability;
        write_file(&iteration_dir.join(".metadata"), &metadata, durability)?;
        write_file(
            &iteration_dir.join("metadata.json"),
            br#"{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}"#,
            durability,
        )?;
        // Versions before 0.19 read the common state from here, later ones from the object.
        let common = archive_bytes(common_state(&options, false));
        write_file(&iteration_dir.join("common.pt"), &common, durability)?;
        let tracker = staging.dir().join(TRACKER_FILE);
        write_file(
            &tracker,
            options.iteration.to_string().as_bytes(),
            durability,
        )?;
        Ok(Self {
            staging,
            iteration_dir,
            files,
            tensors,
            boxes,
            options,
        })
    }

    /// The temporary folder of the iteration, into which other files may be put before [`MegatronWriter::finish`].
    pub fn iteration_dir(&self) -> &Path {
        &self.iteration_dir
    }

    /// Writes `bytes` at byte `offset` of tensor number `tensor`. May be called from several threads at once.
    ///
    /// # Errors
    /// As [`ShardedWriter::write_at`](crate::checkpoint::ShardedWriter::write_at).
    ///
    /// # Panics
    /// When there is no tensor of that number.
    pub fn write_at(&self, tensor: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        // The boxes of a tensor have one size and follow each other.
        let boxes = &self.boxes[tensor];
        let size = boxes.first().map_or(0, |first| first.len);
        let (mut offset, mut bytes) = (offset, bytes);
        while !bytes.is_empty() {
            let index = usize::try_from(offset.checked_div(size).unwrap_or(u64::MAX));
            let Some(own) = index.ok().and_then(|index| boxes.get(index)) else {
                return Err(CheckpointError::BadRange {
                    name: self.tensors[tensor].spec.name.clone(),
                    problem: format!("a write at byte {offset} leaves the tensor"),
                });
            };
            let within = offset % size;
            let count = bytes.len().min((size - within) as usize);
            let (part, rest) = bytes.split_at(count);
            self.files.write_at(own.slot, within, part)?;
            let mut sums = own.sums.lock().unwrap_or_else(PoisonError::into_inner);
            sums.insert(within, (count as u64, crc32fast::hash(part)));
            (offset, bytes) = (offset + count as u64, rest);
        }
        Ok(())
    }

    /// Copies `len` bytes of `source`, from `source_offset` on, to byte `offset` of tensor number `tensor`, through a
    /// buffer, since the checksum must see them.
    ///
    /// # Errors
    /// As [`MegatronWriter::write_at`], and [`CheckpointError::Io`] when the source cannot be read.
    ///
    /// # Panics
    /// When there is no tensor of that number.
    pub fn copy_from(
        &self,
        tensor: usize,
        offset: u64,
        source: &dyn RangeReader,
        source_offset: u64,
        len: u64,
    ) -> Result<()> {
        const BUFFER_BYTES: u64 = 4 << 20;
        let mut buffer = vec![0; len.min(BUFFER_BYTES) as usize];
        let mut done = 0;
        while done < len {
            let part = &mut buffer[..(len - done).min(BUFFER_BYTES) as usize];
            source.read_exact_at(source_offset + done, part)?;
            self.write_at(tensor, offset + done, part)?;
            done += part.len() as u64;
        }
        Ok(())
    }

    /// Adds a small file to the iteration's folder.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], also when a file of that name is there already, and [`CheckpointError::DiskFull`].
    pub fn add_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        write_file(
            &self.iteration_dir.join(name),
            bytes,
            self.options.durability,
        )
    }

    /// Checks that every byte of every tensor has been written, completes the archives, and publishes the folder. Returns
    /// its path.
    ///
    /// # Errors
    /// As [`ShardedWriter::finish`](crate::checkpoint::ShardedWriter::finish).
    pub fn finish(self) -> Result<PathBuf> {
        for (tensor, boxes) in self.tensors.iter().zip(&self.boxes) {
            for own in boxes {
                let sums = own.sums.lock().unwrap_or_else(PoisonError::into_inner);
                let mut sum = crc32fast::Hasher::new();
                for (len, crc) in sums.values() {
                    sum.combine(&crc32fast::Hasher::new_with_initial_len(*crc, *len));
                }
                let Some(blob) = TensorBlob::new(tensor.spec.dtype, &own.region.shape) else {
                    continue;
                };
                for (at, piece) in blob.zip.pieces(sum.finalize()) {
                    self.files.write_raw(own.file, own.start + at, &piece)?;
                }
            }
        }
        let durability = self.options.durability;
        self.files.finish(self.staging.target(), durability)?;
        self.staging.publish(durability)
    }
}

fn file_name(index: usize) -> String {
    format!("__0_{index}.distcp")
}

/// The boxes of a tensor: one for each index of its first `stacked` dims.
fn cut(shape: &[usize], stacked: usize) -> Vec<Region> {
    let dims = stacked.min(MAX_CUT_DIMS).min(shape.len());
    let count: usize = shape[..dims].iter().product();
    (0..count)
        .map(|index| {
            let mut region = Region::whole(shape);
            let mut rest = index;
            for dim in (0..dims).rev() {
                region.offset[dim] = rest % shape[dim];
                region.shape[dim] = 1;
                rest /= shape[dim];
            }
            region
        })
        .collect()
}

/// The objects with their archives: the common state, then what holds nothing.
fn object_blobs(keys: &[String], options: &MegatronWriterOptions) -> Vec<(String, Vec<u8>)> {
    let mut blobs = vec![(
        "common_state/shard_0_1".to_owned(),
        archive_bytes(common_state(options, true)),
    )];
    let mut nothing = PickleWriter::new();
    nothing.empty_list().mark().none().appends();
    let nothing = archive_bytes(nothing.finish());
    blobs.extend(keys.iter().map(|key| (key.clone(), nothing.clone())));
    blobs
}

/// What Megatron-Core keeps beside the tensors; as an object it stands in a list.
fn common_state(options: &MegatronWriterOptions, in_list: bool) -> Vec<u8> {
    let mut pickle = PickleWriter::new();
    if in_list {
        pickle.empty_list().mark();
    }
    pickle.empty_dict().mark();
    pickle.str("checkpoint_version").float(3.0);
    pickle.str("iteration").int(options.iteration);
    pickle.str("content_metadata").empty_dict().mark();
    pickle.str("singleton_local_shards").bool(false);
    pickle.str("chained_optim_avoid_prefix").bool(true);
    if options.layer_names {
        pickle.str("non_homogeneous_layers").bool(true);
    }
    pickle.set_items();
    pickle.set_items();
    if in_list {
        pickle.appends();
    }
    pickle.finish()
}

const METADATA_MODULE: &str = "torch.distributed.checkpoint.metadata";

/// The bytes of `.metadata`.
fn metadata(
    tensors: &[MegatronTensor],
    boxes: &[Vec<BoxPlan>],
    objects: &[(&str, u64, u64)],
) -> Vec<u8> {
    let mut p = PickleWriter::new();
    let object = |p: &mut PickleWriter, class: &str| {
        p.global(METADATA_MODULE, class).empty_tuple().new_object();
    };
    object(&mut p, "Metadata");
    p.empty_dict().mark();
    p.str("state_dict_metadata").empty_dict().mark();
    for (key, ..) in objects {
        p.str(key);
        object(&mut p, "BytesStorageMetadata");
    }
    for (tensor, boxes) in tensors.iter().zip(boxes) {
        p.str(&tensor.spec.name);
        object(&mut p, "TensorStorageMetadata");
        p.empty_dict().mark().str("properties");
        object(&mut p, "TensorProperties");
        // Refused before this if PyTorch has no such type.
        let dtype = torch_name(tensor.spec.dtype).map_or("float32", |(name, _)| name);
        p.mark().global("torch", dtype);
        p.global("torch.serialization", "_get_layout")
            .mark()
            .str("torch.strided")
            .tuple()
            .reduce();
        p.bool(false);
        p.global(METADATA_MODULE, "_MEM_FORMAT_ENCODING")
            .mark()
            .int(0)
            .tuple()
            .reduce();
        p.bool(false).tuple().build();
        p.str("size").torch_size(&tensor.spec.shape);
        p.str("chunks").empty_list().mark();
        for own in boxes {
            object(&mut p, "ChunkStorageMetadata");
            p.empty_dict().mark();
            p.str("offsets").torch_size(&own.region.offset);
            p.str("sizes").torch_size(&own.region.shape);
            p.set_items().build();
        }
        p.appends().set_items().build();
    }
    p.set_items();
    p.str("planner_data").empty_dict();
    p.str("storage_data").empty_dict().mark();
    let mut place = |key: &str, offset: Option<&[usize]>, file: usize, start: u64, len: u64| {
        object(&mut p, "MetadataIndex");
        p.empty_dict().mark().str("fqn").str(key).str("offset");
        match offset {
            Some(offset) => p.torch_size(offset),
            None => p.none(),
        };
        p.str("index").none().set_items().build();
        p.global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
            .empty_tuple()
            .new_object();
        p.empty_dict().mark();
        p.str("relative_path").str(&file_name(file));
        p.str("offset").int(start).str("length").int(len);
        p.set_items().build();
    };
    for (key, start, len) in objects {
        place(key, None, 0, *start, *len);
    }
    for (tensor, boxes) in tensors.iter().zip(boxes) {
        for own in boxes {
            let offset = Some(own.region.offset.as_slice());
            place(&tensor.spec.name, offset, own.file, own.start, own.blob_len);
        }
    }
    p.set_items();
    p.str("storage_meta").none();
    p.str("version").str("1.0.0");
    p.set_items().build();
    p.finish()
}
