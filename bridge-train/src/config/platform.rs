//! What the machine and this build can run, against what a configuration asks for.

use super::section::{Problem, Problems};
use super::{PrecisionMode, ResolvedConfig};
use crate::error::{Error, Result};

/// What a backend and its launch offer.
#[derive(Clone, Debug, PartialEq)]
pub struct Platform {
    /// Name of the backend, as given to `--backend`.
    pub backend: &'static str,
    /// Whether it trains with bf16 weights.
    pub bf16: bool,
    /// Ranks that take part.
    pub world_size: usize,
}

impl Platform {
    /// The CPU backend, one rank.
    pub fn cpu() -> Self {
        Self {
            backend: "cpu",
            bf16: false,
            world_size: 1,
        }
    }

    /// The number formats that `mode` stands for here.
    pub fn precision(&self, mode: PrecisionMode) -> PrecisionMode {
        match mode {
            PrecisionMode::Auto if self.bf16 => PrecisionMode::Bf16Mixed,
            PrecisionMode::Auto => PrecisionMode::Fp32,
            chosen => chosen,
        }
    }

    /// Checks that `config` can run here.
    ///
    /// # Errors
    /// [`Error::Config`] with every key that asks for more than there is.
    pub fn check(&self, config: &ResolvedConfig) -> Result<()> {
        let mut problems = Problems::default();
        if config.precision.mode == PrecisionMode::Bf16Mixed && !self.bf16 {
            problems.add(
                "precision.mode",
                format!("is bf16_mixed, which the {} backend does not train in; set precision.mode=fp32", self.backend),
            );
        }
        let layout = config.parallel.layout();
        if layout.world_size() != self.world_size {
            problems.add(
                "parallel",
                format!(
                    "layout {layout} has {} ranks (tensor, pipeline, context and data parallel sizes multiplied), but {} \
                     take part; change parallel.data_parallel_size or the number of ranks",
                    layout.world_size(),
                    self.world_size
                ),
            );
        }
        if config.parallel.sequence_parallel && config.parallel.tensor_model_parallel_size == 1 {
            problems.add(
                "parallel.sequence_parallel",
                "splits work over tensor-parallel ranks, and there is only one; set it to false",
            );
        }
        let found: Vec<Problem> = problems.into_vec();
        if found.is_empty() {
            Ok(())
        } else {
            Err(Error::Config(found))
        }
    }
}
