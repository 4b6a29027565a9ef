//! What can go wrong between ranks.

use serde::{Deserialize, Serialize};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why ranks could not work together. Ranks are global. Cloned, since every rank of a job reports the same one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Error {
    /// A rank stopped with an error or a panic of its own.
    #[error("rank {rank} failed: {reason}")]
    RankFailed {
        /// The rank.
        rank: usize,
        /// Its error or panic message.
        reason: String,
    },
    /// A rank's process died, or the connection to it broke.
    #[error("rank {rank} is gone: {reason}; see that rank's own output for the cause")]
    RankLost {
        /// The rank.
        rank: usize,
        /// How that was noticed.
        reason: String,
    },
    /// Ranks did not reach a collective in time, and wait for nobody themselves: they hang, or are very slow.
    #[error(
        "{} did not reach {call} within {seconds} s (rank {waiting} waited); see what hangs there, or raise the timeout",
        name_ranks(ranks)
    )]
    Timeout {
        /// The ranks that are missing.
        ranks: Vec<usize>,
        /// What was waited for.
        call: String,
        /// The rank that waited.
        waiting: usize,
        /// How long it waited.
        seconds: u64,
    },
    /// Ranks wait for each other in different collectives.
    #[error("ranks wait for each other: {}; every rank must call a group's collectives in the same order", waits.join(", "))]
    Deadlock {
        /// One sentence for each wait.
        waits: Vec<String>,
    },
    /// A rank ended its work while another still waited for it.
    #[error("rank {rank} ended without calling {call}, for which rank {waiting} waits")]
    Ended {
        /// The rank that ended.
        rank: usize,
        /// What was waited for.
        call: String,
        /// The rank that waited.
        waiting: usize,
    },
    /// The members of a group called different collectives, or with arguments that do not fit together.
    #[error("ranks disagree in {call}: {problem}")]
    Mismatch {
        /// The collective.
        call: String,
        /// What does not fit, with the ranks.
        problem: String,
    },
    /// A rank asked for the end of the job.
    #[error("rank {rank} ended the job: {reason}")]
    Aborted {
        /// The rank.
        rank: usize,
        /// Its reason.
        reason: String,
    },
    /// A layout, rank or argument that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// Ranks could not find each other.
    #[error("rendezvous: {0}")]
    Rendezvous(String),
    /// A library or device call failed on this rank.
    #[error("rank {rank}: {call} failed: {reason}")]
    Device {
        /// The rank.
        rank: usize,
        /// The call.
        call: String,
        /// What it said.
        reason: String,
    },
}

impl Error {
    /// The rank at fault, where there is just one.
    pub fn rank(&self) -> Option<usize> {
        match self {
            Error::RankFailed { rank, .. }
            | Error::RankLost { rank, .. }
            | Error::Ended { rank, .. }
            | Error::Aborted { rank, .. }
            | Error::Device { rank, .. } => Some(*rank),
            Error::Timeout { ranks, .. } if ranks.len() == 1 => Some(ranks[0]),
            _ => None,
        }
    }
}

/// "rank 3" or "ranks 3, 4, 5 and 12 more".
pub(crate) fn name_ranks(ranks: &[usize]) -> String {
    const LISTED: usize = 8;
    let listed: Vec<String> = ranks.iter().take(LISTED).map(usize::to_string).collect();
    let plural = if ranks.len() == 1 { "" } else { "s" };
    let more = match ranks.len().saturating_sub(LISTED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("rank{plural} {}{more}", listed.join(", "))
}
