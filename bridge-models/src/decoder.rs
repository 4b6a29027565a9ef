//! The one decoder: what a [`DecoderConfig`] describes, as weights and a forward pass.

use bridge_core::DecoderConfig;
use bridge_ops::{
    CrossEntropySpec, Float, Ops, Param, Tape, Var, embedding, linear, linear_cross_entropy,
    linear_cross_entropy_weighted, reshape, scale, slice, softcap,
};

use crate::context::{DecoderCache, ForwardContext, Targets};
use crate::error::{Error, Result};
use crate::layers::{DecoderLayer, Norm};
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
        Ok(Self {
            embedding,
            layers,
            final_norm,
            lm_head,
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
        let x = embedding(tape, ctx.input_ids(), &self.embedding);
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
        let x = self.final_norm.forward(tape, hidden);
        let logits = linear(tape, &x, self.head_weight(), None);
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
        let x = self.final_norm.forward(tape, input);
        let x = reshape(
            tape,
            &x,
            &[ctx.batch() * ctx.seq(), self.config.hidden_size],
        );
        let spec = CrossEntropySpec {
            logit_softcap: self.config.final_logit_softcap,
            ..CrossEntropySpec::default()
        };
        let (head, ids) = (self.head_weight(), &targets.ids);
        match &targets.loss_gradient {
            Some(known) => linear_cross_entropy_weighted(tape, &x, head, ids, known.clone(), spec),
            None => linear_cross_entropy(tape, &x, head, ids, spec),
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
            params.push(self.head_weight().clone());
        }
        params
    }
}

#[cfg(test)]
#[path = "decoder_tests.rs"]
mod tests;
