//! The two ends of a decoder, which know the vocabulary: the token embedding and the output head.

use bridge_core::DecoderConfig;
use bridge_ops::{
    CrossEntropySpec, Float, Int, Ops, Param, Tape, Var, linear, linear_cross_entropy,
    linear_cross_entropy_weighted, reshape, scale, slice, softcap,
};
use bridge_parallel::{
    TensorRegion, autodiff, vocab_parallel_embedding, vocab_parallel_linear_cross_entropy,
};

use super::Norm;
use crate::context::ForwardContext;
use crate::error::Result;
use crate::weights::ParamBuilder;

/// Looks up a row per token.
#[derive(Debug, Clone)]
pub struct Embedding<B: Ops> {
    /// `[vocab, hidden]`.
    pub weight: Param<B>,
    scale: Option<f64>,
    region: TensorRegion<B>,
}

impl<B: Ops> Embedding<B> {
    /// The embedding of the model that `config` describes.
    ///
    /// # Errors
    /// If the weights' source fails.
    pub fn build(params: &mut ParamBuilder<'_, B>, config: &DecoderConfig) -> Result<Self> {
        let table = [config.vocab_size, config.hidden_size];
        Ok(Self {
            weight: params.param("embedding.weight", &table)?,
            scale: config.embedding_scale,
            region: params.region(),
        })
    }

    /// The embeddings of the context's tokens: `[batch, seq, hidden]`.
    pub fn forward(&self, tape: &Tape<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
        self.look_up(tape, ctx.input_ids())
    }

    /// The embeddings of `ids` `[batch, seq]`: `[batch, seq, hidden]`.
    pub fn look_up(&self, tape: &Tape<B>, ids: &Int<B>) -> Var<B> {
        let x = vocab_parallel_embedding(tape, ids, &self.weight, &self.region);
        match self.scale {
            Some(factor) => scale(tape, &x, factor),
            None => x,
        }
    }
}

/// The final norm and the matrix to the vocabulary.
#[derive(Debug, Clone)]
pub struct Head<B: Ops> {
    /// The norm before the matrix.
    pub norm: Norm<B>,
    /// `[vocab, hidden]`.
    pub weight: Param<B>,
    vocab_size: usize,
    softcap: Option<f64>,
    region: TensorRegion<B>,
}

impl<B: Ops> Head<B> {
    /// The head of the model that `config` describes. `tied` is the embedding's matrix, where the same rank has it and it
    /// is the head's as well.
    ///
    /// # Errors
    /// If the weights' source fails.
    pub fn build(
        params: &mut ParamBuilder<'_, B>,
        config: &DecoderConfig,
        tied: Option<&Param<B>>,
    ) -> Result<Self> {
        let norm = Norm::build(params, "final_norm", config.hidden_size, &config.norm)?;
        let table = [config.vocab_size, config.hidden_size];
        let weight = match tied {
            Some(weight) => weight.clone(),
            None if config.tie_word_embeddings => params.param("embedding.weight", &table)?,
            None => params.param("lm_head.weight", &table)?,
        };
        Ok(Self {
            norm,
            weight,
            vocab_size: config.vocab_size,
            softcap: config.final_logit_softcap,
            region: params.region(),
        })
    }

    /// `[batch, seq, hidden]` -> the same shape: what the matrix is multiplied with.
    pub fn normed(&self, tape: &Tape<B>, hidden: &Var<B>) -> Var<B> {
        self.norm.forward(tape, hidden)
    }

    /// `[batch, seq, hidden]` -> logits `[batch, seq, vocab]`, on every rank those of the whole vocabulary.
    pub fn logits(&self, tape: &Tape<B>, hidden: &Var<B>) -> Var<B> {
        self.logits_of(tape, &self.normed(tape, hidden))
    }

    /// [`logits`](Self::logits) of something that has been normed.
    pub fn logits_of(&self, tape: &Tape<B>, normed: &Var<B>) -> Var<B> {
        self.product(tape, &self.region.enter(tape, normed))
    }

    /// Logits of the last token of each row: `[batch, 1, vocab]`.
    pub fn last_logits(&self, tape: &Tape<B>, hidden: &Var<B>) -> Var<B> {
        let hidden = self.region.whole(tape, hidden);
        let seq = hidden.shape()[1];
        let x = self
            .norm
            .forward(tape, &slice(tape, &hidden, 1, seq - 1..seq));
        self.product(tape, &x)
    }

    fn product(&self, tape: &Tape<B>, x: &Var<B>) -> Var<B> {
        let mut logits = linear(tape, x, &self.weight, None);
        if let Some(group) = self.region.group() {
            let padded = autodiff::gather(tape, &logits, group, 2);
            logits = slice(tape, &padded, 2, 0..self.vocab_size);
        }
        match self.softcap {
            Some(cap) => softcap(tape, &logits, cap),
            None => logits,
        }
    }

    /// The loss of each token: `[batch * seq]` f32. normed: `[batch, seq, hidden]`, ids: `[batch * seq]`; `gradient` is what
    /// the losses will be seeded with, if that is known.
    pub fn losses_of(
        &self,
        tape: &Tape<B>,
        normed: &Var<B>,
        ids: &Int<B>,
        gradient: Option<Float<B>>,
    ) -> Var<B> {
        let x = self.region.enter(tape, normed);
        let shape = x.shape(); // [batch, seq, hidden]
        let x = reshape(tape, &x, &[shape[0] * shape[1], shape[2]]);
        let spec = CrossEntropySpec {
            logit_softcap: self.softcap,
            ..CrossEntropySpec::default()
        };
        let weight = &self.weight;
        match (self.region.group(), gradient) {
            (Some(group), known) => {
                vocab_parallel_linear_cross_entropy(tape, &x, weight, ids, known, spec, group)
            }
            (None, Some(known)) => {
                linear_cross_entropy_weighted(tape, &x, weight, ids, known, spec)
            }
            (None, None) => linear_cross_entropy(tape, &x, weight, ids, spec),
        }
    }
}
