#!/usr/bin/env python3
"""What transformers computes with a model folder, for the tests that hand it the folders which this project writes.

  transformers_models.py available                 fails where transformers or torch is missing
  transformers_models.py same FOLDER OTHER         both give the same logits, bit for bit, in fp32
  transformers_models.py reference FOLDER OUT      writes OUT/oracle.{json,safetensors}: logits, loss, gradient norms, greedy tokens
"""
import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{folder}: {kind}: {info[kind]}"
    return model.eval()


def random_ids(model, batch=2, seq=24):
    generator = torch.Generator().manual_seed(11)
    return torch.randint(5, model.config.get_text_config().vocab_size, (batch, seq), generator=generator)


def same(folder, other):
    models = load(folder), load(other)
    ids = random_ids(models[0])
    with torch.no_grad():
        logits = [model(ids).logits for model in models]
    assert torch.equal(*logits), f"logits differ by up to {(logits[0] - logits[1]).abs().max()}"


def reference(folder, out):
    model = load(folder)
    ids = random_ids(model)
    result = model(input_ids=ids, labels=ids, use_cache=False)
    result.loss.backward()
    grads = {
        name: [p.grad.double().norm().item(), p.grad.double().sum().item(), p.numel()]
        for name, p in model.named_parameters()
    }
    prompt = ids[:1, :6]
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        generated = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 6:]
    os.makedirs(out)
    tensors = {"input_ids": ids, "labels": ids.clone(), "logits": result.logits.detach()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, os.path.join(out, "oracle.safetensors"))
    numbers = {
        "loss": result.loss.item(),
        "grads": grads,
        "gen_prompt": prompt[0].tolist(),
        "gen_ids": generated.tolist(),
        "transformers": transformers.__version__,
    }
    with open(os.path.join(out, "oracle.json"), "w") as file:
        json.dump(numbers, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    verb, arguments = sys.argv[1], sys.argv[2:]
    if verb != "available":
        {"same": same, "reference": reference}[verb](*arguments)
