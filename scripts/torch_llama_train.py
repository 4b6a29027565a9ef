#!/usr/bin/env python3
"""Training steps of a Llama-shaped model in PyTorch, to compare `bridge bench train` with.

The usual fast recipe for one GPU: torch.compile, attention through cuDNN, bf16 weights and activations, fp32 master
weights and optimizer state, fused AdamW, gradients clipped by their global norm. One JSON line with the same fields and
the same count of operations as `bridge bench train`: 6 per weight and token, and the causal half of attention.

    python3 torch_llama_train.py --shape llama32_1b --seq 4096 --batch 4 --steps 10
"""

import argparse
import json
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qk_norm: bool = False


SHAPES = {
    "llama32_1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama3_8b_4l": Shape(4096, 14336, 4, 32, 8, 128, 128256, False),
    "qwen3_600m": Shape(1024, 3072, 28, 16, 8, 128, 151936, True, qk_norm=True),
}


def rotate(x, cos, sin):
    """x: [batch, heads, seq, head_dim], rotated in halves."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        self.qkv = nn.Linear(s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim, bias=False)
        self.out = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)
        if s.qk_norm:
            self.q_norm = nn.RMSNorm(s.head_dim, eps=1e-6)
            self.k_norm = nn.RMSNorm(s.head_dim, eps=1e-6)

    def forward(self, x, cos, sin):
        s = self.s
        batch, seq, _ = x.shape
        qkv = self.qkv(x).view(batch, seq, s.heads + 2 * s.kv_heads, s.head_dim)
        q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], dim=2)
        if s.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        return self.out(y.transpose(1, 2).reshape(batch, seq, -1))


class Layer(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.attention_norm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.attention = Attention(s)
        self.mlp_norm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.gate_up = nn.Linear(s.hidden, 2 * s.intermediate, bias=False)
        self.down = nn.Linear(s.intermediate, s.hidden, bias=False)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.embedding = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.head = nn.Linear(s.hidden, s.vocab, bias=False)
        if s.tied:
            self.head.weight = self.embedding.weight
        exponent = torch.arange(0, s.head_dim, 2, dtype=torch.float32) / s.head_dim
        self.register_buffer("inv_freq", 500_000.0**-exponent, persistent=False)

    def forward(self, ids, labels):
        positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        angles = torch.outer(positions, self.inv_freq.float())
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(self.norm(x)).flatten(0, 1)
        return F.cross_entropy(logits.float(), labels.flatten())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="llama32_1b")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=4)
    args = parser.parse_args()
    s = SHAPES[args.shape]

    started = time.perf_counter()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Llama(s).to(torch.bfloat16)
    weights = list(model.parameters())
    masters = [w.detach().float().requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    compiled = torch.compile(model)

    def step():
        ids = torch.randint(0, s.vocab, (args.batch, args.seq), device="cuda")
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            loss = compiled(ids, ids.roll(-1, dims=1))
            loss.backward()
        for master, weight in zip(masters, weights):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)

    times = []
    startup = None
    for index in range(args.warmup + args.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if startup is None:
            startup = time.perf_counter() - started
        if index >= args.warmup:
            times.append(time.perf_counter() - start)
    times.sort()
    median = times[len(times) // 2]
    matrices = sum(w.numel() for w in weights if w.dim() == 2) - (0 if s.tied else s.vocab * s.hidden)
    tokens = args.batch * args.seq
    operations = 6 * matrices * tokens + 6 * s.layers * s.heads * s.head_dim * args.seq * tokens
    print(
        json.dumps(
            {
                "bench": "train",
                "peer": f"torch {torch.__version__}",
                "shape": args.shape,
                "seq": args.seq,
                "micro_batch": args.batch,
                "precision": "bf16",
                "step_ms": round(median * 1e3, 2),
                "min_ms": round(times[0] * 1e3, 2),
                "tokens_per_s": round(tokens / median, 1),
                "model_tflops": round(operations / median / 1e12, 1),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                "startup_s": round(startup, 2),
                "gpu": torch.cuda.get_device_name(),
            }
        )
    )


main()
