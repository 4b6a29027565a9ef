//! Documents packed into one sequence do not see each other at any layout, context parallelism included, whichever way its
//! ranks talk: a step's loss and gradients are those of one rank, which are those of each document by itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bridge_core::LayoutSpec;
use bridge_core::convert::HfModel;
use bridge_data::{Batch, IGNORE_INDEX};
use bridge_models::weights::load_hf_parallel;
use bridge_models::{Decoder, DtypePolicy, ParallelOptions, registry};
use bridge_ops::to_f32_vec;
use bridge_parallel::{CpCommType, run_threads};
use bridge_tests::fixture;
use bridge_train::config::RecomputeGranularity;
use bridge_train::engine::Executor;
use bridge_train::optimizer::{AdamWOptions, DataParallelOptions, Optimizer};
use bridge_train::step::accumulate_gradients;
use burn_flex::Flex;

const SEQ: usize = 23;
/// Lengths of the documents in each of two rows: some end within a chunk of a rank, one lies across several.
const DOCUMENTS: [&[usize]; 2] = [&[5, 1, 12, 5], &[23]];
/// Sums of fp32 in another order, relative to a gradient's largest element.
const REORDERED: f32 = 2e-4;

fn token(row: usize, place: usize) -> i64 {
    ((row * 7919 + place * place * 31 + place * 7 + 5) % 97) as i64
}

/// Row `row` with its documents packed.
fn packed(row: usize) -> Batch {
    let mut boundaries = vec![0];
    let (mut positions, mut labels) = (Vec::new(), Vec::new());
    for length in DOCUMENTS[row] {
        let start = positions.len();
        positions.extend(0..*length as i64);
        // The last token of a document predicts nothing.
        labels.extend((start + 1..start + length).map(|place| token(row, place)));
        labels.push(IGNORE_INDEX);
        boundaries.push(start + length);
    }
    Batch {
        batch: 1,
        seq: SEQ,
        tokens: (0..SEQ).map(|place| token(row, place)).collect(),
        labels,
        position_ids: positions,
        cu_seqlens: Some(boundaries.into()),
    }
}

/// Each document of row `row` as a batch of its own.
fn apart(row: usize) -> Vec<Batch> {
    let whole = packed(row);
    let mut start = 0;
    let document = |length: &usize| {
        let range = start..start + length;
        start += length;
        Batch {
            batch: 1,
            seq: *length,
            tokens: whole.tokens[range.clone()].to_vec(),
            labels: whole.labels[range].to_vec(),
            position_ids: (0..*length as i64).collect(),
            cu_seqlens: None,
        }
    };
    DOCUMENTS[row].iter().map(document).collect()
}

type Gradients = BTreeMap<String, Vec<f32>>;

/// Loss, norm of the gradient, and where no tensor is divided the gradients, of one step. `batches` are those of a
/// data-parallel rank.
fn step(
    family: &str,
    layout: LayoutSpec,
    comm: CpCommType,
    batches: fn(LayoutSpec, usize) -> Vec<Batch>,
) -> (f64, f64, Gradients) {
    let folder = HfModel::open(&fixture(family), &registry(), &layout).expect("a model");
    let options = ParallelOptions {
        cp_comm_type: comm,
        ..ParallelOptions::default()
    };
    let ranks = run_threads::<Flex, _, _>(layout, Duration::from_secs(60), move |parallel| {
        let model: Decoder<Flex> =
            load_hf_parallel(&folder, DtypePolicy::Float32, &parallel, &options)?;
        let recompute = RecomputeGranularity::Selective;
        let executor = Executor::new(&model, Arc::clone(&parallel), None, recompute)?;
        let adamw = AdamWOptions::default();
        let optimizer = Optimizer::new(&model, &parallel, &adamw, &DataParallelOptions::default())?;
        let own = match executor.reads_samples() {
            true => batches(*parallel.layout(), parallel.coords().dp),
            false => Vec::new(),
        };
        let loss = accumulate_gradients(&executor, &model, &own)?.mean;
        let sums = optimizer.finish_reduction(optimizer.start_reduction())?;
        let squares = optimizer.local_squared_norm(&sums);
        let counted = optimizer.params().iter().zip(optimizer.placements());
        let gradients: Gradients = counted
            .filter(|(_, placement)| placement.writes())
            .map(|(param, _)| {
                let grad = to_f32_vec::<Flex>(param.grad().expect("a gradient"));
                (param.name().to_owned(), grad)
            })
            .collect();
        Ok::<_, bridge_train::Error>((loss, squares, gradients))
    });
    let ranks = ranks.unwrap_or_else(|error| panic!("{family} at {layout}: {error}"));
    let squares: f64 = ranks.iter().map(|(_, squares, _)| squares).sum();
    let loss = ranks[0].0;
    let gradients = ranks.into_iter().flat_map(|(_, _, gradients)| gradients);
    (loss, squares.sqrt(), gradients.collect())
}

#[track_caller]
fn close(what: &str, found: &(f64, f64, Gradients), expected: &(f64, f64, Gradients), whole: bool) {
    assert!(
        (found.0 - expected.0).abs() < 2e-5,
        "{what}: loss {} and {}",
        found.0,
        expected.0
    );
    let apart = (found.1 / expected.1 - 1.0).abs();
    assert!(
        apart < 1e-4,
        "{what}: gradient norms {} and {}",
        found.1,
        expected.1
    );
    if !whole {
        return;
    }
    assert!(
        found.2.keys().eq(expected.2.keys()),
        "{what}: other weights"
    );
    for ((name, found), expected) in found.2.iter().zip(expected.2.values()) {
        let largest = expected.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
        for (a, b) in found.iter().zip(expected) {
            assert!(
                (a - b).abs() <= REORDERED * largest,
                "{what}, {name}: {a} and {b}"
            );
        }
    }
}

fn rows_of(layout: LayoutSpec, dp_rank: usize) -> Vec<Batch> {
    (dp_rank..2).step_by(layout.dp).map(packed).collect()
}

#[test]
fn packed_documents_are_those_of_one_rank_at_every_layout() {
    use CpCommType::{A2a, AllGather, P2p};
    let cp = |cp| LayoutSpec {
        cp,
        ..LayoutSpec::default()
    };
    let layouts = [
        (cp(2), P2p),
        (cp(2), AllGather),
        (cp(2), A2a),
        (cp(3), P2p),
        (LayoutSpec { dp: 2, ..cp(2) }, AllGather),
        (LayoutSpec { pp: 2, ..cp(2) }, P2p),
        (
            LayoutSpec {
                tp: 2,
                sp: true,
                ..cp(2)
            },
            P2p,
        ),
        (
            LayoutSpec {
                tp: 2,
                pp: 2,
                ..LayoutSpec::default()
            },
            P2p,
        ),
    ];
    for family in [
        "llama3_1",
        "gemma3_text",
        "gpt_oss",
        "deepseek_v3",
        "qwen3_moe",
    ] {
        let alone = LayoutSpec::default();
        let expected = step(family, alone, P2p, rows_of);
        let each = step(family, alone, P2p, |_, _| (0..2).flat_map(apart).collect());
        close(
            &format!("{family}, each document by itself"),
            &each,
            &expected,
            true,
        );
        for (layout, comm) in layouts {
            if comm == A2a && family == "gpt_oss" {
                // Refused: sinks are no matter of all-to-all.
                continue;
            }
            let found = step(family, layout, comm, rows_of);
            let what = format!("{family} at {layout}, {comm:?}");
            close(&what, &found, &expected, layout.tp == 1);
        }
    }
}

/// Recurrent layers start anew with each document.
#[test]
fn recurrent_layers_keep_documents_apart() {
    for family in ["nemotron_h", "qwen3_next"] {
        let alone = LayoutSpec::default();
        let expected = step(family, alone, CpCommType::P2p, |_, _| {
            (0..2).flat_map(apart).collect()
        });
        for layout in [
            alone,
            LayoutSpec::tp_pp(1, 2),
            LayoutSpec::tp_pp(2, 1),
            LayoutSpec { dp: 2, ..alone },
            LayoutSpec { cp: 2, ..alone },
            LayoutSpec {
                cp: 2,
                tp: 2,
                sp: true,
                ..alone
            },
            LayoutSpec { cp: 4, ..alone },
        ] {
            let found = step(family, layout, CpCommType::P2p, rows_of);
            close(
                &format!("{family} at {layout}"),
                &found,
                &expected,
                layout.tp == 1,
            );
        }
    }
}
