//! Mixture of experts, step by step, so that a parallel layout can put a collective between any two of them.
//!
//! ```text
//! logits  [tokens, E]      = x W_router^T
//! weights, experts [tokens, k] = route(logits)             who works on which token, and how much it counts
//! rows    [n, h]           = permute(x, experts)            n = tokens k rows, those of one expert side by side
//! outputs [n, h]           = expert products of the rows    grouped_linear: one product per expert
//! y       [tokens, h]      = unpermute(outputs, weights)    weighted sum over each token's k experts
//! ```
//!
//! What orders the rows is an [`ExpertOrder`]. Auxiliary losses of the router are in [`router_loss`].

mod capacity;
pub(crate) mod grouped_linear;
pub(crate) mod permute;
pub(crate) mod router;
mod router_loss;

#[cfg(test)]
mod router_loss_tests;
#[cfg(test)]
mod tests;

pub use capacity::{DropPolicy, drop_over_capacity, expert_capacity};
pub use grouped_linear::{grouped_linear, grouped_linear_pair};
pub use permute::{ExpertOffsets, ExpertOrder, SortedExperts, permute, unpermute};
pub use router::{
    GroupScore, RouterGroups, RouterOutput, RouterScore, RouterSpec, Routing, route, route_to,
};
pub use router_loss::{
    BalanceLoss, CountsAcross, RouterLossSpec, RouterLosses, ValidTokens, count_assignments,
    with_router_losses,
};
