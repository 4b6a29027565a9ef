//! Loss and gradients do not depend on how a batch is cut, nor on what is recomputed.

mod support;

use bridge_train::config::RecomputeGranularity;
use bridge_train::engine::Executor;
use bridge_train::step::{accumulate_gradients, evaluate};
use support::{batches, fresh_model, gradients, patchy, tiny};

/// How far gradients of differently cut batches may be apart, relative to the largest: sums of fp32 in another order.
const REORDERED_SUM: f32 = 2e-6;

#[test]
fn any_cut_gives_the_same_loss_and_gradients() {
    let (config, data) = (tiny(), patchy());
    let samples = 12;
    let run = |micro_batch_size: usize| {
        let model = fresh_model(&config, 5);
        let cut = batches(data.as_ref(), samples, micro_batch_size);
        let executor =
            Executor::single(&model, &Default::default(), RecomputeGranularity::None).unwrap();
        let loss = accumulate_gradients(&executor, &model, &cut).unwrap();
        let evaluated = evaluate(&executor, &model, &cut).unwrap();
        assert!(
            (evaluated.mean - loss.mean).abs() < 1e-6,
            "{} and {}",
            evaluated.mean,
            loss.mean
        );
        (loss, gradients(&model))
    };
    let (whole, expected) = run(samples as usize);
    assert!(whole.valid_tokens < whole.tokens && whole.valid_tokens > 0);
    // 5 and 7 leave a smaller last micro-batch.
    for micro_batch_size in [1, 2, 3, 4, 5, 6, 7] {
        let (loss, found) = run(micro_batch_size);
        assert_eq!(
            (loss.tokens, loss.valid_tokens),
            (whole.tokens, whole.valid_tokens)
        );
        assert!(
            (loss.mean - whole.mean).abs() < 1e-6,
            "cut by {micro_batch_size}: {} and {}",
            loss.mean,
            whole.mean
        );
        for ((name, found), (_, expected)) in found.iter().zip(&expected) {
            let largest = expected.iter().fold(0.0f32, |m, g| m.max(g.abs()));
            let error = found
                .iter()
                .zip(expected)
                .fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(
                error <= REORDERED_SUM * largest.max(1e-3),
                "cut by {micro_batch_size}, {name}: {error} of {largest}"
            );
        }
    }
}

#[test]
fn a_mean_of_means_would_differ() {
    // The dataset is only a test of the rule above if micro-batches hold different numbers of valid tokens.
    let cut = batches(patchy().as_ref(), 12, 2);
    let counts: Vec<usize> = cut.iter().map(|batch| batch.loss_tokens()).collect();
    assert!(counts.iter().any(|count| *count != counts[0]), "{counts:?}");
}

#[test]
fn recomputing_layers_gives_the_same_bits() {
    let (config, data) = (tiny(), patchy());
    let run = |recompute| {
        let model = fresh_model(&config, 5);
        let cut = batches(data.as_ref(), 6, 3);
        let executor = Executor::single(&model, &Default::default(), recompute).unwrap();
        let loss = accumulate_gradients(&executor, &model, &cut).unwrap();
        (loss, gradients(&model))
    };
    assert_eq!(
        run(RecomputeGranularity::None),
        run(RecomputeGranularity::Full)
    );
}
