"""PyTorch's attention through cuDNN, at the shapes of `gpu_check --bench --only attention`, timed the same way.

    python3 peer_attention.py [--backend cudnn|flash]
"""

import argparse

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = [
    (4, 2048, 32, 32, 64, 64),
    (2, 4096, 32, 32, 128, 128),
    (4, 4096, 32, 8, 64, 64),
    (1, 8192, 32, 8, 128, 128),
    (2, 8192, 32, 8, 64, 64),
    (1, 4096, 16, 4, 256, 256),
    (1, 4096, 32, 32, 192, 128),
]


def median_ms(run, runs=7, inner=3):
    """Median milliseconds of a call, after three calls to warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / inner)
    return sorted(times)[runs // 2]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=["cudnn", "flash"], default="cudnn")
    backend = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[
        parser.parse_args().backend
    ]
    print(torch.__version__, "cuDNN", torch.backends.cudnn.version(), torch.cuda.get_device_name())
    for b, s, h, kv, d, dv in SHAPES:
        def make(heads, channels):
            # [batch, seq, heads, channels] in memory, as in a model.
            x = torch.randn(b, s, heads, channels, device="cuda", dtype=torch.bfloat16)
            return x.transpose(1, 2).requires_grad_()

        name = f"attention b{b} s{s} h{h}/{kv} d{d}/{dv} torch {backend.name.lower()}"
        try:
            q, k, v = make(h, d), make(kv, d), make(kv, dv)
            dout = make(h, dv).detach()
            with sdpa_kernel(backend):
                def forward():
                    return torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=h != kv
                    )

                out = forward()
                flop = 2 * b * h * (s * s / 2) * (d + dv)
                ms = median_ms(forward)
                print(f"{name} fwd {ms:9.3f} ms {flop / ms * 1e-9:9.1f} TFLOP/s", flush=True)
                ms = median_ms(
                    lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
                )
                print(f"{name} bwd {ms:9.3f} ms {2.5 * flop / ms * 1e-9:9.1f} TFLOP/s", flush=True)
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
