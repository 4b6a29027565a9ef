//! Which parts of a rank's queries attend to which parts of some rank's keys, and by which rule.

use std::ops::Range;
use std::sync::Arc;

use bridge_ops::AttentionRule;

/// The chunks of a sequence, two for each rank.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunks {
    /// Number of ranks.
    pub(super) ranks: usize,
    /// Tokens in a chunk.
    pub(super) size: usize,
    /// Sequences.
    pub(super) batch: usize,
}

/// A call of the attention kernel: queries and keys are ranges of what a rank holds of each sequence.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Block {
    pub(super) queries: Range<usize>,
    pub(super) keys: Range<usize>,
    pub(super) rule: AttentionRule,
    /// Whether these are the queries' own keys, with which their sinks are counted, once.
    pub(super) own: bool,
}

impl Chunks {
    pub(super) fn of_rank(&self, rank: usize) -> [usize; 2] {
        [rank, 2 * self.ranks - 1 - rank]
    }

    /// Length of the sequences.
    pub(super) fn seq(&self) -> usize {
        2 * self.ranks * self.size
    }

    /// What the queries of rank `rank` have to do with the keys of rank `from`, as few calls as it takes. Windows and
    /// documents need a causal rule.
    pub(super) fn blocks(&self, rank: usize, from: usize, rule: &AttentionRule) -> Vec<Block> {
        let size = self.size;
        let plain = rule.window.is_none() && rule.cu_seqlens.is_none();
        let call = |queries, keys, causal, own| Block {
            queries,
            keys,
            rule: AttentionRule {
                causal,
                ..rule.clone()
            },
            own,
        };
        if plain && (rank == from || !rule.causal) {
            // A rank's chunks are in the order of the sequence, so that the mask is the usual one.
            return vec![call(0..2 * size, 0..2 * size, rule.causal, rank == from)];
        }
        if plain {
            // From a lower rank the first chunk comes before both chunks here and the second after both; from a higher
            // one both come between the chunks here.
            let (queries, keys) = if from < rank {
                (0..2 * size, 0..size)
            } else {
                (size..2 * size, 0..2 * size)
            };
            return vec![call(queries, keys, false, false)];
        }
        let mut blocks = Vec::new();
        for (q_half, q_chunk) in self.of_rank(rank).into_iter().enumerate() {
            for (k_half, k_chunk) in self.of_rank(from).into_iter().enumerate() {
                if k_chunk > q_chunk {
                    continue;
                }
                let offset = (q_chunk - k_chunk) * size;
                let out_of_window = rule
                    .window
                    .is_some_and(|window| offset + 1 >= size + window);
                if out_of_window {
                    continue;
                }
                blocks.push(Block {
                    queries: q_half * size..(q_half + 1) * size,
                    keys: k_half * size..(k_half + 1) * size,
                    rule: self.rule_at(rule, q_chunk * size..(q_chunk + 1) * size, k_chunk * size),
                    own: q_chunk == k_chunk,
                });
            }
        }
        blocks
    }

    /// The rule for queries at `queries` of each sequence and keys that start at `first_key`.
    pub(super) fn rule_at(
        &self,
        rule: &AttentionRule,
        queries: Range<usize>,
        first_key: usize,
    ) -> AttentionRule {
        let span = queries.end - first_key;
        let cu_seqlens = rule.cu_seqlens.as_ref().map(|offsets| -> Arc<[usize]> {
            let mut own = vec![0];
            for row in 0..self.batch {
                let start = row * self.seq() + first_key;
                let inner = offsets
                    .iter()
                    .filter(|offset| (start..start + span).contains(*offset));
                own.extend(inner.map(|offset| row * span + (offset - start)));
                own.push((row + 1) * span);
            }
            own.dedup();
            own.into()
        });
        AttentionRule {
            q_offset: queries.start - first_key,
            cu_seqlens,
            ..rule.clone()
        }
    }
}
