#!/usr/bin/env python3
"""Training steps of a Llama-shaped model in PyTorch, to compare `bridge bench train` with.

The usual fast recipe for one GPU: torch.compile, attention through cuDNN, bf16 weights and activations, fp32 master
weights and optimizer state, fused AdamW, gradients clipped by their global norm. One JSON line with the same fields and
the same count of operations as `bridge bench train`: 6 per weight and token, and the causal half of attention.

    python3 torch_llama_train.py --shape llama32_1b --seq 4096 --batch 4 --steps 10
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_train


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
    args = torch_train.arguments(SHAPES, "llama32_1b", 4096, 4)
    s = SHAPES[args.shape]
    with torch.device("cuda"):
        model = Llama(s).to(torch.bfloat16)
    weights = list(model.parameters())
    compiled = torch.compile(model)

    def backward(ids, labels):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            compiled(ids, labels).backward()

    matrices = sum(w.numel() for w in weights if w.dim() == 2) - (0 if s.tied else s.vocab * s.hidden)
    tokens = args.batch * args.seq
    operations = 6 * matrices * tokens + 6 * s.layers * s.heads * s.head_dim * args.seq * tokens
    torch_train.train(args, weights, s.vocab, backward, operations)


main()
