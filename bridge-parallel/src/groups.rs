//! Which ranks form a group along which axis of a layout.

use bridge_core::LayoutSpec;
use bridge_core::layout::RankCoords;

/// An axis, or a product of axes, along which ranks work together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Axis {
    /// Every rank.
    World,
    /// Tensor parallel: parts of the same layers, the same tokens.
    Tp,
    /// Context parallel: parts of the same sequences.
    Cp,
    /// Tensor and context parallel: all parts of one micro-batch.
    TpCp,
    /// Data parallel: other samples.
    Dp,
    /// Data and context parallel: all ranks that hold the same dense weights, over which their gradients are summed.
    DpCp,
    /// Tensor, data and context parallel: all ranks of a pipeline stage.
    Stage,
    /// Pipeline stages, first to last.
    Pp,
    /// Expert parallel: other experts.
    Ep,
    /// Tensor parallel inside an expert.
    Etp,
    /// Expert and expert-tensor parallel: all parts of a layer's experts.
    EtpEp,
    /// Data parallel of the experts: all ranks that hold the same expert weights.
    Edp,
    /// First and last pipeline stage, which both hold a tied embedding. Ranks in between belong to none and see a group
    /// of themselves.
    Embedding,
}

impl Axis {
    /// All axes, in the order in which groups are made.
    pub const ALL: [Axis; 13] = [
        Axis::World,
        Axis::Tp,
        Axis::Cp,
        Axis::TpCp,
        Axis::Dp,
        Axis::DpCp,
        Axis::Stage,
        Axis::Pp,
        Axis::Ep,
        Axis::Etp,
        Axis::EtpEp,
        Axis::Edp,
        Axis::Embedding,
    ];

    /// Short name, as in messages.
    pub fn name(self) -> &'static str {
        match self {
            Axis::World => "world",
            Axis::Tp => "tp",
            Axis::Cp => "cp",
            Axis::TpCp => "tp_cp",
            Axis::Dp => "dp",
            Axis::DpCp => "dp_cp",
            Axis::Stage => "stage",
            Axis::Pp => "pp",
            Axis::Ep => "ep",
            Axis::Etp => "etp",
            Axis::EtpEp => "etp_ep",
            Axis::Edp => "edp",
            Axis::Embedding => "embedding",
        }
    }

    /// What the members of a group have in common.
    fn key(self, c: &RankCoords) -> [usize; 3] {
        match self {
            Axis::World => [0; 3],
            Axis::Tp => [c.cp, c.dp, c.pp],
            Axis::Cp => [c.tp, c.dp, c.pp],
            Axis::TpCp => [c.dp, c.pp, 0],
            Axis::Dp => [c.tp, c.cp, c.pp],
            Axis::DpCp => [c.tp, c.pp, 0],
            Axis::Stage => [c.pp, 0, 0],
            Axis::Pp | Axis::Embedding => [c.tp, c.cp, c.dp],
            Axis::Ep => [c.etp, c.edp, c.pp],
            Axis::Etp => [c.ep, c.edp, c.pp],
            Axis::EtpEp => [c.edp, c.pp, 0],
            Axis::Edp => [c.etp, c.ep, c.pp],
        }
    }
}

/// The global ranks of the group of `rank` along `axis`, ascending, which is the order of their ranks in the group.
///
/// # Panics
/// If `rank` is not one of the layout's.
pub fn group_ranks(layout: &LayoutSpec, axis: Axis, rank: usize) -> Vec<usize> {
    let own = layout.coords(rank);
    let at_an_end = |c: &RankCoords| c.pp == 0 || c.pp + 1 == layout.pp;
    if axis == Axis::Embedding && !at_an_end(&own) {
        return vec![rank];
    }
    let key = axis.key(&own);
    (0..layout.world_size())
        .filter(|other| {
            let coords = layout.coords(*other);
            axis.key(&coords) == key && (axis != Axis::Embedding || at_an_end(&coords))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every group along `axis`, in the order of its first rank.
    fn groups(layout: &LayoutSpec, axis: Axis) -> Vec<Vec<usize>> {
        let mut found: Vec<Vec<usize>> = Vec::new();
        for rank in 0..layout.world_size() {
            let group = group_ranks(layout, axis, rank);
            assert!(group.contains(&rank) && group.is_sorted());
            if group[0] == rank {
                found.push(group);
            } else {
                // The same group from every member's point of view.
                assert!(found.contains(&group), "{axis:?} of rank {rank}: {group:?}");
            }
        }
        found
    }

    #[track_caller]
    fn check(layout: &LayoutSpec, axis: Axis, expected: &[&[usize]]) {
        assert_eq!(groups(layout, axis), expected, "{axis:?} of {layout}");
    }

    /// The example of Megatron-Core's `initialize_model_parallel` documentation: 16 ranks, tp 2, pp 4, dp 2.
    #[test]
    fn dense_groups_follow_megatron_order() {
        let layout = LayoutSpec {
            dp: 2,
            ..LayoutSpec::tp_pp(2, 4)
        };
        check(
            &layout,
            Axis::Dp,
            &[
                &[0, 2],
                &[1, 3],
                &[4, 6],
                &[5, 7],
                &[8, 10],
                &[9, 11],
                &[12, 14],
                &[13, 15],
            ],
        );
        check(
            &layout,
            Axis::Tp,
            &[
                &[0, 1],
                &[2, 3],
                &[4, 5],
                &[6, 7],
                &[8, 9],
                &[10, 11],
                &[12, 13],
                &[14, 15],
            ],
        );
        check(
            &layout,
            Axis::Pp,
            &[
                &[0, 4, 8, 12],
                &[1, 5, 9, 13],
                &[2, 6, 10, 14],
                &[3, 7, 11, 15],
            ],
        );
        check(
            &layout,
            Axis::Embedding,
            &[
                &[0, 12],
                &[1, 13],
                &[2, 14],
                &[3, 15],
                &[4],
                &[5],
                &[6],
                &[7],
                &[8],
                &[9],
                &[10],
                &[11],
            ],
        );
    }

    #[test]
    fn context_groups_lie_between_tensor_and_data() {
        let layout = LayoutSpec {
            tp: 2,
            cp: 2,
            dp: 2,
            ..LayoutSpec::default()
        };
        check(&layout, Axis::Cp, &[&[0, 2], &[1, 3], &[4, 6], &[5, 7]]);
        check(&layout, Axis::Dp, &[&[0, 4], &[1, 5], &[2, 6], &[3, 7]]);
        check(&layout, Axis::TpCp, &[&[0, 1, 2, 3], &[4, 5, 6, 7]]);
        check(&layout, Axis::DpCp, &[&[0, 2, 4, 6], &[1, 3, 5, 7]]);
        check(&layout, Axis::Stage, &[&[0, 1, 2, 3, 4, 5, 6, 7]]);
        check(&layout, Axis::World, &[&[0, 1, 2, 3, 4, 5, 6, 7]]);
    }

    #[test]
    fn expert_groups_fold_over_a_stage() {
        let layout = LayoutSpec {
            tp: 2,
            dp: 4,
            pp: 2,
            ep: 2,
            etp: 2,
            ..LayoutSpec::default()
        };
        check(
            &layout,
            Axis::Etp,
            &[
                &[0, 1],
                &[2, 3],
                &[4, 5],
                &[6, 7],
                &[8, 9],
                &[10, 11],
                &[12, 13],
                &[14, 15],
            ],
        );
        check(
            &layout,
            Axis::Ep,
            &[
                &[0, 2],
                &[1, 3],
                &[4, 6],
                &[5, 7],
                &[8, 10],
                &[9, 11],
                &[12, 14],
                &[13, 15],
            ],
        );
        check(
            &layout,
            Axis::EtpEp,
            &[
                &[0, 1, 2, 3],
                &[4, 5, 6, 7],
                &[8, 9, 10, 11],
                &[12, 13, 14, 15],
            ],
        );
        check(
            &layout,
            Axis::Edp,
            &[
                &[0, 4],
                &[1, 5],
                &[2, 6],
                &[3, 7],
                &[8, 12],
                &[9, 13],
                &[10, 14],
                &[11, 15],
            ],
        );
    }

    #[test]
    fn one_rank_is_alone_on_every_axis() {
        for axis in Axis::ALL {
            check(&LayoutSpec::default(), axis, &[&[0]]);
        }
    }
}
