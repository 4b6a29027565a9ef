use burn_flex::Flex;

use super::*;
use crate::families::{deepseek_v3, qwen3_moe};
use crate::run::loss_and_gradients;
use crate::{Decoder, IGNORED_TARGET, Init, RandomInit};
use bridge_core::DecoderConfig;

const SHAPE: [usize; 2] = [2, 7];

fn model(config: DecoderConfig) -> Decoder<Flex> {
    let init = Init {
        std: Some(0.2),
        ..Init::default()
    };
    let mut weights = RandomInit::new(&init, &config);
    Decoder::build(config, &mut weights, &Default::default()).unwrap()
}

fn ids() -> Vec<u32> {
    (0..14).map(|i| i * 37 % 131).collect()
}

fn targets() -> Vec<i64> {
    let row = |row: &[u32]| {
        let next = row[1..].iter().map(|id| i64::from(*id));
        next.chain([IGNORED_TARGET]).collect::<Vec<_>>()
    };
    ids().chunks(7).flat_map(row).collect()
}

/// Gradients of one weight with and without auxiliary losses, and the report.
fn step(
    model: &Decoder<Flex>,
    options: Option<AuxiliaryOptions>,
    name: &str,
) -> (Vec<f32>, AuxiliaryReport, f64) {
    let params = model.params();
    params.iter().for_each(|param| param.clear_grad());
    let losses = AuxiliaryLosses::new(options.unwrap_or_default(), 14);
    let ctx = ForwardContext::new(&ids(), SHAPE, model.device());
    let ctx = match options {
        Some(_) => ctx.with_auxiliary(&losses),
        None => ctx,
    };
    let loss = loss_and_gradients(model, &ctx, &targets()).mean_loss();
    let param = params.iter().find(|param| param.name() == name).unwrap();
    let grad = param.grad().map_or_else(Vec::new, to_f32_vec::<Flex>);
    (grad, losses.report(), loss)
}

#[test]
fn router_losses_join_the_routers_gradient_and_nothing_else() {
    let model = model(qwen3_moe::presets::tiny());
    let router = "layers.2.mlp.router.weight";
    let (plain, report, loss) = step(&model, None, router);
    assert_eq!(report, AuxiliaryReport::default());
    let options = |balance, router_z| AuxiliaryOptions {
        balance,
        router_z,
        ..AuxiliaryOptions::default()
    };
    // The gradient is linear in both factors.
    let with = |balance, z| step(&model, Some(options(balance, z)), router);
    let (unmoved, report, same_loss) = with(0.0, 0.0);
    assert_eq!((unmoved, same_loss), (plain.clone(), loss));
    assert!(report.balance / 3.0 >= 0.9 && report.router_z > 0.0);
    let counts: Vec<f32> = report
        .load
        .iter()
        .map(|load| load.counts.iter().sum())
        .collect();
    assert_eq!(counts, [14.0 * 3.0; 3]);
    for (one, two) in [
        (with(1.0, 0.0).0, with(2.0, 0.0).0),
        (with(0.0, 1.0).0, with(0.0, 2.0).0),
    ] {
        assert_ne!(one, plain);
        for ((one, two), plain) in one.iter().zip(&two).zip(&plain) {
            assert!((two - plain - 2.0 * (one - plain)).abs() < 1e-5);
        }
    }
    let last = "layers.2.mlp.experts.down_proj.weight";
    assert_eq!(
        step(&model, Some(options(1.0, 1.0)), last).0,
        step(&model, None, last).0
    );
}

#[test]
fn a_balance_over_the_step_takes_earlier_micro_batches_in() {
    let model = model(qwen3_moe::presets::tiny());
    let options = AuxiliaryOptions {
        balance: 1.0,
        scope: BalanceScope::Step,
        ..AuxiliaryOptions::default()
    };
    let losses = AuxiliaryLosses::<Flex>::new(options, 28);
    for _ in 0..2 {
        let ctx = ForwardContext::new(&ids(), SHAPE, model.device()).with_auxiliary(&losses);
        loss_and_gradients(&model, &ctx, &targets());
    }
    let report = losses.report();
    assert_eq!(report.load[0].counts.iter().sum::<f32>(), 28.0 * 3.0);
    // The same tokens twice are as balanced as once.
    let once = step(&model, Some(options), "final_norm.weight").1;
    assert!((report.balance - once.balance).abs() < 1e-5);
}

#[test]
fn a_capacity_of_all_changes_nothing_and_one_of_none_takes_the_experts_out() {
    let model = model(qwen3_moe::presets::tiny());
    let options = |factor| AuxiliaryOptions {
        capacity: Some(Capacity {
            factor,
            policy: DropPolicy::Weight,
        }),
        ..AuxiliaryOptions::default()
    };
    let down = "layers.2.mlp.experts.down_proj.weight";
    let (plain, _, loss) = step(&model, None, down);
    // Three of eight experts per token: at eight thirds of its share an expert takes every token.
    let (roomy, _, same_loss) = step(&model, Some(options(8.0 / 3.0)), down);
    assert_eq!((roomy, same_loss), (plain.clone(), loss));
    let (tight, report, other_loss) = step(&model, Some(options(0.5)), down);
    assert!(tight != plain && other_loss != loss);
    // Load is what the router asked for.
    assert_eq!(report.load[2].counts.iter().sum::<f32>(), 42.0);
    let (none, ..) = step(&model, Some(options(0.0)), down);
    assert!(none.iter().all(|gradient| *gradient == 0.0));
}

#[test]
fn multi_token_prediction_is_trained_only_when_asked() {
    let model = model(deepseek_v3::presets::tiny());
    let proj = "mtp.0.proj.weight";
    let (none, _, loss) = step(&model, None, proj);
    assert!(none.is_empty());
    let options = |mtp| AuxiliaryOptions {
        mtp,
        ..AuxiliaryOptions::default()
    };
    let (one, report, same_loss) = step(&model, Some(options(0.1)), proj);
    assert_eq!(loss, same_loss);
    let [found] = report.mtp[..] else {
        panic!("one module, {report:?}");
    };
    // Two tokens of each row have no token two ahead.
    assert_eq!(found.tokens, 10.0);
    assert!((found.mean() - 131f64.ln()).abs() < 1.0, "{found:?}");
    let (three, ..) = step(&model, Some(options(0.3)), proj);
    for (one, three) in one.iter().zip(&three) {
        assert!((three - 3.0 * one).abs() < 1e-5 * three.abs().max(1e-2));
    }
    // It reaches the model's own weights as well.
    let embedding = "embedding.weight";
    assert_ne!(
        step(&model, Some(options(0.3)), embedding).0,
        step(&model, None, embedding).0
    );
}

#[test]
fn correction_biases_move_against_the_load_and_have_no_gradient() {
    let model = model(deepseek_v3::presets::tiny());
    let name = "layers.1.mlp.router.correction_bias";
    let (grad, report, _) = step(&model, Some(AuxiliaryOptions::default()), name);
    assert!(grad.is_empty());
    let params = model.params();
    update_correction_biases(&params, &report.load, 0.01);
    let bias = params.iter().find(|param| param.name() == name).unwrap();
    let load = report
        .load
        .iter()
        .find(|load| load.name == "layers.1.mlp")
        .unwrap();
    let mean = load.counts.iter().sum::<f32>() / load.counts.len() as f32;
    for (bias, count) in to_f32_vec::<Flex>(bias.value()).iter().zip(&load.counts) {
        let expected = match mean - count {
            under if under > 0.0 => 0.01,
            under if under < 0.0 => -0.01,
            _ => 0.0,
        };
        assert_eq!(*bias, expected);
    }
}
