//! Training learns: the loss of a small model on the bundled text falls to where it should.

mod support;

use support::{Workbench, finish, losses, pretrain};

/// A model without any idea has a loss of ln(vocabulary).
const UNIFORM: f64 = 5.5;
/// Letter frequencies alone give about 3.0 nats a byte for English prose; pairs of letters about 2.4. A run this short
/// passes both. Measured: 2.17 for the seed below.
const LEARNT: f64 = 2.4;

#[test]
fn two_hundred_steps_on_the_bundled_text_pass_pairs_of_letters() {
    let bench = Workbench::empty();
    let dir = bench.path("run");
    let overrides = [
        "train.train_iters=200",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
        "data.seq_length=64",
        "train.seed=7",
        "optimizer.lr=1e-2",
        "model.initializer_range=0.1",
        // The numbers above are nats a byte.
        "tokenizer.kind=bytes",
        "model.vocab_size=260",
    ];
    finish(pretrain(&dir, &overrides)).ok();
    let losses: Vec<f64> = losses(&dir).into_values().collect();
    assert_eq!(losses.len(), 200);
    assert!(
        (losses[0] - UNIFORM).abs() < 0.3,
        "the first loss is {}",
        losses[0]
    );
    let last = losses[190..].iter().sum::<f64>() / 10.0;
    assert!(last < LEARNT, "the mean of the last ten losses is {last}");
}
