//! TensorBoard event files.
//!
//! An event file is a TFRecord stream: for each record its length (u64, little endian), the masked CRC-32C of those eight
//! bytes, the record, and the masked CRC-32C of the record. Each record is a protobuf `Event`. Of that message, and of
//! the `Summary` in it, only the few fields of scalar curves are needed, so they are encoded by hand.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::callback::{Callback, EvalReport, StepReport};
use crate::error::{Error, Result};

/// Writes the curves of a run for TensorBoard, under Megatron's names.
#[derive(Debug)]
pub struct TensorBoard {
    writer: EventWriter,
}

impl TensorBoard {
    /// Starts a new event file in `dir`.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn create(dir: &Path) -> Result<Self> {
        let writer = EventWriter::create(dir)
            .map_err(|source| Error::io("create a TensorBoard file in", dir, source))?;
        Ok(Self { writer })
    }

    fn write(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let written = self.writer.scalars(step, values);
        written.map_err(|source| Error::io("write", self.writer.path(), source))
    }
}

impl Callback for TensorBoard {
    fn on_step_end(&mut self, step: &StepReport) -> Result<()> {
        let mut values = vec![
            ("lm loss", step.loss),
            ("learning-rate", step.lr),
            ("grad-norm", step.grad_norm),
            ("iteration-time", step.elapsed.as_secs_f64()),
            ("throughput/tokens_per_sec", step.tokens_per_s()),
        ];
        if let Some(tflops) = step.tflops_per_s {
            values.push(("throughput/tflops", tflops));
        }
        let losses = step.auxiliary_losses.iter();
        values.extend(losses.map(|(name, loss)| (name.as_ref(), *loss)));
        self.write(step.iteration, &values)
    }

    fn on_eval(&mut self, eval: &EvalReport) -> Result<()> {
        let values = [
            ("lm loss validation", eval.loss),
            ("lm loss validation ppl", eval.loss.exp()),
        ];
        self.write(eval.iteration, &values)
    }
}

/// Writes scalar curves to one event file.
#[derive(Debug)]
pub struct EventWriter {
    file: File,
    path: PathBuf,
}

impl EventWriter {
    /// Creates a new event file in `dir`, which is created if need be. TensorBoard reads all event files of a folder in
    /// the order of their names, which start with the time, so a continued run adds a file.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn create(dir: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let now = seconds_since_epoch();
        // The process id keeps two runs that start in the same second apart.
        let name = format!(
            "events.out.tfevents.{:010}.bridge.{}",
            now as u64,
            std::process::id()
        );
        let path = dir.join(name);
        let mut writer = Self {
            file: File::create(&path)?,
            path,
        };
        let mut event = Message::new();
        event.double(EVENT_WALL_TIME, now);
        event.bytes(EVENT_FILE_VERSION, b"brain.Event:2");
        writer.record(&event.0)?;
        Ok(writer)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a point at `step` to each curve.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> io::Result<()> {
        let mut event = Message::new();
        event.double(EVENT_WALL_TIME, seconds_since_epoch());
        event.varint(EVENT_STEP, step);
        let mut summary = Message::new();
        for (tag, value) in values {
            let mut entry = Message::new();
            entry.bytes(VALUE_TAG, tag.as_bytes());
            entry.float(VALUE_SIMPLE_VALUE, *value as f32);
            summary.bytes(SUMMARY_VALUE, &entry.0);
        }
        event.bytes(EVENT_SUMMARY, &summary.0);
        self.record(&event.0)
    }

    fn record(&mut self, data: &[u8]) -> io::Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + 16);
        record.extend_from_slice(&length);
        record.extend_from_slice(&masked_crc32c(&length).to_le_bytes());
        record.extend_from_slice(data);
        record.extend_from_slice(&masked_crc32c(data).to_le_bytes());
        // One write per record, so that a reader that follows the file sees whole records.
        self.file.write_all(&record)
    }
}

fn seconds_since_epoch() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map(|d| d.as_secs_f64())
        .unwrap_or_default()
}

// Field numbers of tensorflow/core/util/event.proto and tensorflow/core/framework/summary.proto.
const EVENT_WALL_TIME: u32 = 1;
const EVENT_STEP: u32 = 2;
const EVENT_FILE_VERSION: u32 = 3;
const EVENT_SUMMARY: u32 = 5;
const SUMMARY_VALUE: u32 = 1;
const VALUE_TAG: u32 = 1;
const VALUE_SIMPLE_VALUE: u32 = 2;

/// A protobuf message being written.
struct Message(Vec<u8>);

impl Message {
    const WIRE_VARINT: u32 = 0;
    const WIRE_64BIT: u32 = 1;
    const WIRE_BYTES: u32 = 2;
    const WIRE_32BIT: u32 = 5;

    fn new() -> Self {
        Self(Vec::new())
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn tag(&mut self, field: u32, wire: u32) {
        self.raw_varint(u64::from(field << 3 | wire));
    }

    fn varint(&mut self, field: u32, value: u64) {
        self.tag(field, Self::WIRE_VARINT);
        self.raw_varint(value);
    }

    fn double(&mut self, field: u32, value: f64) {
        self.tag(field, Self::WIRE_64BIT);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn float(&mut self, field: u32, value: f32) {
        self.tag(field, Self::WIRE_32BIT);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u32, value: &[u8]) {
        self.tag(field, Self::WIRE_BYTES);
        self.raw_varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }
}

/// The CRC as TFRecord stores it: rotated and offset, since a CRC of data that holds CRCs is weak.
fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), reflected.
fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = crc32c_table();
    !data.iter().fold(!0, |crc, byte| {
        TABLE[usize::from(crc as u8 ^ byte)] ^ (crc >> 8)
    })
}

const fn crc32c_table() -> [u32; 256] {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ POLYNOMIAL
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_matches_the_published_test_vectors() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    /// Splits an event file into its records, checking every length and CRC.
    fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let (length, rest) = bytes.split_at(8);
            let (length_crc, rest) = rest.split_at(4);
            assert_eq!(masked_crc32c(length).to_le_bytes(), length_crc);
            let (data, rest) =
                rest.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
            let (data_crc, rest) = rest.split_at(4);
            assert_eq!(masked_crc32c(data).to_le_bytes(), data_crc);
            all.push(data.to_vec());
            bytes = rest;
        }
        all
    }

    #[test]
    fn a_point_is_encoded_as_the_protobuf_schema_says() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path()).unwrap();
        writer.scalars(300, &[("lm loss", 2.5)]).unwrap();
        let records = records(&std::fs::read(writer.path()).unwrap());
        assert_eq!(records.len(), 2);
        assert_eq!(
            &records[0][9..],
            b"\x1a\x0dbrain.Event:2",
            "after the nine bytes of the time"
        );
        // step = 300; summary { value { tag: "lm loss" simple_value: 2.5 } }
        assert_eq!(
            &records[1][9..],
            b"\x10\xac\x02\x2a\x10\x0a\x0e\x0a\x07lm loss\x15\x00\x00\x20\x40"
        );
    }
}
