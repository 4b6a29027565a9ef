//! Times of what recurrent layers do besides products with weights, at 8192 tokens of Nemotron-H 8B and Qwen3-Next 80B. Bytes
//! are those of the operands and results, so that a rate below that of a copy is what the pass costs more than its floor.

use bridge_cuda::{Cuda, CudaTensor};
use bridge_ops::{ConvSpec, DeltaRuleInputs, GatedNormSpec, Ops, ScanSpec, SsdInputs};
use burn_backend::{FloatDType, TensorMetadata};

use super::Bench;

/// Bytes of tensors that a pass reads or writes.
fn bytes(tensors: &[&CudaTensor]) -> f64 {
    tensors
        .iter()
        .map(|x| (x.shape().num_elements() * x.dtype().size()) as f64)
        .sum()
}

pub(super) fn run(b: &Bench) {
    scan(b);
    delta_rule(b);
    convolution(b);
    norms(b);
}

/// fp32 numbers in -1..0 times `factor`.
fn decays(b: &Bench, shape: &[usize], factor: f64) -> CudaTensor {
    let x = b.random(shape, FloatDType::F32);
    let squares = Cuda::mul(x.clone(), x);
    Cuda::scale(squares, factor)
}

fn scan(b: &Bench) {
    for (batch, seq) in [(1, 8192), (2, 4096)] {
        let name = format!("recurrent ssd_scan b{batch} s{seq} 128x64 8x128");
        if !b.wanted(&name) {
            continue;
        }
        let (x, group) = ([batch, seq, 128, 64], [batch, seq, 8, 128]);
        let inputs = SsdInputs {
            x: b.bf16(&x),
            dt: decays(b, &x[..3], 0.1),
            log_decay: decays(b, &x[..3], -0.05),
            b: b.bf16(&group),
            c: b.bf16(&group),
        };
        let skip = Some(b.random(&[128], FloatDType::F32));
        let (dy, spec) = (b.bf16(&x), ScanSpec::new(128));
        let once = bytes(&[
            &inputs.x,
            &inputs.dt,
            &inputs.log_decay,
            &inputs.b,
            &inputs.c,
        ]);
        b.time(
            &format!("{name} forward"),
            "B",
            once + bytes(&[&dy]),
            || {
                Cuda::ssd_scan_forward(inputs.clone(), skip.clone(), None, &spec);
            },
        );
        b.time(
            &format!("{name} backward"),
            "B",
            2.0 * once + bytes(&[&dy]),
            || {
                Cuda::ssd_scan_backward(inputs.clone(), skip.clone(), dy.clone(), &spec);
            },
        );
    }
}

fn delta_rule(b: &Bench) {
    for (batch, seq) in [(1, 8192), (2, 4096)] {
        let name = format!("recurrent delta_rule b{batch} s{seq} 32x128 16x128");
        if !b.wanted(&name) {
            continue;
        }
        let (keys, values) = ([batch, seq, 16, 128], [batch, seq, 32, 128]);
        let inputs = DeltaRuleInputs {
            q: Cuda::l2_norm_forward(b.bf16(&keys), 1e-6),
            k: Cuda::l2_norm_forward(b.bf16(&keys), 1e-6),
            v: b.bf16(&values),
            log_decay: decays(b, &values[..3], -0.05),
            beta: decays(b, &values[..3], 0.2),
        };
        let (dout, spec) = (b.bf16(&values), ScanSpec::new(64));
        let once = bytes(&[
            &inputs.q,
            &inputs.k,
            &inputs.v,
            &inputs.log_decay,
            &inputs.beta,
        ]);
        b.time(
            &format!("{name} forward"),
            "B",
            once + bytes(&[&dout]),
            || {
                Cuda::gated_delta_rule_forward(inputs.clone(), None, 0.088, &spec);
            },
        );
        b.time(
            &format!("{name} backward"),
            "B",
            2.0 * once + bytes(&[&dout]),
            || {
                Cuda::gated_delta_rule_backward(inputs.clone(), dout.clone(), 0.088, &spec);
            },
        );
    }
}

fn convolution(b: &Bench) {
    for channels in [8192, 1024] {
        let name = format!("recurrent conv 8192x{channels}");
        if !b.wanted(&name) {
            continue;
        }
        let (x, dy) = (b.bf16(&[1, 8192, channels]), b.bf16(&[1, 8192, channels]));
        let (weight, bias) = (b.bf16(&[channels, 4]), Some(b.bf16(&[channels])));
        let spec = ConvSpec {
            silu: true,
            documents: None,
        };
        let once = bytes(&[&x]);
        b.time(&format!("{name} forward"), "B", 2.0 * once, || {
            Cuda::causal_conv1d_forward(x.clone(), weight.clone(), bias.clone(), None, &spec);
        });
        b.time(&format!("{name} backward"), "B", 3.0 * once, || {
            Cuda::causal_conv1d_backward(
                x.clone(),
                weight.clone(),
                bias.clone(),
                dy.clone(),
                &spec,
            );
        });
    }
}

fn norms(b: &Bench) {
    for (rows, channels, group_size, gate_first) in
        [(8192, 8192, 1024, true), (8192 * 32, 128, 128, false)]
    {
        let name = format!("recurrent gated_norm {rows}x{channels} by {group_size}");
        if !b.wanted(&name) {
            continue;
        }
        let [x, gate, dy] = [0; 3].map(|_| b.bf16(&[rows, channels]));
        let weight = b.bf16(&[channels]);
        let spec = GatedNormSpec {
            eps: 1e-5,
            group_size,
            gate_first,
        };
        let once = bytes(&[&x]);
        b.time(&format!("{name} forward"), "B", 3.0 * once, || {
            Cuda::gated_rms_norm_forward(x.clone(), gate.clone(), weight.clone(), spec);
        });
        b.time(&format!("{name} backward"), "B", 5.0 * once, || {
            Cuda::gated_rms_norm_backward(
                x.clone(),
                gate.clone(),
                weight.clone(),
                dy.clone(),
                spec,
            );
        });
    }
    if b.wanted("recurrent l2_norm") {
        let (x, dy) = (b.bf16(&[8192 * 16, 128]), b.bf16(&[8192 * 16, 128]));
        let once = bytes(&[&x]);
        b.time("recurrent l2_norm forward", "B", 2.0 * once, || {
            Cuda::l2_norm_forward(x.clone(), 1e-6);
        });
        b.time("recurrent l2_norm backward", "B", 3.0 * once, || {
            Cuda::l2_norm_backward(x.clone(), dy.clone(), 1e-6);
        });
    }
    if b.wanted("recurrent time_step") {
        let (x, bias) = (b.bf16(&[8192, 128]), b.bf16(&[128]));
        let dy = b.random(&[8192, 128], FloatDType::F32);
        b.time(
            "recurrent time_step forward",
            "B",
            bytes(&[&x, &dy]),
            || {
                Cuda::time_step_forward(x.clone(), bias.clone(), 0.001);
            },
        );
        b.time(
            "recurrent time_step backward",
            "B",
            bytes(&[&x, &x, &dy]),
            || {
                Cuda::time_step_backward(x.clone(), bias.clone(), dy.clone(), 0.001);
            },
        );
    }
}
