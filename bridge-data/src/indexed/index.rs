//! The `.idx` file.

use std::ops::Range;

use super::{HEADER_LEN, MAGIC, TokenDtype, VERSION};

/// A checked index over the bytes of an `.idx` file.
///
/// Everything is checked once, when it is parsed: sizes against the length of the file before anything is read by
/// them, every sequence against the length of the `.bin` file, every border of a document against its neighbours.
/// The accessors check again what they return, since a mapped file can change under a reader.
#[derive(Debug)]
pub struct Index<B> {
    bytes: B,
    dtype: TokenDtype,
    sequences: u64,
    borders: u64,
    has_modes: bool,
    tokens_len: u64,
}

impl<B: AsRef<[u8]>> Index<B> {
    /// Parses an index whose tokens are in a file of `tokens_len` bytes.
    ///
    /// # Errors
    /// A sentence that says what was found and expected, and where.
    pub fn parse(bytes: B, tokens_len: u64) -> Result<Self, String> {
        let file = bytes.as_ref();
        let file_len = file.len() as u64;
        let Some((header, _)) = file.split_first_chunk::<HEADER_LEN>() else {
            return Err(format!(
                "it has {file_len} bytes, and the header alone takes {HEADER_LEN}"
            ));
        };
        if !header.starts_with(MAGIC) {
            return Err(format!(
                "it begins with {:02x?}, expected {MAGIC:02x?} (`MMIDIDX`); older formats have to be made anew",
                &header[..9]
            ));
        }
        let version = u64_at(header, 9);
        if version != VERSION {
            return Err(format!("it has version {version}, expected {VERSION}"));
        }
        let dtype = TokenDtype::from_code(header[17])
            .ok_or_else(|| format!("dtype code {} is not one of 1 to 8", header[17]))?;
        let (sequences, borders) = (u64_at(header, 18), u64_at(header, 26));
        if borders == 0 {
            return Err("it has no document borders, expected at least one (0)".into());
        }
        let expected = sequences
            .checked_mul(12)
            .and_then(|sum| sum.checked_add(borders.checked_mul(8)?))
            .and_then(|sum| sum.checked_add(HEADER_LEN as u64));
        let with_modes = expected.and_then(|sum| sum.checked_add(sequences));
        let (Some(expected), Some(with_modes)) = (expected, with_modes) else {
            return Err(format!(
                "{sequences} sequences and {borders} document borders cannot fit into any file"
            ));
        };
        if file_len != expected && file_len != with_modes {
            return Err(format!(
                "it has {file_len} bytes, but {sequences} sequences and {borders} document borders take {expected} \
                 (or {with_modes} with modes); it is truncated or damaged"
            ));
        }
        let has_modes = sequences > 0 && file_len == with_modes;
        let index = Self {
            bytes,
            dtype,
            sequences,
            borders,
            has_modes,
            tokens_len,
        };
        index.check()?;
        Ok(index)
    }

    fn check(&self) -> Result<(), String> {
        for sequence in 0..self.sequences {
            self.sequence(sequence)?;
        }
        let mut last = 0;
        for border in 0..self.borders {
            let at = self.border(border)?;
            if at < last || (border == 0 && at != 0) {
                return Err(format!(
                    "document {border} begins at sequence {at}, before the end of its predecessor ({last}), or not at 0"
                ));
            }
            last = at;
        }
        if last != self.sequences {
            return Err(format!(
                "its documents end at sequence {last} of {}",
                self.sequences
            ));
        }
        Ok(())
    }

    /// How tokens are stored.
    pub fn dtype(&self) -> TokenDtype {
        self.dtype
    }

    /// Number of sequences.
    pub fn sequences(&self) -> u64 {
        self.sequences
    }

    /// Number of documents, each one or more sequences.
    pub fn documents(&self) -> u64 {
        self.borders - 1
    }

    /// Length of a sequence in tokens, and its offset in the `.bin` file in bytes.
    ///
    /// # Errors
    /// If there is no such sequence, or it does not lie in the `.bin` file.
    pub fn sequence(&self, sequence: u64) -> Result<(u64, u64), String> {
        let missing = || format!("there is no sequence {sequence}; it has {}", self.sequences);
        let place = self.place(sequence, self.sequences).ok_or_else(missing)?;
        let len = self.i32(HEADER_LEN + place * 4).ok_or_else(missing)?;
        let offset = self
            .i64(HEADER_LEN + self.sequences as usize * 4 + place * 8)
            .ok_or_else(missing)?;
        let size = self.dtype.size() as u64;
        let (Ok(tokens), Ok(start)) = (u64::try_from(len), u64::try_from(offset)) else {
            return Err(format!(
                "sequence {sequence} has length {len} and offset {offset}, expected numbers from 0"
            ));
        };
        match start.checked_add(tokens * size) {
            Some(end) if end <= self.tokens_len => Ok((tokens, start)),
            _ => Err(format!(
                "sequence {sequence} takes {} bytes from {start} on, but the .bin file has {} bytes",
                tokens * size,
                self.tokens_len
            )),
        }
    }

    /// The sequences of a document.
    ///
    /// # Errors
    /// If there is no such document.
    pub fn document(&self, document: u64) -> Result<Range<u64>, String> {
        let end = document
            .checked_add(1)
            .ok_or_else(|| format!("there is no document {document}"))?;
        Ok(self.border(document)?..self.border(end)?)
    }

    /// The mode of a sequence, in multimodal data.
    pub fn mode(&self, sequence: u64) -> Option<i8> {
        let place = self
            .has_modes
            .then(|| self.place(sequence, self.sequences))
            .flatten()?;
        let start = HEADER_LEN + self.sequences as usize * 12 + self.borders as usize * 8;
        self.bytes
            .as_ref()
            .get(start + place)
            .map(|byte| *byte as i8)
    }

    fn border(&self, border: u64) -> Result<u64, String> {
        let missing = || {
            format!(
                "there is no document border {border}; it has {}",
                self.borders
            )
        };
        let place = self.place(border, self.borders).ok_or_else(missing)?;
        let value = self
            .i64(HEADER_LEN + self.sequences as usize * 12 + place * 8)
            .ok_or_else(missing)?;
        u64::try_from(value).map_err(|_| {
            format!("document {border} begins at sequence {value}, expected a number from 0")
        })
    }

    /// `index` as a place in a list of `count`, all of which lie in the file, so that offsets computed from it do not
    /// overflow.
    fn place(&self, index: u64, count: u64) -> Option<usize> {
        if index < count {
            usize::try_from(index).ok()
        } else {
            None
        }
    }

    fn i32(&self, at: usize) -> Option<i32> {
        self.bytes
            .as_ref()
            .get(at..)?
            .first_chunk()
            .map(|bytes| i32::from_le_bytes(*bytes))
    }

    fn i64(&self, at: usize) -> Option<i64> {
        self.bytes
            .as_ref()
            .get(at..)?
            .first_chunk()
            .map(|bytes| i64::from_le_bytes(*bytes))
    }
}

fn u64_at(header: &[u8; HEADER_LEN], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&header[at..at + 8]);
    u64::from_le_bytes(bytes)
}
