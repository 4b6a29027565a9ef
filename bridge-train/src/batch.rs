//! From batches of the data crate to what a model runs on.

use bridge_data::Batch;
use bridge_models::{ForwardContext, Positions};
use bridge_ops::Ops;
use bridge_parallel::ParallelContext;

/// What a model's segments run in: the batch's tokens, positions and document boundaries, on `device`.
///
/// # Panics
/// If a token id does not fit 32 bits; datasets give no such ids.
pub fn context<B: Ops>(batch: &Batch, device: &B::Device) -> ForwardContext<'static, B> {
    let ids: Vec<u32> = batch.tokens.iter().map(|id| to_u32(*id)).collect();
    with_documents(
        ForwardContext::new(&ids, [batch.batch, batch.seq], device),
        batch,
    )
}

fn with_documents<B: Ops>(
    ctx: ForwardContext<'static, B>,
    batch: &Batch,
) -> ForwardContext<'static, B> {
    let Some(boundaries) = &batch.cu_seqlens else {
        return ctx;
    };
    let positions = batch
        .position_ids
        .iter()
        .map(|position| to_u32(*position))
        .collect();
    ctx.with_positions(Positions::Explicit(positions))
        .with_documents(boundaries.clone())
}

fn to_u32(value: i64) -> u32 {
    u32::try_from(value).unwrap_or_else(|_| panic!("{value} is no token id or position"))
}

/// The part of a micro-batch that a rank of a layout runs: its tokens of every sequence.
pub(crate) fn local_context<B: Ops>(
    batch: &Batch,
    parallel: &ParallelContext<B>,
) -> ForwardContext<'static, B> {
    let ids: Vec<u32> = batch.tokens.iter().map(|id| to_u32(*id)).collect();
    with_documents(
        ForwardContext::for_rank(&ids, [batch.batch, batch.seq], parallel),
        batch,
    )
}

/// As [`local_context`], of a micro-batch whose tokens only other pipeline stages need.
pub(crate) fn header_context<B: Ops>(
    header: &Batch,
    parallel: &ParallelContext<B>,
) -> ForwardContext<'static, B> {
    let ids = vec![0; header.batch * header.seq];
    with_documents(
        ForwardContext::for_rank(&ids, [header.batch, header.seq], parallel),
        header,
    )
}

/// What the tokens of a rank's part of a micro-batch are to predict.
pub(crate) fn local_labels<B: Ops>(batch: &Batch, ctx: &ForwardContext<'_, B>) -> Vec<i64> {
    ctx.own_targets(&batch.labels)
}
