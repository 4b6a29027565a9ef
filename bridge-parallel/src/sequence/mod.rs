//! Context parallelism: the ranks of a group each have a part of every sequence, and attention brings keys and values, or
//! heads, together.
//!
//! A sequence is cut into two chunks per rank; rank `r` of `n` has chunks `r` and `2n - 1 - r` ("zig-zag"), so that under
//! a causal mask every rank has the same work. [`SequenceShard`] cuts host data that way; [`context_attention`] attends.

mod attention;
mod blocks;
mod gather;
mod heads;
mod recurrent;
mod ring;
mod shard;

#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

pub use attention::{ContextParallel, context_attention};
pub use recurrent::rows_of_params;
pub use shard::SequenceShard;

use crate::error::{Error, Result};

/// How attention reaches the keys and values of other ranks: `cp_comm_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum CpCommType {
    /// Keys and values travel around the ring of ranks while each rank attends to those it has at the moment; results
    /// are joined by their log-sum-exps (Liu et al. 2023, "Ring Attention"). Least memory.
    #[default]
    P2p,
    /// Keys and values of the whole sequence are gathered first.
    AllGather,
    /// Each rank gets the whole sequence for some of the heads (Jacobs et al. 2023, "DeepSpeed Ulysses"). The heads of a
    /// tensor-parallel rank must divide evenly.
    A2a,
}

impl CpCommType {
    /// All of them.
    pub const ALL: [CpCommType; 3] = [CpCommType::P2p, CpCommType::AllGather, CpCommType::A2a];

    /// The name in configs.
    pub fn name(self) -> &'static str {
        match self {
            CpCommType::P2p => "p2p",
            CpCommType::AllGather => "all_gather",
            CpCommType::A2a => "a2a",
        }
    }
}

impl fmt::Display for CpCommType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CpCommType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = CpCommType::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| {
            Error::Invalid(format!(
                "cp_comm_type is {name:?}, expected p2p, all_gather or a2a"
            ))
        })
    }
}
