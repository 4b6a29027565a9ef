"""Adapters with the numbers that Hugging Face PEFT computes with them, for the tests of bridge-peft.

    python tests/oracle/make_peft.py            writes tests/fixtures/peft/<case>
    python tests/oracle/make_peft.py check BASE ADAPTER IDS OUT
                                                logits of a model with an adapter, for a folder that this project wrote

Each case is an adapter folder as `save_pretrained` leaves it, beside `expected.safetensors`: `input_ids`, `labels`,
`logits`, `loss` (mean over the labels that are not -100), `grad.<tensor>` of every tensor of the adapter, and
`merged.<module>`, the weights of layer 0 after `merge_and_unload`. Bases are fixtures of this repository, in fp32.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
CASES = {
    "lora_llama": ("llama3_2", dict(r=4, lora_alpha=8, target_modules=ATTENTION + MLP)),
    "dora_llama": ("llama3_1", dict(r=3, lora_alpha=6, use_dora=True, target_modules=ATTENTION + MLP)),
    "rslora_qwen3_moe": ("qwen3_moe", dict(r=4, lora_alpha=4, use_rslora=True, target_modules=ATTENTION)),
    "dora_deepseek_v3": ("deepseek_v3", dict(r=2, lora_alpha=4, use_dora=True, target_modules=LATENT)),
}


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def make(case):
    base, options = CASES[case]
    torch.manual_seed(1234)
    model = get_peft_model(load(FIXTURES / base), LoraConfig(task_type="CAUSAL_LM", **options))
    model.eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(0.0, 0.05)
            elif "lora_magnitude" in name:
                param.mul_(1.0 + 0.2 * torch.rand_like(param))
    out = FIXTURES / "peft" / case
    model.save_pretrained(out)
    for path in out.iterdir():
        if path.name not in ("adapter_config.json", "adapter_model.safetensors"):
            path.unlink()
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    config["target_modules"] = sorted(config["target_modules"])
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (2, 9))
    labels = torch.randint(0, vocabulary, (2, 9))
    labels[0, :4] = -100
    labels[1, 7:] = -100
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()
    tensors = {"input_ids": ids, "labels": labels, "logits": logits.detach(), "loss": loss.detach()}
    for name, param in model.named_parameters():
        if param.requires_grad:
            name = name.replace(".default.weight", ".weight").replace("magnitude_vector.default", "magnitude_vector")
            name = name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            tensors[f"grad.{name}"] = param.grad
    merged = model.merge_and_unload()
    for name, param in merged.named_parameters():
        if ".layers.0." in name and param.dim() == 2 and "embed" not in name:
            tensors[f"merged.{name}"] = param.detach()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "expected.safetensors")
    print(case, float(loss))


def check(base, adapter, ids, out):
    model = PeftModel.from_pretrained(load(base), adapter).eval()
    ids = torch.tensor([json.loads(ids)])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    save_file({"logits": logits.contiguous()}, out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        check(*sys.argv[2:])
    elif sys.argv[1:2] == ["available"]:
        import peft

        print(peft.__version__)
    else:
        for case in sys.argv[1:] or CASES:
            make(case)
