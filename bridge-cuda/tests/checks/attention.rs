//! Attention on every path: cuDNN's, our kernel for the tensor cores, and the generic one.

use std::any::TypeId;
use std::sync::Arc;

use bridge_cuda::{AttentionPath, Cuda, Library, attention_calls, force_attention_path};
use bridge_ops::{AttentionRule, AttentionSpec, DType, Ops, float_from_f32};

use super::{Context, Group, group};

const FLOATS: &[DType] = &[DType::F32, DType::BF16, DType::F16];
const HALVES: &[DType] = &[DType::BF16, DType::F16];

pub(crate) fn groups() -> Vec<Group> {
    let mut groups = vec![
        group!(attention_small, FLOATS),
        group!(attention_rules, FLOATS),
        group!(attention_tiles, HALVES),
        group!(attention_tile_rules, HALVES),
        group!(attention_path, HALVES),
    ];
    if Library::Cudnn.load().is_ok() {
        groups.extend([
            group!(attention_cudnn, HALVES),
            group!(attention_cudnn_heads, HALVES),
            group!(attention_cudnn_rules, HALVES),
            group!(attention_cudnn_documents, HALVES),
            group!(attention_deterministic, HALVES),
        ]);
    }
    groups
}

/// While it lives, attention on the GPU takes one path. On the CPU there is none to choose.
struct Forced(bool);

impl Forced {
    fn to<B: Ops>(path: AttentionPath) -> Self {
        let on_gpu = TypeId::of::<B>() == TypeId::of::<Cuda>();
        if on_gpu {
            force_attention_path(Some(path));
        }
        Self(on_gpu)
    }
}

impl Drop for Forced {
    fn drop(&mut self) {
        if self.0 {
            force_attention_path(None);
            bridge_cuda::set_deterministic_attention(false);
        }
    }
}

/// Sizes of an attention problem: batch, queries, keys, heads, key heads, channels, value channels.
type Sizes = [usize; 7];

fn attend<B: Ops>(
    c: &mut Context<B>,
    seed: u64,
    [batch, s, t, heads, kv_heads, d, dv]: Sizes,
    rule: &AttentionRule,
    sinks: bool,
) {
    let q = c.float(seed, &[batch, s, heads, d]);
    let k = c.float(seed + 1, &[batch, t, kv_heads, d]);
    let v = c.float(seed + 2, &[batch, t, kv_heads, dv]);
    let dout = c.float(seed + 3, &[batch, s, heads, dv]);
    let sinks = sinks.then(|| c.float(seed + 4, &[heads]));
    let output = B::attention_forward(q.clone(), k.clone(), v.clone(), sinks.clone(), rule);
    c.push("output", output.output.clone());
    c.push("lse", output.lse.clone());
    let grads = B::attention_backward(q, k, v, sinks, output, dout, rule);
    c.push("dq", grads.dq);
    c.push("dk", grads.dk);
    c.push("dv", grads.dv);
    if let Some(dsinks) = grads.dsinks {
        c.push("dsinks", dsinks);
    }
}

fn causal<B: Ops>() -> AttentionRule {
    AttentionSpec::<B>::causal().rule
}

fn bidirectional<B: Ops>() -> AttentionRule {
    AttentionSpec::<B>::bidirectional().rule
}

fn attention_small<B: Ops>(c: &mut Context<B>) {
    let _forced = Forced::to::<B>(AttentionPath::Generic);
    attend(c, 100, [2, 9, 9, 6, 2, 16, 16], &causal::<B>(), false);
    attend(
        c,
        110,
        [1, 5, 200, 4, 4, 24, 40],
        &bidirectional::<B>(),
        false,
    );
    attend(c, 120, [1, 150, 150, 2, 1, 48, 48], &causal::<B>(), true);
}

fn attention_tiles<B: Ops>(c: &mut Context<B>) {
    let _forced = Forced::to::<B>(AttentionPath::TensorCores);
    for d in [64, 128] {
        attend(c, 130, [2, 64, 64, 2, 1, d, d], &causal::<B>(), false);
        attend(c, 140, [1, 200, 200, 4, 2, d, d], &causal::<B>(), false);
        attend(
            c,
            150,
            [1, 130, 77, 2, 2, d, d],
            &bidirectional::<B>(),
            false,
        );
        attend(c, 160, [1, 321, 321, 3, 1, d, d], &causal::<B>(), true);
    }
}

/// The generic kernels.
fn attention_rules<B: Ops>(c: &mut Context<B>) {
    let _forced = Forced::to::<B>(AttentionPath::Generic);
    every_rule(c, &[16, 64]);
}

fn attention_tile_rules<B: Ops>(c: &mut Context<B>) {
    let _forced = Forced::to::<B>(AttentionPath::TensorCores);
    every_rule(c, &[64, 128]);
}

fn every_rule<B: Ops>(c: &mut Context<B>, head_sizes: &[usize]) {
    for &d in head_sizes {
        let sizes = [1, 150, 150, 4, 2, d, d];
        attend(
            c,
            170,
            sizes,
            &AttentionRule {
                window: Some(40),
                ..causal::<B>()
            },
            false,
        );
        attend(
            c,
            180,
            sizes,
            &AttentionRule {
                window: Some(70),
                ..causal::<B>()
            },
            true,
        );
        attend(
            c,
            190,
            sizes,
            &AttentionRule {
                softcap: Some(3.0),
                ..causal::<B>()
            },
            false,
        );
        attend(
            c,
            200,
            sizes,
            &AttentionRule {
                scale: Some(0.05),
                ..causal::<B>()
            },
            false,
        );
        attend(
            c,
            210,
            [1, 3, 150, 4, 2, d, d],
            &AttentionRule {
                q_offset: 100,
                kv_len: Some(103),
                ..causal::<B>()
            },
            false,
        );
        attend(
            c,
            220,
            [1, 1, 300, 4, 2, d, d],
            &AttentionRule {
                q_offset: 230,
                kv_len: Some(231),
                ..causal::<B>()
            },
            false,
        );
        let documents: Arc<[usize]> = Arc::from([0, 30, 41, 130, 150, 151, 300]);
        attend(
            c,
            230,
            [2, 150, 150, 4, 2, d, d],
            &AttentionRule {
                cu_seqlens: Some(documents),
                ..causal::<B>()
            },
            false,
        );
    }
}

fn attention_cudnn<B: Ops>(c: &mut Context<B>) {
    let _forced = Forced::to::<B>(AttentionPath::Cudnn);
    for d in [64, 128] {
        attend(c, 300, [2, 128, 128, 2, 2, d, d], &causal::<B>(), false);
        attend(c, 310, [2, 200, 200, 4, 1, d, d], &causal::<B>(), false);
        attend(c, 320, [1, 321, 321, 3, 3, d, d], &causal::<B>(), false);
        let both_ways = bidirectional::<B>();
        attend(c, 330, [1, 130, 77, 4, 2, d, d], &both_ways, false);
        attend(c, 340, [2, 64, 256, 2, 2, d, d], &both_ways, false);
    }
    // A length with a plan of its own.
    attend(c, 345, [1, 512, 512, 2, 1, 64, 64], &causal::<B>(), false);
    // The same kernels serve other lengths and strides.
    attend(c, 350, [3, 77, 77, 2, 2, 64, 64], &causal::<B>(), false);
    let by_head =
        |c: &Context<B>, seed, heads| B::float_swap_dims(c.float(seed, &[2, heads, 96, 64]), 1, 2);
    let (q, k, v) = (by_head(c, 360, 4), by_head(c, 361, 2), by_head(c, 362, 2));
    let dout = c.float(363, &[2, 96, 4, 64]);
    let rule = causal::<B>();
    let output = B::attention_forward(q.clone(), k.clone(), v.clone(), None, &rule);
    c.push("output of views", output.output.clone());
    let grads = B::attention_backward(q, k, v, None, output, dout, &rule);
    c.push("dq of views", grads.dq);
    c.push("dk of views", grads.dk);
    c.push("dv of views", grads.dv);
}

fn attention_cudnn_heads<B: Ops>(c: &mut Context<B>) {
    let _forced = Forced::to::<B>(AttentionPath::Cudnn);
    for (d, dv) in [(32, 32), (80, 80), (96, 96), (256, 256), (192, 128)] {
        attend(c, 370, [1, 150, 150, 2, 1, d, dv], &causal::<B>(), false);
    }
}

fn attention_cudnn_rules<B: Ops>(c: &mut Context<B>) {
    let _forced = Forced::to::<B>(AttentionPath::Cudnn);
    for d in [64, 128] {
        let sizes = [1, 150, 150, 4, 2, d, d];
        let rules = [
            AttentionRule {
                window: Some(40),
                ..causal::<B>()
            },
            AttentionRule {
                window: Some(40),
                ..bidirectional::<B>()
            },
            AttentionRule {
                softcap: Some(3.0),
                ..causal::<B>()
            },
            AttentionRule {
                scale: Some(0.05),
                ..causal::<B>()
            },
        ];
        for (i, rule) in rules.iter().enumerate() {
            attend(c, 380 + 10 * i as u64, sizes, rule, false);
        }
        attend(c, 420, sizes, &causal::<B>(), true);
        attend(c, 430, sizes, &rules[0], true);
        // Queries at the end of a cache with room to spare, with and without a window.
        for window in [None, Some(30)] {
            let rule = AttentionRule {
                q_offset: 100,
                kv_len: Some(170),
                window,
                ..causal::<B>()
            };
            attend(c, 440, [2, 70, 190, 4, 2, d, d], &rule, false);
        }
        let rule = AttentionRule {
            q_offset: 230,
            kv_len: Some(231),
            ..causal::<B>()
        };
        attend(c, 450, [1, 1, 300, 4, 2, d, d], &rule, false);
        // A block of earlier keys, of which queries with a window see the last few or all.
        let rule = AttentionRule {
            q_offset: 100,
            window: Some(140),
            ..causal::<B>()
        };
        attend(c, 455, [1, 80, 100, 4, 2, d, d], &rule, false);
    }
}

/// Packed documents: of every length, one that fills a row, more than a power of two of them.
fn attention_cudnn_documents<B: Ops>(c: &mut Context<B>) {
    let _forced = Forced::to::<B>(AttentionPath::Cudnn);
    let offsets: [Arc<[usize]>; 3] = [
        Arc::from([0, 30, 41, 130, 150, 151, 300]),
        Arc::from([0, 150, 200, 300]),
        Arc::from([0, 150, 300]),
    ];
    for (heads, kv_heads, d) in [(4, 2, 64), (2, 2, 64), (4, 2, 128)] {
        for (i, offsets) in offsets.iter().enumerate() {
            let rule = AttentionRule {
                cu_seqlens: Some(offsets.clone()),
                window: (i == 1).then_some(20),
                ..causal::<B>()
            };
            attend(
                c,
                480 + 10 * i as u64,
                [2, 150, 150, heads, kv_heads, d, d],
                &rule,
                i == 0,
            );
        }
    }
}

fn attention_deterministic<B: Ops>(c: &mut Context<B>) {
    let _forced = Forced::to::<B>(AttentionPath::Cudnn);
    if TypeId::of::<B>() == TypeId::of::<Cuda>() {
        bridge_cuda::set_deterministic_attention(true);
    }
    for d in [64, 128] {
        attend(c, 460, [2, 200, 200, 4, 2, d, d], &causal::<B>(), false);
    }
}

/// Which path the backend takes when nothing is forced, as counts of calls: `[cudnn, tensor cores, generic]`.
fn attention_path<B: Ops>(c: &mut Context<B>) {
    let cudnn = Library::Cudnn.load().is_ok();
    let plain = causal::<B>();
    let documents = AttentionRule {
        cu_seqlens: Some(Arc::from([0, 30, 128])),
        ..causal::<B>()
    };
    for (sizes, rule, served, own) in [
        ([1, 128, 128, 2, 1, 64, 64], &plain, true, 1),
        ([1, 128, 128, 2, 1, 80, 80], &plain, true, 2),
        ([1, 8, 128, 2, 1, 64, 64], &bidirectional::<B>(), false, 1),
        ([1, 128, 128, 2, 1, 64, 64], &documents, true, 1),
        ([1, 128, 128, 2, 1, 20, 20], &plain, false, 2),
    ] {
        let expected = if served && cudnn { 0 } else { own };
        let before = attention_calls();
        attend(c, 470, sizes, rule, false);
        let after = attention_calls();
        let count = |path: usize, after: [u64; 3], before: [u64; 3]| {
            if TypeId::of::<B>() == TypeId::of::<Cuda>() {
                (after[path] - before[path]) as f32
            } else {
                f32::from(u8::from(path == expected))
            }
        };
        let forward = [0, 1, 2].map(|path| count(path, after.forward, before.forward));
        let backward = [0, 1, 2].map(|path| count(path, after.backward, before.backward));
        let counts = [forward, backward].concat();
        c.push(
            "calls by path",
            float_from_f32::<B>(&counts, &[6], &c.device),
        );
    }
}
