//! Losses of a training step besides that of the next token: those of routers and of multi-token prediction.
//!
//! They are no part of what a segment returns. Each adds its gradient where the gradient of what it is about passes
//! (a router's weights, the head's losses), and leaves its value here, so that segments, recomputation and pipelines
//! need not know of them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bridge_ops::{
    BalanceLoss, DType, Float, Ops, Param, RouterLossSpec, RouterLosses, RouterSpec, Routing, Tape,
    Var, float_from_f32, to_f32_vec, with_router_losses,
};
use bridge_parallel::ExpertParallel;

use crate::context::ForwardContext;

/// Over which tokens a router's experts should be equally busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BalanceScope {
    /// Each sequence by itself.
    Sequence,
    /// The tokens of a micro-batch.
    MicroBatch,
    /// All tokens of the step so far.
    Step,
}

/// Which losses there are, and how much they count. A factor of 0 turns one off.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AuxiliaryOptions {
    /// Factor of the balance loss of each router.
    pub balance: f64,
    /// Over which tokens it is taken.
    pub scope: BalanceScope,
    /// Factor of the z loss of each router.
    pub router_z: f64,
    /// Factor of the mean of the multi-token prediction losses.
    pub mtp: f64,
}

impl Default for AuxiliaryOptions {
    fn default() -> Self {
        Self {
            balance: 0.0,
            scope: BalanceScope::MicroBatch,
            router_z: 0.0,
            mtp: 0.0,
        }
    }
}

/// The losses of one step, and how busy experts were in it. Made per step, lent to the context of each micro-batch.
#[derive(Debug)]
pub struct AuxiliaryLosses<B: Ops> {
    options: AuxiliaryOptions,
    tokens: usize,
    state: Mutex<State<B>>,
}

#[derive(Debug)]
struct State<B: Ops> {
    /// By the name of the mixture of experts, such as `layers.3.mlp`.
    routers: BTreeMap<String, RouterState<B>>,
    /// Losses of each multi-token prediction module, per micro-batch.
    mtp: Vec<Vec<Float<B>>>,
}

#[derive(Debug)]
struct RouterState<B: Ops> {
    counts: Float<B>,
    /// Share of the step's tokens, balance loss, z loss.
    losses: Vec<(f64, Float<B>, Float<B>)>,
}

/// How many tokens each expert of one layer was given in a step.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertLoad {
    /// The layer's mixture of experts, such as `layers.3.mlp`.
    pub name: String,
    /// Assignments to each expert.
    pub counts: Vec<f32>,
}

/// The values of a step's losses, without their factors.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AuxiliaryReport {
    /// Mean balance loss over the routers; 1 when all experts are equally busy.
    pub balance: Option<f64>,
    /// Mean z loss over the routers.
    pub router_z: Option<f64>,
    /// Sum of the token losses of each multi-token prediction module.
    pub mtp_loss_sums: Vec<f64>,
    /// How busy experts were.
    pub load: Vec<ExpertLoad>,
}

impl<B: Ops> AuxiliaryLosses<B> {
    /// No losses yet, of a step over `tokens` tokens, all micro-batches (and all ranks) together.
    pub fn new(options: AuxiliaryOptions, tokens: usize) -> Self {
        Self {
            options,
            tokens: tokens.max(1),
            state: Mutex::new(State {
                routers: BTreeMap::new(),
                mtp: Vec::new(),
            }),
        }
    }

    /// Factor of the multi-token prediction loss, if there is one.
    pub fn mtp_weight(&self) -> Option<f64> {
        (self.options.mtp != 0.0).then_some(self.options.mtp)
    }

    /// Adds the losses of one router to what is minimised, and notes how busy its experts are. Returns the weights of
    /// `routing`, to be used in their place.
    pub(crate) fn attach(
        &self,
        tape: &Tape<B>,
        name: &str,
        router: &RouterSpec,
        logits: &Var<B>,
        routing: &Routing<B>,
        ctx: &ForwardContext<'_, B>,
        parallel: &ExpertParallel<B>,
    ) -> Var<B> {
        let tokens = logits.shape()[0];
        let share = tokens as f64 / self.tokens as f64;
        let balance = match self.options.scope {
            BalanceScope::Sequence => BalanceLoss::PerSequence(ctx.batch()),
            BalanceScope::MicroBatch => BalanceLoss::PerBatch,
            BalanceScope::Step => match self.counts_so_far(name) {
                None => BalanceLoss::PerBatch,
                Some(earlier) => BalanceLoss::Since(earlier),
            },
        };
        // Ranks with the same tokens find the same gradient, and their gradients are summed.
        let own = share / parallel.copies_of_tokens() as f64;
        let spec = RouterLossSpec {
            score: router.score,
            balance,
            balance_weight: self.options.balance * own,
            z_weight: self.options.router_z * own,
            across_ranks: parallel.counts_across(),
        };
        let (weights, losses) =
            with_router_losses(tape, &routing.weights, logits, &routing.experts, &spec);
        self.note(name, share, losses);
        weights
    }

    fn counts_so_far(&self, name: &str) -> Option<Float<B>> {
        let state = self.state();
        state.routers.get(name).map(|router| router.counts.clone())
    }

    fn note(&self, name: &str, share: f64, losses: RouterLosses<B>) {
        let RouterLosses { balance, z, counts } = losses;
        let mut state = self.state();
        match state.routers.get_mut(name) {
            Some(router) => {
                router.counts = B::add(router.counts.clone(), counts);
                router.losses.push((share, balance, z));
            }
            None => {
                let losses = vec![(share, balance, z)];
                let router = RouterState { counts, losses };
                state.routers.insert(name.to_owned(), router);
            }
        }
    }

    /// Notes the token losses `[batch * seq]` of each multi-token prediction module.
    pub(crate) fn record_mtp(&self, losses: &[Var<B>]) {
        let mut state = self.state();
        state.mtp.resize_with(losses.len(), Vec::new);
        for (module, losses) in state.mtp.iter_mut().zip(losses) {
            module.push(losses.value());
        }
    }

    /// Reads everything back. Waits for the device.
    pub fn report(&self) -> AuxiliaryReport {
        let state = self.state();
        let number = |x: &Float<B>| f64::from(to_f32_vec::<B>(x.clone())[0]);
        let (mut balance, mut router_z, mut load) = (0.0, 0.0, Vec::new());
        for (name, router) in &state.routers {
            for (share, own_balance, own_z) in &router.losses {
                balance += share * number(own_balance);
                router_z += share * number(own_z);
            }
            load.push(ExpertLoad {
                name: name.clone(),
                counts: to_f32_vec::<B>(router.counts.clone()),
            });
        }
        let mean = |sum: f64| (!load.is_empty()).then(|| sum / load.len() as f64);
        let sum = |losses: &Vec<Float<B>>| {
            let tokens = losses.iter().flat_map(|x| to_f32_vec::<B>(x.clone()));
            tokens.map(f64::from).sum()
        };
        AuxiliaryReport {
            balance: mean(balance),
            router_z: mean(router_z),
            mtp_loss_sums: state.mtp.iter().map(sum).collect(),
            load,
        }
    }

    fn state(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Moves the correction biases of a model's routers against the load of the step: up by `rate` for an expert that was
/// given fewer tokens than the mean, down for one that was given more (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
///
/// `load` counts the tokens of the whole step, those of all ranks together; routers without a bias, and those that it
/// does not speak of, stay as they are.
pub fn update_correction_biases<B: Ops>(params: &[Param<B>], load: &[ExpertLoad], rate: f64) {
    for load in load {
        let name = format!("{}.router.correction_bias", load.name);
        let Some(bias) = params.iter().find(|param| param.name() == name) else {
            continue;
        };
        let mean = load.counts.iter().sum::<f32>() / load.counts.len().max(1) as f32;
        let steps: Vec<f32> = load
            .counts
            .iter()
            .map(|count| {
                // The sign of zero is zero here.
                let under = mean - count;
                if under == 0.0 {
                    0.0
                } else {
                    under.signum() * rate as f32
                }
            })
            .collect();
        let (shape, dtype) = (bias.shape(), bias.dtype());
        let steps = float_from_f32::<B>(&steps, &shape, &bias.device());
        let moved = B::add(B::cast(bias.value(), DType::F32), steps);
        bias.set_value(B::cast(moved, dtype));
    }
}

#[cfg(test)]
mod tests {
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
        assert!(report.balance.unwrap() >= 0.9 && report.router_z.unwrap() > 0.0);
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
        assert!((report.balance.unwrap() - once.balance.unwrap()).abs() < 1e-6);
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
        let [sum] = report.mtp_loss_sums[..] else {
            panic!("one module, {report:?}");
        };
        // Two tokens of each row have no token two ahead.
        assert!((sum / 10.0 - 131f64.ln()).abs() < 1.0, "{sum}");
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
}
