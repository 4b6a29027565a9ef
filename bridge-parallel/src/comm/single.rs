//! A group of one.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use bridge_ops::{DType, Float, Ops};

use super::{Communicator, Pending, ReduceOp};
use crate::error::{Error, Result};

/// A group of one rank: every collective returns its argument.
pub struct SingleRank<B: Ops> {
    name: String,
    ranks: [usize; 1],
    /// What the rank sent to itself and has not received.
    sent: Mutex<VecDeque<Float<B>>>,
    failure: Mutex<Option<Error>>,
}

impl<B: Ops> SingleRank<B> {
    /// The group called `name` of global rank `rank`.
    pub fn new(name: impl Into<String>, rank: usize) -> Self {
        Self {
            name: name.into(),
            ranks: [rank],
            sent: Mutex::default(),
            failure: Mutex::default(),
        }
    }
}

impl<B: Ops> Communicator<B> for SingleRank<B> {
    fn name(&self) -> &str {
        &self.name
    }

    fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    fn rank(&self) -> usize {
        0
    }

    fn start_all_reduce(&self, x: Float<B>, _: ReduceOp) -> Pending<B> {
        Pending::ready(x)
    }

    fn start_all_gather(&self, x: Float<B>, _: usize) -> Pending<B> {
        Pending::ready(x)
    }

    fn start_reduce_scatter(&self, x: Float<B>, _: usize) -> Pending<B> {
        Pending::ready(x)
    }

    fn start_all_to_all(&self, x: Float<B>, _: &[usize], _: &[usize]) -> Pending<B> {
        Pending::ready(x)
    }

    fn start_recv(&self, _: &[usize], _: DType, _: usize) -> Pending<B> {
        let sent = self
            .sent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        Pending::ready(sent.expect("a rank receives from itself only what it has sent"))
    }

    fn broadcast(&self, x: Float<B>, _: usize) -> Float<B> {
        x
    }

    fn send(&self, x: Float<B>, _: usize) {
        self.sent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(x);
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![bytes.to_vec()])
    }

    fn abort(&self, reason: &str) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert_with(|| Error::Aborted {
            rank: self.ranks[0],
            reason: reason.to_owned(),
        });
    }

    fn health(&self) -> Result<()> {
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }
}
