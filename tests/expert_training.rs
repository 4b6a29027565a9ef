//! Mixtures of experts train on many ranks as on one, with every loss that they have: balance and z losses of routers,
//! multi-token prediction, correction biases that follow the load.

mod training;

use bridge_core::DecoderConfig;
use bridge_models::families::{deepseek_v3, qwen3_moe};
use bridge_models::{AuxiliaryOptions, BalanceScope, Capacity};
use bridge_ops::DropPolicy;
use bridge_train::config::RecomputeGranularity;

use training::{Run, Step, close};

/// Softmax routers in every layer.
fn qwen() -> DecoderConfig {
    qwen3_moe::presets::tiny()
}

/// Sigmoid routers with groups and correction biases, a shared expert, latent attention, a module of multi-token
/// prediction; four layers.
fn deepseek() -> DecoderConfig {
    let mut config = deepseek_v3::presets::tiny();
    config.num_hidden_layers = 4;
    config.layers.push(config.layers[2].clone());
    config
}

const LOSSES: AuxiliaryOptions = AuxiliaryOptions {
    balance: 0.02,
    scope: BalanceScope::MicroBatch,
    router_z: 0.01,
    mtp: 0.3,
    bias_update_rate: 0.01,
    capacity: None,
};

fn run(config: DecoderConfig, at: &str, auxiliary: AuxiliaryOptions) -> Run {
    let mut run = Run::of(config, at);
    // Routers that tell tokens apart from the start.
    run.std = Some(0.1);
    run.options.auxiliary = auxiliary;
    run
}

#[track_caller]
fn moved(trace: &[Step], losses: usize) {
    let (first, last) = (&trace[0], &trace[trace.len() - 1]);
    assert_eq!(first.others.len(), losses);
    assert!(first.loss - last.loss > 0.1, "{first:?} to {last:?}");
}

const LAYOUTS: [&str; 8] = [
    "dp2",
    "cp2",
    "ep2 dp2",
    "tp2 ep2 etp1 dp2",
    "tp2 ep2 etp2 dp2",
    "tp2 sp ep2 dp2",
    "pp3",
    "pp3 ep2 dp2",
];

#[test]
fn router_losses_train_alike_at_every_layout() {
    for (scope, every) in [(BalanceScope::MicroBatch, 1), (BalanceScope::Sequence, 3)] {
        let losses = AuxiliaryOptions { scope, ..LOSSES };
        let expected = run(qwen(), "", losses).trace();
        moved(&expected, 2);
        for at in LAYOUTS.iter().step_by(every) {
            for distributed in [false, true] {
                let found = run(qwen(), at, losses).distributed(distributed).trace();
                let what = format!("{at}, {scope:?}, distributed optimizer {distributed}");
                close(&what, &found, &expected);
            }
        }
    }
}

#[test]
fn biases_groups_and_multi_token_prediction_train_alike_at_every_layout() {
    let losses = AuxiliaryOptions {
        scope: BalanceScope::Sequence,
        ..LOSSES
    };
    let expected = run(deepseek(), "", losses).trace();
    moved(&expected, 3);
    for (index, at) in [
        "dp2",
        "ep2 dp2",
        "tp2 sp ep2 dp2",
        "tp2 ep2 etp2 dp2",
        "pp4",
        "pp2 vpp2 ep2 dp2",
    ]
    .iter()
    .enumerate()
    {
        let found = run(deepseek(), at, losses)
            .distributed(index % 2 == 1)
            .trace();
        close(at, &found, &expected);
    }
}

#[test]
fn what_is_made_again_in_the_backward_pass_counts_once() {
    let losses = AuxiliaryOptions {
        capacity: Some(Capacity {
            factor: 1.0,
            policy: DropPolicy::Weight,
        }),
        ..LOSSES
    };
    let expected = run(deepseek(), "", losses).trace();
    for recompute in [RecomputeGranularity::Selective, RecomputeGranularity::Full] {
        let mut run = run(deepseek(), "pp2 dp2", losses);
        run.options.recompute = recompute;
        close(&format!("{recompute}"), &run.trace(), &expected);
    }
}

/// The balance over a step counts the data-parallel ranks' tokens together, as if they were of one micro-batch.
#[test]
fn a_balance_over_the_step_counts_all_ranks_tokens() {
    let losses = AuxiliaryOptions {
        scope: BalanceScope::Step,
        ..LOSSES
    };
    let at = |layout: &str, micro_batch_size| {
        let mut run = run(qwen(), layout, losses);
        run.options.micro_batch_size = micro_batch_size;
        run.trace()
    };
    // Two rounds of four samples each.
    let expected = at("", 4);
    for (layout, micro_batch_size) in [("dp2", 2), ("ep2 dp4", 1), ("cp2 dp2", 2), ("pp3 dp2", 2)] {
        close(layout, &at(layout, micro_batch_size), &expected);
    }
    let differs = at("", 1);
    assert_ne!(differs[19].loss, expected[19].loss);
}

/// Sequences that do not divide are padded, and padding is neither balanced nor counted.
#[test]
fn padding_of_divided_sequences_has_no_part_in_any_loss() {
    let odd = |config: fn() -> DecoderConfig, at: &str| {
        let mut run = run(config(), at, LOSSES);
        run.seq = 11;
        run.trace()
    };
    close("cp2", &odd(qwen, "cp2"), &odd(qwen, ""));
    close("tp2 sp", &odd(deepseek, "tp2 sp"), &odd(deepseek, ""));
    close("tp2 sp cp2", &odd(qwen, "tp2 sp cp2"), &odd(qwen, ""));
}

#[test]
fn a_run_goes_on_at_another_expert_parallel_size() {
    let expected = run(deepseek(), "", LOSSES).trace();
    for (index, (before, after)) in [
        ("ep2 dp2", ""),
        ("", "ep2 dp2"),
        ("ep4 dp4", "tp2 ep2 etp2 dp2"),
        ("tp2 ep2 etp2 dp2", "pp2 ep2 dp2"),
    ]
    .into_iter()
    .enumerate()
    {
        let dir = tempfile::tempdir().expect("a folder");
        let part = |at: &str, distributed| {
            let mut run = run(deepseek(), at, LOSSES).distributed(distributed);
            run.dir = Some(dir.path().to_owned());
            run
        };
        let mut first = part(before, index % 2 == 0);
        first.stop_after = 8;
        let mut found = first.trace();
        found.extend(part(after, index % 4 < 2).trace());
        close(&format!("{before} to {after}"), &found, &expected);
    }
}

#[test]
fn a_run_continued_at_the_same_layout_is_the_same_bit_for_bit() {
    let at = || run(deepseek(), "ep2 dp2", LOSSES).distributed(true);
    let whole = at().trace();
    let dir = tempfile::tempdir().expect("a folder");
    let part = || Run {
        dir: Some(dir.path().to_owned()),
        ..at()
    };
    let mut first = part();
    first.stop_after = 7;
    let mut found = first.trace();
    found.extend(part().trace());
    assert_eq!(found, whole);
}
