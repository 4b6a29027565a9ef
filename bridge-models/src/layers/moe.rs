//! A mixture of experts: a router picks some experts for each token, and their outputs are summed by weight. The steps
//! are those of the operations' own module, one call each, so that a parallel layout can stand between them.

use bridge_core::DecoderConfig;
use bridge_core::config::{GroupScoring, MoeConfig, RouterConfig, RouterScoring};
use bridge_ops::{
    Activation, ExpertOffsets, ExpertOrder, GroupScore, Int, Ops, Param, RouterGroups, RouterScore,
    RouterSpec, SwigluClamp, Tape, ValidTokens, Var, activation, add, clamped_swiglu,
    gated_activation, grouped_linear, grouped_linear_pair, linear_f32, permute, reshape, route,
    route_to, scale_rows, unpermute,
};
use bridge_parallel::{ExpertParallel, TensorRegion};
use burn::tensor::{Int as IntKind, Tensor, TensorPrimitive};

use super::mlp::activation_op;
use super::{Linear, Mlp};
use crate::auxiliary::RouterAtWork;
use crate::context::ForwardContext;
use crate::error::Result;
use crate::weights::ParamBuilder;

/// A router, its experts, and the expert that works on every token, if there is one.
#[derive(Debug, Clone)]
pub struct Moe<B: Ops> {
    name: String,
    router: Linear<B>,
    /// `[experts]`. Sways the choice alone; moved by a rule of its own, never by the optimizer.
    correction_bias: Option<Param<B>>,
    spec: RouterSpec,
    experts: Experts<B>,
    shared_expert: Option<Mlp<B>>,
    shared_expert_gate: Option<Linear<B>>,
    num_experts: usize,
    /// Into how many parts a rank's sequences are cut, and which of them is here (sequence parallelism).
    sequence_part: [usize; 2],
    /// The region to enter and leave, where all its ranks have the same tokens.
    region: TensorRegion<B>,
    expert_parallel: ExpertParallel<B>,
}

/// The routed experts of one layer, their matrices stacked.
#[derive(Debug, Clone)]
pub struct Experts<B: Ops> {
    gate_proj: Option<GroupedLinear<B>>,
    up_proj: GroupedLinear<B>,
    down_proj: GroupedLinear<B>,
    activation: ExpertActivation,
}

#[derive(Debug, Clone, Copy)]
enum ExpertActivation {
    Plain(Activation),
    Clamped(SwigluClamp),
}

/// One linear layer per expert.
#[derive(Debug, Clone)]
pub struct GroupedLinear<B: Ops> {
    /// `[experts, out_features, in_features]`.
    pub weight: Param<B>,
    /// `[experts, out_features]`.
    pub bias: Option<Param<B>>,
    /// Whether this rank adds the bias: one of those that share an expert does where their outputs are summed.
    adds_bias: bool,
}

impl<B: Ops> Moe<B> {
    /// The mixture of experts called `name`.
    ///
    /// # Errors
    /// If the weights' source fails.
    pub fn build(
        params: &mut ParamBuilder<'_, B>,
        name: &str,
        config: &DecoderConfig,
        moe: &MoeConfig,
    ) -> Result<Self> {
        let hidden = config.hidden_size;
        let router_name = format!("{name}.router");
        let shape = [moe.num_experts, hidden];
        // Each rank of a tensor-parallel group minds its own tokens, also where all of them have all tokens.
        let inside = &mut params.inside();
        let router = if moe.router.correction_bias {
            // Between scores this close even the rounding of a weight decides; the published models keep these in fp32.
            Linear::build(
                &mut inside.in_full_precision(),
                &router_name,
                shape,
                moe.router.bias,
            )?
        } else {
            Linear::build(inside, &router_name, shape, moe.router.bias)?
        };
        let correction_bias = if moe.router.correction_bias {
            let name = format!("{router_name}.correction_bias");
            // Its steps are too small for less than fp32.
            let bias = params
                .in_full_precision()
                .param(&name, &[moe.num_experts])?;
            bias.set_requires_grad(false);
            Some(bias)
        } else {
            None
        };
        let experts = Experts::build(params, &format!("{name}.experts"), config, moe)?;
        let shared_expert = match moe.shared_intermediate_size {
            Some(inner) => {
                let name = format!("{name}.shared_expert");
                Some(Mlp::build(params, &name, config, inner)?)
            }
            None => None,
        };
        let shared_expert_gate = if moe.shared_expert_gate {
            let name = format!("{name}.shared_expert_gate");
            Some(Linear::build(params, &name, [1, hidden], false)?)
        } else {
            None
        };
        Ok(Self {
            name: name.to_owned(),
            router,
            correction_bias,
            spec: router_spec(&moe.router, moe.num_experts_per_tok),
            experts,
            shared_expert,
            shared_expert_gate,
            num_experts: moe.num_experts,
            sequence_part: match params.region() {
                region if region.is_sequence_parallel() => [
                    region.size(),
                    region.group().map_or(0, |group| group.rank()),
                ],
                _ => [1, 0],
            },
            region: match params.region() {
                region if region.is_sequence_parallel() => TensorRegion::single(),
                region => region,
            },
            expert_parallel: params.expert_parallel(),
        })
    }

    /// `x`: `[batch, seq, hidden]` -> the same shape.
    pub fn forward(&self, tape: &Tape<B>, x: &Var<B>, ctx: &ForwardContext<'_, B>) -> Var<B> {
        let shape = x.shape();
        let hidden = shape[2];
        let parallel = &self.expert_parallel;
        let entered = self.region.enter(tape, x);
        let tokens = reshape(tape, &entered, &[shape[0] * shape[1], hidden]);
        // Close scores decide which weights a token meets, so they are computed in full precision. [tokens, experts]
        let logits = linear_f32(
            tape,
            &tokens,
            &self.router.weight,
            self.router.bias.as_ref(),
        );
        let bias = self.correction_bias.as_ref().map(Param::value);
        let mut routing = route(tape, &logits, bias, &self.spec);
        let choices = ctx.expert_choices();
        if let Some(choices) = choices.filter(|_| !self.spec.fills_up(self.num_experts)) {
            routing.experts = choices.decide(&self.name, routing.experts);
            if choices.replays() {
                routing = route_to(tape, &logits, routing.experts, &self.spec);
            }
        }
        let valid = ctx.valid_tokens(self.sequence_part);
        if let Some(valid) = &valid {
            routing.experts = without_padding::<B>(routing.experts, valid, self.num_experts);
        }
        if let Some(auxiliary) = ctx.auxiliary() {
            // Recomputation runs a layer first without a record; its losses count once.
            if tape.is_recording() {
                let router = RouterAtWork {
                    name: &self.name,
                    spec: &self.spec,
                    logits: &logits,
                    routing: &routing,
                    biased: self.correction_bias.is_some(),
                    valid: valid.as_ref(),
                    parallel,
                };
                routing.weights = auxiliary.attach(tape, &router, ctx);
            }
            // The same assignments are dropped either time.
            let count = valid.map_or(shape[0] * shape[1], |valid| valid.count);
            routing.experts = auxiliary.within_capacity(&routing, count, self.num_experts);
        }
        let experts = parallel.own_assignments(routing.experts, self.num_experts);
        let order = ExpertOrder::new(experts, self.num_experts);
        let rows = permute(tape, &tokens, &order); // [tokens * k, hidden]
        let rows = parallel.dispatch(tape, &rows, order.offsets(), |rows, offsets| {
            self.experts.forward(tape, rows, offsets)
        });
        let y = unpermute(tape, &rows, &routing.weights, &order);
        let y = self.region.leave(tape, &reshape(tape, &y, &shape));
        match &self.shared_expert {
            Some(shared) => add(tape, &y, &self.shared(tape, x, shared)),
            None => y,
        }
    }

    fn shared(&self, tape: &Tape<B>, x: &Var<B>, expert: &Mlp<B>) -> Var<B> {
        let y = expert.forward(tape, x);
        match &self.shared_expert_gate {
            Some(gate) => {
                let gate = activation(tape, &gate.forward(tape, x), Activation::Sigmoid);
                scale_rows(tape, &y, &gate)
            }
            None => y,
        }
    }

    /// Hands each linear layer to `visit`, in the order of their canonical names.
    pub fn visit_linears(&mut self, visit: &mut dyn FnMut(&mut Linear<B>)) {
        // The router scores in fp32 past its layer's own product, and experts' matrices are stacked.
        if let Some(shared) = &mut self.shared_expert {
            shared.visit_linears(visit);
        }
        if let Some(gate) = &mut self.shared_expert_gate {
            visit(gate);
        }
    }

    /// Appends the weights, in the order of their canonical names.
    pub fn collect(&self, params: &mut Vec<Param<B>>) {
        self.router.collect(params);
        params.extend(self.correction_bias.clone());
        self.experts.collect(params);
        if let Some(shared) = &self.shared_expert {
            shared.collect(params);
        }
        if let Some(gate) = &self.shared_expert_gate {
            gate.collect(params);
        }
    }
}

impl<B: Ops> Experts<B> {
    fn build(
        params: &mut ParamBuilder<'_, B>,
        name: &str,
        config: &DecoderConfig,
        moe: &MoeConfig,
    ) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, moe.intermediate_size);
        let mut project = |proj: &str, shape: [usize; 2]| {
            GroupedLinear::build(params, &format!("{name}.{proj}_proj"), shape, moe)
        };
        Ok(Self {
            gate_proj: if config.gated_mlp {
                Some(project("gate", [inner, hidden])?)
            } else {
                None
            },
            up_proj: project("up", [inner, hidden])?,
            down_proj: project("down", [hidden, inner])?,
            activation: match moe.clamped_swiglu {
                None => ExpertActivation::Plain(activation_op(config.activation)),
                Some(clamp) => ExpertActivation::Clamped(SwigluClamp {
                    alpha: clamp.alpha,
                    limit: clamp.limit,
                }),
            },
        })
    }

    /// Each expert's output for its rows. `rows`: `[rows, hidden]`, sorted by expert -> the same shape.
    pub fn forward(&self, tape: &Tape<B>, rows: &Var<B>, offsets: &ExpertOffsets<B>) -> Var<B> {
        // [rows, intermediate] each
        let (gate, up) = match &self.gate_proj {
            Some(gate_proj) => {
                let weights = [&gate_proj.weight, &self.up_proj.weight];
                let biases = [gate_proj.bias(), self.up_proj.bias()];
                let [gate, up] = grouped_linear_pair(tape, rows, weights, biases, offsets);
                (Some(gate), up)
            }
            None => (None, self.up_proj.forward(tape, rows, offsets)),
        };
        let inner = match (gate, self.activation) {
            (Some(gate), ExpertActivation::Plain(act)) => gated_activation(tape, &gate, &up, act),
            (Some(gate), ExpertActivation::Clamped(clamp)) => {
                clamped_swiglu(tape, &gate, &up, clamp)
            }
            (None, ExpertActivation::Plain(act)) => activation(tape, &up, act),
            (None, ExpertActivation::Clamped(_)) => {
                unreachable!("a config with a clamped SwiGLU has gates")
            }
        };
        self.down_proj.forward(tape, &inner, offsets)
    }

    fn collect(&self, params: &mut Vec<Param<B>>) {
        let projections = [&self.up_proj, &self.down_proj];
        for projection in self.gate_proj.iter().chain(projections) {
            params.push(projection.weight.clone());
            params.extend(projection.bias.clone());
        }
    }
}

impl<B: Ops> GroupedLinear<B> {
    fn build(
        params: &mut ParamBuilder<'_, B>,
        name: &str,
        [out_features, in_features]: [usize; 2],
        moe: &MoeConfig,
    ) -> Result<Self> {
        let experts = moe.num_experts;
        let weight = params.param(
            &format!("{name}.weight"),
            &[experts, out_features, in_features],
        )?;
        let bias = if moe.expert_projection_bias {
            Some(params.param(&format!("{name}.bias"), &[experts, out_features])?)
        } else {
            None
        };
        let summed = weight.shape()[2] != in_features;
        Ok(Self {
            adds_bias: !summed || params.expert_parallel().adds_output_bias(),
            weight,
            bias,
        })
    }

    /// `rows`: `[rows, in_features]`, sorted by expert -> `[rows, out_features]`.
    pub fn forward(&self, tape: &Tape<B>, rows: &Var<B>, offsets: &ExpertOffsets<B>) -> Var<B> {
        grouped_linear(tape, rows, &self.weight, self.bias(), offsets)
    }

    /// The bias, if this rank adds it.
    fn bias(&self) -> Option<&Param<B>> {
        self.bias.as_ref().filter(|_| self.adds_bias)
    }
}

/// Assignments with `num_experts`, which is none, in the place of those of padding. experts: [tokens, k].
fn without_padding<B: Ops>(experts: Int<B>, valid: &ValidTokens<B>, num_experts: usize) -> Int<B> {
    let experts = Tensor::<B, 2, IntKind>::from_primitive(experts);
    let padding = Tensor::<B, 1>::from_primitive(TensorPrimitive::Float(valid.mask.clone()));
    let padding = padding
        .equal_elem(0.0)
        .unsqueeze_dim::<2>(1)
        .expand(experts.dims());
    experts
        .mask_fill(padding, num_experts as i64)
        .into_primitive()
}

fn router_spec(router: &RouterConfig, top_k: usize) -> RouterSpec {
    RouterSpec {
        top_k,
        score: match router.score {
            RouterScoring::Softmax => RouterScore::Softmax,
            RouterScoring::Sigmoid => RouterScore::Sigmoid,
        },
        normalize: router.normalize,
        scale: router.scaling_factor,
        groups: router.groups.as_ref().map(|groups| RouterGroups {
            groups: groups.n_group,
            top_groups: groups.topk_group,
            score: match groups.score {
                GroupScoring::Max => GroupScore::Max,
                GroupScoring::SumOfTopTwo => GroupScore::SumOfTopTwo,
            },
        }),
    }
}
