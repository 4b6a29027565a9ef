//! What the training engine asks of a model: to run as a list of segments.

use std::collections::HashSet;

use bridge_ops::{DType, Ops, Param, Tape, Var};

use crate::context::{ForwardContext, Targets};
use crate::weights::ParamRole;

/// A model that runs as a list of segments, each with a tape of its own.
///
/// The engine runs forward segment by segment, each on a fresh [`Tape`] whose input is a leaf, and walks back feeding
/// each tape the gradient of its output. That gives recomputation per segment, pipeline stages and early reduction of
/// gradients without any support from the model.
///
/// Segments `0..num_segments() - 1` are hidden ones: segment 0 starts from the token ids of the context, every other
/// from the output of the one before. The last segment is the head and ends in the loss.
///
/// [`Decoder`](crate::Decoder) implements this for all families. A model of one's own takes a few lines, and trains
/// with the same engine:
///
/// ```
/// use bridge_models::{ForwardContext, SegmentedModel, Targets, run};
/// use bridge_ops::{
///     Activation, CrossEntropySpec, Ops, Param, Tape, Var, activation, add, embedding, float_from_f32, linear,
///     linear_cross_entropy, reshape,
/// };
/// use burn_flex::Flex;
///
/// /// Predicts the next token from the current one: an embedding, residual layers, and a head that shares the
/// /// embedding's matrix.
/// struct Bigram<B: Ops> {
///     embedding: Param<B>,    // [vocab, hidden]
///     layers: Vec<Param<B>>,  // [hidden, hidden] each
/// }
///
/// impl<B: Ops> SegmentedModel<B> for Bigram<B> {
///     fn num_segments(&self) -> usize {
///         self.layers.len() + 2
///     }
///
///     fn forward_segment(&self, index: usize, tape: &Tape<B>, input: Option<&Var<B>>, ctx: &ForwardContext<'_, B>) -> Var<B> {
///         match input {
///             None => embedding(tape, ctx.input_ids(), &self.embedding), // [batch, seq, hidden]
///             Some(x) => {
///                 let inner = activation(tape, &linear(tape, x, &self.layers[index - 1], None), Activation::Silu);
///                 add(tape, x, &inner)
///             }
///         }
///     }
///
///     fn head_loss(&self, tape: &Tape<B>, input: &Var<B>, targets: &Targets<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
///         let hidden = *input.shape().last().unwrap();
///         let x = reshape(tape, input, &[ctx.batch() * ctx.seq(), hidden]);
///         linear_cross_entropy(tape, &x, &self.embedding, &targets.ids, CrossEntropySpec::default())
///     }
///
///     fn segment_params(&self, index: usize) -> Vec<Param<B>> {
///         match self.layers.get(index.wrapping_sub(1)) {
///             Some(layer) => vec![layer.clone()],
///             None => vec![self.embedding.clone()], // the first segment and the last
///         }
///     }
/// }
///
/// let device = Default::default();
/// let weight = |name: &str, shape: [usize; 2]| {
///     let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i as f32 * 0.7).sin() * 0.3).collect();
///     Param::<Flex>::new(name, float_from_f32::<Flex>(&values, &shape, &device))
/// };
/// let model = Bigram { embedding: weight("embedding.weight", [7, 4]), layers: vec![weight("layers.0.weight", [4, 4])] };
///
/// let ctx = ForwardContext::new(&[1, 2, 3, 4, 5, 6], [2, 3], &device);
/// let step = run::loss_and_gradients(&model, &ctx, &[2, 3, -100, 5, 6, -100]); // -100: no loss for that token
/// assert_eq!(step.num_tokens, 4);
/// assert!((step.mean_loss() - (7.0f64).ln()).abs() < 0.5);
/// assert!(model.params().iter().all(|param| param.grad().is_some()));
/// ```
///
/// A model may be divided: a pipeline stage holds some of the segments, and the numbers stay those of the whole model.
pub trait SegmentedModel<B: Ops>: Send + Sync {
    /// Number of segments of the whole model, the head included: at least 2.
    fn num_segments(&self) -> usize;

    /// Whether segment `index` is held here. The default is a model on one rank.
    fn holds_segment(&self, index: usize) -> bool {
        let _ = index;
        true
    }

    /// What goes from one segment to the next in `ctx`, on this rank, which is what one pipeline stage receives from
    /// another. `None`, the default, for a model that cannot be divided into stages.
    fn boundary(&self, ctx: &ForwardContext<'_, B>) -> Option<Boundary> {
        let _ = ctx;
        None
    }

    /// Runs hidden segment `index`. `input` is `None` for segment 0 and the output of the segment before for the
    /// others; the output has the shape of the hidden states, `[batch, seq, hidden]`.
    fn forward_segment(
        &self,
        index: usize,
        tape: &Tape<B>,
        input: Option<&Var<B>>,
        ctx: &ForwardContext<'_, B>,
    ) -> Var<B>;

    /// Runs the last segment: the loss of each token, `[batch * seq]` in f32, 0 where the target is
    /// [`IGNORED_TARGET`](crate::IGNORED_TARGET).
    fn head_loss(
        &self,
        tape: &Tape<B>,
        input: &Var<B>,
        targets: &Targets<B>,
        ctx: &ForwardContext<'_, B>,
    ) -> Var<B>;

    /// The weights that segment `index` uses, in a fixed order; none if it is not held here.
    ///
    /// A weight may be used by several segments, as a tied embedding is by the first and the last. Its gradient is
    /// complete once backward has passed the lowest of them.
    fn segment_params(&self, index: usize) -> Vec<Param<B>>;

    /// Every weight held here once, in the order of the segments that first use it. Names are unique.
    fn params(&self) -> Vec<Param<B>> {
        let mut seen = HashSet::new();
        let all = (0..self.num_segments()).flat_map(|index| self.segment_params(index));
        all.filter(|param| seen.insert(param.name().to_owned()))
            .collect()
    }

    /// What a weight does in the model, for rules such as "no weight decay on norms and biases". The default goes by
    /// [`ParamRole::of`].
    fn param_role(&self, param: &Param<B>) -> ParamRole {
        ParamRole::of(param.name(), &param.shape())
    }
}

/// The form of the hidden states between two segments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boundary {
    /// Shape on this rank.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
}
