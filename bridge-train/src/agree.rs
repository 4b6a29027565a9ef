//! What the ranks of a run decide together. Each of these is a meeting of all ranks, which all of them must call; one rank
//! alone costs nothing.

use bridge_ops::Ops;
use bridge_parallel::{Axis, ParallelContext};

use crate::error::{Error, Result};

/// As [`sum`], of lists: one after the end of a rank's list counts as 0.
///
/// # Errors
/// If a rank failed.
pub(crate) fn sum_lists<B: Ops>(
    parallel: &ParallelContext<B>,
    values: Vec<f64>,
) -> Result<Vec<f64>> {
    if parallel.is_alone() {
        return Ok(values);
    }
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let all = parallel.group(Axis::World).all_gather_bytes(&bytes)?;
    let mut sums = Vec::new();
    for bytes in &all {
        let (values, _) = bytes.as_chunks::<8>();
        if sums.len() < values.len() {
            sums.resize(values.len(), 0.0);
        }
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += f64::from_le_bytes(*value);
        }
    }
    Ok(sums)
}

/// The sums over all ranks, in the order of ranks and so the same on every rank.
///
/// # Errors
/// If a rank failed.
pub(crate) fn sum<B: Ops, const N: usize>(
    parallel: &ParallelContext<B>,
    values: [f64; N],
) -> Result<[f64; N]> {
    let mut sums = [0.0; N];
    for (sum, value) in sums.iter_mut().zip(sum_lists(parallel, values.to_vec())?) {
        *sum = value;
    }
    Ok(sums)
}

/// What the first rank passes, on every rank.
///
/// # Errors
/// If a rank failed.
pub(crate) fn from_first<B: Ops>(parallel: &ParallelContext<B>, bytes: Vec<u8>) -> Result<Vec<u8>> {
    if parallel.is_alone() {
        return Ok(bytes);
    }
    let own = if parallel.rank() == 0 {
        &bytes[..]
    } else {
        &[]
    };
    let mut all = parallel.group(Axis::World).all_gather_bytes(own)?;
    Ok(all.swap_remove(0))
}

/// The texts of all ranks that have one, each once, at most `limit`.
///
/// # Errors
/// If a rank failed.
pub(crate) fn texts<B: Ops>(
    parallel: &ParallelContext<B>,
    own: Vec<String>,
    limit: usize,
) -> Result<Vec<String>> {
    if parallel.is_alone() {
        return Ok(own);
    }
    let bytes = own.join("\n").into_bytes();
    let all = parallel.group(Axis::World).all_gather_bytes(&bytes)?;
    let mut found: Vec<String> = Vec::new();
    for text in all.iter().map(|bytes| String::from_utf8_lossy(bytes)) {
        for line in text.lines() {
            if found.len() < limit && found.iter().all(|known| known != line) {
                found.push(line.to_owned());
            }
        }
    }
    Ok(found)
}

/// Passes `result` on if it is well on every rank. A rank that failed gets its own error, the others one that names it.
///
/// # Errors
/// As said, or if a rank is gone.
pub(crate) fn all_well<B: Ops, T>(parallel: &ParallelContext<B>, result: Result<T>) -> Result<T> {
    if parallel.is_alone() {
        return result;
    }
    let own = match &result {
        Ok(_) => Vec::new(),
        // An error without words must still be noticed.
        Err(error) => format!("!{error}").into_bytes(),
    };
    let all = parallel.group(Axis::World).all_gather_bytes(&own)?;
    let value = result?;
    match all.iter().position(|bytes| !bytes.is_empty()) {
        None => Ok(value),
        Some(rank) => Err(Error::OtherRank {
            rank,
            reason: String::from_utf8_lossy(&all[rank][1..]).into_owned(),
        }),
    }
}
