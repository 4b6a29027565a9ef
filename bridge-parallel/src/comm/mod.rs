//! Process groups and their collectives.
//!
//! **Failure is sticky.** Collectives run inside tapes and return tensors. Once a rank has failed (it panicked, ended,
//! hung beyond the timeout, its process died, or ranks disagreed about what to do), every collective of every group of
//! the job returns at once, with zeros of the right shape, and [`Communicator::health`] gives the error, the same on
//! every rank. Whoever uses results asks first: the engine at the end of each forward, backward and optimizer step,
//! before it writes anything.
//!
//! **Order.** All members of a group call its collectives in the same order. Different groups are independent, and so are
//! `send` and `recv` from the collectives: messages from one rank to another arrive in the order they were sent.
//!
//! **Precision.** Dtypes are kept. On the CPU, sums of bf16 and f16 are accumulated in f32, in the order of the ranks, so
//! that results repeat bit for bit; on GPUs they are NCCL's.

pub mod autodiff;
mod blame;
mod combine;
mod failure;
pub mod nccl;
mod run;
mod single;
pub mod tcp;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod threads;

use std::sync::Arc;
use std::time::Duration;

use bridge_ops::{DType, Float, Ops};
use serde::{Deserialize, Serialize};

use crate::error::Result;

pub use run::run_threads;
pub use single::SingleRank;

/// How values of several ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ReduceOp {
    /// Their sum.
    Sum,
    /// The largest. NaN if one is.
    Max,
}

/// A process group as one of its ranks holds it. Shared by layers and engine.
pub type Group<B> = Arc<dyn Communicator<B>>;

/// One process group of this rank. Ranks in arguments and results are counted in the group. See the module's
/// documentation for failure, order and precision.
///
/// # Panics
/// Every method panics on a rank, dimension or number of rows that its own arguments show to be wrong. What only the
/// other ranks' arguments show is a failure of the job.
pub trait Communicator<B: Ops>: Send + Sync {
    /// Name of the axis, for messages.
    fn name(&self) -> &str;

    /// The members' global ranks, in the order of their ranks in the group.
    fn ranks(&self) -> &[usize];

    /// This rank's place in the group.
    fn rank(&self) -> usize;

    /// Number of members.
    fn size(&self) -> usize {
        self.ranks().len()
    }

    /// Starts [`all_reduce`](Self::all_reduce).
    fn start_all_reduce(&self, x: Float<B>, op: ReduceOp) -> Pending<B>;

    /// Starts [`all_gather`](Self::all_gather).
    fn start_all_gather(&self, x: Float<B>, dim: usize) -> Pending<B>;

    /// Starts [`reduce_scatter`](Self::reduce_scatter).
    fn start_reduce_scatter(&self, x: Float<B>, dim: usize) -> Pending<B>;

    /// Starts [`all_to_all`](Self::all_to_all).
    fn start_all_to_all(&self, x: Float<B>, send_rows: &[usize], recv_rows: &[usize])
    -> Pending<B>;

    /// Starts [`recv`](Self::recv).
    fn start_recv(&self, shape: &[usize], dtype: DType, from: usize) -> Pending<B>;

    /// Combines `x` of all ranks, elementwise; the result is the same on all. x: any shape, equal on all ranks.
    fn all_reduce(&self, x: Float<B>, op: ReduceOp) -> Float<B> {
        self.start_all_reduce(x, op).wait()
    }

    /// Joins `x` of all ranks along `dim`, in the order of ranks. x: any shape, equal on all ranks.
    fn all_gather(&self, x: Float<B>, dim: usize) -> Float<B> {
        self.start_all_gather(x, dim).wait()
    }

    /// Sums `x` over the ranks and gives each rank its part along `dim`, which must divide evenly.
    fn reduce_scatter(&self, x: Float<B>, dim: usize) -> Float<B> {
        self.start_reduce_scatter(x, dim).wait()
    }

    /// Sends `send_rows[r]` rows of dimension 0 to each rank `r`, in order, and returns the rows received, in the order
    /// of the senders. x: [sum of send_rows, ..] -> [sum of recv_rows, ..]. `recv_rows[r]` must be what `r` sends here;
    /// either may be 0.
    fn all_to_all(&self, x: Float<B>, send_rows: &[usize], recv_rows: &[usize]) -> Float<B> {
        self.start_all_to_all(x, send_rows, recv_rows).wait()
    }

    /// The `x` of rank `root`, on every rank. The others pass a tensor of the same shape and dtype, whose values do not
    /// matter.
    fn broadcast(&self, x: Float<B>, root: usize) -> Float<B>;

    /// Sends `x` to another rank of the group, which must receive it. Does not wait for that.
    fn send(&self, x: Float<B>, to: usize);

    /// The next tensor that rank `from` sends here. Shape and dtype must be those of what is sent.
    fn recv(&self, shape: &[usize], dtype: DType, from: usize) -> Float<B> {
        self.start_recv(shape, dtype, from).wait()
    }

    /// The bytes that each rank passes, on every rank. For small host data: sizes, names, decisions.
    ///
    /// # Errors
    /// The job's failure.
    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Waits until every rank of the group is here.
    ///
    /// # Errors
    /// The job's failure.
    fn barrier(&self) -> Result<()> {
        self.all_gather_bytes(&[]).map(|_| ())
    }

    /// Ends the job on every rank, with this rank as the cause. The first failure of a job stays.
    fn abort(&self, reason: &str);

    /// Whether the job is well.
    ///
    /// # Errors
    /// The failure that ended the job, with the rank at fault.
    fn health(&self) -> Result<()>;
}

/// What connects the ranks of a job, and makes groups of them.
pub trait Transport<B: Ops>: Send + Sync {
    /// This rank.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// The group of `ranks` (global, ascending, this one among them). Its members all call this, and ranks that share
    /// several groups make them in the same order. Equal name and ranks give the same group.
    ///
    /// # Errors
    /// If this rank is not a member, or the group could not be made.
    fn group(&self, name: &str, ranks: &[usize]) -> Result<Group<B>>;

    /// Ends the job on every rank, with this rank as the cause. The first failure of a job stays.
    fn abort(&self, reason: &str);

    /// Whether the job is well.
    ///
    /// # Errors
    /// The failure that ended the job.
    fn health(&self) -> Result<()>;

    /// From now on measures how long this rank's device stands still for other ranks. Nothing happens where that is not
    /// measured: on a CPU.
    fn measure_waits(&self) {}

    /// How long the device stood still, or ran nothing but an exchange, since the last call; `None` where that is not
    /// measured. What is still queued counts the next time.
    fn waited(&self) -> Option<Duration> {
        None
    }
}

/// The result of a collective that was started. It goes on by itself; [`wait`](Self::wait) gives the result.
#[must_use = "the result of a collective comes from `wait`"]
pub struct Pending<B: Ops>(State<B>);

enum State<B: Ops> {
    Ready(Float<B>),
    Waiting(Box<dyn FnOnce() -> Float<B> + Send>),
}

impl<B: Ops> Pending<B> {
    /// A result that is there already.
    pub fn ready(x: Float<B>) -> Self {
        Self(State::Ready(x))
    }

    /// A result that `wait` gives. It returns at once when the job has failed.
    pub fn new(wait: impl FnOnce() -> Float<B> + Send + 'static) -> Self {
        Self(State::Waiting(Box::new(wait)))
    }

    /// The result. On a device with a queue, the work queued from here on finds it complete; elsewhere this waits.
    pub fn wait(self) -> Float<B> {
        match self.0 {
            State::Ready(x) => x,
            State::Waiting(wait) => wait(),
        }
    }
}
