"""Loads a Megatron-Core checkpoint into Megatron-Core's own GPT model on a CPU, and compares its logits with a reference.

    megatron_core.py available
    megatron_core.py check CHECKPOINT HF_DIR [--tp N] [--pp N]

CHECKPOINT is an iteration's folder, HF_DIR the Hugging Face folder of the same model with its `oracle.safetensors`. Dense
models with RMSNorm, SwiGLU and plain rotary embeddings, as Llama 2, Qwen2 and Qwen3; mixtures of experts as Qwen3-MoE.
Prints the largest difference of the logits.
"""
import argparse
import contextlib
import json
import os
import sys
import warnings

warnings.filterwarnings("ignore")


def build(config, args):
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core import parallel_state as mpu

    experts = config.get("num_experts") or config.get("num_local_experts")
    extra = {}
    if experts:
        extra = dict(
            num_moe_experts=experts,
            moe_router_topk=config["num_experts_per_tok"],
            moe_ffn_hidden_size=config["moe_intermediate_size"],
            moe_router_pre_softmax=not config.get("norm_topk_prob", False),
            moe_token_dispatcher_type="allgather",
            moe_router_load_balancing_type="none",
        )
    qkv_bias = config.get("attention_bias", config["model_type"] == "qwen2")
    heads = config["num_attention_heads"]
    transformer = TransformerConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        normalization="RMSNorm",
        layernorm_epsilon=config["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=qkv_bias,
        qk_layernorm=config["model_type"].startswith("qwen3"),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        **extra,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=experts,
        moe_grouped_gemm=False,
        qk_layernorm=transformer.qk_layernorm,
        normalization="RMSNorm",
    )
    if experts:
        # Training runs use Transformer Engine's layers, which leave the norm before the experts its own name.
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    rope = config.get("rope_parameters") or {}
    theta = config.get("rope_theta") or rope.get("rope_theta", 10000.0)
    vocab = -(-config["vocab_size"] // (16 * args.tp)) * 16 * args.tp
    return GPTModel(
        transformer,
        spec,
        vocab_size=vocab,
        max_sequence_length=config["max_position_embeddings"],
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=config.get("tie_word_embeddings", False),
        position_embedding_type="rope",
        rotary_base=theta,
        parallel_output=False,
    )


def forward(model, ids, args):
    import torch
    from megatron.core import parallel_state as mpu

    batch, seq = ids.shape
    positions = torch.arange(seq).expand(batch, seq)
    mask = torch.ones(1, 1, seq, seq, dtype=torch.bool).triu(1)
    if args.pp == 1:
        return model(ids, positions, mask)
    # A plain relay from stage to stage; hidden states are [seq, batch, hidden].
    hidden = torch.empty(seq, batch, model.config.hidden_size)
    if not mpu.is_pipeline_first_stage():
        torch.distributed.recv(hidden, src=mpu.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    output = model(ids, positions, mask)
    if not mpu.is_pipeline_last_stage():
        torch.distributed.send(output.contiguous(), dst=mpu.get_pipeline_model_parallel_next_rank())
        return None
    return output


def rank_main(rank, args):
    import torch
    from megatron.core import dist_checkpointing, tensor_parallel
    from megatron.core import parallel_state as mpu
    from safetensors.torch import load_file

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    torch.set_num_threads(1)
    world = args.tp * args.pp
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    mpu.initialize_model_parallel(args.tp, args.pp)
    # 0.16 names this where Transformer Engine is missing, too.
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # What asks for the GPU of this process gets the CPU.
    torch.cuda.current_device = lambda: torch.device("cpu")
    # Without dropout nothing is drawn, and the tracker's states live on a GPU.
    tracker = tensor_parallel.random.get_cuda_rng_tracker()
    type(tracker).fork = lambda *_, **__: contextlib.nullcontext()

    with open(os.path.join(args.hf, "config.json")) as file:
        config = json.load(file)
    model = build(config, args).eval()
    state = model.sharded_state_dict(prefix="")
    loaded = dist_checkpointing.load(state, args.checkpoint)
    model.load_state_dict(loaded, strict=False)

    reference = load_file(os.path.join(args.hf, "oracle.safetensors"))
    with torch.no_grad():
        logits = forward(model, reference["input_ids"], args)
    if logits is not None and mpu.get_tensor_model_parallel_rank() == 0:
        expected = reference["logits"]
        found = logits[..., : expected.shape[-1]]
        difference = (found - expected).abs().max().item()
        print(json.dumps({"logits_max_abs_diff": difference}), flush=True)
        if not difference <= args.atol:
            sys.exit(f"logits differ by {difference}, allowed {args.atol}")
    torch.distributed.barrier()


def main():
    if sys.argv[1:] == ["available"]:
        import megatron.core
        import safetensors.torch  # noqa: F401

        print(megatron.core.__version__)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["check"])
    parser.add_argument("checkpoint")
    parser.add_argument("hf")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--port", type=int, default=29561)
    parser.add_argument("--atol", type=float, default=1e-5)
    args = parser.parse_args()
    if args.tp * args.pp == 1:
        rank_main(0, args)
        return
    import torch.multiprocessing as mp

    mp.spawn(rank_main, args=(args,), nprocs=args.tp * args.pp)


if __name__ == "__main__":
    main()
