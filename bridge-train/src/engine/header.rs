//! What stages of a pipeline must know of a step's micro-batches before they can run: shapes, and how texts are packed.
//!
//! The first and the last stage read samples; the stages between them get this from the first, once a step, as part of
//! the messages between stages. The last stage compares it with what it read itself.

use std::sync::Arc;

use bridge_data::Batch;

/// A step's micro-batches without their tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StepHeader {
    /// Tokens with a loss in the whole step, over all data-parallel ranks.
    pub(super) valid_tokens: u64,
    /// Tokens in the whole step, over all data-parallel ranks.
    pub(super) tokens: u64,
    /// The micro-batches; tokens and labels are empty.
    pub(super) micro_batches: Vec<Batch>,
}

impl StepHeader {
    /// The header of micro-batches that were read here.
    pub(super) fn of([valid_tokens, tokens]: [u64; 2], micro_batches: &[Batch]) -> Self {
        let shape = |batch: &Batch| Batch {
            batch: batch.batch,
            seq: batch.seq,
            tokens: Vec::new(),
            labels: Vec::new(),
            // Without packed documents positions count up in every row, and nobody reads these.
            position_ids: match batch.cu_seqlens {
                Some(_) => batch.position_ids.clone(),
                None => Vec::new(),
            },
            cu_seqlens: batch.cu_seqlens.clone(),
        };
        Self {
            valid_tokens,
            tokens,
            micro_batches: micro_batches.iter().map(shape).collect(),
        }
    }

    /// As bytes: every number as 8 bytes, little-endian.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut numbers = vec![
            self.valid_tokens,
            self.tokens,
            self.micro_batches.len() as u64,
        ];
        for batch in &self.micro_batches {
            let boundaries = batch.cu_seqlens.as_deref().unwrap_or_default();
            numbers.extend([
                batch.batch as u64,
                batch.seq as u64,
                batch.position_ids.len() as u64,
                boundaries.len() as u64,
            ]);
            numbers.extend(batch.position_ids.iter().map(|position| *position as u64));
            numbers.extend(boundaries.iter().map(|boundary| *boundary as u64));
        }
        numbers.into_iter().flat_map(u64::to_le_bytes).collect()
    }

    /// From bytes; `None` if they are none of a header.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (numbers, rest) = bytes.as_chunks::<8>();
        let mut numbers = numbers.iter().map(|bytes| u64::from_le_bytes(*bytes));
        let size = |number: u64| usize::try_from(number).ok();
        let (valid_tokens, tokens) = (numbers.next()?, numbers.next()?);
        let mut micro_batches = Vec::new();
        for _ in 0..numbers.next()? {
            let (batch, seq) = (size(numbers.next()?)?, size(numbers.next()?)?);
            let (positions, boundaries) = (size(numbers.next()?)?, size(numbers.next()?)?);
            let position_ids: Vec<i64> = numbers
                .by_ref()
                .take(positions)
                .map(|position| position as i64)
                .collect();
            let cu_seqlens: Arc<[usize]> = numbers
                .by_ref()
                .take(boundaries)
                .map(size)
                .collect::<Option<_>>()?;
            if position_ids.len() != positions || cu_seqlens.len() != boundaries {
                return None;
            }
            micro_batches.push(Batch {
                batch,
                seq,
                tokens: Vec::new(),
                labels: Vec::new(),
                position_ids,
                cu_seqlens: (boundaries > 0).then_some(cu_seqlens),
            });
        }
        (rest.is_empty() && numbers.next().is_none()).then_some(Self {
            valid_tokens,
            tokens,
            micro_batches,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_as_it_was() {
        let batch = |cu_seqlens: Option<Vec<usize>>| Batch {
            batch: 2,
            seq: 3,
            tokens: (0..6).collect(),
            labels: vec![-100; 6],
            position_ids: vec![0, 1, 0, 0, 1, 2],
            cu_seqlens: cu_seqlens.map(Into::into),
        };
        let header = StepHeader::of([7, 12], &[batch(None), batch(Some(vec![0, 2, 3, 6]))]);
        assert!(header.micro_batches[0].position_ids.is_empty());
        let bytes = header.encode();
        assert_eq!(StepHeader::decode(&bytes), Some(header));
        for cut in 0..bytes.len() {
            assert_eq!(StepHeader::decode(&bytes[..cut]), None, "{cut}");
        }
    }
}
