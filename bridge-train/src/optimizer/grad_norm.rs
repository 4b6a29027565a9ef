//! The global norm of a gradient.

use bridge_ops::{Float, Ops, Param, to_f32_vec};

/// The 2-norm of the gradients of all `params` together, as if they were one vector. Parameters without a gradient count
/// as zero. Waits for the device.
pub fn grad_norm<B: Ops>(params: &[Param<B>]) -> f64 {
    sum_of_squares::<B>(params.iter().filter_map(Param::grad)).sqrt()
}

/// The sum of the squares of the elements of all tensors. Waits for the device.
pub(super) fn sum_of_squares<B: Ops>(tensors: impl Iterator<Item = Float<B>>) -> f64 {
    let tensors: Vec<Float<B>> = tensors.collect();
    if tensors.is_empty() {
        return 0.0;
    }
    // Summed on the device, so that the host waits once and not once per parameter.
    let squares = to_f32_vec::<B>(B::sum_squares_many(tensors));
    squares.into_iter().map(f64::from).sum()
}

/// What a gradient of norm `norm` is multiplied by so that its norm becomes at most `clip`: `min(1, clip / (norm + 1e-6))`,
/// as in `torch.nn.utils.clip_grad_norm_`. A `clip` of 0 disables.
pub fn clip_coefficient(norm: f64, clip: f64) -> f64 {
    if clip > 0.0 {
        (clip / (norm + 1e-6)).min(1.0)
    } else {
        1.0
    }
}

/// The names of the parameters whose gradient holds a NaN or an infinity, at most `limit` of them.
pub fn non_finite_gradients<B: Ops>(params: &[Param<B>], limit: usize) -> Vec<String> {
    let holds_non_finite = |p: &&Param<B>| {
        p.grad()
            .is_some_and(|g| to_f32_vec::<B>(g).iter().any(|x| !x.is_finite()))
    };
    params
        .iter()
        .filter(holds_non_finite)
        .take(limit)
        .map(|p| p.name().to_owned())
        .collect()
}
