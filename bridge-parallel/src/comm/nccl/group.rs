//! A group of processes with a GPU each.

use std::collections::{HashMap, VecDeque};
use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bridge_cuda::{Cuda, CudaTensor, Mark};
use bridge_ops::{DType, float_zeros};
use burn_backend::Shape;
use burn_backend::TensorMetadata;
use burn_backend::ops::FloatTensorOps;

use super::channel::{Channel, On};
use super::watchdog::Job;
use crate::comm::tcp::HostGroup;
use crate::comm::threads::{exchanged_shape, gathered_shape, scattered_shape};
use crate::comm::{Communicator, Pending, ReduceOp};
use crate::error::Result;

/// A group as one of its processes holds it.
pub(super) struct NcclGroup {
    inner: Arc<Inner>,
}

struct Inner {
    job: Arc<Job>,
    host: HostGroup,
    /// For the group's collectives, made by the first of them.
    channel: OnceLock<Result<Arc<Channel>>>,
    /// For tensors from one rank to another, by sender and receiver.
    pairs: Mutex<Pairs>,
}

#[derive(Default)]
struct Pairs {
    ring_made: bool,
    channels: HashMap<(usize, usize), Arc<Channel>>,
    /// What this rank sent to itself and has not received.
    own: VecDeque<CudaTensor>,
}

/// A call under way on a side stream. What it reads and writes may go back to the pool only after the compute stream has
/// been told to wait for it, which happens here at the latest.
struct UnderWay {
    job: Arc<Job>,
    mark: Arc<Mark>,
    _output: CudaTensor,
    _input: Option<CudaTensor>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        // A driver that refuses this has failed, and with it all that would use the memory.
        let _ = self.job.timed(|| self.mark.release());
    }
}

impl NcclGroup {
    pub(super) fn new(job: Arc<Job>, host: HostGroup) -> Self {
        Self {
            inner: Arc::new(Inner {
                job,
                host,
                channel: OnceLock::new(),
                pairs: Mutex::default(),
            }),
        }
    }
}

impl Inner {
    /// The group's communicator; `None` when the job has failed.
    fn channel(&self) -> Option<&Arc<Channel>> {
        if self.job.link.failure().get().is_some() {
            return None;
        }
        let made = self
            .channel
            .get_or_init(|| Channel::new(Arc::clone(&self.job), &self.host));
        match made {
            Ok(channel) => Some(channel),
            Err(error) => {
                self.job.link.fail(error.clone());
                None
            }
        }
    }

    /// The communicator for tensors from one member to another; `None` when the job has failed.
    ///
    /// The first message makes those of all neighbours in both directions, in an order on which all members agree, since
    /// pipelines and rings need them all; those of other pairs are made when both ends first use them.
    fn pair(&self, from: usize, to: usize) -> Option<Arc<Channel>> {
        let size = self.host.ranks.len();
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        let made = (|| -> Result<Arc<Channel>> {
            if !pairs.ring_made {
                pairs.ring_made = true;
                for left in 0..size {
                    let right = (left + 1) % size;
                    for (a, b) in [(left, right), (right, left)] {
                        let mine = a != b && (a == self.host.rank || b == self.host.rank);
                        if mine && !pairs.channels.contains_key(&(a, b)) {
                            let channel = self.make_pair(a, b)?;
                            pairs.channels.insert((a, b), channel);
                        }
                    }
                }
            }
            if let Some(channel) = pairs.channels.get(&(from, to)) {
                return Ok(Arc::clone(channel));
            }
            let channel = self.make_pair(from, to)?;
            pairs.channels.insert((from, to), Arc::clone(&channel));
            Ok(channel)
        })();
        made.map_err(|error| self.job.link.fail(error)).ok()
    }

    fn make_pair(&self, from: usize, to: usize) -> Result<Arc<Channel>> {
        let [from, to] = [self.host.ranks[from], self.host.ranks[to]];
        let name = format!("{} {from} to {to}", self.host.name);
        let mut ranks = vec![from, to];
        ranks.sort_unstable();
        ranks.dedup();
        let host = HostGroup::new(Arc::clone(&self.job.link), &name, &ranks)?;
        let channel = Channel::new(Arc::clone(&self.job), &host)?;
        if ranks.len() == 2 {
            self.connect(&channel, host.global_rank() == from, from, to)?;
        }
        Ok(channel)
    }

    /// Sends one number over a new channel, on both its ends. NCCL connects two ranks at their first message, for which
    /// both must call; from then on neither a send nor a receive waits for the other rank's call, and ranks that both
    /// send before they receive cannot block each other.
    fn connect(&self, channel: &Channel, sends: bool, from: usize, to: usize) -> Result<()> {
        let number = self.zeros(&[1], DType::F32);
        let place = |rank: usize| c_int::from(rank != channel.ranks[0]);
        let (address, float) = (address_mut(&number), nccl_dtype(DType::F32));
        let queued = channel.run("connect", On::Side, Some(number), |api, comm, stream| {
            // SAFETY: a tensor of one element, which the channel keeps until the call is done.
            unsafe {
                if sends {
                    (api.send)(address, 1, float, place(to), comm, stream)
                } else {
                    (api.recv)(address, 1, float, place(from), comm, stream)
                }
            }
        });
        match queued {
            Some(_) => Ok(()),
            None => Err(self
                .host
                .health()
                .expect_err("a call is not queued only after a failure")),
        }
    }

    fn zeros(&self, shape: &[usize], dtype: DType) -> CudaTensor {
        float_zeros::<Cuda>(shape, dtype, &self.job.device)
    }

    /// An output tensor; failing to get memory is a panic, as everywhere in a backend.
    #[track_caller]
    fn output(&self, shape: &[usize], dtype: DType) -> CudaTensor {
        CudaTensor::uninitialized(self.job.device, shape, dtype)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// Sums or maxima of `x`, in place where nobody else has it.
    fn all_reduce(&self, x: CudaTensor, op: ReduceOp, on: On) -> (CudaTensor, Option<UnderWay>) {
        let (shape, dtype) = (x.dims().to_vec(), x.dtype());
        let input = packed(x);
        let output = if input.is_unique() {
            input.clone()
        } else {
            self.output(&shape, dtype)
        };
        let count = count(&shape);
        let op = match op {
            ReduceOp::Sum => 0,
            ReduceOp::Max => 2,
        };
        let (from, to) = (address(&input), address_mut(&output));
        self.collective("all_reduce", on, input, output, |api, comm, stream| {
            // SAFETY: packed tensors of `count` elements on this device, kept alive until the call is done.
            unsafe { (api.all_reduce)(from, to, count, nccl_dtype(dtype), op, comm, stream) }
        })
    }

    /// Runs a collective of the group. `None` on the compute stream, where order alone makes it safe.
    fn collective(
        &self,
        call: &'static str,
        on: On,
        input: CudaTensor,
        output: CudaTensor,
        queue: impl FnOnce(
            &super::ffi::Api,
            super::ffi::CommPtr,
            super::ffi::Stream,
        ) -> super::ffi::Status,
    ) -> (CudaTensor, Option<UnderWay>) {
        let run = || {
            let channel = self.channel()?;
            channel.run(call, on, None, queue)
        };
        let mark = match on {
            On::Compute => self.job.timed(run),
            On::Side => run(),
        };
        match mark {
            None => (self.zeros(output.dims(), output.dtype()), None),
            Some(_) if on == On::Compute => (output, None),
            Some(mark) => {
                let under_way = UnderWay {
                    job: Arc::clone(&self.job),
                    mark,
                    _output: output.clone(),
                    _input: Some(input),
                };
                (output, Some(under_way))
            }
        }
    }

    /// All ranks' `x` one after the other: [size, ..x].
    fn all_gather(&self, x: CudaTensor, on: On) -> (CudaTensor, Option<UnderWay>) {
        let dtype = x.dtype();
        let input = packed(x);
        let mut shape = vec![self.host.ranks.len()];
        shape.extend(input.dims());
        let output = self.output(&shape, dtype);
        let count = count(input.dims());
        let (from, to) = (address(&input), address_mut(&output));
        self.collective("all_gather", on, input, output, |api, comm, stream| {
            // SAFETY: as above; the output holds `count` elements of each rank.
            unsafe { (api.all_gather)(from, to, count, nccl_dtype(dtype), comm, stream) }
        })
    }

    /// The sum of `x`: [size, ..part] over the ranks, of which each gets its part.
    fn reduce_scatter(
        &self,
        x: CudaTensor,
        part: &[usize],
        on: On,
    ) -> (CudaTensor, Option<UnderWay>) {
        let dtype = x.dtype();
        let input = packed(x);
        let output = self.output(part, dtype);
        let count = count(part);
        let (from, to) = (address(&input), address_mut(&output));
        self.collective("reduce_scatter", on, input, output, |api, comm, stream| {
            // SAFETY: as above; the input holds `count` elements for each rank.
            unsafe { (api.reduce_scatter)(from, to, count, nccl_dtype(dtype), 0, comm, stream) }
        })
    }

    fn all_to_all(
        &self,
        x: CudaTensor,
        send_rows: &[usize],
        recv_rows: &[usize],
        shape: &[usize],
        on: On,
    ) -> (CudaTensor, Option<UnderWay>) {
        let dtype = x.dtype();
        let input = packed(x);
        let output = self.output(shape, dtype);
        let row = count(&shape[1..]);
        let (mut from, mut to) = (input.address(), output.address());
        self.collective("all_to_all", on, input, output, |api, comm, stream| {
            // SAFETY: the rows of each rank lie one after the other in packed tensors, as the shapes were checked to say.
            unsafe {
                let mut status = (api.group_start)();
                for (peer, (send, recv)) in send_rows.iter().zip(recv_rows).enumerate() {
                    let (sent, received) = (send * row, recv * row);
                    if sent > 0 && status == super::ffi::SUCCESS {
                        status = (api.send)(
                            from as *const c_void,
                            sent,
                            nccl_dtype(dtype),
                            peer as c_int,
                            comm,
                            stream,
                        );
                    }
                    if received > 0 && status == super::ffi::SUCCESS {
                        status = (api.recv)(
                            to as *mut c_void,
                            received,
                            nccl_dtype(dtype),
                            peer as c_int,
                            comm,
                            stream,
                        );
                    }
                    from += (sent * dtype.size()) as u64;
                    to += (received * dtype.size()) as u64;
                }
                let end = (api.group_end)();
                if status == super::ffi::SUCCESS || status == super::ffi::IN_PROGRESS {
                    end
                } else {
                    status
                }
            }
        })
    }
}

/// `x`: [.., dim, ..] with its parts along `dim` first: [size, .., dim / size, ..].
fn split_parts(x: CudaTensor, dim: usize, size: usize) -> CudaTensor {
    if dim == 0 {
        return x;
    }
    let mut shape = x.dims().to_vec();
    shape[dim] /= size;
    shape.insert(dim, size);
    let x = Cuda::float_reshape(x, Shape::from(shape.clone()));
    let mut axes: Vec<usize> = (0..shape.len()).filter(|axis| *axis != dim).collect();
    axes.insert(0, dim);
    Cuda::float_permute(x, &axes)
}

/// The other way: `x`: [size, .., part, ..] joined along what was dimension `dim` of a part.
fn join_parts(x: CudaTensor, dim: usize) -> CudaTensor {
    let parts = x.dims().to_vec();
    let mut axes: Vec<usize> = (1..parts.len()).collect();
    axes.insert(dim, 0);
    let mut shape = parts[1..].to_vec();
    shape[dim] *= parts[0];
    let x = if dim == 0 {
        x
    } else {
        Cuda::float_permute(x, &axes)
    };
    Cuda::float_reshape(x, Shape::from(shape))
}

/// A result that is complete for the work queued from the wait on.
fn pending(
    (output, under_way): (CudaTensor, Option<UnderWay>),
    finish: impl FnOnce(CudaTensor) -> CudaTensor + Send + 'static,
) -> Pending<Cuda> {
    Pending::new(move || {
        // Dropping what is under way makes the compute stream wait for it.
        drop(under_way);
        finish(output)
    })
}

impl Communicator<Cuda> for NcclGroup {
    fn name(&self) -> &str {
        &self.inner.host.name
    }

    fn ranks(&self) -> &[usize] {
        &self.inner.host.ranks
    }

    fn rank(&self) -> usize {
        self.inner.host.rank
    }

    fn start_all_reduce(&self, x: CudaTensor, op: ReduceOp) -> Pending<Cuda> {
        pending(self.inner.all_reduce(x, op, On::Side), |x| x)
    }

    fn start_all_gather(&self, x: CudaTensor, dim: usize) -> Pending<Cuda> {
        gathered_shape::<Cuda>(&x, dim, self.size());
        pending(self.inner.all_gather(x, On::Side), move |x| {
            join_parts(x, dim)
        })
    }

    fn start_reduce_scatter(&self, x: CudaTensor, dim: usize) -> Pending<Cuda> {
        let part = scattered_shape::<Cuda>(&x, dim, self.size());
        let x = split_parts(x, dim, self.size());
        pending(self.inner.reduce_scatter(x, &part, On::Side), |x| x)
    }

    fn start_all_to_all(
        &self,
        x: CudaTensor,
        send_rows: &[usize],
        recv_rows: &[usize],
    ) -> Pending<Cuda> {
        let shape = exchanged_shape::<Cuda>(&x, send_rows, recv_rows, self.size());
        pending(
            self.inner
                .all_to_all(x, send_rows, recv_rows, &shape, On::Side),
            |x| x,
        )
    }

    fn start_recv(&self, shape: &[usize], dtype: DType, from: usize) -> Pending<Cuda> {
        let inner = &self.inner;
        assert!(
            from < self.size(),
            "rank {from} of a group of {}",
            self.size()
        );
        if from == inner.host.rank {
            let sent = inner
                .pairs
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .own
                .pop_front();
            return Pending::ready(
                sent.expect("a rank receives from itself only what it has sent"),
            );
        }
        let Some(channel) = inner.pair(from, inner.host.rank) else {
            return Pending::ready(inner.zeros(shape, dtype));
        };
        let output = inner.output(shape, dtype);
        let (to, count) = (address_mut(&output), count(shape));
        // The sender's place among the two.
        let peer = c_int::from(inner.host.ranks[from] != channel.ranks[0]);
        let mark = channel.run("recv", On::Side, None, |api, comm, stream| {
            // SAFETY: a packed tensor of `count` elements, kept until the call is done.
            unsafe { (api.recv)(to, count, nccl_dtype(dtype), peer, comm, stream) }
        });
        match mark {
            Some(mark) => {
                let under_way = UnderWay {
                    job: Arc::clone(&inner.job),
                    mark,
                    _output: output.clone(),
                    _input: None,
                };
                pending((output, Some(under_way)), |x| x)
            }
            None => Pending::ready(inner.zeros(shape, dtype)),
        }
    }

    fn all_reduce(&self, x: CudaTensor, op: ReduceOp) -> CudaTensor {
        self.inner.all_reduce(x, op, On::Compute).0
    }

    fn all_gather(&self, x: CudaTensor, dim: usize) -> CudaTensor {
        gathered_shape::<Cuda>(&x, dim, self.size());
        join_parts(self.inner.all_gather(x, On::Compute).0, dim)
    }

    fn reduce_scatter(&self, x: CudaTensor, dim: usize) -> CudaTensor {
        let part = scattered_shape::<Cuda>(&x, dim, self.size());
        self.inner
            .reduce_scatter(split_parts(x, dim, self.size()), &part, On::Compute)
            .0
    }

    fn all_to_all(&self, x: CudaTensor, send_rows: &[usize], recv_rows: &[usize]) -> CudaTensor {
        let shape = exchanged_shape::<Cuda>(&x, send_rows, recv_rows, self.size());
        self.inner
            .all_to_all(x, send_rows, recv_rows, &shape, On::Compute)
            .0
    }

    fn broadcast(&self, x: CudaTensor, root: usize) -> CudaTensor {
        assert!(
            root < self.size(),
            "root {root} of a group of {}",
            self.size()
        );
        let (shape, dtype) = (x.dims().to_vec(), x.dtype());
        let input = packed(x);
        let output = self.inner.output(&shape, dtype);
        let (from, to) = (address(&input), address_mut(&output));
        let queued = self.inner.collective(
            "broadcast",
            On::Compute,
            input,
            output,
            |api, comm, stream| {
                // SAFETY: packed tensors of equal size on this device, ordered by the compute stream.
                unsafe {
                    (api.broadcast)(
                        from,
                        to,
                        count(&shape),
                        nccl_dtype(dtype),
                        root as c_int,
                        comm,
                        stream,
                    )
                }
            },
        );
        queued.0
    }

    fn send(&self, x: CudaTensor, to: usize) {
        let inner = &self.inner;
        assert!(to < self.size(), "rank {to} of a group of {}", self.size());
        if to == inner.host.rank {
            inner
                .pairs
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .own
                .push_back(x);
            return;
        }
        let Some(channel) = inner.pair(inner.host.rank, to) else {
            return;
        };
        let (dtype, x) = (x.dtype(), packed(x));
        let (from, count) = (address(&x), count(x.dims()));
        let peer = c_int::from(inner.host.ranks[to] != channel.ranks[0]);
        channel.run("send", On::Side, Some(x), |api, comm, stream| {
            // SAFETY: a packed tensor of `count` elements, which the channel keeps until the call is done.
            unsafe { (api.send)(from, count, nccl_dtype(dtype), peer, comm, stream) }
        });
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.inner.host.all_gather_bytes(bytes)
    }

    fn abort(&self, reason: &str) {
        self.inner.host.abort(reason);
    }

    fn health(&self) -> Result<()> {
        self.inner.host.health()
    }
}

/// The tensor itself where its elements lie one after the other, without a second handle to it.
fn packed(x: CudaTensor) -> CudaTensor {
    if x.is_packed() { x } else { x.packed() }
}

fn count(shape: &[usize]) -> usize {
    shape.iter().product()
}

fn address(x: &CudaTensor) -> *const c_void {
    x.address() as *const c_void
}

fn address_mut(x: &CudaTensor) -> *mut c_void {
    x.address() as *mut c_void
}

/// `ncclDataType_t`.
#[track_caller]
fn nccl_dtype(dtype: DType) -> c_int {
    match dtype {
        DType::F16 => 6,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::BF16 => 9,
        other => panic!("tensors of {other:?} do not travel between ranks"),
    }
}
