//! Reading canonical weights straight out of a foreign checkpoint.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::less_one::{Shift, ShiftedReader};
use super::source::Source;
use super::strided::Paired;
use super::transfer::{Resources, Segment, SegmentReader, Transfer};
use crate::bridge::ModelBridge;
use crate::checkpoint::megatron::{MegatronBridge, MegatronCheckpoint, MegatronForm};
use crate::checkpoint::torch::TorchWeights;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::{DecoderConfig, HfConfig};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::LayoutSpec;
use crate::mapping::{View, ViewPair};
use crate::plan::{Plan, plan_import};
use crate::quant::DequantizingReader;
use crate::registry::Registry;

/// A model in a Hugging Face folder: its config, its files and the plan that connects them. Opening reads headers only;
/// any slice of any canonical tensor can then be read, so that each rank reads just its own.
pub struct HfModel {
    bridge: &'static dyn ModelBridge,
    config: HfConfig,
    source: Source,
    plan: Plan,
    by_name: HashMap<String, usize>,
    /// Whether weights that are stored less one may be rounded.
    rounds: bool,
}

impl HfModel {
    /// Opens the model in `dir`, to be held at `layout`.
    ///
    /// # Errors
    /// If a file cannot be read or is malformed, the architecture is not in `registry`, or the plan has gaps.
    pub fn open(dir: &Path, registry: &Registry, layout: &LayoutSpec) -> Result<Self> {
        let config = HfConfig::load(dir)?;
        let bridge = registry.detect(&config)?;
        let source = match Checkpoint::open(dir) {
            Ok(checkpoint) => Source::Safetensors(checkpoint),
            Err(CheckpointError::NoWeights { .. }) if TorchWeights::are_in(dir) => {
                Source::Blocks(TorchWeights::open(dir)?)
            }
            Err(error) => return Err(error.into()),
        };
        let plan = plan_import(bridge, &config, &source.headers(), layout)?;
        Ok(Self::new(bridge, config, source, plan))
    }

    /// Opens the Megatron-Core checkpoint in `dir`, of the model that `config` (a Hugging Face config) describes, to be
    /// held at `layout`.
    ///
    /// # Errors
    /// As [`HfModel::open`].
    pub fn open_megatron(
        dir: &Path,
        config: HfConfig,
        registry: &Registry,
        layout: &LayoutSpec,
    ) -> Result<Self> {
        let bridge = registry.detect(&config)?;
        let typed = bridge.config(&config)?;
        let checkpoint = MegatronCheckpoint::open(dir)?;
        let form = MegatronForm::of(&checkpoint);
        let source = Source::Blocks(checkpoint.into_store(typed.vocab_size));
        let megatron = MegatronBridge::new(bridge, form);
        megatron.check(&typed)?;
        let plan = plan_import(&megatron, &config, &source.headers(), layout)?;
        Ok(Self::new(bridge, config, source, plan))
    }

    fn new(bridge: &'static dyn ModelBridge, config: HfConfig, source: Source, plan: Plan) -> Self {
        let names = plan.tensors.iter().map(|tensor| tensor.canonical.clone());
        let by_name = names
            .enumerate()
            .map(|(index, name)| (name, index))
            .collect();
        Self {
            bridge,
            config,
            source,
            plan,
            by_name,
            rounds: false,
        }
    }

    /// Has weights that are stored less one rounded where that is not exact.
    pub(super) fn round(&mut self) {
        self.rounds = true;
    }

    /// Checks that weights which are stored less one can be read as they are: there are few, and it is better to know
    /// before anything is written.
    ///
    /// # Errors
    /// If one cannot, and was not to be rounded.
    pub(super) fn check_values(&self) -> Result<()> {
        let mapping = &self.plan.mapping;
        for foreign in (0..mapping.foreign.len()).filter(|index| mapping.is_less_one(*index)) {
            for piece in mapping.pieces_of_foreign(foreign) {
                self.read(&mapping.canonical[piece.canonical].name)?;
            }
        }
        Ok(())
    }

    /// The family's bridge.
    pub fn bridge(&self) -> &'static dyn ModelBridge {
        self.bridge
    }

    /// The model's `config.json`.
    pub fn hf_config(&self) -> &HfConfig {
        &self.config
    }

    /// The typed config.
    pub fn config(&self) -> &DecoderConfig {
        &self.plan.config
    }

    /// The files.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    pub(super) fn into_plan(self) -> Plan {
        self.plan
    }

    /// Shape and stored type of canonical tensor `name`.
    ///
    /// # Errors
    /// If the model has no such tensor.
    pub fn tensor(&self, name: &str) -> Result<(&[usize], DType)> {
        let tensor = &self.plan.tensors[self.index(name)?];
        Ok((&tensor.shape, tensor.dtype))
    }

    /// Reads canonical tensor `name` whole, row-major, as stored.
    ///
    /// # Errors
    /// If the model has no such tensor, or a file cannot be read.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let shape = &self.plan.tensors[self.index(name)?].shape;
        let whole: Vec<Range<usize>> = shape.iter().map(|extent| 0..*extent).collect();
        self.read_slice(name, &whole)
    }

    /// Reads the part `region` (a range per dimension) of canonical tensor `name`, row-major, as stored.
    ///
    /// # Errors
    /// If the model has no such tensor, the region is not within it, or a file cannot be read.
    pub fn read_slice(&self, name: &str, region: &[Range<usize>]) -> Result<Vec<u8>> {
        let index = self.index(name)?;
        let tensor = &self.plan.tensors[index];
        let within = |(range, extent): (&Range<usize>, &usize)| {
            range.start <= range.end && range.end <= *extent
        };
        if region.len() != tensor.shape.len() || !region.iter().zip(&tensor.shape).all(within) {
            return Err(Error::InvalidArgument(format!(
                "slice {region:?} is not within tensor `{name}` of shape {:?}",
                tensor.shape
            )));
        }
        let transfer = self.transfer(index, region, 0);
        transfer.read(Resources {
            threads: 1,
            memory_budget: 64 << 20,
        })
    }

    /// Reads elements `range` of canonical tensor `name`, counted row by row, as stored, into `out`, which has room for
    /// just those.
    pub(super) fn read_elements(
        &self,
        name: &str,
        range: Range<usize>,
        out: &mut [u8],
    ) -> Result<()> {
        let index = self.index(name)?;
        let shape = &self.plan.tensors[index].shape;
        let whole: Vec<Range<usize>> = shape.iter().map(|extent| 0..*extent).collect();
        self.transfer(index, &whole, 0).read_range(range, out)
    }

    /// Where canonical tensor `name` lies in the source row by row, as one stretch of its own type: from what it is read,
    /// the byte that elements are counted from there, and the number of its first element. `None` if it does not.
    ///
    /// # Errors
    /// If the model has no such tensor.
    pub(super) fn stored_as_is(
        &self,
        name: &str,
    ) -> Result<Option<(SegmentReader<'_>, u64, usize)>> {
        let index = self.index(name)?;
        let tensor = &self.plan.tensors[index];
        let whole: Vec<Range<usize>> = tensor.shape.iter().map(|extent| 0..*extent).collect();
        let mut segments = self.transfer(index, &whole, 0).segments;
        let (Some(segment), true) = (segments.pop(), segments.is_empty()) else {
            return Ok(None);
        };
        let paired = Paired::new(&ViewPair {
            near: segment.target,
            far: segment.source,
        });
        let as_is = paired.is_run() && paired.near_offset == 0 && segment.dtype == tensor.dtype;
        Ok(as_is.then_some((segment.reader, segment.base, paired.far_offset)))
    }

    fn index(&self, name: &str) -> Result<usize> {
        self.by_name.get(name).copied().ok_or_else(|| {
            let known = self
                .plan
                .tensors
                .iter()
                .map(|tensor| tensor.canonical.as_str());
            let near =
                crate::registry::nearest(name, known).map(|n| format!("; did you mean `{n}`?"));
            Error::InvalidArgument(format!(
                "the model has no tensor `{name}`{}",
                near.unwrap_or_default()
            ))
        })
    }

    /// What makes `region` of canonical tensor number `index`, for the sink's tensor `target`.
    pub(super) fn transfer(
        &self,
        index: usize,
        region: &[Range<usize>],
        target: usize,
    ) -> Transfer<'_> {
        let pieces = self
            .plan
            .sources(index)
            .into_iter()
            .map(|piece| (piece.foreign, &piece.canonical_view, &piece.foreign_view));
        self.transfer_of(index, region, target, pieces)
    }

    /// The same from a tied copy, which lies in foreign tensor number `foreign`.
    pub(super) fn tied_transfer(&self, index: usize, foreign: usize) -> Transfer<'_> {
        let whole: Vec<Range<usize>> = self.plan.tensors[index]
            .shape
            .iter()
            .map(|extent| 0..*extent)
            .collect();
        let pieces = self
            .plan
            .mapping
            .pieces_of_foreign(foreign)
            .filter(|piece| piece.canonical == index);
        let pieces =
            pieces.map(|piece| (piece.foreign, &piece.canonical_view, &piece.foreign_view));
        self.transfer_of(index, &whole, 0, pieces)
    }

    /// Where foreign tensor number `foreign` can be read: from what, as which type, from which byte on.
    fn stored(&self, foreign: usize) -> Option<(SegmentReader<'_>, DType, u64)> {
        match &self.plan.quantized[foreign] {
            None => self.source.stored(&self.plan.mapping.foreign[foreign].name),
            Some(stored) => {
                let reader = DequantizingReader::new(self.source.safetensors()?, stored)?;
                Some((SegmentReader::Computed(Arc::new(reader)), DType::BF16, 0))
            }
        }
    }

    /// Where the bytes of the foreign tensor called `name` lie: its file and the offset in it.
    pub(super) fn place_of(&self, name: &str) -> Option<(usize, u64)> {
        let stored = self
            .plan
            .mapping
            .foreign_index(name)
            .and_then(|index| self.plan.quantized[index].as_ref());
        let name = stored.map_or(name, |stored| stored.values.name.as_str());
        self.source.place(name)
    }

    fn transfer_of<'a>(
        &'a self,
        index: usize,
        region: &[Range<usize>],
        target: usize,
        pieces: impl Iterator<Item = (usize, &'a View, &'a View)>,
    ) -> Transfer<'a> {
        let tensor = &self.plan.tensors[index];
        let mut segments = Vec::new();
        for (foreign, near, far) in pieces {
            // The plan holds only foreign tensors that the checkpoint has.
            let Some((reader, dtype, base)) = self.stored(foreign) else {
                continue;
            };
            let pair = ViewPair {
                near: near.clone(),
                far: far.clone(),
            };
            let name = &self.plan.mapping.foreign[foreign].name;
            for part in pair.within(&tensor.shape, region) {
                let (source, reader, base) = match self.source.within_block(name, &part.far) {
                    Some((file, base, view)) => (view, file.into(), base),
                    None => (part.far, reader.clone(), base),
                };
                let reader = match self.plan.mapping.is_less_one(foreign) {
                    false => reader,
                    true => SegmentReader::Computed(Arc::new(ShiftedReader {
                        inner: reader,
                        base,
                        dtype,
                        name: name.clone(),
                        shift: Shift::Add,
                        rounds: self.rounds,
                    })),
                };
                segments.push(Segment {
                    target: part.near,
                    source,
                    dtype,
                    reader,
                    base,
                });
            }
        }
        Transfer {
            tensor: target,
            name: tensor.canonical.clone(),
            numel: region.iter().map(Range::len).product(),
            dtype: tensor.dtype,
            segments,
        }
    }
}
