//! A rank's place in a layout.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bridge_core::LayoutSpec;
use bridge_core::layout::RankCoords;
use bridge_ops::Ops;

use crate::comm::{Group, SingleRank, Transport};
use crate::error::{Error, Result};
use crate::groups::{Axis, group_ranks};

/// The layout, where this rank stands in it, its device, and its group along each axis. Models and engines share it in
/// an `Arc`.
pub struct ParallelContext<B: Ops> {
    layout: LayoutSpec,
    rank: usize,
    coords: RankCoords,
    device: B::Device,
    /// By the position of the axis in [`Axis::ALL`].
    groups: Vec<Group<B>>,
    transport: Option<Arc<dyn Transport<B>>>,
}

impl<B: Ops> ParallelContext<B> {
    /// One rank, alone.
    pub fn single(device: B::Device) -> Self {
        let layout = LayoutSpec::default();
        let alone = |axis: &Axis| -> Group<B> { Arc::new(SingleRank::new(axis.name(), 0)) };
        Self {
            layout,
            rank: 0,
            coords: layout.coords(0),
            device,
            groups: Axis::ALL.iter().map(alone).collect(),
            transport: None,
        }
    }

    /// The place of the transport's rank. Makes this rank's groups, together with the other ranks: every rank must call
    /// this, with the same layout.
    ///
    /// # Errors
    /// If the layout has another number of ranks than there are, its degrees do not fit each other, or a group could not
    /// be made.
    pub fn new(
        layout: LayoutSpec,
        device: B::Device,
        transport: Arc<dyn Transport<B>>,
    ) -> Result<Self> {
        check_degrees(&layout)?;
        if layout.world_size() != transport.world_size() {
            return Err(Error::Invalid(format!(
                "layout {layout} has {} ranks, the job has {}; change dp, or the number of processes",
                layout.world_size(),
                transport.world_size()
            )));
        }
        let rank = transport.rank();
        let mut groups: Vec<Group<B>> = Vec::with_capacity(Axis::ALL.len());
        for axis in Axis::ALL {
            let ranks = group_ranks(&layout, axis, rank);
            // The one process of a job goes through its transport (see `is_alone`).
            groups.push(if ranks.len() == 1 && layout.world_size() > 1 {
                Arc::new(SingleRank::new(axis.name(), rank))
            } else {
                transport.group(axis.name(), &ranks)?
            });
        }
        Ok(Self {
            layout,
            rank,
            coords: layout.coords(rank),
            device,
            groups,
            transport: Some(transport),
        })
    }

    /// The layout.
    pub fn layout(&self) -> &LayoutSpec {
        &self.layout
    }

    /// This rank, 0 to [`world_size`](Self::world_size) - 1.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.layout.world_size()
    }

    /// Where this rank stands on each axis.
    pub fn coords(&self) -> &RankCoords {
        &self.coords
    }

    /// This rank's device.
    pub fn device(&self) -> &B::Device {
        &self.device
    }

    /// This rank's group along `axis`. A group of one costs nothing to use.
    pub fn group(&self, axis: Axis) -> &Group<B> {
        let index = Axis::ALL.iter().position(|other| *other == axis);
        &self.groups[index.expect("every axis is listed")]
    }

    /// Whether this rank belongs to no job: nothing it does needs a transport. The one rank of a job of one process is not
    /// alone, and goes the way of ranks that have others, so that what that costs can be measured.
    pub fn is_alone(&self) -> bool {
        self.transport.is_none()
    }

    /// Whether the ranks along `axis` exchange anything: there are several, or the job has one process.
    pub fn exchanges(&self, axis: Axis) -> bool {
        self.group(axis).size() > 1 || (self.world_size() == 1 && !self.is_alone())
    }

    /// Whether this is the first pipeline stage, which holds the embedding.
    pub fn is_first_stage(&self) -> bool {
        self.coords.pp == 0
    }

    /// Whether this is the last pipeline stage, which holds the head.
    pub fn is_last_stage(&self) -> bool {
        self.coords.pp + 1 == self.layout.pp
    }

    /// Whether the job is well. Results of collectives may be used only after this said so.
    ///
    /// # Errors
    /// The failure that ended the job, with the rank at fault.
    pub fn health(&self) -> Result<()> {
        match &self.transport {
            Some(transport) => transport.health(),
            None => Ok(()),
        }
    }

    /// See [`Transport::measure_waits`].
    pub fn measure_waits(&self) {
        if let Some(transport) = &self.transport {
            transport.measure_waits();
        }
    }

    /// See [`Transport::waited`].
    pub fn waited(&self) -> Option<Duration> {
        self.transport.as_ref()?.waited()
    }

    /// Ends the job on every rank, with this rank as the cause.
    pub fn abort(&self, reason: &str) {
        if let Some(transport) = &self.transport {
            transport.abort(reason);
        }
    }
}

impl<B: Ops> fmt::Debug for ParallelContext<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ParallelContext")
            .field("layout", &self.layout.to_string())
            .field("rank", &self.rank)
            .field("coords", &self.coords)
            .finish_non_exhaustive()
    }
}

/// What holds for every model; [`LayoutSpec::validate`] checks a layout against a given one.
fn check_degrees(layout: &LayoutSpec) -> Result<()> {
    let degrees = [
        ("tp", layout.tp),
        ("pp", layout.pp),
        ("vpp", layout.vpp),
        ("cp", layout.cp),
        ("ep", layout.ep),
        ("etp", layout.etp),
        ("dp", layout.dp),
    ];
    if let Some((name, _)) = degrees.iter().find(|(_, degree)| *degree == 0) {
        return Err(Error::Invalid(format!("{name} is 0, expected at least 1")));
    }
    let stage = layout.tp * layout.cp * layout.dp;
    if !stage.is_multiple_of(layout.etp * layout.ep) {
        return Err(Error::Invalid(format!(
            "etp={} times ep={} does not divide the {stage} ranks of a pipeline stage (tp*cp*dp); the nearest is dp={}",
            layout.etp,
            layout.ep,
            layout.with_room_for_experts().dp
        )));
    }
    Ok(())
}
