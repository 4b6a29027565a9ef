//! Native checkpoint to native checkpoint, cut for another parallel layout.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::export::stored_segments;
use super::piece_files::PieceFiles;
use super::transfer::{self, Transfer};
use super::{ConvertOptions, Progress};
use crate::bridge::CanonicalTensor;
use crate::checkpoint::native::{Group, NativeCheckpoint, NativeWriter, PieceSpec};
use crate::error::Result;
use crate::layout::{LayoutSpec, PipelineSplit, local_slice};
use crate::mapping::View;

/// Rewrites the weights of `source` as the ranks of `layout` would write them: each rank a file of the slices that it
/// owns. `tensors` are the model's canonical tensors, `num_layers` its decoder layers. Returns the new iteration's
/// folder; the files in `hf/` and optimizer state are not taken along.
///
/// # Errors
/// If the layout cannot hold the model, or reading or writing fails; nothing is left behind then.
pub fn reshard(
    source: &NativeCheckpoint,
    out: &Path,
    tensors: &[CanonicalTensor],
    num_layers: usize,
    layout: &LayoutSpec,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<PathBuf> {
    layout.validate(tensors, num_layers)?;
    let split = PipelineSplit::even(layout, num_layers)?;
    let mut ranks: Vec<Vec<(PieceSpec, Transfer<'_>)>> = Vec::new();
    let mut number = 0;
    for rank in 0..layout.world_size() {
        let coords = layout.coords(rank);
        let mut owned = Vec::new();
        // The first of the stages that hold a tensor owns it.
        for tensor in tensors
            .iter()
            .filter(|tensor| split.stages(tensor.place).first() == Some(&coords.pp))
        {
            let Some(slice) = local_slice(&tensor.shard, &tensor.shape, layout, &coords)? else {
                continue;
            };
            if !slice.owner || slice.numel() == 0 {
                continue;
            }
            owned.push(piece(source, tensor, &slice.ranges, number)?);
            number += 1;
        }
        if !owned.is_empty() {
            ranks.push(owned);
        }
    }

    let writer = NativeWriter::begin(out, source.iteration(), options.durability)?;
    let mut parts = Vec::new();
    let mut transfers = Vec::new();
    for owned in ranks {
        let (specs, own): (Vec<PieceSpec>, Vec<Transfer<'_>>) = owned.into_iter().unzip();
        parts.push(specs);
        transfers.extend(own);
    }
    let files = PieceFiles::create(&writer, parts)?;
    progress.begin("reshard", transfers.iter().map(Transfer::bytes).sum());
    transfer::run(&transfers, &files, options.resources(), progress)?;
    files.finish(writer)
}

fn piece<'a>(
    source: &'a NativeCheckpoint,
    tensor: &CanonicalTensor,
    ranges: &[Range<usize>],
    number: usize,
) -> Result<(PieceSpec, Transfer<'a>)> {
    let stored = source.tensor(Group::Model, &tensor.name)?;
    let offset: Vec<usize> = ranges.iter().map(|range| range.start).collect();
    let shape: Vec<usize> = ranges.iter().map(Range::len).collect();
    let local = View::whole(&tensor.shape).narrow(ranges);
    let transfer = Transfer {
        tensor: number,
        name: tensor.name.clone(),
        numel: shape.iter().product(),
        dtype: stored.dtype,
        segments: stored_segments(source, &tensor.name, stored, &local, &View::whole(&shape))?,
    };
    let spec = PieceSpec {
        name: tensor.name.clone(),
        dtype: stored.dtype,
        shape: tensor.shape.clone(),
        region: crate::checkpoint::Region::new(offset, shape),
    };
    Ok((spec, transfer))
}
