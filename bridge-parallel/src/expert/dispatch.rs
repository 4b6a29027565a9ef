//! Rows to the ranks that have their experts, and their outputs back. Nothing is dropped.
//!
//! ```text
//! rows here, by expert    --- all-to-all --->    rows of the experts here, by rank and expert    -- by expert -->
//! experts' products       --- by rank again, all-to-all back --->    outputs of the rows here, by expert
//! ```
//!
//! Who sends how many rows to whom is exchanged first, on the host. Where several ranks divide an expert (expert tensor
//! parallelism), each gets every row of the expert and gives back its contribution to the output; the rank that has the
//! token adds them up.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bridge_ops::{
    CountsAcross, DType, ExpertOffsets, ExpertOrder, Float, Int, Ops, Tape, Var, int_from_i64,
    permute, unpermute,
};
use burn::tensor::{Int as IntKind, Tensor};
use burn_backend::TensorMetadata;

use crate::autodiff;
use crate::comm::{Group, ReduceOp};
use crate::context::ParallelContext;
use crate::groups::Axis;
use crate::tensors::{dims, narrow, zeros};

/// How a layer reaches the experts of other ranks. On one rank it does nothing and costs nothing.
pub struct ExpertParallel<B: Ops> {
    /// The ranks that have a layer's experts together, expert-tensor parallel rank fastest. `None` where there is one.
    group: Option<Group<B>>,
    etp: usize,
    /// How many ranks have the same tokens, and which of them this is.
    copies: (usize, usize),
    /// The ranks with other tokens of the same micro-batch, if there are any.
    tokens: Option<Group<B>>,
    /// The ranks with other tokens of the same step, if there are any.
    step: Option<Group<B>>,
}

impl<B: Ops> ExpertParallel<B> {
    /// All experts on one rank.
    pub fn single() -> Self {
        Self {
            group: None,
            etp: 1,
            copies: (1, 0),
            tokens: None,
            step: None,
        }
    }

    /// The expert parallelism of a rank.
    pub fn new(ctx: &ParallelContext<B>) -> Self {
        let layout = ctx.layout();
        let others = |axis: Axis| {
            let group = ctx.group(axis);
            (group.size() > 1).then(|| group.clone())
        };
        Self {
            group: (layout.ep * layout.etp > 1).then(|| ctx.group(Axis::EtpEp).clone()),
            etp: layout.etp,
            // Under sequence parallelism every rank has tokens of its own.
            copies: if layout.sp {
                (1, 0)
            } else {
                (layout.tp, ctx.coords().tp)
            },
            tokens: others(if layout.sp { Axis::TpCp } else { Axis::Cp }),
            step: others(if layout.sp { Axis::Stage } else { Axis::DpCp }),
        }
    }

    /// The assignments that this rank takes care of, the others replaced by `num_experts`, which is none: where several
    /// ranks have the same tokens, each token is one rank's. experts: [tokens, k].
    pub fn own_assignments(&self, experts: Int<B>, num_experts: usize) -> Int<B> {
        let (copies, own) = self.copies;
        if copies == 1 {
            return experts;
        }
        let experts = Tensor::<B, 2, IntKind>::from_primitive(experts);
        let [tokens, top_k] = experts.dims();
        let index = Tensor::<B, 1, IntKind>::arange(0..tokens as i64, &experts.device());
        let others = index
            .remainder_scalar(copies as i64)
            .not_equal_elem(own as i64);
        let others = others.unsqueeze_dim::<2>(1).expand([tokens, top_k]);
        experts
            .mask_fill(others, num_experts as i64)
            .into_primitive()
    }

    /// How many ranks have the same tokens.
    pub fn copies_of_tokens(&self) -> usize {
        self.copies.0
    }

    /// Sums counts over the ranks with other tokens of the same micro-batch, if there are any.
    pub fn counts_across_micro_batch(&self) -> Option<CountsAcross<B>> {
        counts_across(self.tokens.clone()?)
    }

    /// Sums counts over the ranks with other tokens of the same step, those with other micro-batches among them.
    pub fn counts_across_step(&self) -> Option<CountsAcross<B>> {
        counts_across(self.step.clone()?)
    }

    /// Whether this rank adds what is added to an expert's output once, and not by each rank that has a part of it: the
    /// bias of its last product.
    pub fn adds_output_bias(&self) -> bool {
        self.group
            .as_ref()
            .is_none_or(|group| group.rank().is_multiple_of(self.etp))
    }

    /// Runs `experts` on every row, wherever its expert is. `rows`: [rows, hidden], sorted by expert, of all the layer's
    /// experts as `offsets` say; `experts` gets such rows and offsets of this rank's experts, and returns as many rows of
    /// outputs (or of contributions to them). Returns the outputs of `rows`, in the same order. Rows after the last
    /// expert's are not looked at.
    ///
    /// Every rank that shares the experts calls this, also one without tokens.
    pub fn dispatch(
        &self,
        tape: &Tape<B>,
        rows: &Var<B>,
        offsets: &ExpertOffsets<B>,
        experts: impl FnOnce(&Var<B>, &ExpertOffsets<B>) -> Var<B>,
    ) -> Var<B> {
        let Some(group) = &self.group else {
            return experts(rows, offsets);
        };
        let Some(traffic) = Traffic::exchange(group, self.etp, &offsets.counts()) else {
            // The job has failed: the shapes stay right, and nobody will look at the values.
            return rows.clone();
        };
        let device = B::float_device(&rows.value());
        let sent = self.for_every_part(tape, rows, &traffic);
        let (send, recv) = (traffic.send_rows(), traffic.recv_rows());
        let received = autodiff::all_to_all(tape, &sent, group, &send, &recv);
        // [ranks, experts here] rows -> by expert.
        let ids = traffic.experts_of_received();
        let outputs = if ids.is_empty() {
            received
        } else {
            let ids = int_from_i64::<B>(&ids, &[ids.len(), 1], &device);
            let order = ExpertOrder::new(ids, traffic.local_experts());
            let sorted = permute(tape, &received, &order);
            let outputs = experts(&sorted, order.offsets());
            let ones = B::float_ones(vec![order.num_rows(), 1].into(), &device, DType::F32.into());
            unpermute(tape, &outputs, &tape.constant(ones), &order)
        };
        let returned = autodiff::all_to_all(tape, &outputs, group, &recv, &send);
        self.sum_of_parts(tape, &returned, &traffic, rows.shape()[0])
    }

    /// Each rank's rows as often as there are ranks with a part of their experts.
    fn for_every_part(&self, tape: &Tape<B>, rows: &Var<B>, traffic: &Traffic) -> Var<B> {
        let (etp, count) = (self.etp, rows.shape()[0]);
        if etp == 1 && traffic.own_rows() == count {
            return rows.clone();
        }
        let blocks = traffic.blocks();
        let output = repeat_blocks::<B>(rows.value(), &blocks, etp);
        tape.record(output, &[rows], move |dy| {
            vec![Some(sum_blocks::<B>(dy, &blocks, etp, count))]
        })
    }

    /// The inverse: the sum of what the ranks with a part of a row's expert gave, for each row; zeros for rows of no
    /// expert.
    fn sum_of_parts(
        &self,
        tape: &Tape<B>,
        returned: &Var<B>,
        traffic: &Traffic,
        rows: usize,
    ) -> Var<B> {
        let etp = self.etp;
        if etp == 1 && traffic.own_rows() == rows {
            return returned.clone();
        }
        let blocks = traffic.blocks();
        let output = sum_blocks::<B>(returned.value(), &blocks, etp, rows);
        tape.record(output, &[returned], move |dy| {
            vec![Some(repeat_blocks::<B>(dy, &blocks, etp))]
        })
    }
}

fn counts_across<B: Ops>(group: Group<B>) -> Option<CountsAcross<B>> {
    let sum = move |counts: Float<B>| group.all_reduce(counts, ReduceOp::Sum);
    Some(CountsAcross(Arc::new(sum)))
}

/// Each of `blocks` of rows, `copies` times one after another.
fn repeat_blocks<B: Ops>(x: Float<B>, blocks: &[Range<usize>], copies: usize) -> Float<B> {
    let parts = blocks
        .iter()
        .filter(|block| !block.is_empty())
        .flat_map(|block| std::iter::repeat_n(narrow::<B>(x.clone(), 0, block.clone()), copies))
        .collect();
    joined::<B>(parts, x)
}

/// Parts one after another; without any, no rows like those of `like`.
fn joined<B: Ops>(parts: Vec<Float<B>>, like: Float<B>) -> Float<B> {
    if parts.is_empty() {
        narrow::<B>(like, 0, 0..0)
    } else {
        B::float_cat(parts, 0)
    }
}

/// For each of `blocks`, `copies` of which lie one after another in `x`, the sum of the copies; `rows` rows in all, the
/// last ones zeros.
fn sum_blocks<B: Ops>(
    x: Float<B>,
    blocks: &[Range<usize>],
    copies: usize,
    rows: usize,
) -> Float<B> {
    let mut parts = Vec::new();
    let mut start = 0;
    for block in blocks.iter().filter(|block| !block.is_empty()) {
        let mut sum: Option<Float<B>> = None;
        for _ in 0..copies {
            let part = narrow::<B>(x.clone(), 0, start..start + block.len());
            start += block.len();
            sum = Some(match sum {
                None => part,
                Some(sum) => B::add(sum, part),
            });
        }
        parts.extend(sum);
    }
    let used = blocks.last().map_or(0, |block| block.end);
    if used < rows {
        let device = B::float_device(&x);
        let width = dims(&x)[1];
        parts.push(zeros::<B>(&[rows - used, width], &device, x.dtype()));
    }
    joined::<B>(parts, x)
}

/// Who sends how many rows to whom.
struct Traffic {
    /// Rows of each rank for each of the layer's experts.
    counts: Vec<Vec<usize>>,
    rank: usize,
    etp: usize,
}

impl Traffic {
    /// `None` if the job has failed.
    fn exchange<B: Ops>(group: &Group<B>, etp: usize, own: &[usize]) -> Option<Self> {
        let bytes: Vec<u8> = own
            .iter()
            .flat_map(|count| (*count as u64).to_le_bytes())
            .collect();
        let all = group.all_gather_bytes(&bytes).ok()?;
        let counts = |bytes: Vec<u8>| -> Vec<usize> {
            let (numbers, _) = bytes.as_chunks::<8>();
            numbers
                .iter()
                .map(|number| u64::from_le_bytes(*number) as usize)
                .collect()
        };
        Some(Self {
            counts: all.into_iter().map(counts).collect(),
            rank: group.rank(),
            etp,
        })
    }

    /// Ranks with different experts.
    fn ep(&self) -> usize {
        self.counts.len() / self.etp
    }

    fn local_experts(&self) -> usize {
        self.counts[self.rank].len() / self.ep()
    }

    /// The experts of a rank of the group.
    fn experts_of(&self, rank: usize) -> Range<usize> {
        let (share, index) = (self.local_experts(), rank / self.etp);
        index * share..(index + 1) * share
    }

    fn rows(&self, from: usize, to: usize) -> usize {
        self.counts[from][self.experts_of(to)].iter().sum()
    }

    fn send_rows(&self) -> Vec<usize> {
        (0..self.counts.len())
            .map(|to| self.rows(self.rank, to))
            .collect()
    }

    fn recv_rows(&self) -> Vec<usize> {
        (0..self.counts.len())
            .map(|from| self.rows(from, self.rank))
            .collect()
    }

    /// Rows here that have an expert.
    fn own_rows(&self) -> usize {
        self.counts[self.rank].iter().sum()
    }

    /// The rows here for the experts of each expert-parallel rank.
    fn blocks(&self) -> Vec<Range<usize>> {
        let mut start = 0;
        (0..self.ep())
            .map(|index| {
                let block = start..start + self.rows(self.rank, index * self.etp);
                start = block.end;
                block
            })
            .collect()
    }

    /// The expert, counted here, of each row that this rank receives.
    fn experts_of_received(&self) -> Vec<i64> {
        let own = self.experts_of(self.rank);
        let of_rank = |counts: &Vec<usize>| {
            let counts = counts[own.clone()].to_vec();
            counts
                .into_iter()
                .enumerate()
                .flat_map(|(expert, count)| std::iter::repeat_n(expert as i64, count))
                .collect::<Vec<_>>()
        };
        self.counts.iter().flat_map(of_rank).collect()
    }
}

impl<B: Ops> Clone for ExpertParallel<B> {
    fn clone(&self) -> Self {
        Self {
            group: self.group.clone(),
            etp: self.etp,
            copies: self.copies,
            tokens: self.tokens.clone(),
            step: self.step.clone(),
        }
    }
}

impl<B: Ops> fmt::Debug for ExpertParallel<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExpertParallel")
            .field(
                "ranks",
                &self.group.as_ref().map_or(1, |group| group.size()),
            )
            .field("etp", &self.etp)
            .finish()
    }
}
