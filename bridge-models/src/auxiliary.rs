//! Losses of a training step besides that of the next token: those of routers and of multi-token prediction.
//!
//! They are no part of what a segment returns. Each adds its gradient where the gradient of what it is about passes
//! (a router's weights, the head's losses), and leaves its value here, so that segments, recomputation and pipelines
//! need not know of them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bridge_ops::{
    BalanceLoss, DType, DropPolicy, Float, Int, Ops, Param, RouterLossSpec, RouterSpec, Routing,
    Tape, ValidTokens, Var, count_assignments, drop_over_capacity, expert_capacity, float_from_f32,
    to_f32_vec, with_router_losses,
};
use bridge_parallel::ExpertParallel;
use burn::tensor::{Int as IntKind, Tensor, TensorPrimitive};

use crate::context::{ForwardContext, IGNORED_TARGET};

/// Over which tokens a router's experts should be equally busy. Ranks that have parts of the same tokens count them
/// together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BalanceScope {
    /// Each sequence by itself.
    Sequence,
    /// The tokens of a micro-batch.
    MicroBatch,
    /// All tokens of the step so far, those of data-parallel ranks among them. The one scope in which it matters how a
    /// batch is cut: a micro-batch sees what came before it.
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
    /// How far a step moves the correction bias of an expert (see [`update_correction_biases`]).
    pub bias_update_rate: f64,
    /// A limit on the tokens of an expert; `None` drops none.
    pub capacity: Option<Capacity>,
}

/// A limit on how many tokens of a micro-batch an expert takes, or of a rank's part of one: as in Megatron-Core, each rank
/// drops from what it routes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Capacity {
    /// The limit, as a multiple of an equal share.
    pub factor: f64,
    /// Which assignments stay.
    pub policy: DropPolicy,
}

impl Default for AuxiliaryOptions {
    /// None.
    fn default() -> Self {
        Self {
            balance: 0.0,
            scope: BalanceScope::MicroBatch,
            router_z: 0.0,
            mtp: 0.0,
            bias_update_rate: 0.0,
            capacity: None,
        }
    }
}

impl AuxiliaryOptions {
    /// Whether there is anything to do in a training step.
    pub fn is_active(&self) -> bool {
        *self
            != Self {
                scope: self.scope,
                ..Self::default()
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
    /// By multi-token prediction module: sum of its losses, and number of tokens that have one, `[1]` fp32 each.
    mtp: Vec<[Float<B>; 2]>,
}

/// Everything that a router leaves, summed on the device over the micro-batches so far.
#[derive(Debug)]
struct RouterState<B: Ops> {
    /// Assignments that the balance loss is about: `[E]`.
    counts: Float<B>,
    /// Tokens that the router gave each expert: `[E]`.
    load: Float<B>,
    /// Balance loss and z loss, each times the micro-batch's share of the step's tokens: `[1]`.
    losses: [Float<B>; 2],
}

/// How many tokens each expert of one layer was given in a step.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertLoad {
    /// The layer's mixture of experts, such as `layers.3.mlp`.
    pub name: String,
    /// Assignments to each expert.
    pub counts: Vec<f32>,
}

/// The loss of a multi-token prediction module.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MtpLoss {
    /// Sum over the tokens that have one.
    pub sum: f64,
    /// How many have.
    pub tokens: f64,
}

impl MtpLoss {
    /// The mean.
    pub fn mean(&self) -> f64 {
        self.sum / self.tokens.max(1.0)
    }
}

/// The values of a step's losses, without their factors, as far as a rank has computed them. Tensor-parallel ranks without
/// sequence parallelism have the same tokens, and each reports them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AuxiliaryReport {
    /// Routers that were at work here.
    pub num_routers: usize,
    /// Sum of their balance losses, this rank's tokens counting as much as they are of the step's. On one rank, 1 for each
    /// router whose experts are equally busy.
    pub balance: f64,
    /// Sum of their z losses, in the same way.
    pub router_z: f64,
    /// The loss of each multi-token prediction module.
    pub mtp: Vec<MtpLoss>,
    /// How busy experts were, in the order of the layers' names.
    pub load: Vec<ExpertLoad>,
}

/// What [`AuxiliaryLosses::attach`] is told of a router.
pub(crate) struct RouterAtWork<'a, B: Ops> {
    /// Its mixture of experts, such as `layers.3.mlp`.
    pub(crate) name: &'a str,
    pub(crate) spec: &'a RouterSpec,
    /// [tokens, E].
    pub(crate) logits: &'a Var<B>,
    pub(crate) routing: &'a Routing<B>,
    /// Whether a bias swayed the choice.
    pub(crate) biased: bool,
    /// Which of the tokens are none.
    pub(crate) valid: Option<&'a ValidTokens<B>>,
    pub(crate) parallel: &'a ExpertParallel<B>,
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
    /// its routing, to be used in their place.
    ///
    /// The balance is that of the experts with the highest scores, whatever groups and biases made of them (DeepSeek-V3,
    /// arXiv 2412.19437, equation 18).
    pub(crate) fn attach(
        &self,
        tape: &Tape<B>,
        router: &RouterAtWork<'_, B>,
        ctx: &ForwardContext<'_, B>,
    ) -> Var<B> {
        let (logits, parallel) = (router.logits, router.parallel);
        let &[rows, num_experts] = logits.shape().as_slice() else {
            unreachable!("a router's logits are [tokens, experts]");
        };
        let tokens = router.valid.map_or(rows, |valid| valid.count);
        let share = tokens as f64 / self.tokens as f64;
        let load = count_assignments::<B>(&router.routing.experts, num_experts);
        let favoured = if router.biased || router.spec.groups.is_some() {
            let plain = RouterSpec {
                groups: None,
                ..*router.spec
            };
            B::router_forward(logits.value(), None, &plain).experts
        } else {
            router.routing.experts.clone()
        };
        let balance = match self.options.scope {
            BalanceScope::Sequence => BalanceLoss::PerSequence(ctx.batch()),
            BalanceScope::MicroBatch => BalanceLoss::PerBatch,
            BalanceScope::Step => match self.counts_so_far(router.name) {
                None => BalanceLoss::PerBatch,
                Some(earlier) => BalanceLoss::Since(earlier),
            },
        };
        // Ranks with the same tokens find the same gradient, and their gradients are summed.
        let own = share / parallel.copies_of_tokens() as f64;
        let spec = RouterLossSpec {
            score: router.spec.score,
            balance,
            balance_weight: self.options.balance * own,
            z_weight: self.options.router_z * own,
            across_ranks: match self.options.scope {
                BalanceScope::Sequence | BalanceScope::MicroBatch => {
                    parallel.counts_across_micro_batch()
                }
                BalanceScope::Step => parallel.counts_across_step(),
            },
            valid: router.valid.cloned(),
        };
        let (weights, found) =
            with_router_losses(tape, &router.routing.weights, logits, &favoured, &spec);
        let losses = [found.balance, found.z].map(|loss| B::scale(loss, share));
        self.note(
            router.name,
            RouterState {
                counts: found.counts,
                load,
                losses,
            },
        );
        weights
    }

    /// The assignments of one router, `num_experts` in the place of those that are dropped. `tokens` of them are no
    /// padding.
    pub(crate) fn within_capacity(
        &self,
        routing: &Routing<B>,
        tokens: usize,
        num_experts: usize,
    ) -> Int<B> {
        let experts = routing.experts.clone();
        let Some(Capacity { factor, policy }) = self.options.capacity else {
            return experts;
        };
        let top_k = routing.weights.shape()[1];
        let capacity = expert_capacity(factor, tokens, top_k, num_experts);
        drop_over_capacity::<B>(
            experts,
            routing.weights.value(),
            num_experts,
            capacity,
            policy,
        )
    }

    fn counts_so_far(&self, name: &str) -> Option<Float<B>> {
        let state = self.state();
        state.routers.get(name).map(|router| router.counts.clone())
    }

    fn note(&self, name: &str, found: RouterState<B>) {
        let mut state = self.state();
        let sum = match state.routers.remove(name) {
            None => found,
            Some(earlier) => {
                let [balance, z] = earlier.losses;
                let [own_balance, own_z] = found.losses;
                RouterState {
                    counts: B::add(earlier.counts, found.counts),
                    load: B::add(earlier.load, found.load),
                    losses: [B::add(balance, own_balance), B::add(z, own_z)],
                }
            }
        };
        state.routers.insert(name.to_owned(), sum);
    }

    /// Notes the losses of each multi-token prediction module, and the targets that they are about: `[batch * seq]` both.
    pub(crate) fn record_mtp(&self, losses: &[Var<B>], targets: &[Int<B>]) {
        let mut state = self.state();
        let earlier = std::mem::take(&mut state.mtp);
        let mut earlier = earlier.into_iter();
        for (losses, targets) in losses.iter().zip(targets) {
            let targets = Tensor::<B, 1, IntKind>::from_primitive(targets.clone());
            let valid = targets.not_equal_elem(IGNORED_TARGET).int().sum().float();
            let TensorPrimitive::Float(valid) = valid.into_primitive() else {
                unreachable!("a sum of numbers is not quantized");
            };
            let sum = Tensor::<B, 1>::from_primitive(TensorPrimitive::Float(losses.value())).sum();
            let TensorPrimitive::Float(sum) = sum.into_primitive() else {
                unreachable!("a sum of numbers is not quantized");
            };
            let own = [sum, B::cast(valid, DType::F32)];
            state.mtp.push(match earlier.next() {
                None => own,
                Some([sum, tokens]) => {
                    let [own_sum, own_tokens] = own;
                    [B::add(sum, own_sum), B::add(tokens, own_tokens)]
                }
            });
        }
    }

    /// Reads everything back, in one transfer. Waits for the device.
    pub fn report(&self) -> AuxiliaryReport {
        let state = self.state();
        let mut parts: Vec<Float<B>> = Vec::new();
        for router in state.routers.values() {
            parts.extend(router.losses.iter().cloned());
            parts.push(router.load.clone());
        }
        parts.extend(state.mtp.iter().flatten().cloned());
        if parts.is_empty() {
            return AuxiliaryReport::default();
        }
        let values = to_f32_vec::<B>(B::float_cat(parts, 0));
        let mut values = values.into_iter();
        let mut report = AuxiliaryReport {
            num_routers: state.routers.len(),
            ..AuxiliaryReport::default()
        };
        for (name, router) in &state.routers {
            let mut number = || f64::from(values.next().unwrap_or_default());
            report.balance += number();
            report.router_z += number();
            let experts = burn::tensor::TensorMetadata::shape(&router.load)[0];
            report.load.push(ExpertLoad {
                name: name.clone(),
                counts: values.by_ref().take(experts).collect(),
            });
        }
        for _ in &state.mtp {
            let mut number = || f64::from(values.next().unwrap_or_default());
            report.mtp.push(MtpLoss {
                sum: number(),
                tokens: number(),
            });
        }
        report
    }

    fn state(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Name of the correction bias of the mixture of experts called `moe`.
fn correction_bias_of(moe: &str) -> String {
    format!("{moe}.router.correction_bias")
}

/// Whether `name` is that of a router's correction bias, which stays in fp32 whatever weights are in: its steps are small.
pub fn is_correction_bias(name: &str) -> bool {
    name.ends_with(".router.correction_bias")
}

/// Those of `load` whose router has a correction bias among `params`.
pub fn load_with_correction_bias<B: Ops>(
    params: &[Param<B>],
    mut load: Vec<ExpertLoad>,
) -> Vec<ExpertLoad> {
    let biases: std::collections::HashSet<&str> = (params.iter().map(Param::name))
        .filter(|name| is_correction_bias(name))
        .collect();
    load.retain(|load| biases.contains(correction_bias_of(&load.name).as_str()));
    load
}

/// Moves the correction biases of a model's routers against the load of the step: up by `rate` for an expert that was
/// given fewer tokens than the mean, down for one that was given more (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
///
/// `load` counts the tokens of the whole step, those of all ranks together; routers without a bias, and those that it
/// does not speak of, stay as they are.
pub fn update_correction_biases<B: Ops>(params: &[Param<B>], load: &[ExpertLoad], rate: f64) {
    for load in load {
        let name = correction_bias_of(&load.name);
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
#[path = "auxiliary_tests.rs"]
mod tests;
