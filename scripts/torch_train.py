"""What the PyTorch trainers beside it have in common: their arguments, a training step, and the line of results.

bf16 weights and activations, fp32 master weights and optimizer state, fused AdamW, gradients clipped by their global norm.
"""

import argparse
import json
import time

import torch


def arguments(shapes, shape, seq, batch):
    """The command line, with these defaults; random numbers begin anew."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=shapes, default=shape)
    parser.add_argument("--seq", type=int, default=seq)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=4)
    args = parser.parse_args()
    args.started = time.perf_counter()
    torch.manual_seed(0)
    return args


def train(args, weights, vocab, backward, operations, **more):
    """Trains on random tokens and prints one JSON line, `more` in it. `backward(ids, labels)` leaves the gradients in
    the weights; `operations` are those of a whole step."""
    masters = [w.detach().float().requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def step():
        ids = torch.randint(0, vocab, (args.batch, args.seq), device="cuda")
        backward(ids, ids.roll(-1, dims=1))
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
            startup = time.perf_counter() - args.started
        if index >= args.warmup:
            times.append(time.perf_counter() - start)
    times.sort()
    median = times[len(times) // 2]
    print(
        json.dumps(
            {
                "bench": "train",
                "peer": f"torch {torch.__version__}",
                "shape": args.shape,
                **more,
                "seq": args.seq,
                "micro_batch": args.batch,
                "precision": "bf16",
                "step_ms": round(median * 1e3, 2),
                "min_ms": round(times[0] * 1e3, 2),
                "tokens_per_s": round(args.batch * args.seq / median, 1),
                "model_tflops": round(operations / median / 1e12, 1),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                "startup_s": round(startup, 2),
                "gpu": torch.cuda.get_device_name(),
            }
        )
    )
