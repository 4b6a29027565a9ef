//! The one decoder: what a [`DecoderConfig`] describes, as weights and a forward pass.

use bridge_core::DecoderConfig;
use bridge_ops::{
    CrossEntropySpec, Float, Int, Ops, Param, Tape, Var, embedding, linear, linear_cross_entropy,
    linear_cross_entropy_weighted, reshape, scale, slice, softcap,
};
use burn::tensor::{Int as IntKind, Tensor};

use crate::context::{DecoderCache, ForwardContext, IGNORED_TARGET, Targets};
use crate::error::{Error, Result};
use crate::layers::{DecoderLayer, MtpModule, Norm};
use crate::segmented::SegmentedModel;
use crate::weights::{ParamBuilder, WeightSource};

/// A decoder-only transformer.
///
/// As a [`SegmentedModel`] its segments are the embedding, each layer, and the head.
#[derive(Debug, Clone)]
pub struct Decoder<B: Ops> {
    config: DecoderConfig,
    device: B::Device,
    embedding: Param<B>,
    layers: Vec<DecoderLayer<B>>,
    final_norm: Norm<B>,
    /// `None` where the embedding matrix is the head as well.
    lm_head: Option<Param<B>>,
    /// Multi-token prediction, for training alone.
    mtp: Vec<MtpModule<B>>,
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
        let mut params = ParamBuilder::new(source, device);
        let table = [config.vocab_size, config.hidden_size];
        let embedding = params.param("embedding.weight", &table)?;
        let layers = (0..config.num_hidden_layers)
            .map(|layer| DecoderLayer::build(&mut params, &config, layer))
            .collect::<Result<_>>()?;
        let final_norm = Norm::build(&mut params, "final_norm", config.hidden_size, &config.norm)?;
        let lm_head = if config.tie_word_embeddings {
            None
        } else {
            Some(params.param("lm_head.weight", &table)?)
        };
        let mtp = (0..config.num_mtp_layers)
            .map(|index| MtpModule::build(&mut params, &config, index))
            .collect::<Result<_>>()?;
        Ok(Self {
            embedding,
            layers,
            final_norm,
            lm_head,
            mtp,
            device: device.clone(),
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

    /// The matrix `[vocab, hidden]` that the head multiplies by: its own, or the embedding.
    pub fn head_weight(&self) -> &Param<B> {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
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
        let vocab_size = self.config.vocab_size;
        match ids.iter().position(|id| *id as usize >= vocab_size) {
            None => Ok(()),
            Some(position) => Err(Error::TokenOutOfVocabulary {
                id: i64::from(ids[position]),
                position,
                vocab_size,
            }),
        }
    }

    /// The embeddings of the context's tokens: `[batch, seq, hidden]`.
    pub fn embed(&self, tape: &Tape<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
        self.embedded(tape, ctx.input_ids())
    }

    /// The embeddings of `ids` `[batch, seq]`: `[batch, seq, hidden]`.
    fn embedded(&self, tape: &Tape<B>, ids: &Int<B>) -> Var<B> {
        let x = embedding(tape, ids, &self.embedding);
        match self.config.embedding_scale {
            Some(factor) => scale(tape, &x, factor),
            None => x,
        }
    }

    /// Every segment up to the head: `[batch, seq, hidden]` before the final norm.
    pub fn hidden_states(&self, tape: &Tape<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
        let embedded = self.embed(tape, ctx);
        self.layers
            .iter()
            .fold(embedded, |x, layer| layer.forward(tape, &x, ctx))
    }

    /// The head: `[batch, seq, hidden]` before the final norm -> logits `[batch, seq, vocab]`.
    pub fn logits(&self, tape: &Tape<B>, hidden: &Var<B>) -> Var<B> {
        self.head_logits(tape, &self.final_norm.forward(tape, hidden))
    }

    /// Logits of what a final norm made: `[batch, seq, hidden]` -> `[batch, seq, vocab]`.
    fn head_logits(&self, tape: &Tape<B>, x: &Var<B>) -> Var<B> {
        let logits = linear(tape, x, self.head_weight(), None);
        match self.config.final_logit_softcap {
            Some(cap) => softcap(tape, &logits, cap),
            None => logits,
        }
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
        let hidden = self.final_norm.forward(&tape, &hidden);
        let views = self.mtp_views(&tape, &hidden, ctx);
        let logits = views.iter().map(|view| self.head_logits(&tape, view));
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
        for module in &self.mtp {
            ids = moved_up::<B>(ids);
            let next = self.embedded(tape, &ids);
            let view = module.forward(tape, views.last().unwrap_or(hidden), &next, ctx);
            views.push(view);
        }
        views
    }

    /// The loss of each token under the head: `[batch * seq]`. x: `[batch, seq, hidden]` after a final norm.
    fn token_losses(
        &self,
        tape: &Tape<B>,
        x: &Var<B>,
        ids: &Int<B>,
        gradient: Option<Float<B>>,
        ctx: &ForwardContext<'_, B>,
    ) -> Var<B> {
        let x = reshape(tape, x, &[ctx.batch() * ctx.seq(), self.config.hidden_size]);
        let spec = CrossEntropySpec {
            logit_softcap: self.config.final_logit_softcap,
            ..CrossEntropySpec::default()
        };
        let head = self.head_weight();
        match gradient {
            Some(known) => linear_cross_entropy_weighted(tape, &x, head, ids, known, spec),
            None => linear_cross_entropy(tape, &x, head, ids, spec),
        }
    }

    /// Logits of the last token of each row, without recording gradients: `[batch, 1, vocab]`. What generation needs;
    /// the head's product is the dearest one, and a prompt needs it once.
    pub fn forward_last(&self, ctx: &ForwardContext<'_, B>) -> Float<B> {
        let tape = Tape::inference();
        let hidden = self.hidden_states(&tape, ctx);
        let last = slice(&tape, &hidden, 1, ctx.seq() - 1..ctx.seq());
        self.logits(&tape, &last).into_value()
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
            (layer, Some(input)) => self.layers[layer - 1].forward(tape, input, ctx),
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
        let hidden = self.final_norm.forward(tape, input);
        let gradient = targets.loss_gradient.clone();
        let losses = self.token_losses(tape, &hidden, &targets.ids, gradient, ctx);
        let auxiliary = ctx.auxiliary().filter(|_| tape.is_recording());
        match auxiliary.and_then(|auxiliary| Some((auxiliary, auxiliary.mtp_weight()?))) {
            Some((auxiliary, weight)) if !self.mtp.is_empty() => {
                let weight = weight / self.mtp.len() as f64;
                let mut ids = targets.ids.clone();
                let mut ahead = Vec::with_capacity(self.mtp.len());
                for view in self.mtp_views(tape, &hidden, ctx) {
                    ids = next_targets::<B>(ids, [ctx.batch(), ctx.seq()]);
                    // Seeded with `weight` times the gradient of the losses that it joins.
                    let known = targets.loss_gradient.clone();
                    let known = known.map(|known| B::scale(known, weight));
                    ahead.push(self.token_losses(tape, &view, &ids, known, ctx));
                }
                auxiliary.record_mtp(&ahead);
                joined(tape, losses, ahead, weight)
            }
            _ => losses,
        }
    }

    fn segment_params(&self, index: usize) -> Vec<Param<B>> {
        let mut params = Vec::new();
        if index == 0 {
            params.push(self.embedding.clone());
        } else if let Some(layer) = self.layers.get(index - 1) {
            layer.collect(&mut params);
        } else {
            self.final_norm.collect(&mut params);
            if !self.mtp.is_empty() && self.lm_head.is_some() {
                params.push(self.embedding.clone());
            }
            for module in &self.mtp {
                module.collect(&mut params);
            }
            params.push(self.head_weight().clone());
        }
        params
    }
}

/// Each row of ids one place to the left: `[batch, seq]`, the last place of each row filled with its first.
fn moved_up<B: Ops>(ids: Int<B>) -> Int<B> {
    let ids = Tensor::<B, 2, IntKind>::from_primitive(ids);
    let [_, seq] = ids.dims();
    if seq == 1 {
        return ids.into_primitive();
    }
    let (first, rest) = (ids.clone().narrow(1, 0, 1), ids.narrow(1, 1, seq - 1));
    Tensor::cat(vec![rest, first], 1).into_primitive()
}

/// Targets one token further ahead: `[batch * seq]`. None where a row ends, and none across the end of a document, where
/// the target so far is none.
fn next_targets<B: Ops>(targets: Int<B>, [batch, seq]: [usize; 2]) -> Int<B> {
    let targets = Tensor::<B, 1, IntKind>::from_primitive(targets).reshape([batch, seq]);
    let none = targets.clone().equal_elem(IGNORED_TARGET);
    let end = targets.clone().narrow(1, 0, 1).full_like(IGNORED_TARGET);
    let next = if seq == 1 {
        end
    } else {
        Tensor::cat(vec![targets.narrow(1, 1, seq - 1), end], 1)
    };
    let next = next.mask_fill(none, IGNORED_TARGET);
    next.reshape([batch * seq]).into_primitive()
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
