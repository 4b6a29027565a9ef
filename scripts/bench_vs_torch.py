#!/usr/bin/env python3
"""Runs `bridge bench train` and the same model in PyTorch in turn on this machine, and prints the ratios.

    python3 scripts/bench_vs_torch.py [--bridge target/release/bridge] [--rounds 1] [--steps 10] [CASE ...]

A case is SHAPE:SEQ:BATCH. The sides alternate, so that a GPU that heats up or shares its server treats both alike; with
several rounds the best of each side counts. Ends with 1 if a side failed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

CASES = [
    "llama32_1b:4096:4",
    "llama32_1b:8192:2",
    "llama3_8b_4l:8192:1",
    "qwen3_600m:4096:4",
    "qwen3_30b_a3b_4l:4096:2",
    "deepseek_v2_lite_4l:4096:2",
    "nemotron_h_stack:8192:1",
    "qwen3_next_stack:4096:2",
]
PEERS = {
    "torch_moe_train.py": ("qwen3_30b_a3b", "deepseek_v2_lite"),
    "torch_hybrid_train.py": ("nemotron_h", "qwen3_next"),
}


def peer_script(shape):
    """The script that trains a shape in PyTorch."""
    name = next((name for name, shapes in PEERS.items() if shape.startswith(shapes)), "torch_llama_train.py")
    return str(Path(__file__).with_name(name))


def run(command):
    """The last JSON line that the command prints, or None with its errors shown."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        print(lines[-1], flush=True)
        return json.loads(lines[-1])
    print(f"failed ({done.returncode}): {' '.join(command)}\n{done.stdout[-500:]}{done.stderr[-2000:]}", flush=True)
    return None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bridge", default="target/release/bridge")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--option", action="append", default=[], help="passed on to `bridge bench train`, such as --option=--recompute=selective")
    parser.add_argument("cases", nargs="*", default=CASES)
    args = parser.parse_args()

    rows, failed = [], False
    for case in args.cases:
        shape, seq, batch = case.split(":")
        common = ["--shape", shape, "--seq", seq, "--batch", batch, "--steps", str(args.steps), "--warmup", "4"]
        ours_command = [args.bridge, "bench", "train", "--backend", "cuda", *common, *args.option]
        best = [None, None]
        for _ in range(args.rounds):
            for side, command in enumerate([ours_command, [sys.executable, peer_script(shape), *common]]):
                found = run(command)
                failed |= found is None
                if found and (best[side] is None or found["tokens_per_s"] > best[side]["tokens_per_s"]):
                    best[side] = found
        if all(best):
            rows.append((case, *best))
    print(f"\n{'case':24} {'tokens/s':>10} {'torch':>10} {'ratio':>6} {'TFLOP/s':>8} {'GiB':>7} {'torch':>7} {'ratio':>6}")
    for case, ours, peer in rows:
        speed = ours["tokens_per_s"] / peer["tokens_per_s"]
        memory = ours["peak_gib"] / peer["peak_gib"]
        print(
            f"{case:24} {ours['tokens_per_s']:10.0f} {peer['tokens_per_s']:10.0f} {speed:6.3f} {ours['model_tflops']:8.1f} "
            f"{ours['peak_gib']:7.2f} {peer['peak_gib']:7.2f} {memory:6.3f}"
        )
    sys.exit(failed)


main()
