//! Layouts: rank order, slices that partition each tensor, advice in errors.

use proptest::prelude::*;

use super::*;

#[test]
fn ranks_follow_megatron_order() {
    let layout = LayoutSpec {
        tp: 2,
        cp: 3,
        dp: 2,
        pp: 2,
        ep: 2,
        etp: 1,
        vpp: 1,
        sp: true,
    };
    assert_eq!(layout.world_size(), 24);
    let coords = |rank| {
        let c = layout.coords(rank);
        (c.tp, c.cp, c.dp, c.pp)
    };
    assert_eq!(coords(0), (0, 0, 0, 0));
    assert_eq!(coords(1), (1, 0, 0, 0));
    assert_eq!(coords(2), (0, 1, 0, 0));
    assert_eq!(coords(6), (0, 0, 1, 0));
    assert_eq!(coords(12), (0, 0, 0, 1));
    for rank in 0..24 {
        assert_eq!(layout.rank(&layout.coords(rank)), rank);
    }
    // Experts fold over the same ranks: etp fastest, then ep.
    assert_eq!(
        (
            layout.coords(1).etp,
            layout.coords(1).ep,
            layout.coords(1).edp
        ),
        (0, 1, 0)
    );
    assert_eq!((layout.coords(2).ep, layout.coords(2).edp), (0, 1));
    assert_eq!(layout.to_string(), "tp=2 pp=2 cp=3 ep=2 dp=2 sp");
    assert_eq!(LayoutSpec::default().to_string(), "single rank");
}

#[test]
fn experts_get_room() {
    let layout = LayoutSpec {
        tp: 2,
        ep: 2,
        etp: 2,
        ..LayoutSpec::default()
    };
    assert_eq!(layout.with_room_for_experts().dp, 2);
    assert_eq!(
        LayoutSpec {
            ep: 8,
            ..LayoutSpec::default()
        }
        .with_room_for_experts()
        .dp,
        8
    );
    assert_eq!(
        LayoutSpec {
            dp: 3,
            ep: 2,
            ..LayoutSpec::default()
        }
        .with_room_for_experts()
        .dp,
        4
    );
    assert_eq!(
        LayoutSpec::tp_pp(4, 2).with_room_for_experts(),
        LayoutSpec::tp_pp(4, 2)
    );
}

fn tensors() -> Vec<CanonicalTensor> {
    vec![
        CanonicalTensor::new(
            "embedding.weight",
            [131, 48],
            ShardRule::Vocab {
                dim: 0,
                multiple: 1,
            },
        ),
        CanonicalTensor::new(
            "layers.0.attention.q_proj.weight",
            [96, 48],
            ShardRule::Heads { dim: 0, heads: 6 },
        ),
        CanonicalTensor::new(
            "layers.0.attention.k_proj.weight",
            [32, 48],
            ShardRule::Heads { dim: 0, heads: 2 },
        ),
        CanonicalTensor::new(
            "layers.0.mlp.up_proj.weight",
            [80, 48],
            ShardRule::Split { dim: 0 },
        ),
    ]
}

#[track_caller]
fn check_refused(layout: LayoutSpec, expected: &str) {
    let error = layout.validate(&tensors(), 3).unwrap_err();
    assert!(error.is_input());
    assert_eq!(error.to_string(), expected);
}

#[test]
fn illegal_layouts_are_refused_with_advice() {
    for layout in [
        LayoutSpec::default(),
        LayoutSpec::tp_pp(2, 3),
        LayoutSpec::tp_pp(1, 2),
    ] {
        layout.validate(&tensors(), 3).unwrap();
    }
    check_refused(
        LayoutSpec::tp_pp(4, 1),
        "layout tp=4: tp=4 does not divide the 6 heads of `layers.0.attention.q_proj.weight`; the nearest legal is 3 \
         or 6",
    );
    check_refused(
        LayoutSpec::tp_pp(3, 1),
        "layout tp=3: 2 problems\n  - tp=3 does not divide the 2 heads of `layers.0.attention.k_proj.weight`; the \
         nearest legal is 2 or 4\n  - tp=3 does not divide the 80 rows or columns of `layers.0.mlp.up_proj.weight`; \
         the nearest legal is 2 or 4",
    );
    check_refused(
        LayoutSpec::tp_pp(1, 4),
        "layout pp=4: pp=4 times vpp=1 is more than the model's 3 layers; the most is pp=3",
    );
    check_refused(
        LayoutSpec {
            vpp: 2,
            ..LayoutSpec::default()
        },
        "layout vpp=2: vpp=2 needs pipeline stages to interleave; set pp above 1, or vpp=1",
    );
    check_refused(
        LayoutSpec {
            ep: 2,
            ..LayoutSpec::default()
        },
        "layout ep=2: etp=1 times ep=2 does not divide the 1 ranks of a pipeline stage (tp*cp*dp); the nearest is dp=2",
    );
    check_refused(
        LayoutSpec {
            ep: 2,
            dp: 2,
            ..LayoutSpec::default()
        },
        "layout ep=2 dp=2: ep=2 on a model without experts; set ep=1",
    );
    check_refused(
        LayoutSpec {
            tp: 0,
            ..LayoutSpec::default()
        },
        "layout tp=0: tp is 0, expected 1 to 16384",
    );
    check_refused(
        LayoutSpec {
            dp: 16384,
            cp: 16384,
            ..LayoutSpec::default()
        },
        "layout cp=16384 dp=16384: it has 268435456 ranks, more than 1048576; lower dp or cp",
    );
    check_refused(
        LayoutSpec {
            dp: usize::MAX,
            ..LayoutSpec::default()
        },
        "layout dp=18446744073709551615: dp is 18446744073709551615, expected 1 to 16384",
    );
}

#[test]
fn stages_split_evenly_with_the_rest_first() {
    let layout = LayoutSpec::tp_pp(1, 3);
    let split = PipelineSplit::even(&layout, 8).unwrap();
    assert_eq!(
        (split.layers(0), split.layers(1), split.layers(2)),
        (0..3, 3..6, 6..8)
    );
    assert_eq!(
        (0..8).map(|l| split.stage_of_layer(l)).collect::<Vec<_>>(),
        [0, 0, 0, 1, 1, 1, 2, 2]
    );
    assert_eq!(split.stages(Place::First), [0]);
    assert_eq!(split.stages(Place::Last), [2]);
    assert_eq!(split.stages(Place::FirstAndLast), [0, 2]);
    assert_eq!(split.stages(Place::Layer(4)), [1]);

    let interleaved = LayoutSpec {
        pp: 2,
        vpp: 2,
        ..LayoutSpec::default()
    };
    let split = PipelineSplit::even(&interleaved, 8).unwrap();
    assert_eq!(
        (0..8).map(|l| split.stage_of_layer(l)).collect::<Vec<_>>(),
        [0, 0, 1, 1, 0, 0, 1, 1]
    );
    assert_eq!(split.stages(Place::Last), [1]);

    let uneven = PipelineSplit::uneven(&layout, 8, &[0, 7, 1]).unwrap();
    assert_eq!(
        (0..8).map(|l| uneven.stage_of_layer(l)).collect::<Vec<_>>(),
        [1, 1, 1, 1, 1, 1, 1, 2]
    );
    assert!(PipelineSplit::uneven(&layout, 8, &[4, 4]).is_err());
    assert!(PipelineSplit::uneven(&layout, 8, &[4, 4, 4]).is_err());
    assert!(PipelineSplit::uneven(&layout, 8, &[usize::MAX, 8, 1]).is_err());
    assert!(PipelineSplit::even(&layout, 2).is_err());
    let single = PipelineSplit::even(&LayoutSpec::default(), 2).unwrap();
    assert_eq!(single.stages(Place::FirstAndLast), [0]);
}

#[test]
fn vocabulary_is_padded_at_its_end() {
    let layout = LayoutSpec::tp_pp(4, 1);
    let slice = |rank: usize, multiple| {
        let rule = ShardRule::Vocab { dim: 0, multiple };
        let slice = local_slice(&rule, &[10, 3], &layout, &layout.coords(rank))
            .unwrap()
            .unwrap();
        (slice.ranges[0].clone(), slice.local_shape)
    };
    assert_eq!(slice(0, 1), (0..3, vec![3, 3]));
    assert_eq!(slice(3, 1), (9..10, vec![3, 3]));
    assert_eq!(slice(0, 8), (0..8, vec![8, 3]));
    assert_eq!(slice(1, 8), (8..10, vec![8, 3]));
    assert_eq!(slice(3, 8), (10..10, vec![8, 3]));
}

#[test]
fn heads_are_replicated_when_there_are_fewer_than_ranks() {
    let layout = LayoutSpec::tp_pp(4, 1);
    let rule = ShardRule::Heads { dim: 0, heads: 2 };
    let slices: Vec<LocalSlice> = (0..4)
        .map(|rank| {
            local_slice(&rule, &[32, 5], &layout, &layout.coords(rank))
                .unwrap()
                .unwrap()
        })
        .collect();
    assert_eq!(
        slices
            .iter()
            .map(|slice| slice.ranges[0].clone())
            .collect::<Vec<_>>(),
        [0..16, 0..16, 16..32, 16..32]
    );
    assert_eq!(
        slices.iter().map(|slice| slice.owner).collect::<Vec<_>>(),
        [true, false, true, false]
    );
    // 6 heads do not divide among 4 ranks even where the rows would.
    let rule = ShardRule::Heads { dim: 0, heads: 6 };
    assert!(local_slice(&rule, &[96, 5], &layout, &layout.coords(0)).is_err());
}

fn rules() -> impl Strategy<Value = (ShardRule, Vec<usize>)> {
    prop_oneof![
        Just((ShardRule::Replicated, vec![5, 3])),
        (0usize..2).prop_map(|dim| (ShardRule::Split { dim }, vec![24, 48])),
        (1usize..40, 1usize..9)
            .prop_map(|(rows, multiple)| (ShardRule::Vocab { dim: 0, multiple }, vec![rows, 3])),
        (0usize..2, prop::sample::select(vec![1usize, 2, 4, 12, 24]))
            .prop_map(|(dim, heads)| (ShardRule::Heads { dim, heads }, vec![24, 48])),
        prop::option::of(1usize..3)
            .prop_map(|inner| (ShardRule::StackedExperts { inner }, vec![12, 24, 48])),
        (0usize..12, prop::option::of(0usize..2)).prop_map(|(index, inner)| (
            ShardRule::Expert {
                index,
                count: 12,
                inner
            },
            vec![24, 48]
        )),
    ]
}

proptest! {
    /// The owners' slices are a partition of the tensor, whatever the rule and the layout.
    #[test]
    fn owners_hold_every_element_once(
        (rule, shape) in rules(),
        tp in prop::sample::select(vec![1usize, 2, 3, 4, 6]),
        ep in prop::sample::select(vec![1usize, 2, 3, 4]),
        etp in prop::sample::select(vec![1usize, 2, 4]),
        cp in 1usize..3,
    ) {
        let layout = LayoutSpec { tp, ep, etp, cp, ..LayoutSpec::default() }.with_room_for_experts();
        let mut counts = vec![0; shape.iter().product()];
        for rank in 0..layout.world_size() {
            let Ok(slice) = local_slice(&rule, &shape, &layout, &layout.coords(rank)) else {
                // Only heads that do not divide are refused here.
                let ShardRule::Heads { heads, .. } = rule else { panic!("{rule:?} at {layout}") };
                prop_assert!(heads % tp != 0 && tp % heads != 0);
                return Ok(());
            };
            let Some(slice) = slice.filter(|slice| slice.owner) else { continue };
            prop_assert!(slice.ranges.iter().zip(&slice.local_shape).all(|(range, local)| range.len() <= *local));
            let mut view = crate::mapping::View::whole(&shape);
            for (dim, range) in slice.ranges.iter().enumerate() {
                view = view.slice(dim, range.clone()).unwrap();
            }
            view.offsets().for_each(|at| counts[at] += 1);
        }
        prop_assert!(counts.iter().all(|count| *count == 1), "{:?} at {}: {:?}", rule, layout, counts);
    }
}
