#!/usr/bin/env python3
"""CPU peers, to be run beside this project's commands on the same machine in the same minute.

  transformers_cpu.py convert HF_DIR OUT      transformers: load (bf16) and save_pretrained; prints seconds and peak RSS
  transformers_cpu.py train HF_DIR [--seq 256 --batch 2 --steps 4 --threads 2]   full fp32 AdamW steps; prints tokens/s
  transformers_cpu.py generate HF_DIR [--tokens 32]   greedy decoding with a KV cache, fp32; prints tokens/s
"""
import argparse, json, resource, time

p = argparse.ArgumentParser()
p.add_argument("what", choices=["convert", "train", "generate"])
p.add_argument("dir")
p.add_argument("out", nargs="?")
p.add_argument("--seq", type=int, default=256)
p.add_argument("--batch", type=int, default=2)
p.add_argument("--steps", type=int, default=4)
p.add_argument("--tokens", type=int, default=32)
p.add_argument("--threads", type=int, default=2)
a = p.parse_args()
t0 = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(a.threads)
rss = lambda: round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
if a.what == "convert":
    t1 = time.perf_counter()
    m = AutoModelForCausalLM.from_pretrained(a.dir, dtype=torch.bfloat16)
    m.save_pretrained(a.out)
    print(json.dumps(dict(peer="transformers", seconds=round(time.perf_counter() - t1, 2), whole_process_s=round(time.perf_counter() - t0, 2), peak_rss_gib=rss())))
else:
    m = AutoModelForCausalLM.from_pretrained(a.dir, dtype=torch.float32)
    if a.what == "train":
        opt = torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True)
        m.train()
        times = []
        for i in range(a.steps + 1):
            ids = torch.randint(0, m.config.vocab_size, (a.batch, a.seq))
            t = time.perf_counter()
            m(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            opt.step(); opt.zero_grad()
            if i: times.append(time.perf_counter() - t)
        s = sorted(times)[len(times) // 2]
        print(json.dumps(dict(peer="torch " + torch.__version__, threads=a.threads, seq=a.seq, batch=a.batch, step_s=round(s, 2), tokens_per_s=round(a.batch * a.seq / s, 1), peak_rss_gib=rss())))
    else:
        ids = torch.randint(5, 1000, (1, 16))
        m.generate(ids, max_new_tokens=4, do_sample=False)
        t = time.perf_counter()
        m.generate(ids, max_new_tokens=a.tokens, min_new_tokens=a.tokens, do_sample=False)
        print(json.dumps(dict(peer="torch " + torch.__version__, threads=a.threads, tokens_per_s=round(a.tokens / (time.perf_counter() - t), 1))))
