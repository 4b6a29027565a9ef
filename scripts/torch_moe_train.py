#!/usr/bin/env python3
"""Training steps of mixture-of-experts models in PyTorch, to compare `bridge bench train` with.

The same recipe as torch_llama_train.py: torch.compile, attention through cuDNN, bf16 weights and activations, fp32 master
weights and optimizer state, fused AdamW, gradients clipped by their global norm. Experts: rows sorted by expert,
torch._grouped_mm with gate and up as one product; bringing rows to that order and back has a gradient that gathers, where
autograd's own would add with atomics. Nothing waits for the device inside a step. One JSON line with the same fields and the
same count of operations as `bridge bench train`.

    python3 torch_moe_train.py --shape qwen3_30b_a3b_4l --seq 4096 --batch 2 --steps 10
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
    layers: int
    heads: int
    vocab: int
    experts: int
    top_k: int
    inner: int
    theta: float
    kv_heads: int = 0
    head_dim: int = 0
    normalize: bool = False
    first_dense: int = 0
    dense_inner: int = 0
    shared_inner: int = 0
    # Latent attention: rank, unrotated and rotated channels of a key, channels of a value.
    latent: tuple = None

    @property
    def attention_size(self):
        """Channels of all queries and of all values."""
        if self.latent:
            _, nope, rotated, value = self.latent
            return self.heads * (nope + rotated), self.heads * value
        return self.heads * self.head_dim, self.heads * self.head_dim


SHAPES = {
    "qwen3_30b_a3b_4l": Shape(2048, 4, 32, 151936, 128, 8, 768, 1e6, kv_heads=4, head_dim=128, normalize=True),
    "deepseek_v2_lite_4l": Shape(
        2048, 4, 16, 102400, 64, 6, 1408, 1e4, first_dense=1, dense_inner=10944, shared_inner=2816, latent=(512, 128, 64, 128)
    ),
}


def rotate(x, cos, sin):
    """x: [batch, seq, heads, channels], rotated in halves."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        self.qkv = nn.Linear(s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim, bias=False)
        self.out = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)
        self.q_norm = nn.RMSNorm(s.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(s.head_dim, eps=1e-6)

    def forward(self, x, cos, sin):
        s = self.s
        batch, seq, _ = x.shape
        qkv = self.qkv(x).view(batch, seq, s.heads + 2 * s.kv_heads, s.head_dim)
        q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], dim=2)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(batch, seq, -1))


class LatentAttention(nn.Module):
    # Whether values are widened to the channels of keys, for kernels that want them alike.
    pad = False

    def __init__(self, s):
        super().__init__()
        self.s = s
        rank, nope, rotated, value = s.latent
        self.q = nn.Linear(s.hidden, s.heads * (nope + rotated), bias=False)
        self.kv_a = nn.Linear(s.hidden, rank + rotated, bias=False)
        self.kv_norm = nn.RMSNorm(rank, eps=1e-6)
        self.kv_b = nn.Linear(rank, s.heads * (nope + value), bias=False)
        self.out = nn.Linear(s.heads * value, s.hidden, bias=False)

    def forward(self, x, cos, sin):
        rank, nope, rotated, value = self.s.latent
        batch, seq, _ = x.shape
        heads = self.s.heads
        q_nope, q_rope = self.q(x).view(batch, seq, heads, -1).split([nope, rotated], dim=-1)
        latent, k_rope = self.kv_a(x).split([rank, rotated], dim=-1)
        k_nope, v = self.kv_b(self.kv_norm(latent)).view(batch, seq, heads, -1).split([nope, value], dim=-1)
        q = torch.cat((q_nope, rotate(q_rope, cos, sin)), dim=-1)
        k_rope = rotate(k_rope.unsqueeze(2), cos, sin).expand(-1, -1, heads, -1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        if self.pad:
            v = F.pad(v, (0, nope + rotated - value))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y[..., :value].transpose(1, 2).reshape(batch, seq, -1))


class Mlp(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ToExperts(torch.autograd.Function):
    """x: [tokens, hidden] -> [tokens * k, hidden], in the order of the experts."""

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad[inverse].view(-1, ctx.k, grad.shape[1]).sum(1), None, None, None


class ToTokens(torch.autograd.Function):
    """rows: [tokens * k, hidden], in the order of the experts -> the same, in the order of the tokens."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(order)
        return rows[inverse]

    @staticmethod
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        return grad[order], None, None


class Moe(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        self.router = nn.Linear(s.hidden, s.experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(s.experts, 2 * s.inner, s.hidden) * s.hidden**-0.5)
        self.down = nn.Parameter(torch.randn(s.experts, s.hidden, s.inner) * s.inner**-0.5)
        self.shared = Mlp(s.hidden, s.shared_inner) if s.shared_inner else None

    def forward(self, x):
        s = self.s
        shape = x.shape
        x = x.flatten(0, 1)
        weights, chosen = F.softmax(self.router(x), dim=-1, dtype=torch.float32).topk(s.top_k, dim=-1)
        if s.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        chosen = chosen.flatten()
        order = torch.argsort(chosen, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        counts = torch.histc(chosen.float(), bins=s.experts, min=0, max=s.experts - 1)
        ends = counts.cumsum(0).to(torch.int32)
        rows = ToExperts.apply(x, order, inverse, s.top_k)
        gate, up = torch._grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        rows = torch._grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        rows = ToTokens.apply(rows, order, inverse).view(-1, s.top_k, s.hidden)
        y = (rows * weights.unsqueeze(-1)).sum(1).to(x.dtype)
        if self.shared:
            y = y + self.shared(x)
        return y.view(shape)


class Layer(nn.Module):
    def __init__(self, s, index):
        super().__init__()
        self.attention_norm = nn.RMSNorm(s.hidden, eps=1e-6)
        self.attention = LatentAttention(s) if s.latent else Attention(s)
        self.mlp_norm = nn.RMSNorm(s.hidden, eps=1e-6)
        self.mlp = Mlp(s.hidden, s.dense_inner) if index < s.first_dense else Moe(s)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.embedding = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s, index) for index in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, eps=1e-6)
        self.head = nn.Linear(s.hidden, s.vocab, bias=False)
        rotated = s.latent[2] if s.latent else s.head_dim
        exponent = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
        self.register_buffer("inv_freq", s.theta**-exponent, persistent=False)

    def forward(self, ids, labels):
        positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        angles = torch.outer(positions, self.inv_freq.float())
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(self.norm(x)).flatten(0, 1)
        return F.cross_entropy(logits.float(), labels.flatten())


def latent_needs_padding(s):
    """Whether attention through cuDNN refuses keys and values of different width."""
    _, nope, rotated, value = s.latent
    q, k = (torch.randn(1, s.heads, 256, nope + rotated, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    v = torch.randn(1, s.heads, 256, value, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        return False
    except RuntimeError:
        return True


def main():
    args = torch_train.arguments(SHAPES, "qwen3_30b_a3b_4l", 4096, 2)
    s = SHAPES[args.shape]
    # Values as wide as keys have no cuDNN engine where keys are wider than 128, but FlashAttention has one.
    backends = [SDPBackend.CUDNN_ATTENTION]
    if s.latent and latent_needs_padding(s):
        LatentAttention.pad = True
        backends = [SDPBackend.FLASH_ATTENTION]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Model(s)
    model.inv_freq = model.inv_freq.float()
    weights = list(model.parameters())
    compiled = torch.compile(model)

    def backward(ids, labels):
        with sdpa_kernel(backends):
            compiled(ids, labels).backward()

    stacked = sum(w.numel() for w in weights if w.dim() == 3)
    matrices = sum(w.numel() for w in weights if w.dim() == 2) - s.vocab * s.hidden + stacked // s.experts * s.top_k
    tokens = args.batch * args.seq
    operations = 6 * matrices * tokens + 3 * s.layers * sum(s.attention_size) * args.seq * tokens
    attention = "flash, values padded" if LatentAttention.pad else "cudnn"
    torch_train.train(args, weights, s.vocab, backward, operations, attention=attention)


main()
