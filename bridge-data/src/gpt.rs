//! The pretraining dataset: documents packed into windows.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::batch::{IGNORE_INDEX, Sample};
use crate::dataset::{Dataset, Fingerprint};
use crate::error::{DataError, Result};
use crate::shuffle::{Permutation, Purpose, derive_key};
use crate::token_source::{self, TokenSource};

/// How documents become samples.
#[derive(Clone, Debug, PartialEq)]
pub struct GptOptions {
    /// Tokens in a sample.
    pub seq_length: usize,
    /// Fixes every random order.
    pub seed: u64,
    /// Whether documents, and the windows cut from them, come in random order (another one each epoch). Without it they come
    /// as they are stored.
    pub shuffle: bool,
    /// The token that ends a document. Documents also end where the source says so.
    pub eod: Option<u32>,
    /// Ids must be below this; one that is not is an error, since it would read past the end of an embedding.
    pub vocab_size: Option<usize>,
    /// Whether positions begin again with each document.
    pub reset_position_ids: bool,
    /// Whether attention stays within a document.
    pub reset_attention_mask: bool,
    /// Whether the first token of a document, which nothing before it foretells, has no loss.
    pub eod_mask_loss: bool,
}

impl GptOptions {
    /// Shuffled windows of `seq_length` tokens in which attention and positions run across documents.
    pub fn new(seq_length: usize, seed: u64) -> Self {
        Self {
            seq_length,
            seed,
            shuffle: true,
            eod: None,
            vocab_size: None,
            reset_position_ids: false,
            reset_attention_mask: false,
            eod_mask_loss: false,
        }
    }
}

/// Documents in random order, joined into one stream and cut into windows, which are dealt out in random order.
///
/// ```text
/// documents (shuffled)   [ C C C C ][ A A ][ D D D D D ][ B B B ]
/// windows of 4           |0: C C C C|1: A A D D|2: D D D B|3: B B - -|   labels are the next token of the stream
/// samples (shuffled)     2, 0, 3, 1
/// ```
///
/// Each epoch has its own orders. Within an epoch every token but the first is predicted exactly once: windows overlap
/// by the one token that ends one and begins the next, and the last window, if short, is filled up with places that have
/// no loss.
///
/// Nothing is stored on disk and next to nothing in memory: orders are computed ([`Permutation`]), and a place in the
/// stream is found with the total length of every 256 documents, 8 bytes each.
pub struct GptDataset {
    source: Arc<dyn TokenSource>,
    /// Which of the source's documents take part.
    documents: Range<u64>,
    options: GptOptions,
    /// Total length of those documents.
    tokens: u64,
    samples_per_epoch: u64,
    /// The epochs used last, newest at the back.
    epochs: Mutex<VecDeque<Arc<EpochOrder>>>,
}

/// Epochs kept: the current one, and the one before for whoever still finishes it.
const EPOCHS_KEPT: usize = 2;

/// Documents in a chunk. Finding a place walks half of one on average: some microseconds.
const CHUNK: u64 = 256;

/// The orders of one epoch.
struct EpochOrder {
    epoch: u64,
    documents: Option<Permutation>,
    samples: Option<Permutation>,
    /// Tokens before each chunk of documents: `[chunks]`.
    chunk_starts: Vec<u64>,
}

impl EpochOrder {
    /// The document at a place of the stream, counted from 0.
    fn document(&self, place: u64) -> u64 {
        self.documents
            .as_ref()
            .map_or(place, |order| order.get(place))
    }
}

impl GptDataset {
    /// A dataset over the documents `documents` of a source.
    ///
    /// # Errors
    /// If the window is empty, or the documents have fewer than two tokens together.
    pub fn new(
        source: Arc<dyn TokenSource>,
        documents: Range<u64>,
        options: GptOptions,
    ) -> Result<Self> {
        if options.seq_length == 0 {
            let reason = "a sample needs at least one token".into();
            return Err(DataError::BadOption {
                option: "seq_length",
                value: "0".into(),
                reason,
            });
        }
        if documents.start > documents.end || documents.end > source.documents() {
            let (index, count) = (documents.end, source.documents());
            return Err(DataError::NoSequence {
                place: source.describe(),
                index,
                count,
            });
        }
        let count = documents.end - documents.start;
        let order = EpochOrder::new(source.as_ref(), &documents, &options, 0)?;
        let tokens = order.1;
        if tokens < 2 {
            return Err(DataError::TooFewTokens {
                what: source.describe(),
                documents: count,
                tokens,
            });
        }
        let samples_per_epoch = (tokens - 1).div_ceil(options.seq_length as u64);
        let order = Arc::new(order.0.with_samples(samples_per_epoch, &options));
        Ok(Self {
            source,
            documents,
            options,
            tokens,
            samples_per_epoch,
            epochs: Mutex::new([order].into()),
        })
    }

    /// Number of documents.
    pub fn documents(&self) -> u64 {
        self.documents.end - self.documents.start
    }

    /// Number of tokens in an epoch.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The options it was made with.
    pub fn options(&self) -> &GptOptions {
        &self.options
    }

    fn epoch(&self, epoch: u64) -> Result<Arc<EpochOrder>> {
        let epoch = if self.options.shuffle { epoch } else { 0 };
        // A panic elsewhere cannot leave the queue half changed, so its content stays good.
        let mut kept = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = kept.iter().find(|known| known.epoch == epoch) {
            return Ok(known.clone());
        }
        let (order, _) =
            EpochOrder::new(self.source.as_ref(), &self.documents, &self.options, epoch)?;
        let order = Arc::new(order.with_samples(self.samples_per_epoch, &self.options));
        if kept.len() == EPOCHS_KEPT {
            kept.pop_front();
        }
        kept.push_back(order.clone());
        Ok(order)
    }

    /// The tokens `start..start + len` of an epoch's stream, and the places among them where a document begins (not 0).
    fn window(&self, order: &EpochOrder, start: u64, len: u64) -> Result<(Vec<u32>, Vec<usize>)> {
        let chunk = order
            .chunk_starts
            .partition_point(|&first| first <= start)
            .saturating_sub(1);
        let mut place = chunk as u64 * CHUNK;
        let mut skip = start - order.chunk_starts.get(chunk).copied().unwrap_or(0);
        let mut tokens = Vec::with_capacity(len as usize);
        let mut starts = Vec::new();
        while (tokens.len() as u64) < len && place < self.documents() {
            let document = self.documents.start + order.document(place);
            let document_len = self.source.document_len(document)?;
            place += 1;
            if skip >= document_len {
                skip -= document_len;
                continue;
            }
            if !tokens.is_empty() {
                starts.push(tokens.len());
            }
            let before = tokens.len();
            let end = document_len.min(skip + len - before as u64);
            self.source.read(document, skip..end, &mut tokens)?;
            self.check_ids(document, skip, &tokens[before..])?;
            skip = 0;
        }
        Ok((tokens, starts))
    }

    fn check_ids(&self, document: u64, start: u64, ids: &[u32]) -> Result<()> {
        let Some(vocab_size) = self.options.vocab_size else {
            return Ok(());
        };
        match ids.iter().position(|&id| id as usize >= vocab_size) {
            None => Ok(()),
            Some(index) => Err(DataError::BadToken {
                place: self.source.describe(),
                index: document,
                position: start + index as u64,
                value: i64::from(ids[index]),
                limit: format!(" below {vocab_size}"),
            }),
        }
    }
}

impl EpochOrder {
    /// The order of documents and the length of the stream.
    fn new(
        source: &dyn TokenSource,
        documents: &Range<u64>,
        options: &GptOptions,
        epoch: u64,
    ) -> Result<(Self, u64)> {
        let count = documents.end - documents.start;
        let order = options
            .shuffle
            .then(|| Permutation::new(count, derive_key(options.seed, Purpose::Documents, epoch)));
        let mut this = Self {
            epoch,
            documents: order,
            samples: None,
            chunk_starts: Vec::new(),
        };
        let totals = (0..count.div_ceil(CHUNK)).into_par_iter().map(|chunk| {
            let places = chunk * CHUNK..count.min((chunk + 1) * CHUNK);
            places
                .map(|place| source.document_len(documents.start + this.document(place)))
                .sum::<Result<u64>>()
        });
        let totals = totals.collect::<Result<Vec<u64>>>()?;
        let mut sum = 0;
        this.chunk_starts = totals
            .into_iter()
            .map(|total| {
                let start = sum;
                sum += total;
                start
            })
            .collect();
        Ok((this, sum))
    }

    fn with_samples(mut self, count: u64, options: &GptOptions) -> Self {
        let key = derive_key(options.seed, Purpose::Samples, self.epoch);
        self.samples = options.shuffle.then(|| Permutation::new(count, key));
        self
    }
}

impl Dataset for GptDataset {
    fn seq_length(&self) -> usize {
        self.options.seq_length
    }

    fn samples_per_epoch(&self) -> u64 {
        self.samples_per_epoch
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let order = self.epoch(index / self.samples_per_epoch)?;
        let place = index % self.samples_per_epoch;
        let number = order
            .samples
            .as_ref()
            .map_or(place, |samples| samples.get(place));
        let seq = self.options.seq_length as u64;
        let start = number * seq;
        let len = (seq + 1).min(self.tokens - start);
        let (tokens, starts) = self.window(&order, start, len)?;
        if tokens.len() as u64 != len {
            // The lengths no longer add up to what they were when the dataset was opened.
            let (place, index) = (self.source.describe(), self.documents.end - 1);
            return Err(DataError::NoTokens {
                place,
                index,
                len: tokens.len() as u64,
                start,
                end: start + len,
            });
        }
        Ok(cut_sample(&tokens, starts, &self.options))
    }

    fn describe(&self) -> String {
        let (documents, tokens, samples) = (self.documents(), self.tokens, self.samples_per_epoch);
        format!(
            "{}: {documents} documents, {tokens} tokens, {samples} samples of {}",
            self.source.describe(),
            self.options.seq_length
        )
    }

    fn fingerprint(&self) -> Fingerprint {
        let o = &self.options;
        token_source::fingerprint(self.source.as_ref(), self.documents.clone(), self.tokens)
            .number(o.seq_length as u64)
            .number(o.seed)
            .number(u64::from(o.shuffle))
            .number(o.eod.map_or(u64::MAX, u64::from))
            .number(
                u64::from(o.reset_position_ids)
                    | u64::from(o.reset_attention_mask) << 1
                    | u64::from(o.eod_mask_loss) << 2,
            )
    }
}

/// A window of up to `seq + 1` tokens as a sample of `seq`: inputs, shifted labels, and what the options ask for at the borders of
/// documents. `starts`: places in the window where a document begins, ascending, without 0.
fn cut_sample(window: &[u32], mut starts: Vec<usize>, options: &GptOptions) -> Sample {
    let seq = options.seq_length;
    let inputs = window.len() - 1;
    if let Some(eod) = options.eod {
        starts.extend((0..inputs).filter(|&at| window[at] == eod).map(|at| at + 1));
        starts.sort_unstable();
        starts.dedup();
    }
    let fill = i64::from(options.eod.unwrap_or(0));
    let mut tokens: Vec<i64> = window[..inputs].iter().map(|&id| i64::from(id)).collect();
    let mut labels: Vec<i64> = window[1..].iter().map(|&id| i64::from(id)).collect();
    tokens.resize(seq, fill);
    labels.resize(seq, IGNORE_INDEX);
    if options.eod_mask_loss {
        for &start in &starts {
            labels[start - 1] = IGNORE_INDEX;
        }
    }
    if inputs < seq && starts.last() != Some(&inputs) {
        // What fills up the window is no part of the last document.
        starts.push(inputs);
    }
    starts.retain(|&start| start < seq);

    let mut position_ids: Vec<i64> = (0..seq as i64).collect();
    if options.reset_position_ids {
        let ends = starts.iter().skip(1).copied().chain([seq]);
        for (&start, end) in starts.iter().zip(ends) {
            position_ids[start..end]
                .iter_mut()
                .zip(0..)
                .for_each(|(position, value)| *position = value);
        }
    }
    let inner = if options.reset_attention_mask {
        starts
    } else {
        Vec::new()
    };
    let boundaries = std::iter::once(0).chain(inner).chain([seq]).collect();
    Sample {
        tokens,
        labels,
        position_ids,
        boundaries,
    }
}

#[cfg(test)]
mod tests;
