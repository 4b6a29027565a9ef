//! The one decoder: what a [`DecoderConfig`] describes, as weights and a forward pass.

use std::sync::Arc;

use bridge_core::layout::{PipelineSplit, Place};
use bridge_core::{CanonicalTensor, DecoderConfig};
use bridge_ops::{DType, Float, Int, Ops, Param, Tape, Var};
use bridge_parallel::{ContextParallel, ParallelContext};
use burn::tensor::{Int as IntKind, Tensor};

use crate::context::{DecoderCache, ForwardContext, IGNORED_TARGET, Targets};
use crate::error::{Error, Result};
use crate::layers::{DecoderLayer, Embedding, Head, Linear, MtpModule};
use crate::parallel::{ParallelOptions, check_layout};
use crate::segmented::{Boundary, SegmentedModel};
use crate::weights::{ParamBuilder, WeightSource};

/// A decoder-only transformer.
///
/// As a [`SegmentedModel`] its segments are the embedding, each layer, and the head. A rank of a layout holds the segments
/// of its pipeline stage, and of their weights its part.
#[derive(Debug, Clone)]
pub struct Decoder<B: Ops> {
    config: DecoderConfig,
    device: B::Device,
    /// Between layers each rank has one of so many parts of its sequences (sequence parallelism).
    sequence_parts: usize,
    /// Who has the other parts of its sequences.
    context_parallel: ContextParallel<B>,
    /// `None` where another pipeline stage has it, as for the layers and the head.
    embedding: Option<Embedding<B>>,
    layers: Vec<Option<DecoderLayer<B>>>,
    head: Option<Head<B>>,
    /// Multi-token prediction, for training alone, where the head is.
    mtp: Vec<MtpModule<B>>,
    /// The embedding as multi-token prediction uses it.
    mtp_embedding: Option<Embedding<B>>,
}

impl<B: Ops> Decoder<B> {
    /// Builds the model that `config` describes with weights from `source`, one tensor at a time.
    ///
    /// # Errors
    /// If the config does not hold together, or the source lacks a weight or has it in another shape.
    pub fn build(
        config: DecoderConfig,
        source: &mut dyn WeightSource<B>,
        device: &B::Device,
    ) -> Result<Self> {
        config.validate("model config")?;
        let params = ParamBuilder::new(source, device);
        Self::assemble(config, params, |_| true)
    }

    /// Builds a rank's part of the model: its pipeline stage, and of that its part of every weight.
    ///
    /// # Errors
    /// As [`build`](Self::build), or if the model cannot be divided as the layout says.
    pub fn build_parallel(
        config: DecoderConfig,
        source: &mut dyn WeightSource<B>,
        ctx: &Arc<ParallelContext<B>>,
        options: &ParallelOptions,
    ) -> Result<Self> {
        Self::on_rank(config, ctx, options, |tensors| {
            ParamBuilder::parallel(source, ctx, tensors, options.cp_comm_type)
        })
    }

    /// As [`build_parallel`](Self::build_parallel), with places for weights of `dtype` in the place of weights: whoever
    /// trains it brings them one by one ([`load_param`](crate::weights::load_param)), and need not hold all at once.
    ///
    /// # Errors
    /// If the config does not hold together, or the model cannot be divided as the layout says.
    pub fn without_weights(
        config: DecoderConfig,
        dtype: DType,
        ctx: &Arc<ParallelContext<B>>,
        options: &ParallelOptions,
    ) -> Result<Self> {
        Self::on_rank(config, ctx, options, |tensors| {
            ParamBuilder::without_values(dtype, ctx, tensors, options.cp_comm_type)
        })
    }

    fn on_rank<'a>(
        config: DecoderConfig,
        ctx: &Arc<ParallelContext<B>>,
        options: &ParallelOptions,
        params: impl FnOnce(Vec<CanonicalTensor>) -> ParamBuilder<'a, B>,
    ) -> Result<Self> {
        config.validate("model config")?;
        let tensors = config.tensors();
        ctx.layout().validate(&tensors, config.num_hidden_layers)?;
        check_layout(&config, ctx.layout(), options)?;
        let split = match &options.pipeline {
            Some(split) => split.clone(),
            None => PipelineSplit::even(ctx.layout(), config.num_hidden_layers)?,
        };
        let stage = ctx.coords().pp;
        Self::assemble(config, params(tensors), |place| {
            split.stages(place).contains(&stage)
        })
    }

    /// Builds the segments in places that `is_here` accepts.
    fn assemble(
        config: DecoderConfig,
        mut params: ParamBuilder<'_, B>,
        is_here: impl Fn(Place) -> bool,
    ) -> Result<Self> {
        let params = &mut params;
        let embedding = if is_here(Place::First) {
            Some(Embedding::build(params, &config)?)
        } else {
            None
        };
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for layer in 0..config.num_hidden_layers {
            layers.push(if is_here(Place::Layer(layer)) {
                Some(DecoderLayer::build(params, &config, layer)?)
            } else {
                None
            });
        }
        let region = params.region();
        // The last stage uses the embedding as a tied head, and to predict several tokens.
        let (ends, tied) = (is_here(Place::Last), config.tie_word_embeddings);
        let last_embedding = match &embedding {
            _ if !ends || (!tied && config.num_mtp_layers == 0) => None,
            Some(embedding) => Some(embedding.clone()),
            None => Some(Embedding::build(params, &config)?),
        };
        let head = if ends {
            let matrix = last_embedding.as_ref().filter(|_| tied);
            Some(Head::build(params, &config, matrix.map(|e| &e.weight))?)
        } else {
            None
        };
        let mtp = (0..config.num_mtp_layers)
            .filter(|_| ends)
            .map(|index| MtpModule::build(params, &config, index))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            device: params.device().clone(),
            sequence_parts: if region.is_sequence_parallel() {
                region.size()
            } else {
                1
            },
            context_parallel: params.context_parallel(),
            embedding,
            layers,
            head,
            mtp_embedding: last_embedding.filter(|_| !mtp.is_empty()),
            mtp,
            config,
        })
    }

    /// What the model is.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Where the weights live.
    pub fn device(&self) -> &B::Device {
        &self.device
    }

    /// Every weight once, in the order of [`DecoderConfig::tensors`].
    pub fn params(&self) -> Vec<Param<B>> {
        SegmentedModel::params(self)
    }

    /// Hands each linear layer of this rank's part to `visit`, in the order of their canonical names: those of the layers
    /// and of multi-token prediction. Not among them are routers, the stacked matrices of experts, and the head.
    pub fn visit_linears(&mut self, visit: &mut dyn FnMut(&mut Linear<B>)) {
        for layer in self.layers.iter_mut().flatten() {
            layer.visit_linears(visit);
        }
        for module in &mut self.mtp {
            module.visit_linears(visit);
        }
    }

    /// The matrix `[vocab, hidden]` that the head multiplies by: its own, or the embedding.
    ///
    /// # Panics
    /// If another pipeline stage has the head.
    pub fn head_weight(&self) -> &Param<B> {
        &self.head().weight
    }

    fn head(&self) -> &Head<B> {
        self.head
            .as_ref()
            .expect("the last pipeline stage has the head")
    }

    /// The longest context in tokens: the model's own, stretched where its rotary embedding stretches with the length.
    pub fn context_length(&self) -> usize {
        let stretch = |rope: &bridge_core::config::RopeConfig| match rope.scaling {
            bridge_core::config::RopeScaling::Dynamic { factor, .. } if factor > 1.0 => factor,
            _ => 1.0,
        };
        let factor = self.config.rope.as_ref().map_or(1.0, stretch);
        (self.config.max_position_embeddings as f64 * factor) as usize
    }

    /// An empty cache for texts of at most `capacity` tokens.
    pub fn new_cache(&self, capacity: usize) -> DecoderCache<B> {
        DecoderCache::new(self.layers.len(), capacity)
    }

    /// Checks that every id is in the vocabulary; an id outside it has no embedding.
    ///
    /// # Errors
    /// [`Error::TokenOutOfVocabulary`] for the first one that is not.
    pub fn check_token_ids(&self, ids: &[u32]) -> Result<()> {
        check_token_ids(ids, self.config.vocab_size)
    }

    /// The embeddings of the context's tokens: `[batch, seq, hidden]`.
    ///
    /// # Panics
    /// If another pipeline stage has the embedding.
    pub fn embed(&self, tape: &Tape<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
        let embedding = self.embedding.as_ref();
        embedding
            .expect("the first pipeline stage has the embedding")
            .forward(tape, ctx)
    }

    fn layer(&self, layer: usize) -> &DecoderLayer<B> {
        match &self.layers[layer] {
            Some(layer) => layer,
            None => panic!("layer {layer} is in another pipeline stage"),
        }
    }

    /// Every segment up to the head: `[batch, seq, hidden]` before the final norm.
    ///
    /// # Panics
    /// If other pipeline stages have some of them.
    pub fn hidden_states(&self, tape: &Tape<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
        let embedded = self.embed(tape, ctx);
        (0..self.layers.len()).fold(embedded, |x, layer| {
            self.layer(layer).forward(tape, &x, ctx)
        })
    }

    /// The head: `[batch, seq, hidden]` before the final norm -> logits `[batch, seq, vocab]`.
    ///
    /// # Panics
    /// If another pipeline stage has the head.
    pub fn logits(&self, tape: &Tape<B>, hidden: &Var<B>) -> Var<B> {
        self.head().logits(tape, hidden)
    }

    /// Logits of every token in the context, without recording gradients: `[batch, seq, vocab]`.
    pub fn forward(&self, ctx: &ForwardContext<'_, B>) -> Float<B> {
        let tape = Tape::inference();
        let hidden = self.hidden_states(&tape, ctx);
        self.logits(&tape, &hidden).into_value()
    }

    /// Logits of the multi-token prediction modules, without recording gradients: `[batch, seq, vocab]` each. Row `t` of
    /// module `k` (from 0) predicts token `t + k + 2`; the last `k + 1` rows of each sequence lack the tokens that they
    /// would be told, and mean nothing.
    pub fn mtp_logits(&self, ctx: &ForwardContext<'_, B>) -> Vec<Float<B>> {
        let tape = Tape::inference();
        let hidden = self.hidden_states(&tape, ctx);
        let hidden = self.head().normed(&tape, &hidden);
        let views = self.mtp_views(&tape, &hidden, ctx);
        let logits = views.iter().map(|view| self.head().logits_of(&tape, view));
        logits.map(Var::into_value).collect()
    }

    /// What each multi-token prediction module makes of the model's own view after its final norm.
    fn mtp_views(
        &self,
        tape: &Tape<B>,
        hidden: &Var<B>,
        ctx: &ForwardContext<'_, B>,
    ) -> Vec<Var<B>> {
        let mut views: Vec<Var<B>> = Vec::with_capacity(self.mtp.len());
        let mut ids = ctx.input_ids().clone();
        for (module, embedding) in self.mtp.iter().zip(std::iter::repeat(&self.mtp_embedding)) {
            let embedding = embedding
                .as_ref()
                .expect("modules are built with the embedding that they use");
            // What the last token of a row is told means nothing, and nothing is predicted from it.
            ids = self.context_parallel.next_tokens(ids, 0);
            let next = embedding.look_up(tape, &ids);
            let view = module.forward(tape, views.last().unwrap_or(hidden), &next, ctx);
            views.push(view);
        }
        views
    }

    /// Targets one token further ahead: `[batch * seq]`. None where a row ends, and none across the end of a document, where
    /// the target so far is none.
    fn next_targets(&self, targets: Int<B>, [batch, seq]: [usize; 2]) -> Int<B> {
        let targets = Tensor::<B, 1, IntKind>::from_primitive(targets).reshape([batch, seq]);
        let none = targets.clone().equal_elem(IGNORED_TARGET);
        let next = self
            .context_parallel
            .next_tokens(targets.into_primitive(), IGNORED_TARGET);
        let next = Tensor::<B, 2, IntKind>::from_primitive(next);
        let next = next.mask_fill(none, IGNORED_TARGET);
        next.reshape([batch * seq]).into_primitive()
    }

    /// Logits of the last token of each row, without recording gradients: `[batch, 1, vocab]`. What generation needs;
    /// the head's product is the dearest one, and a prompt needs it once.
    pub fn forward_last(&self, ctx: &ForwardContext<'_, B>) -> Float<B> {
        let tape = Tape::inference();
        let hidden = self.hidden_states(&tape, ctx);
        self.head().last_logits(&tape, &hidden).into_value()
    }
}

pub(crate) fn check_token_ids(ids: &[u32], vocab_size: usize) -> Result<()> {
    match ids.iter().position(|id| *id as usize >= vocab_size) {
        None => Ok(()),
        Some(position) => Err(Error::TokenOutOfVocabulary {
            id: i64::from(ids[position]),
            position,
            vocab_size,
        }),
    }
}

impl<B: Ops> SegmentedModel<B> for Decoder<B> {
    fn num_segments(&self) -> usize {
        self.layers.len() + 2
    }

    fn forward_segment(
        &self,
        index: usize,
        tape: &Tape<B>,
        input: Option<&Var<B>>,
        ctx: &ForwardContext<'_, B>,
    ) -> Var<B> {
        match (index, input) {
            (0, _) => self.embed(tape, ctx),
            (layer, Some(input)) => self.layer(layer - 1).forward(tape, input, ctx),
            (layer, None) => panic!("segment {layer} needs the output of segment {}", layer - 1),
        }
    }

    fn head_loss(
        &self,
        tape: &Tape<B>,
        input: &Var<B>,
        targets: &Targets<B>,
        ctx: &ForwardContext<'_, B>,
    ) -> Var<B> {
        let head = self.head();
        let hidden = head.normed(tape, input);
        let gradient = targets.loss_gradient.clone();
        let losses = head.losses_of(tape, &hidden, &targets.ids, gradient);
        let auxiliary = ctx.auxiliary().filter(|_| tape.is_recording());
        match auxiliary.and_then(|auxiliary| Some((auxiliary, auxiliary.mtp_weight()?))) {
            Some((auxiliary, weight)) if !self.mtp.is_empty() => {
                let weight = weight / self.mtp.len() as f64;
                let mut ids = targets.ids.clone();
                let mut ahead = Vec::with_capacity(self.mtp.len());
                let mut targets_ahead = Vec::with_capacity(self.mtp.len());
                for view in self.mtp_views(tape, &hidden, ctx) {
                    ids = self.next_targets(ids, [ctx.batch(), ctx.seq()]);
                    // Seeded with `weight` times the gradient of the losses that it joins.
                    let known = targets.loss_gradient.clone();
                    let known = known.map(|known| B::scale(known, weight));
                    ahead.push(head.losses_of(tape, &view, &ids, known));
                    targets_ahead.push(ids.clone());
                }
                auxiliary.record_mtp(&ahead, &targets_ahead);
                joined(tape, losses, ahead, weight)
            }
            _ => losses,
        }
    }

    fn segment_params(&self, index: usize) -> Vec<Param<B>> {
        let mut params = Vec::new();
        if index == 0 {
            params.extend(
                self.embedding
                    .as_ref()
                    .map(|embedding| embedding.weight.clone()),
            );
        } else if let Some(layer) = self.layers.get(index - 1) {
            if let Some(layer) = layer {
                layer.collect(&mut params);
            }
        } else if let Some(head) = &self.head {
            head.norm.collect(&mut params);
            let embedding = self.mtp_embedding.as_ref();
            let separate = embedding.filter(|_| !self.config.tie_word_embeddings);
            params.extend(separate.map(|embedding| embedding.weight.clone()));
            for module in &self.mtp {
                module.collect(&mut params);
            }
            params.push(head.weight.clone());
        }
        params
    }

    fn holds_segment(&self, index: usize) -> bool {
        match index.checked_sub(1) {
            None => self.embedding.is_some(),
            Some(layer) => match self.layers.get(layer) {
                Some(layer) => layer.is_some(),
                None => self.head.is_some(),
            },
        }
    }

    fn boundary(&self, ctx: &ForwardContext<'_, B>) -> Option<Boundary> {
        let matrix = self
            .params()
            .into_iter()
            .find(|param| param.shape().len() == 2);
        Some(Boundary {
            shape: vec![
                ctx.batch(),
                ctx.seq() / self.sequence_parts,
                self.config.hidden_size,
            ],
            dtype: matrix.map_or(DType::F32, |matrix| B::activation_dtype(matrix.dtype())),
        })
    }
}

/// `losses` unchanged, and `weight` times the losses `ahead` in what is minimised.
fn joined<B: Ops>(tape: &Tape<B>, losses: Var<B>, ahead: Vec<Var<B>>, weight: f64) -> Var<B> {
    let parents: Vec<&Var<B>> = std::iter::once(&losses).chain(&ahead).collect();
    let others = ahead.len();
    tape.record(losses.value(), &parents, move |dy| {
        let ahead = std::iter::repeat_with(|| Some(B::scale(dy.clone(), weight)));
        let mut gradients = vec![Some(dy.clone())];
        gradients.extend(ahead.take(others));
        gradients
    })
}

#[cfg(test)]
#[path = "decoder_tests.rs"]
mod tests;
