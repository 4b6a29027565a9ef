//! Moving whole tensors: from stored byte ranges, through strided views and casts, into a sink, on a few threads and
//! within a memory budget.

use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::Progress;
use super::strided::{self, Paired};
use crate::checkpoint::RangeReader;
use crate::dtype::{DType, cast_bytes};
use crate::error::{Error, Result};
use crate::mapping::{View, ViewPair};
use crate::quant::{Band, MXFP4_BLOCK, QuantScheme, quantize_band};

/// Some elements of a target tensor, and where they are stored.
pub(super) struct Segment<'a> {
    /// Which elements of the target tensor.
    pub(super) target: View,
    /// Which elements of the stored one, in the same order.
    pub(super) source: View,
    /// Type of the stored elements.
    pub(super) dtype: DType,
    pub(super) reader: SegmentReader<'a>,
    /// Byte of `reader` at which element 0 of the stored tensor lies.
    pub(super) base: u64,
}

/// Where a segment's bytes come from.
#[derive(Clone)]
pub(super) enum SegmentReader<'a> {
    /// A file, as it is.
    Stored(&'a dyn RangeReader),
    /// Values that are computed as they are read.
    Computed(Arc<dyn RangeReader + 'a>),
}

impl<'a> From<&'a dyn RangeReader> for SegmentReader<'a> {
    fn from(reader: &'a dyn RangeReader) -> Self {
        Self::Stored(reader)
    }
}

impl<'a> Deref for SegmentReader<'a> {
    type Target = dyn RangeReader + 'a;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Stored(reader) => *reader,
            Self::Computed(reader) => reader.as_ref(),
        }
    }
}

/// A tensor to be made of segments that meet each of its elements once.
pub(super) struct Transfer<'a> {
    /// The sink's number for it.
    pub(super) tensor: usize,
    pub(super) name: String,
    pub(super) numel: usize,
    /// Type to write.
    pub(super) dtype: DType,
    pub(super) segments: Vec<Segment<'a>>,
}

/// Where tensors are written to.
pub(super) trait Sink: Sync {
    fn write(&self, tensor: usize, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Copies a byte range, in the kernel where that is possible.
    fn copy(
        &self,
        tensor: usize,
        offset: u64,
        reader: &dyn RangeReader,
        start: u64,
        len: u64,
    ) -> Result<()>;

    /// Number of the file that a tensor lies in, where there are several and it is known. A file is locked while it is
    /// written, so threads are kept in different ones.
    fn file(&self, tensor: usize) -> usize {
        let _ = tensor;
        0
    }
}

/// How much a conversion may use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resources {
    pub(super) threads: usize,
    /// Bytes of buffers, all threads together.
    pub(super) memory_budget: usize,
}

impl Resources {
    /// Bytes of one chunk: each thread holds at most the chunk, a span of the source, and the chunk before and after a
    /// cast, which may double its size.
    fn chunk_bytes(&self) -> usize {
        const BUFFERS: usize = 5;
        const MIN: usize = 64 << 10;
        const MAX: usize = 32 << 20;
        (self.memory_budget / (self.threads.max(1) * BUFFERS)).clamp(MIN, MAX)
    }
}

/// Bytes per kernel copy: large enough to cost nothing, small enough for progress to move and a stop to be noticed.
const COPY_BYTES: u64 = 64 << 20;

/// Bytes of values that are computed, or coded, at a time: what a processor's second-level cache holds.
const COMPUTED_BYTES: usize = 256 << 10;

impl<'a> Transfer<'a> {
    /// Size of an element as written. Plans admit types of whole bytes only.
    fn element(&self) -> usize {
        element_bytes(self.dtype)
    }

    /// Size of the tensor as written.
    pub(super) fn bytes(&self) -> u64 {
        self.numel as u64 * self.element() as u64
    }

    /// Makes the tensor in memory.
    pub(super) fn read(&self, resources: Resources) -> Result<Vec<u8>> {
        let mut out = vec![0; self.numel * self.element()];
        self.gather(
            0..self.numel,
            &mut out,
            &mut Buffers::default(),
            resources.chunk_bytes(),
        )?;
        Ok(out)
    }

    /// Makes elements `range` of the tensor in `out`, which has room for just those.
    pub(super) fn read_range(&self, range: Range<usize>, out: &mut [u8]) -> Result<()> {
        const SPAN_BYTES: usize = 16 << 20;
        self.gather(range, out, &mut Buffers::default(), SPAN_BYTES)
    }

    /// The segments as byte ranges (segment, target byte, source byte, length), if all of them are that simple.
    fn byte_ranges(&self) -> Option<Vec<(usize, u64, u64, u64)>> {
        let ranges = self.segments.iter().enumerate().map(|(index, segment)| {
            let pair = ViewPair {
                near: segment.target.clone(),
                far: segment.source.clone(),
            };
            let paired = Paired::new(&pair);
            (paired.is_run() && segment.dtype == self.dtype).then(|| {
                let size = self.element() as u64;
                let start = segment.base + paired.far_offset as u64 * size;
                (
                    index,
                    paired.near_offset as u64 * size,
                    start,
                    paired.numel() as u64 * size,
                )
            })
        });
        ranges.collect()
    }

    /// Fills `out` with elements `range` of the target tensor.
    fn gather(
        &self,
        range: Range<usize>,
        out: &mut [u8],
        buffers: &mut Buffers,
        limit: usize,
    ) -> Result<()> {
        for segment in &self.segments {
            let pair = ViewPair {
                near: segment.target.clone(),
                far: segment.source.clone(),
            };
            for part in pair.within(&[self.numel], std::slice::from_ref(&range)) {
                let paired = Paired::new(&part);
                let size = element_bytes(segment.dtype);
                if segment.dtype == self.dtype {
                    strided::gather(
                        &paired,
                        size,
                        &*segment.reader,
                        segment.base,
                        out,
                        &mut buffers.scratch,
                        limit,
                    )?;
                    continue;
                }
                let numel = paired.numel();
                buffers.stored.resize(numel * size, 0);
                buffers.cast.resize(numel * self.element(), 0);
                let compact = paired.compact();
                let stored = &mut buffers.stored;
                strided::gather(
                    &compact,
                    size,
                    &*segment.reader,
                    segment.base,
                    stored,
                    &mut buffers.scratch,
                    limit,
                )?;
                cast_bytes(
                    &buffers.stored,
                    segment.dtype,
                    self.dtype,
                    &mut buffers.cast,
                )
                .map_err(|error| {
                    Error::InvalidArgument(format!("tensor `{}`: {error}", self.name))
                })?;
                strided::copy(&paired.scatter(), self.element(), &buffers.cast, out);
            }
        }
        Ok(())
    }
}

fn element_bytes(dtype: DType) -> usize {
    // A plan refuses types of less than a byte before any transfer is made.
    dtype.bytes().unwrap_or(1)
}

/// Buffers of one thread; they grow to what is needed and stay.
#[derive(Default)]
struct Buffers {
    out: Vec<u8>,
    scratch: Vec<u8>,
    stored: Vec<u8>,
    cast: Vec<u8>,
    band: Band,
}

/// What a thread does at a time.
enum Item {
    Copy {
        transfer: usize,
        segment: usize,
        target: u64,
        source: u64,
        len: u64,
    },
    Gather {
        transfer: usize,
        elements: Range<usize>,
    },
}

/// Carries out `transfers`. Stops at the first failure, or when `progress` says so.
pub(super) fn run(
    transfers: &[Transfer<'_>],
    sink: &dyn Sink,
    resources: Resources,
    progress: &dyn Progress,
) -> Result<()> {
    let chunk = resources.chunk_bytes();
    let mut queues = Queues::default();
    for item in items(transfers, chunk) {
        let (Item::Copy { transfer, .. } | Item::Gather { transfer, .. }) = &item;
        queues.push(sink.file(transfers[*transfer].tensor), item);
    }
    queues.each(resources.threads, |item, buffers| {
        let (transfer, bytes) = match item {
            Item::Copy {
                transfer,
                segment,
                target,
                source,
                len,
            } => {
                let transfer = &transfers[*transfer];
                sink.copy(
                    transfer.tensor,
                    *target,
                    &*transfer.segments[*segment].reader,
                    *source,
                    *len,
                )?;
                (transfer, *len)
            }
            Item::Gather { transfer, elements } => {
                let transfer = &transfers[*transfer];
                let size = transfer.element();
                let mut out = std::mem::take(&mut buffers.out);
                out.resize(elements.len() * size, 0);
                transfer.gather(elements.clone(), &mut out, buffers, chunk)?;
                sink.write(transfer.tensor, elements.start as u64 * size as u64, &out)?;
                buffers.out = out;
                (transfer, (elements.len() * size) as u64)
            }
        };
        if progress.advance(&transfer.name, bytes) {
            Ok(())
        } else {
            Err(Error::Cancelled)
        }
    })
}

/// Compares pairs of transfers that should make equal bytes; the name of the first of each unequal pair goes to
/// `differ`.
pub(super) fn compare(
    pairs: &[(Transfer<'_>, Transfer<'_>)],
    resources: Resources,
    progress: &dyn Progress,
    differ: &(dyn Fn(&str) + Sync),
) -> Result<()> {
    // Two chunks are held at a time.
    let chunk = resources.chunk_bytes() / 2;
    let mut queues = Queues::default();
    for (index, (one, _)) in pairs.iter().enumerate() {
        for elements in element_ranges(one, chunk) {
            queues.push(
                0,
                Item::Gather {
                    transfer: index,
                    elements,
                },
            );
        }
    }
    queues.each(resources.threads, |item, buffers| {
        let Item::Gather { transfer, elements } = item else {
            return Ok(());
        };
        let (one, other) = &pairs[*transfer];
        let bytes = elements.len() * one.element();
        let mut out = std::mem::take(&mut buffers.out);
        out.resize(2 * bytes, 0);
        let (left, right) = out.split_at_mut(bytes);
        one.gather(elements.clone(), left, buffers, chunk)?;
        other.gather(elements.clone(), right, buffers, chunk)?;
        if left != right {
            differ(&one.name);
        }
        buffers.out = out;
        if progress.advance(&one.name, bytes as u64) {
            Ok(())
        } else {
            Err(Error::Cancelled)
        }
    })
}

/// A tensor to be quantized on its way to the sink.
pub(super) struct Quantization<'a> {
    /// Makes the values, as bf16.
    pub(super) values: Transfer<'a>,
    pub(super) scheme: QuantScheme,
    /// Extent of the last dimension.
    pub(super) cols: usize,
    /// The sink's numbers for codes and scales.
    pub(super) targets: [usize; 2],
    /// The scales that the values came with, and the byte at which they begin.
    pub(super) stored: Option<(&'a dyn RangeReader, u64)>,
}

/// Quantizes tensors into the sink, a band of rows at a time.
pub(super) fn run_quantized(
    jobs: &[Quantization<'_>],
    sink: &dyn Sink,
    resources: Resources,
    progress: &dyn Progress,
) -> Result<()> {
    let chunk = resources.chunk_bytes();
    let mut queues = Queues::default();
    for (index, job) in jobs.iter().enumerate() {
        let height = match job.scheme {
            QuantScheme::Fp8Block { rows, .. } => rows,
            QuantScheme::Mxfp4 => (COMPUTED_BYTES / 2 / job.cols.max(1)).max(1),
        };
        let step = height.saturating_mul(job.cols).max(1);
        let numel = job.values.numel;
        for start in (0..numel).step_by(step) {
            queues.push(
                sink.file(job.targets[0]),
                Item::Gather {
                    transfer: index,
                    elements: start..start.saturating_add(step).min(numel),
                },
            );
        }
    }
    queues.each(resources.threads, |item, buffers| {
        let Item::Gather { transfer, elements } = item else {
            return Ok(());
        };
        let job = &jobs[*transfer];
        let mut out = std::mem::take(&mut buffers.out);
        out.resize(2 * elements.len(), 0);
        job.values
            .gather(elements.clone(), &mut out, buffers, chunk)?;
        let (codes_at, scales_at, scales_len) = match job.scheme {
            QuantScheme::Fp8Block { rows, cols } => {
                let row = elements.start / job.cols.max(1) / rows;
                let len = 4 * job.cols.div_ceil(cols);
                (elements.start, row * len, len)
            }
            QuantScheme::Mxfp4 => {
                let blocks = elements.len() / MXFP4_BLOCK;
                (elements.start / 2, elements.start / MXFP4_BLOCK, blocks)
            }
        };
        let stored = match job.stored {
            None => None,
            Some((reader, base)) => {
                let mut scales = vec![0; scales_len];
                reader.read_exact_at(base + scales_at as u64, &mut scales)?;
                Some(scales)
            }
        };
        let (values, band) = (out.as_chunks::<2>().0, &mut buffers.band);
        quantize_band(job.scheme, values, job.cols, stored.as_deref(), band).map_err(
            |problem| Error::InvalidArgument(format!("tensor `{}` {problem}", job.values.name)),
        )?;
        sink.write(job.targets[0], codes_at as u64, &band.codes)?;
        sink.write(job.targets[1], scales_at as u64, &band.scales)?;
        buffers.out = out;
        if progress.advance(&job.values.name, 2 * elements.len() as u64) {
            Ok(())
        } else {
            Err(Error::Cancelled)
        }
    })
}

fn items(transfers: &[Transfer<'_>], chunk: usize) -> Vec<Item> {
    let mut items = Vec::new();
    for (index, transfer) in transfers.iter().enumerate() {
        let Some(ranges) = transfer.byte_ranges() else {
            items.extend(
                element_ranges(transfer, chunk).map(|elements| Item::Gather {
                    transfer: index,
                    elements,
                }),
            );
            continue;
        };
        for (segment, target, source, len) in ranges {
            let mut at = 0;
            while at < len {
                let step = COPY_BYTES.min(len - at);
                let (target, source) = (target + at, source + at);
                items.push(Item::Copy {
                    transfer: index,
                    segment,
                    target,
                    source,
                    len: step,
                });
                at += step;
            }
        }
    }
    items
}

/// The tensor's elements in ranges of at most `chunk` bytes.
fn element_ranges(
    transfer: &Transfer<'_>,
    chunk: usize,
) -> impl Iterator<Item = Range<usize>> + use<> {
    let numel = transfer.numel;
    let computed = |segment: &Segment<'_>| matches!(segment.reader, SegmentReader::Computed(_));
    let chunk = match transfer.segments.iter().all(computed) {
        // Written while they are still in the cache.
        true => chunk.min(COMPUTED_BYTES),
        false => chunk,
    };
    let widest = transfer
        .segments
        .iter()
        .map(|segment| element_bytes(segment.dtype))
        .max()
        .unwrap_or(1);
    let step = (chunk / widest.max(transfer.element())).max(1);
    (0..numel)
        .step_by(step)
        .map(move |start| start..(start + step).min(numel))
}

/// Items by the file that they are written to.
#[derive(Default)]
struct Queues(Vec<Queue>);

#[derive(Default)]
struct Queue {
    items: Vec<Item>,
    /// The first item that no thread has taken, or beyond the last.
    next: AtomicUsize,
}

impl Queue {
    fn left(&self) -> usize {
        let taken = self.next.load(Ordering::Relaxed);
        self.items.len().saturating_sub(taken)
    }
}

impl Queues {
    fn push(&mut self, file: usize, item: Item) {
        if self.0.len() <= file {
            self.0.resize_with(file + 1, Queue::default);
        }
        self.0[file].items.push(item);
    }

    /// Hands the items to threads, those of a file in order; returns the first error, after which no further item is begun.
    /// Threads begin with different files, and go on with the one of which most is left.
    fn each(
        &self,
        threads: usize,
        work: impl Fn(&Item, &mut Buffers) -> Result<()> + Sync,
    ) -> Result<()> {
        let failed: Mutex<Option<Error>> = Mutex::new(None);
        let stop = AtomicBool::new(false);
        let count: usize = self.0.iter().map(|queue| queue.items.len()).sum();
        let threads = threads.clamp(1, count.max(1));
        let worker = |number: usize| {
            let mut buffers = Buffers::default();
            let mut queue = self.0.get(number * self.0.len() / threads);
            while let Some(current) = queue {
                while let Some(item) = current
                    .items
                    .get(current.next.fetch_add(1, Ordering::Relaxed))
                {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    if let Err(error) = work(item, &mut buffers) {
                        stop.store(true, Ordering::Relaxed);
                        failed
                            .lock()
                            .unwrap_or_else(|poisoned| poisoned.into_inner())
                            .get_or_insert(error);
                        return;
                    }
                }
                queue = self
                    .0
                    .iter()
                    .max_by_key(|queue| queue.left())
                    .filter(|queue| queue.left() > 0);
            }
        };
        std::thread::scope(|scope| {
            for number in 1..threads {
                let worker = &worker;
                scope.spawn(move || worker(number));
            }
            worker(0);
        });
        match failed
            .into_inner()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
        {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}
