//! Attention through cuDNN: which problems go there, and how they are put to it.

use std::sync::{Arc, Mutex};

use bridge_ops::AttentionRule;
use burn_backend::{DType, TensorMetadata};

use super::{AttentionPath, Gradients, Inputs, Sizes, aligned};
use crate::cudnn_attention::{Dnn, Pass, Problem, Served};
use crate::cudnn_graph::Element;
use crate::error::Result;
use crate::tensor::CudaTensor;

/// Fewer queries go to this crate's own kernel: decoding poses a new problem with every token, and a plan for it takes
/// longer than the attention.
const FEWEST_QUERIES: usize = 64;
/// Batches whose length is not a multiple of this are put as packed documents, one a row: plans for those serve every
/// length up to the next power of two, where each other length would take a plan of its own, compiled in half a second.
const PLANNED_LENGTH: usize = 512;
/// Most scratch memory, in bytes, that deterministic gradients may take; cuDNN keeps a gradient of every score for them.
const MOST_WORKSPACE: usize = 1 << 30;

/// Why cuDNN does not compute an attention.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// It is never asked for such problems.
    #[error("it is not used for {0}")]
    Policy(&'static str),
    /// The library is missing or has no engine for the problem.
    #[error("{0}")]
    Library(String),
}

/// A plan and its inputs.
pub(super) struct Fused {
    dnn: &'static Dnn,
    served: Arc<Served>,
    inputs: Inputs,
    sizes: Sizes,
    deterministic: bool,
    documents: Option<Documents>,
}

/// The documents of a packed batch, as cuDNN is given them. The last entries, up to `count`, are empty.
#[derive(Clone)]
struct Documents {
    count: usize,
    /// No document is longer.
    longest: usize,
    /// Lengths `[count]` i32, then the starts `[count + 1]` i64 of the documents' q, k, v, outputs and rows, in elements.
    table: CudaTensor,
    /// Where each of these begins in the table, in bytes.
    parts: [u64; 6],
}

/// What the table of a batch depends on: offsets, device and elements in a token.
type DocumentKey = (Arc<[usize]>, usize, [usize; 5]);

impl Documents {
    /// The documents of `offsets`, whose tokens hold `steps` elements of q, k, v, output and rows. Every layer of a model
    /// asks for the same, so the last few tables are kept.
    fn of(sizes: Sizes, like: &CudaTensor, offsets: &Arc<[usize]>) -> Self {
        static KEPT: Mutex<Vec<(DocumentKey, Documents)>> = Mutex::new(Vec::new());
        let Sizes {
            heads,
            kv_heads,
            d,
            dv,
            ..
        } = sizes;
        let steps = [heads * d, kv_heads * d, kv_heads * dv, heads * dv, heads];
        let ordinal = like.gpu().ordinal;
        let mut kept = KEPT.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let known = kept.iter().find(|((known, device, known_steps), _)| {
            *device == ordinal && *known_steps == steps && known == offsets
        });
        if let Some((_, documents)) = known {
            return documents.clone();
        }
        let documents = Self::upload(like, offsets, steps);
        if kept.len() == 4 {
            kept.remove(0);
        }
        kept.push(((offsets.clone(), ordinal, steps), documents.clone()));
        documents
    }

    fn upload(like: &CudaTensor, offsets: &[usize], steps: [usize; 5]) -> Self {
        let lengths: Vec<usize> = offsets.windows(2).map(|pair| pair[1] - pair[0]).collect();
        // Powers of two, so that few plans serve every batch.
        let count = lengths.len().next_power_of_two();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let longest = longest.next_power_of_two().max(128);
        let mut table: Vec<u8> = Vec::new();
        let mut parts = [0; 6];
        let mut begin = |table: &mut Vec<u8>, part: usize| {
            table.resize(table.len().next_multiple_of(16), 0);
            parts[part] = table.len() as u64;
        };
        begin(&mut table, 0);
        for i in 0..count {
            let length = lengths.get(i).copied().unwrap_or(0) as i32;
            table.extend_from_slice(&length.to_ne_bytes());
        }
        let end = offsets.last().copied().unwrap_or(0);
        for (part, step) in steps.into_iter().enumerate() {
            begin(&mut table, part + 1);
            for i in 0..=count {
                let start = (offsets.get(i).copied().unwrap_or(end) * step) as i64;
                table.extend_from_slice(&start.to_ne_bytes());
            }
        }
        Self {
            count,
            longest,
            table: CudaTensor::from_bytes(like.gpu(), &table, &[table.len()], DType::U8),
            parts,
        }
    }

    /// In the order of `Packing`: lengths of queries and keys, starts of q, k, v, outputs and rows.
    fn addresses(&self) -> [u64; 7] {
        let [lengths, q, k, v, out, rows] = self.parts.map(|part| self.table.address() + part);
        [lengths, lengths, q, k, v, out, rows]
    }
}

pub(super) fn plan_forward(
    sizes: Sizes,
    inputs: &Inputs,
    sinks: bool,
    rule: &AttentionRule,
    forced: bool,
) -> std::result::Result<Fused, Refusal> {
    plan(Pass::Forward, sizes, inputs, sinks, rule, forced)
}

pub(super) fn plan_backward(
    sizes: Sizes,
    inputs: &Inputs,
    sinks: bool,
    rule: &AttentionRule,
    deterministic: bool,
    forced: bool,
) -> std::result::Result<Fused, Refusal> {
    let pass = Pass::Backward { deterministic };
    let fused = plan(pass, sizes, inputs, sinks, rule, forced)?;
    if deterministic && !forced && Dnn::workspace(&fused.served) > MOST_WORKSPACE {
        return Err(Refusal::Policy(
            "deterministic gradients that take more than 1 GiB of scratch memory",
        ));
    }
    Ok(fused)
}

fn plan(
    pass: Pass,
    sizes: Sizes,
    inputs: &Inputs,
    sinks: bool,
    rule: &AttentionRule,
    forced: bool,
) -> std::result::Result<Fused, Refusal> {
    let Some(element) = Element::half(inputs.q.dtype()) else {
        return Err(Refusal::Policy("dtypes other than bf16 and f16"));
    };
    let keys = rule.kv_len.unwrap_or(sizes.t);
    if rule
        .window
        .is_some_and(|window| rule.q_offset + sizes.s >= keys + window)
    {
        return Err(Refusal::Policy("queries that see no key"));
    }
    let own = AttentionPath::own(inputs.q.dtype(), sizes.d, sizes.dv);
    if rule.kv_len.is_some() && own == AttentionPath::TensorCores && !forced {
        return Err(Refusal::Policy(
            "a cache, which has another length each time",
        ));
    }
    let deterministic = pass
        == (Pass::Backward {
            deterministic: true,
        });
    let whole = (rule.q_offset, keys, sizes.t) == (0, sizes.s, sizes.s);
    // Documents that fill a row of the batch each are no documents.
    let mut offsets = rule
        .cu_seqlens
        .clone()
        .filter(|offsets| offsets.len() > sizes.batch + 1);
    if offsets.is_some() && !whole {
        return Err(Refusal::Policy("a block of the keys of packed documents"));
    }
    if offsets.is_some() && deterministic {
        return Err(Refusal::Policy(
            "deterministic gradients of packed documents",
        ));
    }
    if whole && offsets.is_none() && !deterministic && !sizes.s.is_multiple_of(PLANNED_LENGTH) {
        offsets = Some((0..=sizes.batch).map(|row| row * sizes.s).collect());
    }
    if keys == 0 {
        return Err(Refusal::Policy("attention over no keys"));
    }
    if !sizes.d.is_multiple_of(8) || !sizes.dv.is_multiple_of(8) || sizes.d.max(sizes.dv) > 256 {
        return Err(Refusal::Policy(
            "head sizes above 256 or not a multiple of 8",
        ));
    }
    if sizes.s < FEWEST_QUERIES && !forced {
        return Err(Refusal::Policy("few queries"));
    }
    let dnn = Dnn::of(inputs.q.gpu()).map_err(|error| Refusal::Library(error.to_string()))?;
    let documents = offsets.map(|offsets| Documents::of(sizes, &inputs.q, &offsets));
    let clone = |x: &CudaTensor| {
        if documents.is_some() {
            aligned(x.packed())
        } else {
            aligned(x.clone())
        }
    };
    let inputs = Inputs {
        q: clone(&inputs.q),
        k: clone(&inputs.k),
        v: clone(&inputs.v),
    };
    // The sinks are part of the log-sum-exp, which is all that the gradients of the inputs see of them.
    let sinks = sinks && pass == Pass::Forward;
    let mut problem = problem(sizes, &inputs, element, keys, sinks, rule);
    if let Some(documents) = &documents {
        problem.pack(documents.count as i64, documents.longest as i64);
    }
    let served = dnn.plan(pass, &problem).map_err(Refusal::Library)?;
    Ok(Fused {
        dnn,
        served,
        inputs,
        sizes,
        deterministic,
        documents,
    })
}

/// The problem as cuDNN is given it. Masks that hide nothing are left out.
fn problem(
    sizes: Sizes,
    inputs: &Inputs,
    element: Element,
    keys: usize,
    sinks: bool,
    rule: &AttentionRule,
) -> Problem {
    let strides = |x: &CudaTensor| [x.strides()[0], x.strides()[1], x.strides()[2]];
    let (offset, queries, keys) = (rule.q_offset as i64, sizes.s as i64, keys as i64);
    let window = rule
        .window
        .map(|window| i64::try_from(window).unwrap_or(i64::MAX / 2));
    let last = if rule.causal {
        Some(offset)
    } else {
        window.map(|window| offset + window - 1)
    };
    let first = window.map(|window| window - offset);
    Problem {
        element,
        batch: sizes.batch as i64,
        queries,
        keys,
        heads: sizes.heads as i64,
        key_heads: sizes.kv_heads as i64,
        d: sizes.d as i64,
        dv: sizes.dv as i64,
        q: strides(&inputs.q),
        k: strides(&inputs.k),
        v: strides(&inputs.v),
        scale: (rule.scale_for(sizes.d) as f32).to_bits(),
        softcap: rule.softcap.map(|cap| (cap as f32).to_bits()),
        last: last.filter(|&last| last < keys - 1),
        first: first.filter(|&first| first < queries),
        sinks,
        packed: false,
    }
}

impl Fused {
    /// Queues the forward pass. `sinks`: `[heads]` fp32.
    pub(super) fn forward(
        &self,
        sinks: &Option<CudaTensor>,
        out: &CudaTensor,
        lse: CudaTensor,
    ) -> Result<CudaTensor> {
        let Inputs { q, k, v } = &self.inputs;
        // With documents, rows lie token by token.
        let rows = match &self.documents {
            None => lse,
            Some(_) => CudaTensor::empty(q.gpu(), &self.rows_by_token(), DType::F32),
        };
        let mut addresses: Vec<u64> = [q, k, v, out, &rows]
            .into_iter()
            .chain(sinks)
            .map(CudaTensor::address)
            .collect();
        addresses.extend(self.documents.iter().flat_map(Documents::addresses));
        // SAFETY: the problem was read off these tensors; outputs are packed tensors of its sizes.
        unsafe { self.dnn.run(&self.served, &addresses)? };
        Ok(match &self.documents {
            None => rows,
            Some(_) => rows.permute(&[0, 2, 1]).packed(),
        })
    }

    fn rows_by_token(&self) -> [usize; 3] {
        [self.sizes.batch, self.sizes.s, self.sizes.heads]
    }

    /// Queues the backward pass.
    pub(super) fn backward(
        &self,
        [out, dout, lse]: [&CudaTensor; 3],
        grads: &Gradients,
    ) -> Result<()> {
        let (Inputs { q, k, v }, sizes) = (&self.inputs, self.sizes);
        let gpu = q.gpu();
        let lse = match &self.documents {
            None => lse.clone(),
            Some(_) => lse.clone().permute(&[0, 2, 1]).packed(),
        };
        let mut scratch = vec![CudaTensor::empty(gpu, &[sizes.rows()], DType::F32)];
        if !self.deterministic {
            let sum = [sizes.rows(), sizes.d];
            scratch.push(CudaTensor::empty(gpu, &sum, DType::F32));
        }
        if self.documents.is_some() && sizes.heads != sizes.kv_heads {
            for channels in [sizes.d, sizes.dv] {
                let sums = [sizes.batch * sizes.t * sizes.heads, channels];
                scratch.push(CudaTensor::empty(gpu, &sums, q.dtype()));
            }
        }
        let mut addresses: Vec<u64> = [q, k, v, out, dout, &lse, &grads.dq, &grads.dk, &grads.dv]
            .into_iter()
            .chain(&scratch)
            .map(CudaTensor::address)
            .collect();
        addresses.extend(self.documents.iter().flat_map(Documents::addresses));
        // SAFETY: the problem was read off these tensors; results, gradients and scratch memory are packed and of its
        // sizes.
        unsafe { self.dnn.run(&self.served, &addresses) }
    }
}
