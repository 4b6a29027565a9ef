//! The zip archives of `torch.save`: stored entries, found through the central directory.
//!
//! Source: PKWARE APPNOTE.TXT 6.3.10 (records, ZIP64). PyTorch stores every entry uncompressed and leaves sizes and
//! checksums out of the local headers, so only the directory at the end is believed.

use std::collections::HashMap;

use crate::checkpoint::RangeReader;

const END: [u8; 4] = *b"PK\x05\x06";
const END64: [u8; 4] = *b"PK\x06\x06";
const END64_LOCATOR: [u8; 4] = *b"PK\x06\x07";
const DIRECTORY: [u8; 4] = *b"PK\x01\x02";
const LOCAL: [u8; 4] = *b"PK\x03\x04";
/// The end record without its comment.
const END_BYTES: u64 = 22;
const MAX_COMMENT: u64 = u16::MAX as u64;
/// Largest directory that is read: some hundred thousand entries.
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;

/// An uncompressed file in an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// First byte, counted from the start of the reader.
    pub(super) offset: u64,
    /// Size in bytes.
    pub(super) len: u64,
}

/// The files of an archive, by name.
#[derive(Debug)]
pub(super) struct ZipIndex {
    entries: HashMap<String, Entry>,
}

impl ZipIndex {
    /// Reads the directory of the archive in bytes `start..start + len` of `reader`.
    ///
    /// # Errors
    /// What is wrong: no archive, a record out of bounds, compressed or encrypted or overlapping entries.
    pub(super) fn read(reader: &dyn RangeReader, start: u64, len: u64) -> Result<Self, String> {
        let end = start
            .checked_add(len)
            .filter(|end| *end <= reader.len())
            .ok_or("the archive leaves its file")?;
        let blob = Blob { reader, start, end };
        let (count, directory) = blob.end_record()?;
        // An entry takes 46 bytes at least, so the directory bounds the count.
        if directory.len() as u64 / 46 < count {
            return Err(format!(
                "the directory of {} bytes cannot hold {count} entries",
                directory.len()
            ));
        }
        let mut entries = HashMap::with_capacity(count as usize);
        let mut ranges = Vec::with_capacity(count as usize);
        let mut at = 0;
        for _ in 0..count {
            let (name, entry, header_at, next) = blob.entry(&directory, at)?;
            at = next;
            ranges.push((header_at, entry.offset + entry.len));
            if entries.insert(name.clone(), entry).is_some() {
                return Err(format!("entry {} is listed twice", shown(&name)));
            }
        }
        ranges.sort_unstable();
        if ranges.windows(2).any(|pair| pair[0].1 > pair[1].0) {
            return Err("entries overlap".to_owned());
        }
        Ok(Self { entries })
    }

    /// The entry whose name is `name` below the archive's one root folder, whatever that is called.
    pub(super) fn find(&self, root: &str, name: &str) -> Option<Entry> {
        self.entries.get(&format!("{root}/{name}")).copied()
    }

    /// The name of the root folder: that of `data.pkl`.
    pub(super) fn root(&self) -> Result<&str, String> {
        let mut roots = self
            .entries
            .keys()
            .filter_map(|name| name.strip_suffix("/data.pkl"));
        match (roots.next(), roots.next()) {
            (Some(root), None) => Ok(root),
            (None, _) => Err("it has no data.pkl, so torch.save did not write it".to_owned()),
            (Some(_), Some(_)) => Err("it has several files called data.pkl".to_owned()),
        }
    }
}

/// Part of a file.
struct Blob<'a> {
    reader: &'a dyn RangeReader,
    start: u64,
    end: u64,
}

impl Blob<'_> {
    fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, String> {
        let from = self.start.checked_add(offset);
        let to = from.and_then(|from| from.checked_add(len));
        match (from, to) {
            (Some(from), Some(to)) if to <= self.end => {
                let mut bytes = vec![0; len as usize];
                let read = self.reader.read_exact_at(from, &mut bytes);
                read.map_err(|error| error.to_string())?;
                Ok(bytes)
            }
            _ => Err("a record leaves the archive".to_owned()),
        }
    }

    /// Number of entries, and the bytes of the directory.
    fn end_record(&self) -> Result<(u64, Vec<u8>), String> {
        let len = self.end - self.start;
        let tail_len = len.min(END_BYTES + MAX_COMMENT);
        let tail = self.read(len - tail_len, tail_len)?;
        let found = (0..=tail.len().saturating_sub(END_BYTES as usize))
            .rev()
            .find(|at| {
                let record = &tail[*at..];
                record.len() >= END_BYTES as usize
                    && record[..4] == END
                    // The comment fills the rest; anything else is a signature inside of a comment.
                    && record.len() as u64 == END_BYTES + u64::from(le(&record[20..22]) as u16)
            });
        let at = found.ok_or("it is no zip archive (no end record)")?;
        let record = &tail[at..];
        let (mut count, mut size, mut offset) = (
            le(&record[10..12]),
            le(&record[12..16]),
            le(&record[16..20]),
        );
        let end_at = len - tail_len + at as u64;
        if count == 0xffff || size == 0xffff_ffff || offset == 0xffff_ffff {
            (count, size, offset) = self.end_record64(end_at)?;
        }
        if size > MAX_DIRECTORY_BYTES {
            return Err(format!(
                "its directory has {size} bytes, more than the {MAX_DIRECTORY_BYTES} that are read"
            ));
        }
        Ok((count, self.read(offset, size)?))
    }

    fn end_record64(&self, end_at: u64) -> Result<(u64, u64, u64), String> {
        let locator_at = end_at
            .checked_sub(20)
            .ok_or("its ZIP64 locator is missing")?;
        let locator = self.read(locator_at, 20)?;
        if locator[..4] != END64_LOCATOR {
            return Err("its ZIP64 locator is missing".to_owned());
        }
        let record = self.read(le(&locator[8..16]), 56)?;
        if record[..4] != END64 {
            return Err("its ZIP64 end record is missing".to_owned());
        }
        Ok((
            le(&record[32..40]),
            le(&record[40..48]),
            le(&record[48..56]),
        ))
    }

    /// Name, place, position of the local header (from the start of the reader), and where the next entry starts.
    fn entry(&self, directory: &[u8], at: usize) -> Result<(String, Entry, u64, usize), String> {
        let short = || "its directory ends early".to_owned();
        let fixed = directory.get(at..at + 46).ok_or_else(short)?;
        if fixed[..4] != DIRECTORY {
            return Err("its directory is damaged".to_owned());
        }
        let lens = [&fixed[28..30], &fixed[30..32], &fixed[32..34]].map(|field| le(field) as usize);
        let [name_len, extra_len, comment_len] = lens;
        let next = at + 46 + name_len + extra_len + comment_len;
        let rest = directory.get(at + 46..next).ok_or_else(short)?;
        let name = std::str::from_utf8(&rest[..name_len])
            .map_err(|_| "a name in its directory is not UTF-8")?;
        let (flags, method) = (le(&fixed[8..10]), le(&fixed[10..12]));
        if flags & 1 != 0 || method != 0 {
            return Err(format!(
                "entry {} is compressed or encrypted; torch.save stores entries as they are",
                shown(name)
            ));
        }
        let (mut packed, mut size) = (le(&fixed[20..24]), le(&fixed[24..28]));
        let mut header_at = le(&fixed[42..46]);
        zip64(
            &rest[name_len..name_len + extra_len],
            [&mut size, &mut packed, &mut header_at],
        )?;
        if packed != size {
            return Err(format!("entry {} has two sizes", shown(name)));
        }
        let header = self.read(header_at, 30)?;
        if header[..4] != LOCAL {
            return Err(format!("entry {} has no local header", shown(name)));
        }
        let data_at = header_at + 30 + le(&header[26..28]) + le(&header[28..30]);
        let inside = |offset: u64| self.start.checked_add(offset);
        let (offset, end) = (inside(data_at), data_at.checked_add(size).and_then(inside));
        match (offset, end) {
            (Some(offset), Some(end)) if end <= self.end => {
                let entry = Entry { offset, len: size };
                Ok((name.to_owned(), entry, self.start + header_at, next))
            }
            _ => Err(format!("entry {} leaves the archive", shown(name))),
        }
    }
}

/// Replaces the fields that are all ones by those of the ZIP64 extra field, in their order.
fn zip64(mut extra: &[u8], fields: [&mut u64; 3]) -> Result<(), String> {
    let wanted = fields.into_iter().filter(|field| **field == 0xffff_ffff);
    let mut wanted = wanted.peekable();
    if wanted.peek().is_none() {
        return Ok(());
    }
    let missing = || "a ZIP64 size is missing".to_owned();
    while extra.len() >= 4 {
        let (id, len) = (le(&extra[..2]), le(&extra[2..4]) as usize);
        let mut body = extra.get(4..4 + len).ok_or_else(missing)?;
        if id == 1 {
            for field in wanted {
                let (value, rest) = body.split_first_chunk::<8>().ok_or_else(missing)?;
                *field = u64::from_le_bytes(*value);
                body = rest;
            }
            return Ok(());
        }
        extra = &extra[4 + len..];
    }
    Err(missing())
}

fn le(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn shown(name: &str) -> String {
    crate::checkpoint::quote(name)
}
