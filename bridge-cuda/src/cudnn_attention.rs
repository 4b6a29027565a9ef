//! Softmax attention as cuDNN graphs, forward and backward, and the plans made for them.
//!
//! Forward: `s = scale q k^T` (capped, masked), `out = softmax(s) v`, and the natural log-sum-exp of every row. Backward:
//! `p = exp(s - lse)`, `dv = p^T dout`, `ds = p (dout v^T - rowsum(dout out)) scale`, `dq = ds k`, `dk = ds^T q`. Query
//! heads that share a key head are summed over by a reduction. cuDNN's engines know these graphs by their form, so the
//! order of the operations matters. Sources: the cuDNN frontend's attention nodes, for the form its engines match;
//! Dao 2023, "FlashAttention-2", for the formulas.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use burn_backend::DType;

use crate::cudnn::{Api, Descriptor, Raw};
use crate::cudnn_graph::{
    Element, Four, Graph, Node, Plan, Pointwise, Reduction, Target, packed, transposed,
};
use crate::device::Gpu;
use crate::error::Result;
use crate::tensor::CudaTensor;

/// What a plan is made for. Strides in elements, of batch, sequence and head; channels lie one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Problem {
    pub(crate) element: Element,
    pub(crate) batch: i64,
    pub(crate) queries: i64,
    pub(crate) keys: i64,
    pub(crate) heads: i64,
    pub(crate) key_heads: i64,
    pub(crate) d: i64,
    pub(crate) dv: i64,
    pub(crate) q: [i64; 3],
    pub(crate) k: [i64; 3],
    pub(crate) v: [i64; 3],
    /// Bits of the factor of the scores.
    pub(crate) scale: u32,
    /// Bits of the cap of the scores.
    pub(crate) softcap: Option<u32>,
    /// Query `i` sees keys `j <= i + last` only.
    pub(crate) last: Option<i64>,
    /// Query `i` sees keys `j > i - first` only.
    pub(crate) first: Option<i64>,
    /// A logit per head takes part in the softmax.
    pub(crate) sinks: bool,
    /// The batch entries are documents of at most `queries` tokens, packed one after the other; the rows of the
    /// log-sum-exp lie token by token, `[tokens, heads]`.
    pub(crate) packed: bool,
}

/// Where the documents of a packed batch lie: nodes of the graph, all `None` if the batch is not packed.
#[derive(Clone, Copy, Default)]
struct Packing {
    /// Tokens in each document, `[batch]` i32, for queries and for keys.
    queries: Option<Node>,
    keys: Option<Node>,
    /// First element of each document, `[batch + 1]` i64.
    q: Option<Node>,
    k: Option<Node>,
    v: Option<Node>,
    out: Option<Node>,
    rows: Option<Node>,
}

impl Packing {
    fn nodes(self) -> impl Iterator<Item = Node> {
        [
            self.queries,
            self.keys,
            self.q,
            self.k,
            self.v,
            self.out,
            self.rows,
        ]
        .into_iter()
        .flatten()
    }
}

/// The two passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Pass {
    Forward,
    Backward {
        /// Sums of `dq` are made in a fixed order, for which the scores' gradient is kept in memory.
        deterministic: bool,
    },
}

/// What one compiled kernel serves: a problem without its batch and lengths.
type Family = (Element, [i64; 4], [bool; 5]);

impl Problem {
    /// Makes this problem, of packed tensors, one of `documents` packed documents of at most `longest` tokens.
    pub(crate) fn pack(&mut self, documents: i64, longest: i64) {
        self.packed = true;
        self.batch = documents;
        (self.queries, self.keys) = (longest, longest);
        for strides in [&mut self.q, &mut self.k, &mut self.v] {
            strides[0] = longest * strides[1];
        }
    }

    /// Whether the kernel compiled for this problem serves other lengths. Backward engines cannot do that, and forward a
    /// kernel compiled for lengths that fill whole tiles gave wrong results for others (cuDNN 9.19 on an H100); packed
    /// documents always check their lengths.
    fn shares_kernels(&self, pass: Pass) -> bool {
        self.packed && pass == Pass::Forward
    }

    fn family(&self) -> Family {
        (
            self.element,
            [self.heads, self.key_heads, self.d, self.dv],
            [
                self.softcap.is_some(),
                self.last.is_some(),
                self.first.is_some(),
                self.sinks,
                self.packed,
            ],
        )
    }

    fn q_sizes(&self) -> Four {
        [self.batch, self.heads, self.queries, self.d]
    }

    fn out_sizes(&self) -> Four {
        [self.batch, self.heads, self.queries, self.dv]
    }

    fn k_sizes(&self) -> Four {
        [self.batch, self.key_heads, self.keys, self.d]
    }

    fn v_sizes(&self) -> Four {
        [self.batch, self.key_heads, self.keys, self.dv]
    }

    fn score_sizes(&self) -> Four {
        [self.batch, self.heads, self.queries, self.keys]
    }

    fn row_sizes(&self) -> Four {
        [self.batch, self.heads, self.queries, 1]
    }

    /// A number for every query, inside the kernel.
    fn row(&self, graph: &mut Graph) -> Result<Node> {
        let sizes = self.row_sizes();
        graph.inner(sizes, packed(sizes), Element::F32)
    }

    fn packing(&self, graph: &mut Graph) -> Result<Packing> {
        if !self.packed {
            return Ok(Packing::default());
        }
        let mut lengths = || {
            graph
                .memory([self.batch, 1, 1, 1], [1; 4], Element::I32)
                .map(Some)
        };
        let (queries, keys) = (lengths()?, lengths()?);
        let mut starts = || {
            graph
                .memory([self.batch + 1, 1, 1, 1], [1; 4], Element::I64)
                .map(Some)
        };
        Ok(Packing {
            queries,
            keys,
            q: starts()?,
            k: starts()?,
            v: starts()?,
            out: starts()?,
            rows: starts()?,
        })
    }

    /// A float for every query, in memory.
    fn rows(&self, graph: &mut Graph, packing: Packing) -> Result<Node> {
        let sizes = self.row_sizes();
        let strides = if self.packed {
            by_sequence(sizes)
        } else {
            packed(sizes)
        };
        graph.ragged(sizes, strides, Element::F32, packing.rows)
    }

    fn product(
        &self,
        graph: &mut Graph,
        a: Node,
        b: Node,
        packing: Packing,
        padding: Option<f64>,
    ) -> Result<Node> {
        let sizes = self.score_sizes();
        let scores = graph.inner(sizes, packed(sizes), Element::F32)?;
        let lengths = [packing.queries, packing.keys, None];
        graph.matmul(a, b, scores, lengths, padding)
    }

    /// Scores with what lies past the end of a document at minus infinity.
    fn pad(&self, graph: &mut Graph, scores: Node, packing: Packing) -> Result<Node> {
        let (Some(queries), Some(keys)) = (packing.queries, packing.keys) else {
            return Ok(scores);
        };
        let mut inside = |axis, length| {
            let index = graph.inner(scores.sizes, scores.strides, Element::I32)?;
            graph.pointwise_into(Pointwise::Index, &[scores], index, Element::I32, Some(axis))?;
            graph.pointwise_as(Pointwise::Less, &[index, length], Element::Bool, None)
        };
        let (row, column) = (inside(2, queries)?, inside(3, keys)?);
        let both = graph.pointwise_as(Pointwise::And, &[row, column], Element::Bool, None)?;
        let hidden = graph.float(f32::NEG_INFINITY)?;
        graph.pointwise(Pointwise::Select, &[scores, hidden, both])
    }

    /// Scores with the keys that a query does not see at minus infinity.
    fn mask(&self, graph: &mut Graph, mut scores: Node) -> Result<Node> {
        const ROWS: Option<i64> = Some(2);
        const COLUMNS: Option<i64> = Some(3);
        if let Some(last) = self.last {
            let mut row = graph.pointwise_as(Pointwise::Index, &[scores], Element::I32, ROWS)?;
            let column = graph.pointwise_as(Pointwise::Index, &[scores], Element::I32, COLUMNS)?;
            if last != 0 {
                let shift = graph.int(i32::try_from(last).unwrap_or(i32::MAX))?;
                row = graph.pointwise_as(Pointwise::Add, &[row, shift], Element::I32, None)?;
            }
            let seen =
                graph.pointwise_as(Pointwise::GreaterEqual, &[row, column], Element::Bool, None)?;
            let hidden = graph.float(f32::NEG_INFINITY)?;
            scores = graph.pointwise(Pointwise::Select, &[scores, hidden, seen])?;
        }
        if let Some(first) = self.first {
            let row = graph.pointwise_as(Pointwise::Index, &[scores], Element::I32, ROWS)?;
            let column = graph.pointwise_as(Pointwise::Index, &[scores], Element::I32, COLUMNS)?;
            let width = graph.float(first as f32)?;
            let reach = graph.pointwise_as(Pointwise::Add, &[column, width], Element::F32, None)?;
            let seen =
                graph.pointwise_as(Pointwise::Greater, &[reach, row], Element::Bool, None)?;
            let hidden = graph.float(f32::NEG_INFINITY)?;
            scores = graph.pointwise(Pointwise::Select, &[scores, hidden, seen])?;
        }
        Ok(scores)
    }

    /// Builds the forward graph. Returns q, k, v, out, lse, the sinks if there are any, and the packing.
    fn forward(&self, graph: &mut Graph) -> Result<Vec<Node>> {
        let packing = self.packing(graph)?;
        let q = graph.ragged(self.q_sizes(), by_head(self.q), self.element, packing.q)?;
        let k = graph.ragged(
            transposed(self.k_sizes()),
            transposed(by_head(self.k)),
            self.element,
            packing.k,
        )?;
        let v = graph.ragged(self.v_sizes(), by_head(self.v), self.element, packing.v)?;
        let out_sizes = self.out_sizes();
        let out = graph.ragged(out_sizes, by_sequence(out_sizes), self.element, packing.out)?;

        let padding = self.packed.then_some(0.0);
        let mut scores = self.product(graph, q, k, packing, padding)?;
        let scale = graph.float(f32::from_bits(self.scale))?;
        scores = graph.pointwise(Pointwise::Mul, &[scores, scale])?;
        if let Some(cap) = self.softcap {
            let cap = graph.float(f32::from_bits(cap))?;
            scores = graph.pointwise(Pointwise::Div, &[scores, cap])?;
            scores = graph.pointwise(Pointwise::Tanh, &[scores])?;
            scores = graph.pointwise(Pointwise::Mul, &[scores, cap])?;
        }
        scores = self.pad(graph, scores, packing)?;
        scores = self.mask(graph, scores)?;

        let sinks = if self.sinks {
            let sizes = [1, self.heads, 1, 1];
            Some(graph.memory(sizes, packed(sizes), Element::F32)?)
        } else {
            None
        };
        let mut top = self.row(graph)?;
        graph.reduce(Reduction::Max, scores, top)?;
        if let Some(sinks) = sinks {
            top = graph.pointwise(Pointwise::Max, &[top, sinks])?;
        }
        let below = graph.pointwise(Pointwise::Sub, &[scores, top])?;
        let weights = graph.pointwise(Pointwise::Exp, &[below])?;
        let mut sum = self.row(graph)?;
        if let Some(sinks) = sinks {
            let below = self.row(graph)?;
            graph.pointwise_into(Pointwise::Sub, &[sinks, top], below, Element::F32, None)?;
            let weight = graph.pointwise(Pointwise::Exp, &[below])?;
            graph.reduce(Reduction::Add, weights, sum)?;
            sum = graph.pointwise(Pointwise::Add, &[sum, weight])?;
        } else {
            graph.reduce(Reduction::Add, weights, sum)?;
        }
        let lse = self.rows(graph, packing)?;
        let log = graph.pointwise(Pointwise::Log, &[sum])?;
        graph.pointwise_into(Pointwise::Add, &[top, log], lse, Element::F32, None)?;
        let p = graph.inner(weights.sizes, weights.strides, self.element)?;
        graph.pointwise_into(Pointwise::Div, &[weights, sum], p, Element::F32, None)?;
        graph.matmul(p, v, out, [packing.queries, None, packing.keys], None)?;
        let nodes = [q, k, v, out, lse].into_iter().chain(sinks);
        Ok(nodes.chain(packing.nodes()).collect())
    }

    /// Builds the backward graph. Returns q, k, v, out, dout, lse, dq, dk, dv, a float for every query, the accumulator
    /// of dq unless deterministic, the sums of dk and dv by query head if packed heads share keys, and the packing.
    fn backward(&self, graph: &mut Graph, deterministic: bool) -> Result<Vec<Node>> {
        let (q_sizes, k_sizes, v_sizes) = (self.q_sizes(), self.k_sizes(), self.v_sizes());
        let out_sizes = self.out_sizes();
        let element = self.element;
        let packing = self.packing(graph)?;
        let q = graph.ragged(q_sizes, by_head(self.q), element, packing.q)?;
        let k = graph.ragged(
            transposed(k_sizes),
            transposed(by_head(self.k)),
            element,
            packing.k,
        )?;
        let v = graph.ragged(
            transposed(v_sizes),
            transposed(by_head(self.v)),
            element,
            packing.v,
        )?;
        let out = graph.ragged(out_sizes, by_sequence(out_sizes), element, packing.out)?;
        let dout = graph.ragged(out_sizes, by_sequence(out_sizes), element, packing.out)?;
        let lse = self.rows(graph, packing)?;
        // Gradients lie packed, and so at the same positions as packed inputs; the caller sees to it that they are.
        let dq = graph.ragged(q_sizes, by_sequence(q_sizes), element, packing.q)?;
        let dk = graph.ragged(k_sizes, by_sequence(k_sizes), element, packing.k)?;
        let dv = graph.ragged(v_sizes, by_sequence(v_sizes), element, packing.v)?;

        // rowsum(dout out), kept in memory between cuDNN's kernels.
        let both = graph.inner(out_sizes, by_sequence(out_sizes), Element::F32)?;
        graph.pointwise_into(Pointwise::Mul, &[dout, out], both, Element::F32, None)?;
        let sum = self.row(graph)?;
        graph.reduce(Reduction::Add, both, sum)?;
        let one = graph.float(1.0)?;
        let dots = self.rows(graph, packing)?;
        graph.pointwise_into(Pointwise::Mul, &[sum, one], dots, Element::F32, None)?;

        // p and dv.
        let scale = graph.float(f32::from_bits(self.scale))?;
        let mut scores = self.product(graph, q, k, packing, None)?;
        scores = graph.pointwise(Pointwise::Mul, &[scores, scale])?;
        let mut capped = None;
        if let Some(cap) = self.softcap {
            let cap = graph.float(f32::from_bits(cap))?;
            let ratio = graph.pointwise(Pointwise::Div, &[scores, cap])?;
            capped = Some((cap, ratio));
            scores = graph.pointwise(Pointwise::Tanh, &[ratio])?;
            scores = graph.pointwise(Pointwise::Mul, &[scores, cap])?;
        }
        scores = graph.pointwise(Pointwise::Sub, &[scores, lse])?;
        scores = self.pad(graph, scores, packing)?;
        scores = self.mask(graph, scores)?;
        let p = graph.pointwise(Pointwise::Exp, &[scores])?;
        let p_transposed = graph.transpose(p, element, None)?;
        let dv_sums = self.key_gradient(graph, p_transposed, dout, dv, packing, packing.v)?;

        // ds and dk.
        let mut ds = self.product(graph, dout, v, packing, None)?;
        ds = graph.pointwise(Pointwise::Sub, &[ds, dots])?;
        ds = graph.pointwise(Pointwise::Mul, &[ds, p])?;
        if let Some((cap, ratio)) = capped {
            ds = graph.pointwise(Pointwise::Mul, &[ds, cap])?;
            ds = graph.pointwise(Pointwise::TanhBackward, &[ds, ratio])?;
            ds = graph.pointwise(Pointwise::Div, &[ds, cap])?;
        }
        ds = graph.pointwise(Pointwise::Mul, &[ds, scale])?;
        let ds_transposed = graph.transpose(ds, element, None)?;
        let dk_sums = self.key_gradient(graph, ds_transposed, q, dk, packing, packing.k)?;

        // dq.
        let keys = graph.transpose(k, element, packing.k)?;
        let lengths = [packing.queries, None, packing.keys];
        let mut nodes = vec![q, k, v, out, dout, lse, dq, dk, dv, dots];
        if deterministic {
            graph.matmul(ds, keys, dq, lengths, None)?;
        } else {
            let strides = if self.packed { by_sequence } else { packed };
            let sum = graph.ragged(q_sizes, strides(q_sizes), Element::F32, packing.q)?;
            graph.matmul(ds, keys, sum, lengths, None)?;
            graph.pointwise_into(Pointwise::Identity, &[sum], dq, Element::F32, None)?;
            nodes.push(sum);
        }
        nodes.extend(dk_sums.into_iter().chain(dv_sums));
        nodes.extend(packing.nodes());
        Ok(nodes)
    }

    /// `into = a b`, summed over the query heads that share a key head. Returns the sums by query head if they lie in
    /// memory, at `starts` times the heads that share: inside cuDNN's workspace they would take a full row for every
    /// document.
    fn key_gradient(
        &self,
        graph: &mut Graph,
        a: Node,
        b: Node,
        into: Node,
        packing: Packing,
        starts: Option<Node>,
    ) -> Result<Option<Node>> {
        let lengths = [packing.keys, None, packing.queries];
        if self.heads == self.key_heads {
            graph.matmul(a, b, into, lengths, None)?;
            return Ok(None);
        }
        let [batch, _, keys, columns] = into.sizes;
        let sizes = [batch, self.heads, keys, columns];
        let sums = if self.packed {
            graph.ragged(sizes, by_sequence(sizes), self.element, starts)?
        } else {
            graph.inner(sizes, packed(sizes), self.element)?
        };
        graph.matmul(a, b, sums, lengths, None)?;
        graph.reduce(Reduction::Add, sums, into)?;
        Ok(self.packed.then_some(sums))
    }
}

/// `[batch, heads, rows, channels]` strides from those of batch, sequence and head.
fn by_head([batch, sequence, head]: [i64; 3]) -> Four {
    [batch, head, sequence, 1]
}

/// Strides of a packed `[batch, sequence, heads, channels]` tensor, as `[batch, heads, sequence, channels]`.
fn by_sequence([_, heads, rows, columns]: Four) -> Four {
    [heads * rows * columns, columns, heads * columns, 1]
}

/// A plan and the numbers of its tensors, in the order that the graphs return them.
pub(crate) struct Served {
    plan: Plan,
    tensors: Vec<i64>,
}

/// Makes the plan of a pass over a problem.
fn plan(
    api: &'static Api,
    pass: Pass,
    problem: &Problem,
    target: Target,
    cache: Option<&mut Option<Descriptor>>,
) -> Result<Served> {
    let mut graph = Graph::new(api);
    let nodes = match pass {
        Pass::Forward => problem.forward(&mut graph)?,
        Pass::Backward { deterministic } => problem.backward(&mut graph, deterministic)?,
    };
    Ok(Served {
        tensors: nodes.iter().map(|node| node.id).collect(),
        plan: graph.plan(target, cache)?,
    })
}

/// What is kept of a problem: its plan, or why there is none.
type Kept = std::result::Result<Arc<Served>, String>;

#[derive(Default)]
struct Plans {
    by_problem: HashMap<(Pass, Problem), Kept>,
    /// Compiled kernels that serve problems of every length.
    kernels: HashMap<Family, Option<Descriptor>>,
}

/// cuDNN on one device.
pub(crate) struct Dnn {
    gpu: &'static Gpu,
    api: &'static Api,
    handle: Raw,
    /// Also keeps two threads from using the handle at once.
    plans: Mutex<Plans>,
}

// SAFETY: the handle is used under the lock only.
unsafe impl Send for Dnn {}
// SAFETY: as above.
unsafe impl Sync for Dnn {}

impl Dnn {
    /// The library on `gpu`, started on first use.
    ///
    /// # Errors
    /// The library is missing or too old, or does not start.
    pub(crate) fn of(gpu: &'static Gpu) -> Result<&'static Dnn> {
        static DEVICES: Mutex<Vec<(usize, Result<&'static Dnn>)>> = Mutex::new(Vec::new());
        let mut devices = DEVICES
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((_, dnn)) = devices.iter().find(|(ordinal, _)| *ordinal == gpu.ordinal) {
            return dnn.clone();
        }
        let dnn = Self::start(gpu).map(|dnn| &*Box::leak(Box::new(dnn)));
        devices.push((gpu.ordinal, dnn.clone()));
        dnn
    }

    fn start(gpu: &'static Gpu) -> Result<Self> {
        gpu.bind()?;
        let api = Api::get()?;
        Ok(Self {
            gpu,
            api,
            handle: api.handle(gpu.stream.cast())?,
            plans: Mutex::default(),
        })
    }

    fn plans(&self) -> MutexGuard<'_, Plans> {
        self.plans
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The plan of a pass over a problem, or why cuDNN does not serve it.
    pub(crate) fn plan(&self, pass: Pass, problem: &Problem) -> Kept {
        if let Some(kept) = self.plans().by_problem.get(&(pass, *problem)) {
            return kept.clone();
        }
        let known_wrong = self.known_wrong(pass, problem);
        let mut plans = self.plans();
        let kept = if let Some(reason) = known_wrong {
            Err(reason)
        } else {
            let target = Target::Handle(self.handle);
            let cache = problem
                .shares_kernels(pass)
                .then(|| plans.kernels.entry(problem.family()).or_default());
            self.gpu
                .bind()
                .and_then(|()| plan(self.api, pass, problem, target, cache))
                .map(Arc::new)
                .map_err(|error| error.to_string())
        };
        plans.by_problem.insert((pass, *problem), kept.clone());
        kept
    }

    /// Results that released versions get wrong.
    fn known_wrong(&self, pass: Pass, problem: &Problem) -> Option<String> {
        let version = self.api.version;
        let backward = matches!(pass, Pass::Backward { .. });
        let wrong = backward
            && ((version <= 91_500 && problem.keys % 128 != 0)
                || (version == 91_400 && problem.first.is_some()));
        wrong.then(|| format!("cuDNN {version} computes wrong gradients for {problem:?}"))
    }

    /// Bytes of scratch memory a run of the plan takes.
    pub(crate) fn workspace(served: &Served) -> usize {
        served.plan.workspace
    }

    /// Queues a plan. `addresses`: of its tensors, in the order that the graph returns them.
    ///
    /// # Safety
    /// Every tensor needs device memory of the problem's sizes and strides, 16-byte aligned.
    pub(crate) unsafe fn run(&self, served: &Served, addresses: &[u64]) -> Result<()> {
        assert_eq!(
            addresses.len(),
            served.tensors.len(),
            "a plan is given every tensor"
        );
        let tensors: Vec<(i64, u64)> = served
            .tensors
            .iter()
            .copied()
            .zip(addresses.iter().copied())
            .collect();
        let workspace = CudaTensor::empty(self.gpu, &[served.plan.workspace.max(1)], DType::U8);
        self.gpu.bind()?;
        let _using_the_handle = self.plans();
        // SAFETY: as the caller promises; the workspace may be freed once the work is queued, since the pool hands it out
        // to later work of the same stream only.
        unsafe {
            served
                .plan
                .run(self.api, self.handle, &tensors, workspace.address())
        }
    }
}

#[cfg(test)]
#[path = "cudnn_attention/tests.rs"]
mod tests;
