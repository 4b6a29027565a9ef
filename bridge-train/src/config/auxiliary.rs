//! Losses besides that of the next token: defaults from the model's own config, and what must hold between the keys.

use bridge_models::{AuxiliaryOptions, BalanceScope, Capacity};
use bridge_ops::DropPolicy;
use serde_json::{Map, Value};

use super::model::ModelConfig;
use super::section::Problems;
use super::{LoadBalancing, ResolvedConfig, TokenDropPolicy, TrainConfig};

/// A coefficient from which on a config.json's word is no default. gpt-oss's says 0.9, the default of its class in
/// transformers, at which balance would be all that a router learns; the original trains that model without.
const IMPLAUSIBLE: f64 = 0.1;

/// The balance loss that a `config.json` says its model was trained with.
fn published(json: &Map<String, Value>) -> Option<(LoadBalancing, f64)> {
    let number = |key: &str| json.get(key).and_then(Value::as_f64);
    let found = match (number("router_aux_loss_coef"), number("aux_loss_alpha")) {
        (Some(coefficient), _) => (LoadBalancing::AuxLoss, coefficient),
        (None, Some(alpha)) => {
            let per_sequence = json.get("seq_aux").and_then(Value::as_bool).unwrap_or(true);
            let kind = if per_sequence {
                LoadBalancing::SeqAuxLoss
            } else {
                LoadBalancing::AuxLoss
            };
            (kind, alpha)
        }
        (None, None) => return None,
    };
    Some(found).filter(|(_, coefficient)| (0.0..IMPLAUSIBLE).contains(coefficient))
}

/// Fills in the balance loss of a model with routers.
pub(super) fn complete(train: &mut TrainConfig, model: &ModelConfig) {
    if model.decoder.moe.is_none() {
        return;
    }
    let published = published(model.hf_config.json());
    let kind = *train.moe_router_load_balancing_type.get_or_insert(
        match (train.moe_aux_loss_coeff, published) {
            (_, Some((kind, _))) => kind,
            (Some(_), None) => LoadBalancing::AuxLoss,
            (None, None) => LoadBalancing::None,
        },
    );
    if kind == LoadBalancing::None {
        train.moe_aux_loss_coeff.get_or_insert(0.0);
    } else if let Some((_, coefficient)) = published {
        train.moe_aux_loss_coeff.get_or_insert(coefficient);
    }
}

pub(super) fn check(train: &TrainConfig, model: &ModelConfig, problems: &mut Problems) {
    for (key, value) in [
        (
            "train.moe_aux_loss_coeff",
            train.moe_aux_loss_coeff.unwrap_or_default(),
        ),
        ("train.moe_z_loss_coeff", train.moe_z_loss_coeff),
        (
            "train.moe_router_bias_update_rate",
            train.moe_router_bias_update_rate,
        ),
        (
            "train.mtp_loss_scaling_factor",
            train.mtp_loss_scaling_factor,
        ),
    ] {
        problems.require(value >= 0.0, key, || {
            format!("is {value}, expected 0 or more")
        });
    }
    if model.decoder.moe.is_none() {
        for (key, given) in [
            (
                "train.moe_router_load_balancing_type",
                !matches!(
                    train.moe_router_load_balancing_type,
                    None | Some(LoadBalancing::None)
                ),
            ),
            (
                "train.moe_aux_loss_coeff",
                train.moe_aux_loss_coeff.is_some_and(|c| c != 0.0),
            ),
            ("train.moe_z_loss_coeff", train.moe_z_loss_coeff != 0.0),
            (
                "train.moe_expert_capacity_factor",
                train.moe_expert_capacity_factor.is_some(),
            ),
        ] {
            problems.require(!given, key, || {
                "is about a mixture of experts, which this model does not have; remove it".into()
            });
        }
        return;
    }
    let kind = train.moe_router_load_balancing_type;
    match (kind, train.moe_aux_loss_coeff) {
        (None | Some(LoadBalancing::None), Some(coefficient)) if coefficient != 0.0 => problems.add(
            "train.moe_aux_loss_coeff",
            format!(
                "is {coefficient}, but train.moe_router_load_balancing_type is none; choose {}",
                LoadBalancing::NAMES[1..].join(", ")
            ),
        ),
        (Some(kind), None) if kind != LoadBalancing::None => problems.add(
            "train.moe_aux_loss_coeff",
            format!(
                "must be set for train.moe_router_load_balancing_type = \"{kind}\": the model's config.json names no \
                 coefficient; 1e-3 is usual"
            ),
        ),
        _ => {}
    }
    let factor = train.moe_expert_capacity_factor;
    problems.require(
        factor.is_none_or(|factor| factor > 0.0),
        "train.moe_expert_capacity_factor",
        || "must be more than 0; leave it out for no limit".into(),
    );
}

impl ResolvedConfig {
    /// The losses besides that of the next token that this model trains with.
    pub fn auxiliary_options(&self) -> AuxiliaryOptions {
        let (train, decoder) = (&self.train, &self.model.decoder);
        let mtp = match decoder.num_mtp_layers {
            0 => 0.0,
            _ => train.mtp_loss_scaling_factor,
        };
        let none = AuxiliaryOptions {
            mtp,
            ..AuxiliaryOptions::default()
        };
        let Some(moe) = &decoder.moe else {
            return none;
        };
        let kind = train.moe_router_load_balancing_type;
        let coefficient = match kind {
            None | Some(LoadBalancing::None) => 0.0,
            Some(_) => train.moe_aux_loss_coeff.unwrap_or_default(),
        };
        AuxiliaryOptions {
            balance: coefficient,
            scope: match kind {
                Some(LoadBalancing::SeqAuxLoss) => BalanceScope::Sequence,
                Some(LoadBalancing::GlobalAuxLoss) => BalanceScope::Step,
                _ => BalanceScope::MicroBatch,
            },
            router_z: train.moe_z_loss_coeff,
            bias_update_rate: if moe.router.correction_bias {
                train.moe_router_bias_update_rate
            } else {
                0.0
            },
            capacity: train.moe_expert_capacity_factor.map(|factor| Capacity {
                factor,
                policy: match train.moe_token_drop_policy {
                    TokenDropPolicy::Probs => DropPolicy::Weight,
                    TokenDropPolicy::Position => DropPolicy::Position,
                },
            }),
            ..none
        }
    }
}
