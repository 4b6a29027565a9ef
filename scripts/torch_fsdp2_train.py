#!/usr/bin/env python3
"""Training steps of a Llama-shaped model in PyTorch FSDP2, to compare data-parallel training on one host with.

The usual recipe: fully_shard on every layer, bf16 parameters with fp32 reductions and sharded fp32 masters,
torch.compile on every layer, attention through cuDNN, fused AdamW, gradients clipped by their global norm, activation
checkpointing where asked for. Rank 0 prints one JSON line with the fields of `bridge bench train`, figures per GPU.

    torchrun --nproc-per-node 8 torch_fsdp2_train.py --shape llama3_8b --seq 8192 --batch 1 --checkpoint
"""

import argparse
import contextlib
import json
import os
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
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


SHAPES = {
    "tiny_llama": Shape(128, 352, 4, 4, 2, 32, 1024, True),
    "llama32_1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama3_8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, False),
}


class Layer(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        self.attention_norm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.qkv = nn.Linear(s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim, bias=False)
        self.out = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.gate_up = nn.Linear(s.hidden, 2 * s.intermediate, bias=False)
        self.down = nn.Linear(s.intermediate, s.hidden, bias=False)

    def attention(self, x, cos, sin):
        s = self.s
        batch, seq, _ = x.shape
        qkv = self.qkv(x).view(batch, seq, s.heads + 2 * s.kv_heads, s.head_dim)
        q, k, v = (t.transpose(1, 2) for t in qkv.split([s.heads, s.kv_heads, s.kv_heads], dim=2))

        def rotate(t):
            first, second = t.chunk(2, dim=-1)
            return (t * cos + torch.cat((-second, first), dim=-1) * sin).to(t.dtype)

        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(batch, seq, -1))

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        self.embedding = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.head = nn.Linear(s.hidden, s.vocab, bias=False)
        if s.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids, labels):
        device = ids.device
        exponent = torch.arange(0, self.s.head_dim, 2, dtype=torch.float32, device=device) / self.s.head_dim
        positions = torch.arange(ids.shape[1], device=device, dtype=torch.float32)
        angles = torch.outer(positions, 500_000.0**-exponent)
        angles = torch.cat((angles, angles), dim=-1)
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="llama32_1b")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1, help="samples per GPU and step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--checkpoint", action="store_true", help="recompute every layer in the backward pass")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the script, uncompiled")
    args = parser.parse_args()
    s = SHAPES[args.shape]
    on_gpu = args.device == "cuda"

    started = time.perf_counter()
    local_rank = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank))
    else:
        dist.init_process_group("gloo")
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    world = dist.get_world_size()
    mesh = init_device_mesh(args.device, (world,))
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Llama(s)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for index, layer in enumerate(model.layers):
        if args.checkpoint:
            layer = checkpoint_wrapper(layer)
        if on_gpu:
            layer = torch.compile(layer)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        model.layers[index] = layer
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=args.device)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(std=0.02)
    numel = sum(w.numel() for w in model.parameters() if w.dim() == 2)
    matrices = numel - (0 if s.tied else s.vocab * s.hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def attention():
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if on_gpu else contextlib.nullcontext()

    def step():
        ids = torch.randint(0, s.vocab, (args.batch, args.seq), device=args.device)
        with attention():
            loss = model(ids, ids.roll(-1, dims=1))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = []
    startup = None
    for index in range(args.warmup + args.steps):
        wait()
        dist.barrier()
        start = time.perf_counter()
        step()
        wait()
        if startup is None:
            startup = time.perf_counter() - started
        if index >= args.warmup:
            times.append(time.perf_counter() - start)
    times.sort()
    median = times[len(times) // 2]
    tokens = args.batch * args.seq
    operations = 6 * matrices * tokens + 6 * s.layers * s.heads * s.head_dim * args.seq * tokens
    if dist.get_rank() == 0:
        print(
            json.dumps(
                {
                    "bench": "train",
                    "peer": f"torch {torch.__version__} FSDP2",
                    "shape": args.shape,
                    "gpus": world,
                    "layout": f"dp={world}",
                    "seq": args.seq,
                    "micro_batch": args.batch,
                    "recompute": "full" if args.checkpoint else "none",
                    "precision": "bf16",
                    "step_ms": round(median * 1e3, 2),
                    "min_ms": round(times[0] * 1e3, 2),
                    "tokens_per_s_per_gpu": round(tokens / median, 1),
                    "model_tflops_per_gpu": round(operations / median / 1e12, 1),
                    "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
                    "startup_s": round(startup, 2),
                    "gpu": torch.cuda.get_device_name() if on_gpu else None,
                }
            ),
            flush=True,
        )
    dist.destroy_process_group()


main()
