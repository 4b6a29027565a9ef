//! What every dataset of training samples can do.

use crate::batch::Sample;
use crate::error::Result;

/// An endless, random-access sequence of training samples.
///
/// After [`samples_per_epoch`](Self::samples_per_epoch) samples the data begins again in another order. A sample depends
/// on nothing but its index and the options that the dataset was made with.
pub trait Dataset: Send + Sync {
    /// Tokens in a sample.
    fn seq_length(&self) -> usize;

    /// Samples in one pass over the data, at least 1.
    fn samples_per_epoch(&self) -> u64;

    /// The sample with the given global index.
    ///
    /// # Errors
    /// If the data cannot be read or holds something that is not a token id.
    fn sample(&self, index: u64) -> Result<Sample>;

    /// One line for people: where the data comes from and how much there is.
    fn describe(&self) -> String;

    /// Changes when the samples or their order would: kept with a checkpoint, so that a run resumed on other data can say
    /// so. Covers sizes, options and seeds, not the tokens themselves.
    fn fingerprint(&self) -> Fingerprint;
}

/// A 64-bit FNV-1a hash of what a dataset's samples depend on. Stable between versions, machines and paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(pub u64);

impl Fingerprint {
    /// The fingerprint of nothing but a name, the kind of dataset.
    pub fn new(kind: &str) -> Self {
        Self(0xcbf2_9ce4_8422_2325).bytes(kind.as_bytes())
    }

    /// Adds a number.
    #[must_use]
    pub fn number(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn bytes(self, bytes: &[u8]) -> Self {
        Self(bytes.iter().fold(self.0, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        }))
    }
}

impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
