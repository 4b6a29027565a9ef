#!/usr/bin/env python3
"""Times of matrix products, causal attention and experts' products in PyTorch, under the names that `gpu_check --bench` prints.

Prints `name  milliseconds  TFLOP/s`, the median of several timings with device events.

    python3 torch_ops.py [--only products|attention|experts]
"""

import argparse

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

PRODUCTS = [
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (8192, 2048, 8192),
    (8192, 2048, 2048),
    (8192, 8192, 2048),
    (16384, 2048, 2048),
    (16384, 2048, 512),
    (16384, 2048, 8192),
    (16384, 8192, 2048),
]
ATTENTION = [
    (4, 4096, 32, 8, 64),
    (2, 8192, 32, 8, 64),
    (1, 8192, 32, 8, 128),
    (4, 2048, 32, 32, 64),
    (2, 4096, 32, 32, 128),
]

EXPERTS = [
    ("experts qwen3_30b_a3b", 128, 8, 2048, 768),
    ("experts deepseek_v2_lite", 64, 6, 2048, 1408),
]
TOKENS = 16384


def median_ms(run, repeats=7, inner=3):
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / inner)
    return sorted(times)[repeats // 2]


def report(name, ms, operations):
    print(f"{name:44} {ms:9.3f} ms {operations / ms * 1e-9:9.1f} TFLOP/s", flush=True)


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def products():
    for m, k, n in PRODUCTS:
        x, w, dy = random(m, k), random(n, k), random(m, n)
        name, operations = f"product {m}x{k}x{n}", 2.0 * m * k * n
        report(f"{name} y = x w^T", median_ms(lambda: F.linear(x, w)), operations)
        report(f"{name} dx", median_ms(lambda: dy @ w), operations)
        report(f"{name} dw (bf16)", median_ms(lambda: dy.t() @ x), operations)


def attention():
    for batch, seq, heads, kv, d in ATTENTION:
        q, k, v = random(batch, heads, seq, d), random(batch, kv, seq, d), random(batch, kv, seq, d)
        for t in (q, k, v):
            t.requires_grad_()
        name = f"attention b{batch} s{seq} h{heads}/{kv} d{d} causal"
        operations = 2.0 * batch * heads * seq * seq * d
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            run = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv)
            with torch.no_grad():
                report(f"{name} forward", median_ms(run), operations)
            y = run()
            dy = torch.randn_like(y)
            backward = lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True)
            report(f"{name} backward", median_ms(backward), 2.5 * operations)


def experts():
    for name, count, top_k, hidden, inner in EXPERTS:
        chosen = torch.rand(TOKENS, count, device="cuda").topk(top_k, dim=1).indices
        ends = torch.bincount(chosen.flatten(), minlength=count).cumsum(0).to(torch.int32)
        x, dy = random(TOKENS * top_k, hidden), random(TOKENS * top_k, inner)
        up, down, gate_up = random(count, inner, hidden), random(count, hidden, inner), random(count, 2 * inner, hidden)
        operations = 2.0 * TOKENS * top_k * hidden * inner
        for what, factor, run in [
            ("up", 1, lambda: torch._grouped_mm(x, up.transpose(1, 2), offs=ends)),
            ("gate and up", 2, lambda: torch._grouped_mm(x, gate_up.transpose(1, 2), offs=ends)),
            ("down", 1, lambda: torch._grouped_mm(dy, down.transpose(1, 2), offs=ends)),
            ("up dx", 1, lambda: torch._grouped_mm(dy, up, offs=ends)),
            ("down dx", 1, lambda: torch._grouped_mm(x, down, offs=ends)),
            ("up dw (bf16)", 1, lambda: torch._grouped_mm(dy.t(), x, offs=ends)),
        ]:
            report(f"{name} {what}", median_ms(run), factor * operations)


def main():
    parts = {"products": products, "attention": attention, "experts": experts}
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=parts)
    only = parser.parse_args().only
    for name, run in parts.items():
        if only in (None, name):
            run()


main()
