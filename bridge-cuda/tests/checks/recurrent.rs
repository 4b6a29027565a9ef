//! The kernels of recurrent layers: Mamba-2, the gated delta net.

use std::sync::Arc;

use bridge_ops::{
    ConvSpec, DType, DeltaRuleInputs, Float, GatedNormSpec, Ops, ScanSpec, SsdInputs,
};

use super::{Context, Group, group, numbers};

const FLOATS: &[DType] = &[DType::F32, DType::BF16, DType::F16];

pub(crate) fn groups() -> Vec<Group> {
    vec![
        group!(ssd_scan, FLOATS),
        group!(gated_delta_rule, FLOATS),
        group!(causal_conv1d, FLOATS),
        group!(gated_rms_norm, FLOATS),
        group!(l2_norm, FLOATS),
        group!(time_step, FLOATS),
    ]
}

/// fp32 numbers from `low` to `high`.
fn between<B: Ops>(c: &Context<B>, seed: u64, shape: &[usize], low: f32, high: f32) -> Float<B> {
    let values: Vec<f32> = numbers(seed, shape.iter().product())
        .iter()
        .map(|x| low + (x + 2.0) / 4.0 * (high - low))
        .collect();
    bridge_ops::float_from_f32::<B>(&values, shape, &c.device)
}

fn documents(offsets: &[usize]) -> Option<Arc<[usize]>> {
    (!offsets.is_empty()).then(|| offsets.into())
}

fn ssd_scan<B: Ops>(c: &mut Context<B>) {
    // Sizes of Nemotron-H 8B with fewer heads, those of the fixtures, and odd ones; lengths that no chunk divides.
    let packed: &[usize] = &[0, 7, 7, 150, 200];
    for (seed, [batch, seq, heads, groups, head_dim, state], chunk, offsets) in [
        (400, [1, 200, 4, 2, 64, 128], 128, [].as_slice()),
        (401, [2, 33, 8, 2, 12, 16], 16, &[]),
        (402, [2, 100, 3, 1, 20, 24], 64, packed),
        (403, [1, 1, 2, 1, 64, 128], 128, &[]),
        (404, [1, 70, 2, 2, 5, 7], 256, &[]),
    ] {
        let x = [batch, seq, heads, head_dim];
        let group = [batch, seq, groups, state];
        let inputs = SsdInputs {
            x: c.float(seed, &x),
            dt: between(c, seed + 10, &x[..3], 0.01, 0.5),
            log_decay: between(c, seed + 20, &x[..3], -0.4, -0.01),
            b: B::scale(c.float(seed + 30, &group), 0.25),
            c: B::scale(c.float(seed + 40, &group), 0.25),
        };
        let skip = Some(c.float32(seed + 50, &[heads]));
        let spec = ScanSpec::new(chunk).with_documents(documents(offsets));
        let (y, last) = B::ssd_scan_forward(inputs.clone(), skip.clone(), None, &spec);
        c.push("y", y);
        c.push("state", last.clone());
        if offsets.is_empty() {
            let (y, last) = B::ssd_scan_forward(inputs.clone(), None, Some(last), &spec);
            c.push("y from a state", y);
            c.push("state from a state", last);
        }
        let dy = c.float(seed + 60, &x);
        let (grads, dskip) = B::ssd_scan_backward(inputs.clone(), skip, dy.clone(), &spec);
        c.push("dx", grads.x);
        c.push("ddt", grads.dt);
        c.push("dlog_decay", grads.log_decay);
        c.push("db", grads.b);
        c.push("dc", grads.c);
        c.push("dskip", dskip.expect("there is a skip connection"));
        let (grads, _) = B::ssd_scan_backward(inputs, None, dy, &spec);
        c.push("dx without skip", grads.x);
    }
}

fn gated_delta_rule<B: Ops>(c: &mut Context<B>) {
    // Sizes of Qwen3-Next 80B with fewer heads, those of the fixture, and odd ones.
    let packed: &[usize] = &[0, 7, 7, 150, 200];
    for (seed, [batch, seq, heads, key_heads, key_dim, value_dim], offsets) in [
        (500, [1, 200, 4, 2, 128, 128], [].as_slice()),
        (501, [2, 33, 4, 2, 8, 12], &[]),
        (502, [2, 100, 2, 2, 24, 40], packed),
        (503, [1, 1, 2, 1, 128, 128], &[]),
        (504, [1, 70, 3, 1, 5, 7], &[]),
    ] {
        let keys = [batch, seq, key_heads, key_dim];
        let values = [batch, seq, heads, value_dim];
        let inputs = DeltaRuleInputs {
            q: B::l2_norm_forward(c.float(seed, &keys), 1e-6),
            k: B::l2_norm_forward(c.float(seed + 10, &keys), 1e-6),
            v: c.float(seed + 20, &values),
            log_decay: between(c, seed + 30, &values[..3], -0.3, -0.01),
            beta: between(c, seed + 40, &values[..3], 0.1, 0.9),
        };
        // Lengths of one are rounded to the dtype on the GPU alone, so both sides get the rounded ones.
        let rounded = |x: Float<B>| B::cast(B::cast(x, c.precision()), c.dtype);
        let inputs = DeltaRuleInputs {
            q: rounded(inputs.q),
            k: rounded(inputs.k),
            ..inputs
        };
        let scale = (key_dim as f64).sqrt().recip();
        let spec = ScanSpec::new(64).with_documents(documents(offsets));
        let (o, last) = B::gated_delta_rule_forward(inputs.clone(), None, scale, &spec);
        c.push("o", o);
        c.push("state", last.clone());
        if offsets.is_empty() {
            let (o, last) = B::gated_delta_rule_forward(inputs.clone(), Some(last), scale, &spec);
            c.push("o from a state", o);
            c.push("state from a state", last);
        }
        let dout = c.float(seed + 50, &values);
        let grads = B::gated_delta_rule_backward(inputs, dout, scale, &spec);
        c.push("dq", grads.q);
        c.push("dk", grads.k);
        c.push("dv", grads.v);
        c.push("dlog_decay", grads.log_decay);
        c.push("dbeta", grads.beta);
    }
}

fn causal_conv1d<B: Ops>(c: &mut Context<B>) {
    for (seed, [batch, seq, channels, taps], silu, offsets) in [
        (600, [2, 150, 64, 4], true, [].as_slice()),
        (601, [1, 70, 13, 4], true, &[0, 2, 7, 68, 70]),
        (602, [2, 5, 12, 3], false, &[]),
        (603, [1, 2, 7, 4], true, &[]),
        (604, [1, 9, 8, 12], true, &[]),
    ] {
        let spec = ConvSpec {
            silu,
            documents: documents(offsets),
        };
        let x = c.float(seed, &[batch, seq, channels]);
        let (weight, bias) = (
            c.float(seed + 10, &[channels, taps]),
            c.float(seed + 20, &[channels]),
        );
        let (bias, dy) = (Some(bias), c.float(seed + 30, &[batch, seq, channels]));
        let forward = |bias, history| {
            B::causal_conv1d_forward(x.clone(), weight.clone(), bias, history, &spec)
        };
        let plain = forward(None, None);
        let biased = forward(bias.clone(), None);
        if offsets.is_empty() {
            let history = c.float(seed + 40, &[batch, taps - 1, channels]);
            let continued = forward(bias.clone(), Some(history));
            c.push("y after a history", continued);
        }
        c.push("y", plain);
        c.push("y with bias", biased);
        let grads = B::causal_conv1d_backward(x, weight, bias, dy, &spec);
        c.push("dx", grads.dx);
        c.push("dweight", grads.dweight);
        c.push("dbias", grads.dbias);
    }
}

fn gated_rms_norm<B: Ops>(c: &mut Context<B>) {
    for (seed, rows, channels, group_size) in [
        (700, 9, 2048, 1024),
        (701, 300, 128, 128),
        (702, 13, 21, 7),
        (703, 2, 9000, 9000),
        (704, 5, 96, 48),
    ] {
        for gate_first in [true, false] {
            let spec = GatedNormSpec {
                eps: 1e-5,
                group_size,
                gate_first,
            };
            let [x, gate, dy] = [0, 10, 20].map(|i| c.float(seed + i, &[1, rows, channels]));
            let weight = c.float(seed + 30, &[channels]);
            let y = B::gated_rms_norm_forward(x.clone(), gate.clone(), weight.clone(), spec);
            c.push("y", y);
            let grads = B::gated_rms_norm_backward(x, gate, weight, dy, spec);
            c.push("dx", grads.dx);
            c.push("dgate", grads.dgate);
            c.push("dweight", grads.dweight);
        }
    }
}

fn l2_norm<B: Ops>(c: &mut Context<B>) {
    for (seed, rows, n) in [(800, 300, 128), (801, 7, 37), (802, 5, 8), (803, 2, 5001)] {
        let (x, dy) = (
            c.float(seed, &[2, rows, n]),
            c.float(seed + 10, &[2, rows, n]),
        );
        c.push("y", B::l2_norm_forward(x.clone(), 1e-6));
        c.push("dx", B::l2_norm_backward(x, dy, 1e-6));
    }
}

fn time_step<B: Ops>(c: &mut Context<B>) {
    for (seed, rows, heads) in [(900, 300, 128), (901, 7, 5), (902, 65, 33)] {
        let (x, bias) = (
            c.float(seed, &[1, rows, heads]),
            c.float(seed + 10, &[heads]),
        );
        let a_log = c.float(seed + 20, &[heads]);
        let dy = c.float32(seed + 30, &[1, rows, heads]);
        let dt = B::time_step_forward(x.clone(), bias.clone(), 0.1);
        c.push("dt", dt);
        let (dx, dbias) = B::time_step_backward(x, bias, dy.clone(), 0.1);
        c.push("dx", dx);
        c.push("dbias", dbias);
        let dt = between(c, seed + 40, &[1, rows, heads], 0.1, 2.0);
        c.push("log_decay", B::log_decay_forward(dt.clone(), a_log.clone()));
        let (ddt, da_log) = B::log_decay_backward(dt, a_log, dy);
        c.push("ddt", ddt);
        c.push("da_log", da_log);
    }
}
