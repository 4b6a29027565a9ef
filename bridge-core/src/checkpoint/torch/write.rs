//! Writing what `torch.load` reads: pickles of protocol 2 and archives of stored entries.

use super::{dtype_named, torch_name};
use crate::dtype::DType;

/// Builds a pickle of protocol 2, value by value. Each method pushes a value or works on those pushed before it.
#[derive(Debug)]
pub(in crate::checkpoint) struct PickleWriter {
    bytes: Vec<u8>,
}

impl PickleWriter {
    pub(in crate::checkpoint) fn new() -> Self {
        Self {
            bytes: vec![0x80, 2],
        }
    }

    pub(in crate::checkpoint) fn finish(mut self) -> Vec<u8> {
        self.bytes.push(b'.');
        self.bytes
    }

    fn op(&mut self, opcode: u8) -> &mut Self {
        self.bytes.push(opcode);
        self
    }

    pub(in crate::checkpoint) fn global(&mut self, module: &str, name: &str) -> &mut Self {
        self.bytes
            .extend_from_slice(format!("c{module}\n{name}\n").as_bytes());
        self
    }

    pub(in crate::checkpoint) fn none(&mut self) -> &mut Self {
        self.op(b'N')
    }

    pub(in crate::checkpoint) fn bool(&mut self, value: bool) -> &mut Self {
        self.op(if value { 0x88 } else { 0x89 })
    }

    pub(in crate::checkpoint) fn float(&mut self, value: f64) -> &mut Self {
        self.op(b'G');
        self.bytes.extend_from_slice(&value.to_be_bytes());
        self
    }

    pub(in crate::checkpoint) fn int(&mut self, value: u64) -> &mut Self {
        match value {
            0..=0xff => {
                self.op(b'K');
                self.bytes.push(value as u8);
            }
            0x100..=0xffff => {
                self.op(b'M');
                self.bytes.extend_from_slice(&(value as u16).to_le_bytes());
            }
            0x1_0000..=0x7fff_ffff => {
                self.op(b'J');
                self.bytes.extend_from_slice(&(value as u32).to_le_bytes());
            }
            // As few bytes as leave the sign bit clear, as Python writes it.
            _ => {
                let length = (u64::BITS - value.leading_zeros()) / 8 + 1;
                self.op(0x8a).op(length as u8);
                let bytes = u128::from(value).to_le_bytes();
                self.bytes.extend_from_slice(&bytes[..length as usize]);
            }
        }
        self
    }

    pub(in crate::checkpoint) fn str(&mut self, text: &str) -> &mut Self {
        self.op(b'X');
        self.bytes
            .extend_from_slice(&(text.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(text.as_bytes());
        self
    }

    pub(in crate::checkpoint) fn mark(&mut self) -> &mut Self {
        self.op(b'(')
    }

    /// A tuple of everything since the mark.
    pub(in crate::checkpoint) fn tuple(&mut self) -> &mut Self {
        self.op(b't')
    }

    pub(in crate::checkpoint) fn empty_tuple(&mut self) -> &mut Self {
        self.op(b')')
    }

    pub(in crate::checkpoint) fn empty_list(&mut self) -> &mut Self {
        self.op(b']')
    }

    /// Appends everything since the mark to the list below it.
    pub(in crate::checkpoint) fn appends(&mut self) -> &mut Self {
        self.op(b'e')
    }

    pub(in crate::checkpoint) fn empty_dict(&mut self) -> &mut Self {
        self.op(b'}')
    }

    /// Sets the keys and values since the mark in the dict below it.
    pub(in crate::checkpoint) fn set_items(&mut self) -> &mut Self {
        self.op(b'u')
    }

    /// Calls the callable below with the tuple on top.
    pub(in crate::checkpoint) fn reduce(&mut self) -> &mut Self {
        self.op(b'R')
    }

    /// An instance of the class below, made with the tuple on top.
    pub(in crate::checkpoint) fn new_object(&mut self) -> &mut Self {
        self.op(0x81)
    }

    /// Gives the object below the state on top.
    pub(in crate::checkpoint) fn build(&mut self) -> &mut Self {
        self.op(b'b')
    }

    fn persistent(&mut self) -> &mut Self {
        self.op(b'Q')
    }

    /// A plain tuple of sizes.
    pub(in crate::checkpoint) fn sizes(&mut self, sizes: &[usize]) -> &mut Self {
        self.mark();
        for size in sizes {
            self.int(*size as u64);
        }
        self.tuple()
    }

    /// A `torch.Size`.
    pub(in crate::checkpoint) fn torch_size(&mut self, sizes: &[usize]) -> &mut Self {
        self.global("torch", "Size").mark();
        self.sizes(sizes).tuple().reduce()
    }
}

/// One file of an archive: its bytes, or room for bytes that come later.
#[derive(Debug)]
struct File {
    name: String,
    header_at: u64,
    data_at: u64,
    len: u64,
    /// `None` for a hole.
    bytes: Option<Vec<u8>>,
}

/// Lays out a zip archive of stored entries, each beginning at a multiple of 64 bytes.
#[derive(Debug, Default)]
pub(in crate::checkpoint) struct ZipWriter {
    files: Vec<File>,
    at: u64,
}

/// What `torch.save` aligns entries to, counted from the start of the archive.
const ALIGNMENT: u64 = 64;
const LOCAL_BYTES: u64 = 30;
/// Beyond this, sizes and offsets are in ZIP64 fields.
const MAX_32: u64 = 0xffff_ffff;
/// 1980-01-01, the earliest date that a zip archive can state: results must repeat exactly.
const DATE: u16 = 0x0021;

impl ZipWriter {
    /// Adds a file.
    pub(in crate::checkpoint) fn file(&mut self, name: &str, bytes: Vec<u8>) {
        self.add(name, bytes.len() as u64, Some(bytes));
    }

    /// Leaves room for a file of `len` bytes. Returns where its bytes go.
    pub(in crate::checkpoint) fn hole(&mut self, name: &str, len: u64) -> u64 {
        self.add(name, len, None)
    }

    fn add(&mut self, name: &str, len: u64, bytes: Option<Vec<u8>>) -> u64 {
        let before = self.at + LOCAL_BYTES + name.len() as u64 + zip64_bytes(len) + 4;
        let data_at = before.next_multiple_of(ALIGNMENT);
        self.files.push(File {
            name: name.to_owned(),
            header_at: self.at,
            data_at,
            len,
            bytes,
        });
        self.at = data_at + len;
        data_at
    }

    /// Size of the finished archive.
    pub(in crate::checkpoint) fn len(&self) -> u64 {
        let directory: u64 = self
            .files
            .iter()
            .map(|file| 46 + file.name.len() as u64 + self.directory_extra(file).len() as u64)
            .sum();
        self.at + directory + self.end_bytes(directory)
    }

    fn end_bytes(&self, directory: u64) -> u64 {
        if self.at + directory > MAX_32 {
            56 + 20 + 22
        } else {
            22
        }
    }

    /// Everything but the holes, as pieces with the offset of each in the archive. `crc` is the checksum of the hole.
    pub(in crate::checkpoint) fn pieces(self, crc: u32) -> Vec<(u64, Vec<u8>)> {
        let mut pieces = Vec::with_capacity(self.files.len() + 1);
        let mut directory = Vec::new();
        for file in &self.files {
            let crc = file.bytes.as_deref().map_or(crc, crc32fast::hash);
            let mut header = Vec::with_capacity((file.data_at - file.header_at) as usize);
            header.extend_from_slice(b"PK\x03\x04");
            self.common(file, crc, &mut header);
            let padding = file.data_at
                - file.header_at
                - LOCAL_BYTES
                - file.name.len() as u64
                - zip64_bytes(file.len);
            put(&mut header, zip64_bytes(file.len) + padding, 2);
            header.extend_from_slice(file.name.as_bytes());
            if file.len >= MAX_32 {
                put(&mut header, 1, 2);
                put(&mut header, 16, 2);
                put(&mut header, file.len, 8);
                put(&mut header, file.len, 8);
            }
            // An extra field of PyTorch's own kind fills the room up to the boundary.
            header.extend_from_slice(b"FB");
            put(&mut header, padding - 4, 2);
            header.resize((file.data_at - file.header_at) as usize, b'Z');
            if let Some(bytes) = &file.bytes {
                header.extend_from_slice(bytes);
            }
            pieces.push((file.header_at, header));

            directory.extend_from_slice(b"PK\x01\x02");
            put(&mut directory, 0, 2);
            self.common(file, crc, &mut directory);
            let extra = self.directory_extra(file);
            put(&mut directory, extra.len() as u64, 2);
            // Comment, disk, attributes.
            directory.extend_from_slice(&[0; 2 + 2 + 2 + 4]);
            put(&mut directory, file.header_at.min(MAX_32), 4);
            directory.extend_from_slice(file.name.as_bytes());
            directory.extend_from_slice(&extra);
        }
        let size = directory.len() as u64;
        let count = self.files.len() as u64;
        if self.end_bytes(size) > 22 {
            let end_at = self.at + size;
            directory.extend_from_slice(b"PK\x06\x06");
            put(&mut directory, 44, 8);
            put(&mut directory, 45, 2);
            put(&mut directory, 45, 2);
            put(&mut directory, 0, 8);
            put(&mut directory, count, 8);
            put(&mut directory, count, 8);
            put(&mut directory, size, 8);
            put(&mut directory, self.at, 8);
            directory.extend_from_slice(b"PK\x06\x07");
            put(&mut directory, 0, 4);
            put(&mut directory, end_at, 8);
            put(&mut directory, 1, 4);
        }
        directory.extend_from_slice(b"PK\x05\x06");
        put(&mut directory, 0, 4);
        put(&mut directory, count, 2);
        put(&mut directory, count, 2);
        put(&mut directory, size, 4);
        put(&mut directory, self.at.min(MAX_32), 4);
        put(&mut directory, 0, 2);
        pieces.push((self.at, directory));
        pieces
    }

    /// The fields that local headers and the directory share, up to the length of the name.
    fn common(&self, file: &File, crc: u32, out: &mut Vec<u8>) {
        let version = if file.len >= MAX_32 { 45 } else { 20 };
        put(out, version, 2);
        // Names are UTF-8.
        put(out, 0x0800, 2);
        put(out, 0, 2);
        put(out, 0, 2);
        put(out, DATE.into(), 2);
        put(out, crc.into(), 4);
        put(out, file.len.min(MAX_32), 4);
        put(out, file.len.min(MAX_32), 4);
        put(out, file.name.len() as u64, 2);
    }

    fn directory_extra(&self, file: &File) -> Vec<u8> {
        let mut fields = Vec::new();
        if file.len >= MAX_32 {
            put(&mut fields, file.len, 8);
            put(&mut fields, file.len, 8);
        }
        if file.header_at >= MAX_32 {
            put(&mut fields, file.header_at, 8);
        }
        if fields.is_empty() {
            return fields;
        }
        let mut extra = Vec::new();
        put(&mut extra, 1, 2);
        put(&mut extra, fields.len() as u64, 2);
        extra.extend_from_slice(&fields);
        extra
    }
}

/// Bytes of the ZIP64 field in a local header.
fn zip64_bytes(len: u64) -> u64 {
    if len >= MAX_32 { 20 } else { 0 }
}

fn put(out: &mut Vec<u8>, value: u64, bytes: usize) {
    out.extend_from_slice(&value.to_le_bytes()[..bytes]);
}

/// The whole archive of an object that is no tensor, from its pickle.
pub(in crate::checkpoint) fn archive_bytes(pickle: Vec<u8>) -> Vec<u8> {
    let mut zip = ZipWriter::default();
    zip.file("archive/data.pkl", pickle);
    zip.file("archive/byteorder", b"little".to_vec());
    zip.file("archive/version", b"3\n".to_vec());
    let mut bytes = vec![0; zip.len() as usize];
    for (at, piece) in zip.pieces(0) {
        bytes[at as usize..at as usize + piece.len()].copy_from_slice(&piece);
    }
    bytes
}

/// The archive of one contiguous tensor, whose elements come later.
#[derive(Debug)]
pub(in crate::checkpoint) struct TensorBlob {
    pub(in crate::checkpoint) zip: ZipWriter,
    /// Where the elements go, counted from the start of the archive.
    pub(in crate::checkpoint) data_at: u64,
}

impl TensorBlob {
    /// `None` for a dtype that PyTorch has no storage class for.
    pub(in crate::checkpoint) fn new(dtype: DType, shape: &[usize]) -> Option<Self> {
        let (name, storage) = torch_name(dtype)?;
        debug_assert_eq!(dtype_named(name), Some(dtype));
        if storage.is_empty() {
            return None;
        }
        let numel: usize = shape.iter().product();
        let mut strides = vec![1; shape.len()];
        for dim in (1..shape.len()).rev() {
            strides[dim - 1] = strides[dim] * shape[dim].max(1);
        }
        let mut pickle = PickleWriter::new();
        pickle.global("torch._utils", "_rebuild_tensor_v2").mark();
        pickle
            .mark()
            .str("storage")
            .global("torch", storage)
            .str("0")
            .str("cpu")
            .int(numel as u64)
            .tuple()
            .persistent();
        pickle.int(0).sizes(shape).sizes(&strides).bool(false);
        pickle
            .global("collections", "OrderedDict")
            .empty_tuple()
            .reduce();
        pickle.tuple().reduce();
        let mut zip = ZipWriter::default();
        zip.file("archive/data.pkl", pickle.finish());
        zip.file("archive/byteorder", b"little".to_vec());
        let data_at = zip.hole("archive/data/0", dtype.byte_len(shape)?);
        zip.file("archive/version", b"3\n".to_vec());
        Some(Self { zip, data_at })
    }
}
