//! Groups of processes: host data over the hub, and tensors as host data.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bridge_ops::{DType, Float, Ops, float_from_bytes, float_zeros};
use burn_backend::{TensorMetadata, read_sync};
use sha2::{Digest, Sha256};

use super::link::{Link, Message};
use super::wire::{Content, Tag};
use crate::comm::combine::{Call, Contribution, Data, combine};
use crate::comm::threads::{exchanged_shape, gathered_shape, scattered_shape};
use crate::comm::{Communicator, Pending, ReduceOp};
use crate::error::{Error, Result};

/// A group as one of its processes holds it: who the members are, and exchange of host data among them.
pub(crate) struct HostGroup {
    pub(crate) link: Arc<Link>,
    pub(crate) name: String,
    pub(crate) ranks: Vec<usize>,
    pub(crate) rank: usize,
    /// The same number on every member.
    pub(crate) id: u64,
    next: AtomicU64,
}

impl HostGroup {
    pub(crate) fn new(link: Arc<Link>, name: &str, ranks: &[usize]) -> Result<Self> {
        let (own, world_size) = (link.options().rank, link.options().world_size);
        let rank = ranks.iter().position(|rank| *rank == own);
        let valid = ranks.is_sorted_by(|a, b| a < b) && ranks.iter().all(|rank| *rank < world_size);
        let (Some(rank), true) = (rank, valid) else {
            return Err(Error::Invalid(format!(
                "rank {own} cannot make group {name} of ranks {ranks:?} in a job of {world_size}: ranks ascend, and this \
                 one is among them"
            )));
        };
        // All members derive the same number without asking each other.
        let digest = Sha256::digest(format!("{name} {ranks:?}"));
        let id = u64::from_le_bytes(std::array::from_fn(|i| digest[i]));
        Ok(Self {
            link,
            name: name.to_owned(),
            ranks: ranks.to_vec(),
            rank,
            id,
            next: AtomicU64::new(0),
        })
    }

    pub(crate) fn global_rank(&self) -> usize {
        self.ranks[self.rank]
    }

    /// Sends `content` to the other members as part of the group's next collective. Returns its number.
    fn contribute(&self, content: Content, payload: &[u8]) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.link
            .send(self.others(), self.tag(number), content, payload);
        number
    }

    /// What the other members sent for collective `number`, in the order of ranks.
    fn collect(&self, number: u64, call: Call) -> Option<Vec<Message>> {
        let describe = || {
            format!(
                "{call} number {number} of group {} {:?}",
                self.name, self.ranks
            )
        };
        self.link.wait(self.tag(number), &self.others(), describe)
    }

    fn others(&self) -> Vec<usize> {
        let own = self.global_rank();
        self.ranks
            .iter()
            .copied()
            .filter(|rank| *rank != own)
            .collect()
    }

    fn tag(&self, number: u64) -> Tag {
        Tag {
            group: self.id,
            number: Some(number),
        }
    }

    fn mail_tag(&self) -> Tag {
        Tag {
            group: self.id,
            number: None,
        }
    }

    /// The bytes that each member passes, in the order of ranks.
    pub(crate) fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let call = Call::GatherBytes;
        let content = Content {
            call: Some(call),
            ..Content::default()
        };
        let number = self.contribute(content, bytes);
        let Some(messages) = self.collect(number, call) else {
            return Err(self
                .health()
                .expect_err("a wait gives nothing only after a failure"));
        };
        if let Some(at) = messages
            .iter()
            .position(|message| message.content.call != Some(call))
        {
            let theirs = messages[at].content.call;
            let error = Error::Mismatch {
                call: format!("{call} number {number} of group {}", self.name),
                problem: format!(
                    "rank {} calls {call}, rank {} calls {}",
                    self.global_rank(),
                    self.others()[at],
                    theirs.map_or("nothing known".to_owned(), |call| call.to_string())
                ),
            };
            self.link.fail(error.clone());
            return Err(error);
        }
        let mut all: Vec<Vec<u8>> = messages
            .into_iter()
            .map(|message| message.payload)
            .collect();
        all.insert(self.rank, bytes.to_vec());
        Ok(all)
    }

    pub(crate) fn health(&self) -> Result<()> {
        self.link.failure().health()
    }

    pub(crate) fn abort(&self, reason: &str) {
        self.link.fail(Error::Aborted {
            rank: self.global_rank(),
            reason: reason.to_owned(),
        });
    }
}

/// A group whose tensors travel as host data. Every member gets what every other passes, and computes its result as the
/// thread transport does.
pub(crate) struct TcpGroup<B: Ops> {
    inner: Arc<Inner<B>>,
}

struct Inner<B: Ops> {
    host: HostGroup,
    device: B::Device,
}

impl<B: Ops> TcpGroup<B> {
    pub(crate) fn new(host: HostGroup, device: B::Device) -> Self {
        Self {
            inner: Arc::new(Inner { host, device }),
        }
    }

    fn start(&self, call: Call, x: Float<B>, rows: [&[usize]; 2], shape: Vec<usize>) -> Pending<B> {
        let dtype = x.dtype();
        let mine = Contribution {
            call,
            data: Data::<B>::Tensor(x.clone()),
            send_rows: rows[0].to_vec(),
            recv_rows: rows[1].to_vec(),
        };
        let (tensor, bytes) = encode::<B>(x);
        let content = Content {
            call: Some(call),
            tensor: Some(tensor),
            send_rows: rows[0].to_vec(),
            recv_rows: rows[1].to_vec(),
        };
        let number = self.inner.host.contribute(content, &bytes);
        let inner = Arc::clone(&self.inner);
        Pending::new(move || {
            inner
                .finish(number, call, mine)
                .unwrap_or_else(|| float_zeros::<B>(&shape, dtype, &inner.device))
        })
    }
}

impl<B: Ops> Inner<B> {
    fn finish(&self, number: u64, call: Call, mine: Contribution<B>) -> Option<Float<B>> {
        let host = &self.host;
        let messages = host.collect(number, call)?;
        let decoded: Result<Vec<Contribution<B>>, String> = messages
            .into_iter()
            .map(|message| self.decode(message))
            .collect();
        let combined = decoded.and_then(|mut all| {
            all.insert(host.rank, mine);
            combine(all, &host.ranks)
        });
        match combined {
            Ok(mut results) => match results.swap_remove(host.rank) {
                Data::Tensor(x) => Some(x),
                Data::Bytes(_) => None,
            },
            Err(problem) => {
                host.link.fail(Error::Mismatch {
                    call: format!(
                        "{call} number {number} of group {} {:?}",
                        host.name, host.ranks
                    ),
                    problem,
                });
                None
            }
        }
    }

    fn decode(&self, message: Message) -> Result<Contribution<B>, String> {
        let Content {
            call,
            tensor,
            send_rows,
            recv_rows,
        } = message.content;
        let call = call.ok_or("a message names no collective")?;
        let data = match tensor {
            Some(tensor) => Data::Tensor(decode::<B>(&tensor, message.payload, &self.device)?),
            None => Data::Bytes(Arc::new(vec![message.payload])),
        };
        if matches!(data, Data::Bytes(_)) != (call == Call::GatherBytes) {
            return Err(format!(
                "a message for {call} carries the wrong kind of data"
            ));
        }
        Ok(Contribution {
            call,
            data,
            send_rows,
            recv_rows,
        })
    }
}

impl<B: Ops> Communicator<B> for TcpGroup<B> {
    fn name(&self) -> &str {
        &self.inner.host.name
    }

    fn ranks(&self) -> &[usize] {
        &self.inner.host.ranks
    }

    fn rank(&self) -> usize {
        self.inner.host.rank
    }

    fn start_all_reduce(&self, x: Float<B>, op: ReduceOp) -> Pending<B> {
        let shape = x.shape().to_vec();
        self.start(Call::AllReduce(op), x, [&[], &[]], shape)
    }

    fn start_all_gather(&self, x: Float<B>, dim: usize) -> Pending<B> {
        let shape = gathered_shape::<B>(&x, dim, self.size());
        self.start(Call::AllGather { dim }, x, [&[], &[]], shape)
    }

    fn start_reduce_scatter(&self, x: Float<B>, dim: usize) -> Pending<B> {
        let shape = scattered_shape::<B>(&x, dim, self.size());
        self.start(Call::ReduceScatter { dim }, x, [&[], &[]], shape)
    }

    fn start_all_to_all(
        &self,
        x: Float<B>,
        send_rows: &[usize],
        recv_rows: &[usize],
    ) -> Pending<B> {
        let shape = exchanged_shape::<B>(&x, send_rows, recv_rows, self.size());
        self.start(Call::AllToAll, x, [send_rows, recv_rows], shape)
    }

    fn start_recv(&self, shape: &[usize], dtype: DType, from: usize) -> Pending<B> {
        let inner = Arc::clone(&self.inner);
        let shape = shape.to_vec();
        Pending::new(move || {
            let host = &inner.host;
            let sender = host.ranks[from];
            let describe = || format!("recv from rank {sender} in group {}", host.name);
            let messages = host.link.wait(host.mail_tag(), &[sender], describe);
            let zeros = || float_zeros::<B>(&shape, dtype, &inner.device);
            let Some(message) = messages.and_then(|mut messages| messages.pop()) else {
                return zeros();
            };
            let expected = (dtype_name(dtype).to_owned(), shape.clone());
            let received = match message.content.tensor {
                Some(tensor) if tensor == expected => {
                    decode::<B>(&tensor, message.payload, &inner.device)
                }
                Some((dtype, shape)) => Err(format!("rank {sender} sent {dtype} {shape:?}")),
                None => Err(format!("rank {sender} sent no tensor")),
            };
            received.unwrap_or_else(|problem| {
                let problem = format!(
                    "rank {} expects {} {shape:?}, {problem}",
                    host.global_rank(),
                    expected.0
                );
                host.link.fail(Error::Mismatch {
                    call: describe(),
                    problem,
                });
                zeros()
            })
        })
    }

    fn broadcast(&self, x: Float<B>, root: usize) -> Float<B> {
        assert!(
            root < self.size(),
            "root {root} of a group of {}",
            self.size()
        );
        let shape = x.shape().to_vec();
        self.start(Call::Broadcast { root }, x, [&[], &[]], shape)
            .wait()
    }

    fn send(&self, x: Float<B>, to: usize) {
        let host = &self.inner.host;
        let (tensor, bytes) = encode::<B>(x);
        let content = Content {
            tensor: Some(tensor),
            ..Content::default()
        };
        host.link
            .send(vec![host.ranks[to]], host.mail_tag(), content, &bytes);
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

const DTYPES: [(DType, &str); 4] = [
    (DType::F32, "f32"),
    (DType::F64, "f64"),
    (DType::BF16, "bf16"),
    (DType::F16, "f16"),
];

#[track_caller]
fn dtype_name(dtype: DType) -> &'static str {
    let found = DTYPES.iter().find(|(known, _)| *known == dtype);
    found
        .unwrap_or_else(|| panic!("tensors of {dtype:?} do not travel between ranks"))
        .1
}

fn encode<B: Ops>(x: Float<B>) -> ((String, Vec<usize>), Vec<u8>) {
    let head = (dtype_name(x.dtype()).to_owned(), x.shape().to_vec());
    let data = read_sync(B::float_into_data(x)).expect("reading a tensor back from the device");
    (head, data.bytes.to_vec())
}

fn decode<B: Ops>(
    (dtype, shape): &(String, Vec<usize>),
    bytes: Vec<u8>,
    device: &B::Device,
) -> Result<Float<B>, String> {
    let known = DTYPES.iter().find(|(_, name)| name == dtype);
    let (dtype, _) = known.ok_or_else(|| format!("a message has the unknown dtype {dtype:?}"))?;
    let count = shape
        .iter()
        .try_fold(1usize, |count, dim| count.checked_mul(*dim));
    if count.and_then(|count| count.checked_mul(dtype.size())) != Some(bytes.len()) {
        return Err(format!(
            "a message of {} bytes claims to hold {dtype:?} {shape:?}",
            bytes.len()
        ));
    }
    Ok(float_from_bytes::<B>(*dtype, bytes, shape, device))
}
