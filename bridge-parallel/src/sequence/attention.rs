//! Attention over sequences of which each rank has a part.

use std::fmt;

use bridge_ops::{AttentionSpec, Ops, Tape, Var, attention};

use super::blocks::Chunks;
use super::{CpCommType, gather, heads, ring};
use crate::comm::Group;
use crate::context::ParallelContext;
use crate::groups::Axis;

/// How attention reaches the other parts of its sequences. On one rank it does nothing and costs nothing.
pub struct ContextParallel<B: Ops> {
    /// `None` where the group has one rank.
    group: Option<Group<B>>,
    comm: CpCommType,
}

impl<B: Ops> ContextParallel<B> {
    /// Whole sequences on one rank.
    pub fn single() -> Self {
        Self {
            group: None,
            comm: CpCommType::default(),
        }
    }

    /// The context parallelism of a rank.
    pub fn new(ctx: &ParallelContext<B>, comm: CpCommType) -> Self {
        let shared = ctx.layout().cp > 1;
        Self {
            group: shared.then(|| ctx.group(Axis::Cp).clone()),
            comm,
        }
    }

    /// The ranks that share the sequences, if there are several.
    pub fn group(&self) -> Option<&Group<B>> {
        self.group.as_ref()
    }
}

impl<B: Ops> Clone for ContextParallel<B> {
    fn clone(&self) -> Self {
        Self {
            group: self.group.clone(),
            comm: self.comm,
        }
    }
}

impl<B: Ops> fmt::Debug for ContextParallel<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContextParallel")
            .field("size", &self.group.as_ref().map_or(1, |group| group.size()))
            .field("comm", &self.comm)
            .finish()
    }
}

/// Attention of this rank's queries to the keys of the whole sequence. q: [batch, local seq, heads, d],
/// k, v: [batch, local seq, kv_heads, d], each rank's two chunks one after the other -> like q. The packed documents of
/// `spec` are those of the whole sequences: `[0, .., batch * seq]`.
///
/// # Panics
/// When shapes and spec do not fit each other, or spec asks for a cache, which sequences in parts do not have.
#[track_caller]
pub fn context_attention<B: Ops>(
    tape: &Tape<B>,
    q: &Var<B>,
    k: &Var<B>,
    v: &Var<B>,
    spec: &AttentionSpec<B>,
    context: &ContextParallel<B>,
) -> Var<B> {
    let Some(group) = &context.group else {
        return attention(tape, q, k, v, spec);
    };
    let shape = q.shape();
    assert!(
        shape.len() == 4 && shape[1].is_multiple_of(2) && k.shape()[1] == shape[1],
        "context_attention: queries {shape:?} and keys {:?} are not two chunks each",
        k.shape()
    );
    assert!(
        spec.q_offset == 0 && spec.kv_len.is_none(),
        "context_attention: a sequence in parts has no cache"
    );
    let chunks = Chunks {
        ranks: group.size(),
        size: shape[1] / 2,
        batch: shape[0],
    };
    if context.comm == CpCommType::A2a {
        return heads::attend(tape, q, k, v, spec, group);
    }
    assert!(
        spec.causal || (spec.window.is_none() && spec.cu_seqlens.is_none()),
        "context_attention: windows and documents that reach forward need cp_comm_type a2a"
    );
    match context.comm {
        CpCommType::P2p => ring::attend(tape, q, k, v, spec, chunks, group),
        _ => gather::attend(tape, q, k, v, spec, chunks, group),
    }
}
