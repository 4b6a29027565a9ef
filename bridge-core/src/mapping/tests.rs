//! Weight maps applied to models: every form of entry in both directions, at several layouts, and what is refused.

use proptest::prelude::*;

use super::*;
use crate::bridge::CanonicalTensor;
use crate::layout::{LayoutSpec, ShardRule, local_slice};

fn tensor(name: &str, shape: &[usize], shard: ShardRule) -> CanonicalTensor {
    CanonicalTensor::new(name, shape, shard)
}

fn replicated(name: &str, shape: &[usize]) -> CanonicalTensor {
    tensor(name, shape, ShardRule::Replicated)
}

/// Moves distinct numbers from the foreign tensors into the canonical ones, cuts those for every rank of `layout`, puts
/// the owners' cuts together again, and moves the numbers back.
#[track_caller]
fn check_round_trip(map: &WeightMap, tensors: &[CanonicalTensor], layout: &LayoutSpec) {
    let mapping = map
        .resolve(tensors)
        .unwrap_or_else(|problems| panic!("{problems}"));
    let mut next = 0u32;
    let foreign: Vec<Vec<u32>> = mapping
        .foreign
        .iter()
        .map(|tensor| {
            let numel: usize = tensor.shape.iter().product();
            next += numel as u32;
            (next - numel as u32..next).collect()
        })
        .collect();

    // Each rank reads only what it owns, straight from the foreign tensors.
    let mut canonical: Vec<Vec<Option<u32>>> = tensors
        .iter()
        .map(|tensor| vec![None; tensor.numel()])
        .collect();
    for rank in 0..layout.world_size() {
        for (index, tensor) in tensors.iter().enumerate() {
            let slice =
                local_slice(&tensor.shard, &tensor.shape, layout, &layout.coords(rank)).unwrap();
            let Some(slice) = slice.filter(|slice| slice.owner) else {
                continue;
            };
            let mut local = vec![None; slice.numel()];
            for piece in mapping.pieces_of_canonical(index) {
                let pair = ViewPair {
                    near: piece.canonical_view.clone(),
                    far: piece.foreign_view.clone(),
                };
                for part in pair.within(&tensor.shape, &slice.ranges) {
                    for (near, far) in part.near.offsets().zip(part.far.offsets()) {
                        assert_eq!(
                            local[near].replace(foreign[piece.foreign][far]),
                            None,
                            "{}",
                            tensor.name
                        );
                    }
                }
            }
            let place = View::whole(&tensor.shape).narrow(&slice.ranges);
            for (at, value) in place.offsets().zip(local) {
                assert!(
                    value.is_some() && canonical[index][at].is_none(),
                    "{} at {at}",
                    tensor.name
                );
                canonical[index][at] = value;
            }
        }
    }

    let mut back: Vec<Vec<Option<u32>>> = foreign
        .iter()
        .map(|values| vec![None; values.len()])
        .collect();
    for piece in &mapping.pieces {
        for (near, far) in piece
            .canonical_view
            .offsets()
            .zip(piece.foreign_view.offsets())
        {
            assert_eq!(
                back[piece.foreign][far].replace(canonical[piece.canonical][near].unwrap()),
                None
            );
        }
    }
    let back: Vec<Vec<u32>> = back
        .into_iter()
        .map(|values| values.into_iter().map(Option::unwrap).collect())
        .collect();
    assert_eq!(back, foreign);
}

fn experts(count: usize, name: &str, shape: &[usize], inner: usize) -> Vec<CanonicalTensor> {
    let rule = |index| ShardRule::Expert {
        index,
        count,
        inner: Some(inner),
    };
    (0..count)
        .map(|e| tensor(&format!("layers.0.experts.{e}.{name}"), shape, rule(e)))
        .collect()
}

#[test]
fn interleaved_stacked_experts_have_the_order_of_their_files() {
    // Two experts of a gate and an up projection [inner 2, hidden 3], held as [experts, hidden, 2 * inner] with even
    // columns gate and odd columns up.
    let tensors = [experts(2, "gate", &[2, 3], 0), experts(2, "up", &[2, 3], 0)].concat();
    let parts = ["layers.{l}.experts.{e}.gate", "layers.{l}.experts.{e}.up"];
    let map = WeightMap::new().fuse(
        Fused::new("layers.{l}.gate_up", &parts)
            .dim(1)
            .groups(2)
            .arrange(|view| view.transpose(0, 1)),
    );
    let mapping = map.resolve(&tensors).unwrap();
    assert_eq!(mapping.foreign.len(), 1);
    assert_eq!(
        (mapping.foreign[0].shape.as_slice(), mapping.ops[0]),
        (&[2, 3, 4][..], "stacked")
    );
    // Expert 1's up projection, element [inner 1, hidden 2], is element [1, 2, 3] of the file.
    let up = 3;
    let piece = mapping.pieces_of_canonical(up).next().unwrap();
    let place = piece
        .canonical_view
        .offsets()
        .position(|at| at == 3 + 2)
        .unwrap();
    assert_eq!(
        piece.foreign_view.offsets().nth(place),
        Some((3 + 2) * 4 + 3)
    );
    for (ep, etp) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
        let layout = LayoutSpec {
            ep,
            etp,
            ..LayoutSpec::default()
        }
        .with_room_for_experts();
        check_round_trip(&map, &tensors, &layout);
    }
}

#[test]
fn a_stacked_tensor_may_list_foreign_ones() {
    let tensors = [tensor(
        "layers.1.experts.down",
        &[4, 5, 6],
        ShardRule::StackedExperts { inner: Some(2) },
    )];
    let map = WeightMap::new().unstacked_experts(
        "layers.{l}.experts.down",
        "model.layers.{l}.experts.{e}.down",
    );
    let mapping = map.resolve(&tensors).unwrap();
    let names: Vec<&str> = mapping
        .foreign
        .iter()
        .map(|tensor| tensor.name.as_str())
        .collect();
    assert_eq!(
        names,
        (0..4)
            .map(|e| format!("model.layers.1.experts.{e}.down"))
            .collect::<Vec<_>>()
    );
    for (ep, etp) in [(1, 1), (4, 1), (2, 3)] {
        let layout = LayoutSpec {
            ep,
            etp,
            ..LayoutSpec::default()
        }
        .with_room_for_experts();
        check_round_trip(&map, &tensors, &layout);
    }
}

#[test]
fn stacking_without_fusing_counts_from_zero_without_gaps() {
    let map = WeightMap::new().stacked_experts("layers.{l}.down", "layers.{l}.experts.{e}.down");
    let mut tensors = experts(3, "down", &[2, 5], 1);
    assert_eq!(map.resolve(&tensors).unwrap().foreign[0].shape, [3, 2, 5]);
    tensors.remove(1);
    let problems = map.resolve(&tensors).unwrap_err();
    assert_eq!(
        problems.to_string(),
        "fused tensor `layers.0.down`: its 2 members are not numbered 0 to 1"
    );
}

#[test]
fn a_view_may_be_read_under_another_shape() {
    // Heads of two halves whose rows alternate in the file, as in the first Llama release.
    let (heads, half, hidden) = (3, 2, 5);
    let tensors = [tensor(
        "q",
        &[heads * 2 * half, hidden],
        ShardRule::Heads { dim: 0, heads },
    )];
    let map = WeightMap::new().map("q", "wq", move |view| {
        view.split(0, &[heads, 2, half])?
            .transpose(1, 2)?
            .reads_as(&[heads * half * 2, hidden])
    });
    let mapping = map.resolve(&tensors).unwrap();
    assert_eq!(mapping.foreign[0].shape, [12, 5]);
    // File row 1 is the first row of the second half of head 0: canonical row 2.
    let piece = &mapping.pieces[0];
    let place = piece.foreign_view.offsets().position(|at| at == 5).unwrap();
    assert_eq!(piece.canonical_view.offsets().nth(place), Some(2 * 5));
    for tp in [1, 3] {
        check_round_trip(&map, &tensors, &LayoutSpec::tp_pp(tp, 1));
    }
}

#[track_caller]
fn check_refused(map: WeightMap, tensors: &[CanonicalTensor], expected: &[&str]) {
    let problems = map.resolve(tensors).unwrap_err();
    assert_eq!(problems.listed(), expected);
}

#[test]
fn gaps_and_overlaps_are_found() {
    let two = [replicated("a", &[4, 6]), replicated("b", &[2, 6])];
    check_refused(
        WeightMap::new().copy("a", "x"),
        &two,
        &["canonical tensor `b` has no entry in the weight map"],
    );
    check_refused(
        WeightMap::new().copy("{any}", "x"),
        &two,
        &["foreign tensor `x` is made by two entries of the weight map"],
    );
    check_refused(
        WeightMap::new()
            .copy("b", "y")
            .map("a", "x", |view| view.slice(0, 1..3)),
        &two,
        &["canonical tensor `a` of shape [4, 6]: 12 of its 24 elements are mapped"],
    );
    check_refused(
        WeightMap::new()
            .copy("b", "y")
            .map("a", "x", |view| view.slice(0, 1..9)),
        &two,
        &["canonical tensor `a` does not map to `x`: slice 1..9 leaves dimension 0 of [4, 6]"],
    );
    check_refused(
        WeightMap::new().fused("x", &["a", "c"], 0).copy("b", "y"),
        &two,
        &["fused tensor `x`: no canonical tensor matches part `c`"],
    );
    check_refused(
        WeightMap::new().fused("x", &["a", "b"], 1),
        &two,
        &["fused tensor `x`: `b` would make its shape [2, 12], the parts before it [4, 12]"],
    );
    check_refused(
        WeightMap::new().fuse(Fused::new("x", &["a", "b"]).groups(4)),
        &two,
        &["fused tensor `x`: dimension 0 of `b` is 2, expected a multiple of the 4 groups"],
    );
    check_refused(
        WeightMap::new().fuse(Fused::new("x", &["a", "b"]).groups(0)),
        &two,
        &["fused tensor `x`: it has 0 groups, expected at least 1"],
    );
    check_refused(
        WeightMap::new().fused("x", &["a", "b"], 2),
        &two,
        &["fused tensor `x`: `a` has shape [4, 6] without dimension 2"],
    );
    check_refused(
        WeightMap::new().copy("a", "x.{l}").copy("b", "y"),
        &two,
        &["`x.{l}` has a capture that canonical tensor `a` lacks"],
    );
    check_refused(
        WeightMap::new().copy("a", "x{").copy("b", "y"),
        &two,
        &[
            "pattern `x{` has an unclosed brace",
            "canonical tensor `a` has no entry in the weight map",
        ],
    );
    check_refused(
        WeightMap::new()
            .copy("a", "x")
            .copy("b", "y")
            .tied("c", "d", true)
            .tied("b", "a", true),
        &two,
        &[
            "`c` is tied to `d`, which is no canonical tensor",
            "canonical tensor `b` is tied, and a tensor of its own as well",
        ],
    );
    check_refused(
        WeightMap::new().copy("a", "x"),
        &[replicated("a", &[1]), replicated("a", &[1])],
        &[
            "canonical tensor `a` is declared twice",
            "foreign tensor `x` is made by two entries of the weight map",
        ],
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// A model of every form of entry, with random sizes, at random layouts.
    #[test]
    fn every_form_of_entry_round_trips(
        (hidden, inner, heads, kv_heads, head_dim) in (1usize..5, 1usize..4, 1usize..4, 1usize..3, 1usize..3),
        (experts_count, vocab, tp, ep, etp) in (1usize..4, 1usize..9, 1usize..4, 1usize..3, 1usize..3),
        order in prop::sample::select(vec![[0usize, 1, 2], [0, 2, 1], [1, 0, 2], [2, 1, 0], [1, 2, 0]]),
    ) {
        // Sizes that the layout divides.
        let (inner, heads, kv_heads, count) =
            (inner * tp * etp, heads * kv_heads * tp, kv_heads * tp, experts_count * ep);
        let mut tensors = vec![
            tensor("embedding", &[vocab, hidden], ShardRule::Vocab { dim: 0, multiple: 2 }),
            tensor("layers.0.q", &[heads * head_dim, hidden], ShardRule::Heads { dim: 0, heads }),
            tensor("layers.0.k", &[kv_heads * head_dim, hidden], ShardRule::Heads { dim: 0, heads: kv_heads }),
            tensor("layers.0.v", &[kv_heads * head_dim, hidden], ShardRule::Heads { dim: 0, heads: kv_heads }),
            tensor("layers.0.o", &[hidden, heads * head_dim], ShardRule::Heads { dim: 1, heads }),
            tensor("layers.0.conv", &[inner, 3, hidden], ShardRule::Split { dim: 0 }),
            tensor("layers.0.packed", &[count, hidden, inner], ShardRule::StackedExperts { inner: Some(2) }),
            replicated("norm", &[hidden]),
        ];
        tensors.extend(experts(count, "gate", &[inner, hidden], 0));
        tensors.extend(experts(count, "up", &[inner, hidden], 0));
        tensors.extend(experts(count, "down", &[hidden, inner], 1));
        let map = WeightMap::new()
            .copy("embedding", "wte")
            .fuse(Fused::new("h.{l}.qkv", &["layers.{l}.q", "layers.{l}.k", "layers.{l}.v"]).groups(kv_heads))
            .map("layers.{l}.o", "h.{l}.o", |view| view.transpose(0, 1))
            .map("layers.{l}.conv", "h.{l}.conv", move |view| view.permute(&order))
            .unstacked_experts("layers.{l}.packed", "h.{l}.packed.{e}")
            .copy("norm", "norm")
            .fuse(
                Fused::new("h.{l}.gate_up", &["layers.{l}.experts.{e}.gate", "layers.{l}.experts.{e}.up"])
                    .dim(1)
                    .groups(inner)
                    .arrange(|view| view.transpose(0, 1)),
            )
            .stacked_experts("h.{l}.down", "layers.{l}.experts.{e}.down");
        let layout = LayoutSpec { tp, ep, etp, ..LayoutSpec::default() }.with_room_for_experts();
        check_round_trip(&map, &tensors, &layout);
    }
}
