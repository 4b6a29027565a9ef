//! What a forward pass needs to know besides its input: which tokens, at which positions, and what came before.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bridge_core::LayoutSpec;
use bridge_core::config::{RopeConfig, RopeStyle};
use bridge_ops::{
    Float, Int, KvCache, Ops, RotaryTable, ValidTokens, float_from_f32, int_from_i64,
};
use bridge_parallel::{ParallelContext, SequenceShard};

use crate::auxiliary::AuxiliaryLosses;
use crate::expert_choices::ExpertChoices;
use crate::layers::rotary_table;

/// The position of each token in its text, which is what rotary embeddings rotate by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Positions {
    /// Every row holds positions `start`, `start + 1`, ...; of a row in parts, each rank its own of them.
    From(usize),
    /// Positions given one by one, as `[batch, seq]` in row-major order: packed documents start again at 0.
    Explicit(Arc<[u32]>),
}

/// The surroundings of one forward pass: token ids, positions, document boundaries, and the keys and values of earlier
/// tokens.
///
/// A context is made per micro-batch and read by every segment; rotary tables are computed when first asked for and
/// shared by the layers.
///
/// ```
/// use bridge_models::ForwardContext;
/// use burn_flex::Flex;
/// // Two rows of three tokens.
/// let ctx = ForwardContext::<Flex>::new(&[5, 6, 7, 1, 2, 3], [2, 3], &Default::default());
/// assert_eq!((ctx.batch(), ctx.seq(), ctx.last_position()), (2, 3, 2));
/// ```
pub struct ForwardContext<'a, B: Ops> {
    input_ids: Int<B>,
    device: B::Device,
    batch: usize,
    seq: usize,
    positions: Positions,
    last_position: usize,
    shard: SequenceShard,
    cu_seqlens: Option<Arc<[usize]>>,
    cache: Option<&'a DecoderCache<B>>,
    auxiliary: Option<&'a AuxiliaryLosses<B>>,
    expert_choices: Option<&'a ExpertChoices<B>>,
    pass: Option<u64>,
    tables: Mutex<Vec<CachedTable<B>>>,
}

/// A rotary table and what it was made from.
struct CachedTable<B: Ops> {
    rope: RopeConfig,
    rotary_dim: usize,
    style: RopeStyle,
    table: RotaryTable<B>,
}

impl<'a, B: Ops> ForwardContext<'a, B> {
    /// A context for token ids `[batch, seq]` in row-major order, at positions 0, 1, ... of each row.
    ///
    /// # Panics
    /// If the number of ids is not `batch * seq`, or zero.
    pub fn new(input_ids: &[u32], [batch, seq]: [usize; 2], device: &B::Device) -> Self {
        let shard = SequenceShard::new(seq, &LayoutSpec::default(), 0);
        Self::sharded(input_ids, [batch, seq], shard, device)
    }

    /// The part of a context that a rank has. Everything is given for whole rows, here and to the `with_` methods; the
    /// rank takes its own, and pads it.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn for_rank(input_ids: &[u32], shape: [usize; 2], ctx: &ParallelContext<B>) -> Self {
        let shard = SequenceShard::new(shape[1], ctx.layout(), ctx.coords().cp);
        Self::sharded(input_ids, shape, shard, ctx.device())
    }

    fn sharded(
        input_ids: &[u32],
        [batch, seq]: [usize; 2],
        shard: SequenceShard,
        device: &B::Device,
    ) -> Self {
        assert!(
            !input_ids.is_empty() && input_ids.len() == batch * seq,
            "{} token ids cannot fill a batch of [{batch}, {seq}]",
            input_ids.len()
        );
        let ids: Vec<i64> = input_ids.iter().map(|id| i64::from(*id)).collect();
        // Any token will do for padding: under a causal mask nothing before it sees it.
        let ids = shard.take(&ids, 0);
        Self {
            input_ids: int_from_i64::<B>(&ids, &[batch, shard.local_seq()], device),
            device: device.clone(),
            batch,
            seq: shard.local_seq(),
            positions: Positions::From(0),
            last_position: seq - 1,
            shard,
            cu_seqlens: None,
            cache: None,
            auxiliary: None,
            expert_choices: None,
            pass: None,
            tables: Mutex::default(),
        }
    }

    /// The same context for a training pass with this key: see [`Tape::for_pass`](bridge_ops::Tape::for_pass).
    pub fn for_pass(mut self, key: Option<u64>) -> Self {
        self.pass = key;
        self
    }

    /// The key of the training pass, if this is one.
    pub fn pass(&self) -> Option<u64> {
        self.pass
    }

    /// The same context at other positions.
    ///
    /// # Panics
    /// If explicit positions are not one per token.
    pub fn with_positions(mut self, positions: Positions) -> Self {
        (self.positions, self.last_position) = match positions {
            Positions::From(start) => (positions, start + self.shard.seq() - 1),
            Positions::Explicit(given) => {
                let (found, expected) = (given.len(), self.batch * self.shard.seq());
                assert_eq!(
                    found,
                    expected,
                    "one position per token of [{}, {}]",
                    self.batch,
                    self.shard.seq()
                );
                let last = given.iter().max().map_or(0, |last| *last as usize);
                let own = if self.shard.is_whole() {
                    given
                } else {
                    self.shard.take(&given, 0).into()
                };
                (Positions::Explicit(own), last)
            }
        };
        self.tables = Mutex::default();
        self
    }

    /// The same context with several documents packed into a row: attention does not cross from one to another.
    /// `cu_seqlens` are offsets `[0, l1, l1 + l2, .., batch * seq]` into the tokens in row-major order; a document does
    /// not cross from one row to the next. Positions are a matter of their own: see [`Self::with_positions`].
    pub fn with_documents(mut self, cu_seqlens: Arc<[usize]>) -> Self {
        self.cu_seqlens = Some(if self.shard.padded_seq() == self.shard.seq() {
            cu_seqlens
        } else {
            self.shard.pad_documents(&cu_seqlens).into()
        });
        self
    }

    /// The same context after the tokens in `cache`: positions go on where the cache ends, and each layer's keys and
    /// values are added to it.
    pub fn with_cache(self, cache: &'a DecoderCache<B>) -> Self {
        let start = cache.len();
        Self {
            cache: Some(cache),
            ..self.with_positions(Positions::From(start))
        }
    }

    /// The same context in a training step that has losses besides that of the next token.
    pub fn with_auxiliary(mut self, auxiliary: &'a AuxiliaryLosses<B>) -> Self {
        self.auxiliary = Some(auxiliary);
        self
    }

    /// The losses besides that of the next token, in training.
    pub fn auxiliary(&self) -> Option<&'a AuxiliaryLosses<B>> {
        self.auxiliary
    }

    /// The same context in a pass whose routers write their choices down, or make given ones.
    pub fn with_expert_choices(mut self, choices: &'a ExpertChoices<B>) -> Self {
        self.expert_choices = Some(choices);
        self
    }

    /// Where routers write their choices down, or which they are to make.
    pub fn expert_choices(&self) -> Option<&'a ExpertChoices<B>> {
        self.expert_choices
    }

    /// Token ids: `[batch, seq]`.
    pub fn input_ids(&self) -> &Int<B> {
        &self.input_ids
    }

    /// Number of rows.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Number of tokens in a row, as far as this rank has them.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// Which part of each row this is.
    pub fn shard(&self) -> &SequenceShard {
        &self.shard
    }

    /// Which of the tokens here are none but padding, in row-major order of part `part[1]` of `part[0]` equal ones that
    /// every row is cut into; `None` where there is no padding at all.
    pub fn valid_tokens(&self, part: [usize; 2]) -> Option<ValidTokens<B>> {
        if self.shard.padded_seq() == self.shard.seq() {
            return None;
        }
        let [parts, index] = part;
        let length = self.seq / parts;
        let own = self.shard.ranges().into_iter().flatten();
        let row: Vec<f32> = own
            .skip(index * length)
            .take(length)
            .map(|position| f32::from(u8::from(position < self.shard.seq())))
            .collect();
        let mask = row.repeat(self.batch);
        Some(ValidTokens {
            count: mask.iter().sum::<f32>() as usize,
            mask: float_from_f32::<B>(&mask, &[mask.len()], &self.device),
        })
    }

    /// What the tokens here are to predict, from what all tokens are: `[batch, seq]` in row-major order to one number per
    /// token here, [`IGNORED_TARGET`] for padding.
    pub fn own_targets(&self, targets: &[i64]) -> Vec<i64> {
        self.shard.take(targets, IGNORED_TARGET)
    }

    /// Where the tensors live.
    pub fn device(&self) -> &B::Device {
        &self.device
    }

    /// The position of each token here.
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// The positions here row by row, as few rows as there are different ones: one if all rows are alike.
    pub fn rows_of_positions(&self) -> (usize, Vec<usize>) {
        match &self.positions {
            Positions::From(start) => {
                let own = self.shard.ranges().into_iter().flatten();
                (1, own.map(|position| start + position).collect())
            }
            Positions::Explicit(positions) => {
                let positions = positions.iter().map(|position| *position as usize);
                (self.batch, positions.collect())
            }
        }
    }

    /// The highest position of any token of these rows, wherever it is.
    pub fn last_position(&self) -> usize {
        self.last_position
    }

    /// Offsets of packed documents in whole rows, padding included, if there are several in a row.
    pub fn cu_seqlens(&self) -> Option<&Arc<[usize]>> {
        self.cu_seqlens.as_ref()
    }

    /// Keys and values of earlier tokens, in generation.
    pub fn cache(&self) -> Option<&'a DecoderCache<B>> {
        self.cache
    }

    /// Cosines and sines for this context's positions.
    ///
    /// The first call for a combination computes the table (on the host, in f64 from f32 angles); later calls share it.
    pub fn rotary_table(
        &self,
        rope: &RopeConfig,
        rotary_dim: usize,
        style: RopeStyle,
    ) -> RotaryTable<B> {
        let mut tables = lock(&self.tables);
        let known = tables
            .iter()
            .find(|t| t.rotary_dim == rotary_dim && t.style == style && t.rope == *rope);
        if let Some(known) = known {
            return known.table.clone();
        }
        let table = rotary_table(self, rope, rotary_dim, style);
        tables.push(CachedTable {
            rope: rope.clone(),
            rotary_dim,
            style,
            table: table.clone(),
        });
        table
    }
}

/// What a model keeps of the tokens that it has seen, layer by layer, for generation: keys and values in layers with
/// attention, a state of fixed size in recurrent ones.
#[derive(Debug)]
pub struct DecoderCache<B: Ops> {
    layers: Vec<Mutex<KvCache<B>>>,
    recurrent: Vec<Mutex<RecurrentState<B>>>,
    capacity: usize,
}

/// What a recurrent layer keeps of the tokens that it has seen.
#[derive(Debug)]
pub struct RecurrentState<B: Ops> {
    /// The last inputs of each of the layer's short convolutions: `[batch, taps - 1, channels]`.
    pub histories: [Option<Float<B>>; 3],
    /// The state of the recurrence: `[batch, heads, rows, columns]`.
    pub state: Option<Float<B>>,
    len: usize,
}

impl<B: Ops> RecurrentState<B> {
    /// Takes over the state after `tokens` more tokens.
    pub fn advance(&mut self, state: Float<B>, tokens: usize) {
        self.state = Some(state);
        self.len += tokens;
    }
}

impl<B: Ops> Default for RecurrentState<B> {
    fn default() -> Self {
        Self {
            histories: [None, None, None],
            state: None,
            len: 0,
        }
    }
}

impl<B: Ops> DecoderCache<B> {
    /// An empty cache for `layers` layers and `capacity` tokens. Memory is taken when the first tokens come.
    pub fn new(layers: usize, capacity: usize) -> Self {
        Self {
            layers: (0..layers).map(|_| Mutex::default()).collect(),
            recurrent: (0..layers).map(|_| Mutex::default()).collect(),
            capacity,
        }
    }

    /// Number of tokens in the cache: 0 for a model that keeps nothing of them. Not meaningful while a forward pass
    /// runs, when some layers are ahead of others.
    pub fn len(&self) -> usize {
        let attended = self.layers.iter().map(|layer| lock(layer).len());
        let recurrent = self.recurrent.iter().map(|layer| lock(layer).len);
        attended.chain(recurrent).max().unwrap_or(0)
    }

    /// Whether no token is in the cache.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many tokens memory is taken for at first; more tokens make the cache grow.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Keys and values of layer `layer`.
    ///
    /// # Panics
    /// If the model has fewer layers.
    pub fn layer(&self, layer: usize) -> MutexGuard<'_, KvCache<B>> {
        lock(&self.layers[layer])
    }

    /// The state of recurrent layer `layer`.
    ///
    /// # Panics
    /// If the model has fewer layers.
    pub fn recurrent(&self, layer: usize) -> MutexGuard<'_, RecurrentState<B>> {
        lock(&self.recurrent[layer])
    }
}

/// A cache that a panicking thread held is as good as any: appending replaces its parts whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What each token should have predicted, and how much its loss counts.
#[derive(Debug, Clone)]
pub struct Targets<B: Ops> {
    /// Token ids to be predicted, already shifted, [`IGNORED_TARGET`] for no loss: `[batch * seq]`.
    pub ids: Int<B>,
    /// The gradient that each token's loss will be seeded with, `[batch * seq]` f32, where it is known before the head
    /// runs, as in training (one over the number of tokens). A head may then compute its gradients in the forward pass,
    /// which saves a product with the vocabulary matrix; the result must be seeded with exactly these numbers.
    pub loss_gradient: Option<Float<B>>,
}

/// Marks a target that counts for no loss.
pub const IGNORED_TARGET: i64 = -100;

impl<B: Ops> Targets<B> {
    /// Targets whose weight in the total loss is not known yet.
    pub fn new(ids: &[i64], device: &B::Device) -> Self {
        Self {
            ids: int_from_i64::<B>(ids, &[ids.len()], device),
            loss_gradient: None,
        }
    }

    /// Targets of a step that minimises `sum of losses * weight`, `weight` usually being one over the number of
    /// targets that count in the whole step.
    pub fn weighted(ids: &[i64], weight: f32, device: &B::Device) -> Self {
        let loss_gradient = float_from_f32::<B>(&vec![weight; ids.len()], &[ids.len()], device);
        Self {
            loss_gradient: Some(loss_gradient),
            ..Self::new(ids, device)
        }
    }
}
