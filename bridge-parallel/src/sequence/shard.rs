//! Which tokens of a sequence a rank has.

use std::ops::Range;

use bridge_core::LayoutSpec;

/// A rank's part of sequences of one length.
///
/// Sequences are padded at the end to a length that divides: into two chunks per rank of context parallelism, and each
/// rank's tokens among the ranks of sequence parallelism. Under a causal mask, padding at the end changes nothing as long
/// as it has no targets.
///
/// ```
/// use bridge_core::LayoutSpec;
/// use bridge_parallel::SequenceShard;
///
/// let layout = LayoutSpec { cp: 2, ..LayoutSpec::default() };
/// let shard = SequenceShard::new(7, &layout, 0);
/// assert_eq!((shard.padded_seq(), shard.local_seq()), (8, 4));
/// // Chunks of 2; rank 0 of 2 has the first and the last. 0 stands for padding.
/// assert_eq!(shard.take(&[1, 2, 3, 4, 5, 6, 7], 0), [1, 2, 7, 0]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceShard {
    seq: usize,
    padded: usize,
    ranks: usize,
    rank: usize,
}

impl SequenceShard {
    /// The part of sequences of `seq` tokens that the rank `cp_rank` of context parallelism has.
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn new(seq: usize, layout: &LayoutSpec, cp_rank: usize) -> Self {
        let ranks = layout.cp;
        assert!(cp_rank < ranks, "rank {cp_rank} of cp={ranks}");
        Self {
            seq,
            padded: seq.next_multiple_of(Self::multiple(layout)),
            ranks,
            rank: cp_rank,
        }
    }

    /// What the length of a padded sequence is a multiple of.
    pub fn multiple(layout: &LayoutSpec) -> usize {
        // Two chunks per rank of context parallelism, and tp parts of each rank's tokens.
        let chunks = if layout.cp > 1 { 2 * layout.cp } else { 1 };
        let parts = if layout.sp { layout.cp * layout.tp } else { 1 };
        // Both are multiples of cp, or 1.
        let (mut a, mut b) = (chunks, parts);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        chunks / a * parts
    }

    /// Length of the sequences.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// Their length with padding.
    pub fn padded_seq(&self) -> usize {
        self.padded
    }

    /// Tokens of a sequence that this rank has, padding included.
    pub fn local_seq(&self) -> usize {
        self.padded / self.ranks
    }

    /// Whether this is all of every sequence, without padding.
    pub fn is_whole(&self) -> bool {
        self.ranks == 1 && self.padded == self.seq
    }

    /// The positions in the padded sequence that this rank has, in order.
    pub fn ranges(&self) -> Vec<Range<usize>> {
        if self.ranks == 1 {
            return std::iter::once(0..self.padded).collect();
        }
        let chunk = self.padded / (2 * self.ranks);
        [self.rank, 2 * self.ranks - 1 - self.rank]
            .map(|index| index * chunk..(index + 1) * chunk)
            .to_vec()
    }

    /// This rank's part of `values`, one per token of `[batch, seq]` in row-major order: `[batch, local_seq]`, with
    /// `padding` for the tokens that do not exist.
    ///
    /// # Panics
    /// If `values` does not hold whole sequences.
    pub fn take<T: Copy>(&self, values: &[T], padding: T) -> Vec<T> {
        assert!(
            values.len().is_multiple_of(self.seq.max(1)),
            "{} values are no sequences of {}",
            values.len(),
            self.seq
        );
        let ranges = self.ranges();
        let mut taken = Vec::with_capacity(values.len() / self.seq.max(1) * self.local_seq());
        for row in values.chunks(self.seq.max(1)) {
            for position in ranges.iter().cloned().flatten() {
                taken.push(row.get(position).copied().unwrap_or(padding));
            }
        }
        taken
    }

    /// Puts this rank's part of something with `width` values per token, `[batch, local_seq, width]`, where it belongs
    /// in `whole`: `[batch, seq, width]`. Padding is dropped.
    ///
    /// # Panics
    /// If the two do not have the same number of sequences.
    pub fn put<T: Copy>(&self, local: &[T], whole: &mut [T], width: usize) {
        let rows = whole.len() / (self.seq * width).max(1);
        assert_eq!(
            local.len(),
            rows * self.local_seq() * width,
            "a part of {rows} sequences"
        );
        let positions: Vec<usize> = self.ranges().into_iter().flatten().collect();
        for (index, token) in local.chunks(width).enumerate() {
            let (row, position) = (index / positions.len(), positions[index % positions.len()]);
            if position < self.seq {
                let at = (row * self.seq + position) * width;
                whole[at..at + width].copy_from_slice(token);
            }
        }
    }

    /// The offsets of packed documents in `[batch, seq]` as offsets in `[batch, padded_seq]`, where the padding of a row
    /// is a document of its own. A row without documents of its own is one document.
    pub fn pad_documents(&self, cu_seqlens: &[usize]) -> Vec<usize> {
        let rows = cu_seqlens.last().map_or(0, |end| end / self.seq.max(1));
        let mut padded: Vec<usize> = cu_seqlens
            .iter()
            .map(|offset| offset / self.seq * self.padded + offset % self.seq)
            .collect();
        padded.extend((0..rows).map(|row| row * self.padded + self.seq));
        padded.extend((0..=rows).map(|row| row * self.padded));
        padded.sort_unstable();
        padded.dedup();
        padded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(tp: usize, cp: usize, sp: bool) -> LayoutSpec {
        LayoutSpec {
            tp,
            cp,
            sp,
            ..LayoutSpec::default()
        }
    }

    #[test]
    fn ranks_have_every_token_once_and_putting_undoes_taking() {
        for (seq, tp, cp, sp) in [
            (13, 1, 2, false),
            (16, 2, 4, true),
            (5, 4, 1, true),
            (9, 1, 1, false),
            (3, 8, 3, true),
        ] {
            let values: Vec<usize> = (1..=2 * seq * 3).collect();
            let mut whole = vec![0; values.len()];
            for rank in 0..cp {
                let shard = SequenceShard::new(seq, &layout(tp, cp, sp), rank);
                assert!(shard.local_seq().is_multiple_of(if sp { tp } else { 1 }));
                let tokens: Vec<usize> = (0..2 * seq).collect();
                let local: Vec<usize> = shard
                    .take(&tokens, usize::MAX)
                    .into_iter()
                    .flat_map(|token| {
                        (0..3).map(move |i| {
                            if token == usize::MAX {
                                0
                            } else {
                                token * 3 + i + 1
                            }
                        })
                    })
                    .collect();
                shard.put(&local, &mut whole, 3);
            }
            assert_eq!(whole, values);
        }
    }

    #[test]
    fn lengths_are_padded_as_little_as_divides() {
        for (seq, tp, cp, sp, padded) in [
            (13, 1, 1, false, 13),
            (13, 4, 1, false, 13),
            (13, 4, 1, true, 16),
            (13, 1, 2, false, 16),
            (17, 2, 2, true, 20),
            (17, 3, 2, true, 24),
            (17, 4, 2, true, 24),
        ] {
            let shard = SequenceShard::new(seq, &layout(tp, cp, sp), 0);
            assert_eq!(shard.padded_seq(), padded, "{seq} {tp} {cp} {sp}");
        }
    }

    #[test]
    fn padding_is_a_document_of_its_own() {
        let shard = SequenceShard::new(7, &layout(1, 2, false), 0);
        assert_eq!(shard.pad_documents(&[0, 3, 7, 14]), [0, 3, 7, 8, 15, 16]);
    }
}
