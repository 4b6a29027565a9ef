//! From batches of the data crate to what a model runs on.

use bridge_data::Batch;
use bridge_models::{ForwardContext, Positions};
use bridge_ops::Ops;

/// What a model's segments run in: the batch's tokens, positions and document boundaries, on `device`.
///
/// # Panics
/// If a token id does not fit 32 bits; datasets give no such ids.
pub fn context<B: Ops>(batch: &Batch, device: &B::Device) -> ForwardContext<'static, B> {
    let ids: Vec<u32> = batch.tokens.iter().map(|id| to_u32(*id)).collect();
    let ctx = ForwardContext::new(&ids, [batch.batch, batch.seq], device);
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
