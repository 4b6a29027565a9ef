//! Routers. Kernels: `kernels/router.cu`.

use bridge_ops::{GroupScore, RouterGroups, RouterOutput, RouterScore, RouterSpec, portable};
use burn_backend::{DType, TensorMetadata};

use crate::backend::Cuda;
use crate::device::{Gpu, Launch, launch};
use crate::elementwise::{cast, type_name};
use crate::error::OrPanic;
use crate::nvrtc::Kernel;
use crate::tensor::CudaTensor;

/// Tokens of a block; `WARPS` of the kernel file.
const TOKENS: usize = 4;
/// Most experts per token, and most groups: a lane of a warp for each.
const LANES: usize = 32;
/// Most experts: a lane holds the scores of every 32nd.
const MOST_EXPERTS: usize = 1024;

/// Whether the kernels take a rule. What they leave to the portable body are experts from outside the groups that are
/// searched, which no published model asks for, and sizes beyond all of them.
fn covers(spec: &RouterSpec, experts: usize) -> bool {
    let groups = spec.groups.map_or(0, |rule| rule.groups);
    spec.top_k <= LANES && groups <= LANES && experts <= MOST_EXPERTS && !spec.fills_up(experts)
}

fn kernel(
    gpu: &Gpu,
    [logits, experts]: [DType; 2],
    count: usize,
    spec: &RouterSpec,
    entry: &'static str,
) -> Kernel {
    let flag = |on: bool| if on { "1" } else { "0" };
    let values = count.div_ceil(LANES).to_string();
    let (groups, top_groups, sum_of_two) = match spec.groups {
        Some(RouterGroups {
            groups,
            top_groups,
            score,
        }) => (groups, top_groups, score == GroupScore::SumOfTopTwo),
        None => (0, 0, false),
    };
    let (groups, top_groups) = (groups.to_string(), top_groups.to_string());
    let defines = [
        ("TYPE", type_name(logits)),
        ("INDEX", type_name(experts)),
        ("VALUES", values.as_str()),
        ("SIGMOID", flag(spec.score == RouterScore::Sigmoid)),
        ("NORMALIZE", flag(spec.normalize)),
        ("GROUPS", groups.as_str()),
        ("TOP_GROUPS", top_groups.as_str()),
        ("SUM_OF_TWO", flag(sum_of_two)),
    ];
    gpu.kernel("router", &defines, entry).or_panic()
}

pub(in super::super) fn forward(
    logits: CudaTensor,
    correction_bias: Option<CudaTensor>,
    spec: &RouterSpec,
) -> RouterOutput<Cuda> {
    let (tokens, count) = (logits.dims()[0], logits.dims()[1]);
    if !covers(spec, count) {
        return portable::router_forward::<Cuda>(logits, correction_bias, spec);
    }
    let logits = logits.into_packed();
    let bias = correction_bias.map(|bias| cast(bias, DType::F32).into_packed());
    let gpu = logits.gpu();
    let shape = [tokens, spec.top_k];
    let weights = CudaTensor::empty(gpu, &shape, DType::F32);
    let experts = CudaTensor::empty(gpu, &shape, DType::I32);
    let kernel = kernel(gpu, [logits.dtype(), DType::I32], count, spec, "forward");
    let launch = Launch::linear(tokens.div_ceil(TOKENS), TOKENS as u32 * 32);
    let bias = bias.as_ref().map_or(0, CudaTensor::address);
    // SAFETY: packed operands of the shapes given; a warp per token.
    unsafe {
        launch!(gpu, kernel, launch; weights.address(), experts.address(), logits.address(), bias, tokens as i64,
            count as i32, spec.top_k as i32, spec.scale as f32)
        .or_panic();
    }
    RouterOutput { weights, experts }
}

pub(in super::super) fn backward(
    logits: CudaTensor,
    experts: CudaTensor,
    dweights: CudaTensor,
    spec: &RouterSpec,
) -> CudaTensor {
    let (tokens, count) = (logits.dims()[0], logits.dims()[1]);
    if spec.top_k > LANES || count > MOST_EXPERTS {
        return portable::router_backward::<Cuda>(logits, experts, dweights, spec);
    }
    let (logits, experts) = (logits.into_packed(), experts.into_packed());
    let dweights = cast(dweights, DType::F32).into_packed();
    let gpu = logits.gpu();
    let dlogits = CudaTensor::empty(gpu, &[tokens, count], logits.dtype());
    // The choice is over, and with it the groups.
    let ungrouped = RouterSpec {
        groups: None,
        ..*spec
    };
    let dtypes = [logits.dtype(), experts.dtype()];
    let kernel = kernel(gpu, dtypes, count, &ungrouped, "backward");
    let launch = Launch::linear(tokens.div_ceil(TOKENS), TOKENS as u32 * 32);
    // SAFETY: packed operands of the shapes given; a warp per token; experts lie in `0..count`, as the router chose them.
    unsafe {
        launch!(gpu, kernel, launch; dlogits.address(), logits.address(), experts.address(), dweights.address(),
            tokens as i64, count as i32, spec.top_k as i32, spec.scale as f32)
        .or_panic();
    }
    dlogits
}
