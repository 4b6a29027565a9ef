//! Which samples make up a batch.

use crate::error::{DataError, Result};

/// Cuts global batches into micro-batches for one data-parallel rank.
///
/// The only state of a run is the number of samples consumed. A global batch is the next `global_batch_size` samples; it is
/// dealt out in rounds, each rank taking `micro_batch_size` samples of a round in turn, as Megatron-Core does:
///
/// ```text
/// samples    0 1 2 3 4 5 6 7        global batch 8, micro-batch 2, 2 ranks
/// round      0 0 0 0 1 1 1 1
/// rank       0 0 1 1 0 0 1 1
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GlobalBatchSampler {
    micro_batch_size: usize,
    data_parallel_size: usize,
    data_parallel_rank: usize,
}

impl GlobalBatchSampler {
    /// A sampler for rank `data_parallel_rank` of `data_parallel_size`.
    ///
    /// # Errors
    /// If a size is 0 or the rank is not below the size.
    pub fn new(
        micro_batch_size: usize,
        data_parallel_size: usize,
        data_parallel_rank: usize,
    ) -> Result<Self> {
        let bad = |option, value: usize, reason: String| {
            Err(DataError::BadOption {
                option,
                value: value.to_string(),
                reason,
            })
        };
        if micro_batch_size == 0 {
            return bad("micro_batch_size", 0, "it must be at least 1".into());
        }
        if data_parallel_size == 0 {
            return bad("data_parallel_size", 0, "it must be at least 1".into());
        }
        if data_parallel_rank >= data_parallel_size {
            return bad(
                "data_parallel_rank",
                data_parallel_rank,
                format!("it must be below {data_parallel_size}, the number of ranks"),
            );
        }
        Ok(Self {
            micro_batch_size,
            data_parallel_size,
            data_parallel_rank,
        })
    }

    /// Global indices of the samples in each of this rank's micro-batches, for the global batch that follows
    /// `consumed_samples`.
    ///
    /// # Errors
    /// If `global_batch_size` is not a multiple of the micro-batch size times the number of ranks.
    pub fn micro_batches(
        &self,
        consumed_samples: u64,
        global_batch_size: usize,
    ) -> Result<Vec<Vec<u64>>> {
        let round = self
            .micro_batch_size
            .saturating_mul(self.data_parallel_size);
        if global_batch_size == 0 || !global_batch_size.is_multiple_of(round) {
            return Err(DataError::BadOption {
                option: "global_batch_size",
                value: global_batch_size.to_string(),
                reason: format!(
                    "it must be a multiple of micro_batch_size x data_parallel_size = {} x {} = {round}",
                    self.micro_batch_size, self.data_parallel_size
                ),
            });
        }
        let micro = self.micro_batch_size as u64;
        let first = consumed_samples + self.data_parallel_rank as u64 * micro;
        let rounds = (global_batch_size / round) as u64;
        Ok((0..rounds)
            .map(|k| first + k * round as u64)
            .map(|start| (start..start + micro).collect())
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranks_and_micro_batches_cover_each_global_batch_exactly_once(
            micro in 1usize..5, ranks in 1usize..5, rounds in 1usize..5, consumed in 0u64..1000
        ) {
            let global = micro * ranks * rounds;
            let mut seen = Vec::new();
            for rank in 0..ranks {
                let batches = GlobalBatchSampler::new(micro, ranks, rank).unwrap().micro_batches(consumed, global).unwrap();
                prop_assert_eq!(batches.len(), rounds);
                prop_assert!(batches.iter().all(|batch| batch.len() == micro));
                seen.extend(batches.into_iter().flatten());
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, (consumed..consumed + global as u64).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_batch_that_cannot_be_dealt_out_is_an_error() {
        let error = GlobalBatchSampler::new(2, 3, 0)
            .unwrap()
            .micro_batches(0, 8)
            .unwrap_err();
        assert!(error.to_string().contains("2 x 3 = 6"), "{error}");
        assert!(GlobalBatchSampler::new(2, 3, 3).is_err());
        assert!(GlobalBatchSampler::new(0, 1, 0).is_err());
    }
}
