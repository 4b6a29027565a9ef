#!/usr/bin/env python3
"""Training steps of models with recurrent layers in PyTorch, to compare `bridge bench train` with.

The same recipe as torch_llama_train.py: torch.compile (layer by layer, so that layers of a kind are compiled once), attention
through cuDNN, bf16 weights and activations, fp32 master weights and optimizer state, fused AdamW, gradients clipped by their
global norm. Mamba-2's scan is the chunked one of its paper (section 6) as batched products in bf16 with decays and states in
fp32; the gated delta rule is the chunked one of transformers, in fp32 with TF32 products, with the outputs of all chunks taken
out of the loop over chunks. One JSON line with the same fields and the same count of operations as `bridge bench train`.

    python3 torch_hybrid_train.py --shape nemotron_h_stack --seq 8192 --batch 1 --steps 10
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_train


@dataclass(frozen=True)
class Shape:
    pattern: str  # M: Mamba-2, G: gated delta net, *: attention, g: gated attention, -: MLP
    hidden: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    gated_mlp: bool
    eps: float
    # Heads and size of values, of keys (or groups and states), tokens of a chunk.
    value: tuple
    key: tuple
    chunk: int
    rotary: int = 0


SHAPES = {
    "nemotron_h_stack": Shape("M-M*-M-", 4096, 21504, 131072, 32, 8, 128, False, 1e-5, (128, 64), (8, 128), 128),
    "qwen3_next_stack": Shape("G-G-G-g-", 2048, 5120, 151936, 16, 2, 256, True, 1e-6, (32, 128), (16, 128), 64, rotary=64),
}


def causal_conv(x, weight, bias=None):
    """x: [batch, seq, channels], weight: [channels, taps]; SiLU follows."""
    taps, seq = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    y = sum(padded[:, tap : tap + seq] * weight[:, tap] for tap in range(taps))
    return F.silu(y if bias is None else y + bias)


def decays_between(sums):
    """From running sums of logarithms [.., n] to the decay from each j to each later i: [.., n, n]."""
    n = sums.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=sums.device).tril()
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(~later, float("-inf")).exp()


def ssd_scan(x, dt, log_decay, b, c, chunk):
    """x: [batch, seq, heads, p], dt, log_decay: [batch, seq, heads] fp32, b, c: [batch, seq, groups, n]."""
    batch, seq, heads, p = x.shape
    groups, n = b.shape[2:]
    count, share = seq // chunk, heads // groups
    u = (x * dt[..., None]).to(x.dtype).view(batch, count, chunk, groups, share, p)
    b, c = (t.view(batch, count, chunk, groups, n) for t in (b, c))
    sums = log_decay.view(batch, count, chunk, groups, share).permute(0, 1, 3, 4, 2).cumsum(-1)  # [.., groups, share, chunk]
    scores = torch.einsum("bclgn,bcsgn->bcgls", c, b)
    mixed = (scores[:, :, :, None] * decays_between(sums)).to(x.dtype)
    y = torch.einsum("bcgrls,bcsgrp->bclgrp", mixed, u)
    to_end = (sums[..., -1:] - sums).exp().permute(0, 1, 4, 2, 3)[..., None]
    states = torch.einsum("bclgn,bclgrp->bcgrpn", b, (u * to_end).to(x.dtype)).float()
    states = torch.cat((torch.zeros_like(states[:, :1]), states), 1)
    between = decays_between(F.pad(sums[..., -1].permute(0, 2, 3, 1), (1, 0)).cumsum(-1))  # [batch, groups, share, count + 1, ..]
    states = torch.einsum("bgrzc,bcgrpn->bzgrpn", between, states)[:, :-1].to(x.dtype)
    from_start = sums.exp().permute(0, 1, 4, 2, 3)[..., None]
    y = y + torch.einsum("bclgn,bcgrpn->bclgrp", c, states) * from_start
    return y.reshape(batch, seq, heads, p)


def delta_rule(q, k, v, log_decay, beta, chunk):
    """q, k: [batch, seq, key_heads, d], v: [batch, seq, heads, e], log_decay, beta: [batch, seq, heads]."""
    batch, seq, heads, e = v.shape
    share, d, count = heads // k.shape[2], k.shape[3], seq // chunk
    q, k = (F.normalize(t.float(), dim=-1, eps=1e-6).repeat_interleave(share, dim=2) for t in (q, k))
    cut = lambda t: t.float().transpose(1, 2).reshape(batch, heads, count, chunk, -1)
    q, k, v = cut(q) * d**-0.5, cut(k), cut(v)
    beta, sums = cut(beta[..., None]), cut(log_decay[..., None])[..., 0].cumsum(-1)
    decay, k_beta = decays_between(sums), k * beta
    system = (k_beta @ k.transpose(-1, -2)) * decay
    inside = (q @ k.transpose(-1, -2)) * decay
    right = torch.cat((v * beta, k_beta * sums.exp()[..., None]), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, erased = solved.split([e, d], -1)
    k_end = (k * (sums[..., -1:] - sums).exp()[..., None]).transpose(-1, -2)
    whole = sums[..., -1].exp()[..., None, None]
    state, states, new = torch.zeros(batch, heads, d, e, device=v.device), [], []
    for i in range(count):
        states.append(state)
        new.append(values[:, :, i] - erased[:, :, i] @ state)
        state = state * whole[:, :, i] + k_end[:, :, i] @ new[-1]
    y = (q * sums.exp()[..., None]) @ torch.stack(states, 2) + inside @ torch.stack(new, 2)
    return y.reshape(batch, heads, seq, e).transpose(1, 2)


class Mamba2(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        (heads, p), (groups, n) = s.value, s.key
        self.sizes = [heads * p, heads * p + 2 * groups * n, heads]
        self.proj = nn.Linear(s.hidden, sum(self.sizes), bias=False)
        self.conv = nn.Parameter(torch.randn(self.sizes[1], 4) * 0.1)
        self.conv_bias = nn.Parameter(torch.zeros(self.sizes[1]))
        self.dt_bias, self.a_log = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.zeros(heads))
        self.d, self.norm = nn.Parameter(torch.ones(heads)), nn.Parameter(torch.ones(heads * p))
        self.out = nn.Linear(heads * p, s.hidden, bias=False)

    def forward(self, x, cos, sin):
        s = self.s
        (heads, p), (groups, n) = s.value, s.key
        batch, seq, _ = x.shape
        z, xbc, dt = self.proj(x).split(self.sizes, dim=-1)
        u, b, c = causal_conv(xbc, self.conv, self.conv_bias).split([heads * p, groups * n, groups * n], dim=-1)
        u, b, c = u.reshape(batch, seq, heads, p), b.reshape(batch, seq, groups, n), c.reshape(batch, seq, groups, n)
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp_min(0.001)
        y = ssd_scan(u, dt, -self.a_log.float().exp() * dt, b, c, s.chunk)
        y = (y + u * self.d[:, None]).reshape(batch, seq, heads * p)
        y = (y.float() * F.silu(z.float())).view(batch, seq, groups, -1)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + s.eps)
        return self.out((y.view(batch, seq, -1) * self.norm).to(x.dtype))


class DeltaNet(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        (heads, e), (key_heads, d) = s.value, s.key
        self.sizes = [2 * key_heads * d + heads * e, heads * e, heads, heads]
        self.proj = nn.Linear(s.hidden, sum(self.sizes), bias=False)
        self.conv = nn.Parameter(torch.randn(self.sizes[0], 4) * 0.1)
        self.dt_bias, self.a_log = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.zeros(heads))
        self.norm = nn.Parameter(torch.ones(e))
        self.out = nn.Linear(heads * e, s.hidden, bias=False)

    def forward(self, x, cos, sin):
        s = self.s
        (heads, e), (key_heads, d) = s.value, s.key
        batch, seq, _ = x.shape
        qkv, z, b, a = self.proj(x).split(self.sizes, dim=-1)
        q, k, v = causal_conv(qkv, self.conv).split([key_heads * d, key_heads * d, heads * e], dim=-1)
        q, k = q.reshape(batch, seq, key_heads, d), k.reshape(batch, seq, key_heads, d)
        log_decay = -self.a_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        y = delta_rule(q, k, v.reshape(batch, seq, heads, e), log_decay, b.sigmoid(), s.chunk)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + s.eps) * self.norm
        y = y * F.silu(z.float().view(batch, seq, heads, e))
        return self.out(y.reshape(batch, seq, -1).to(x.dtype))


class Attention(nn.Module):
    def __init__(self, s, gated):
        super().__init__()
        self.s, self.gated = s, gated
        self.sizes = [s.heads * s.head_dim * (2 if gated else 1)] + [s.kv_heads * s.head_dim] * 2
        self.qkv = nn.Linear(s.hidden, sum(self.sizes), bias=False)
        self.out = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)
        if gated:
            self.q_norm, self.k_norm = nn.RMSNorm(s.head_dim, eps=s.eps), nn.RMSNorm(s.head_dim, eps=s.eps)

    def forward(self, x, cos, sin):
        s = self.s
        batch, seq, _ = x.shape
        q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        if self.gated:
            q, gate = q.chunk(2, dim=-1)
        q, k, v = (t.reshape(batch, seq, -1, s.head_dim) for t in (q, k, v))
        if self.gated:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if s.rotary:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(batch, seq, -1)
        return self.out(y * gate.sigmoid() if self.gated else y)


def rotate(x, cos, sin):
    """x: [batch, heads, seq, head_dim]: the first channels rotated in halves."""
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat(((turned * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype), kept), dim=-1)


class Mlp(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.gated = s.gated_mlp
        self.up = nn.Linear(s.hidden, s.intermediate * (2 if s.gated_mlp else 1), bias=False)
        self.down = nn.Linear(s.intermediate, s.hidden, bias=False)

    def forward(self, x, cos, sin):
        up = self.up(x)
        if self.gated:
            gate, up = up.chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.relu(up).square())


KINDS = {
    "M": Mamba2,
    "G": DeltaNet,
    "*": lambda s: Attention(s, False),
    "g": lambda s: Attention(s, True),
    "-": Mlp,
}


class Layer(nn.Module):
    def __init__(self, s, kind):
        super().__init__()
        self.norm, self.part = nn.RMSNorm(s.hidden, eps=s.eps), KINDS[kind](s)

    def forward(self, x, cos, sin):
        return x + self.part(self.norm(x), cos, sin)


class Head(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.norm, self.head = nn.RMSNorm(s.hidden, eps=s.eps), nn.Linear(s.hidden, s.vocab, bias=False)

    def forward(self, x, labels):
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())


class Model(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        self.embedding = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s, kind) for kind in s.pattern)
        self.head = Head(s)

    def compile_parts(self):
        for part in [*self.layers, self.head]:
            part.compile()

    def forward(self, ids, labels):
        rotary = max(self.s.rotary, 2)
        inv_freq = 1e7 ** -(torch.arange(0, rotary, 2, dtype=torch.float32, device=ids.device) / rotary)
        angles = torch.outer(torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32), inv_freq).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(x, labels)


def main():
    args = torch_train.arguments(SHAPES, "nemotron_h_stack", 8192, 1)
    s = SHAPES[args.shape]
    torch.backends.cuda.matmul.allow_tf32 = True
    with torch.device("cuda"):
        model = Model(s).to(torch.bfloat16)
    model.compile_parts()

    def backward(ids, labels):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            model(ids, labels).backward()

    projections = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    attentions = sum(kind in "*g" for kind in s.pattern)
    tokens = args.batch * args.seq
    operations = 6 * projections * tokens + 6 * attentions * s.heads * s.head_dim * args.seq * tokens
    torch_train.train(args, list(model.parameters()), s.vocab, backward, operations)


if __name__ == "__main__":
    main()
