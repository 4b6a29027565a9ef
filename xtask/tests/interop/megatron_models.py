"""Megatron-Core's models after a Hugging Face `config.json`: of its own layers, or of those of training runs."""
import dataclasses
import importlib.util
import inspect
import json


class Unsupported(Exception):
    """This version of Megatron-Core has no such model."""


def accepted(kind, fields):
    """The fields that this version's configuration class has; those it lacks must be at their neutral value."""
    known = {field.name for field in dataclasses.fields(kind)}
    missing = {name: value for name, value in fields.items() if name not in known and value}
    if missing:
        raise Unsupported(f"its configuration has no {', '.join(sorted(missing))}")
    return {name: value for name, value in fields.items() if name in known}


def rope_of(config):
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def activation(name):
    import torch

    return {
        "silu": torch.nn.functional.silu,
        "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu2": lambda x: torch.relu(x).square(),
    }[name]


def experts_of(config):
    """Keywords of the mixture of experts, and how many of the first layers are dense."""
    kind = config["model_type"]
    experts = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts")
    if not experts:
        return {}
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    sigmoid = kind in ("deepseek_v3", "glm4_moe")
    fields = dict(
        num_moe_experts=experts,
        moe_router_topk=config["num_experts_per_tok"],
        moe_ffn_hidden_size=width,
        moe_router_load_balancing_type="none",
        moe_router_pre_softmax=not config.get("norm_topk_prob", kind == "gpt_oss"),
        moe_token_dispatcher_type="allgather",
    )
    shared = config.get("n_shared_experts")
    if shared:
        fields.update(moe_shared_expert_intermediate_size=shared * width)
    if config.get("first_k_dense_replace") is not None:
        dense = config["first_k_dense_replace"]
        fields.update(moe_layer_freq=[int(layer >= dense) for layer in range(config["num_hidden_layers"])])
    if config.get("routed_scaling_factor"):
        fields.update(moe_router_topk_scaling_factor=config["routed_scaling_factor"])
    if config.get("n_group", 1) > 1:
        fields.update(moe_router_num_groups=config["n_group"], moe_router_group_topk=config["topk_group"])
    if sigmoid:
        fields.update(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
        fields.update(moe_router_pre_softmax=False)
    return fields


def pipeline_stages(layers, args):
    """Keywords for virtual stages: equal ones, or one layer after the other with what remains in the last."""
    stages = args.pp * args.vpp
    if layers % stages == 0:
        return dict(virtual_pipeline_model_parallel_size=args.vpp)
    cut = ["t"] * min(layers, stages - 1) + ["t" * max(layers - stages + 1, 0)]
    cut = ["E" + cut[0], *cut[1:-1], cut[-1] + "L"]
    return dict(pipeline_model_parallel_layout="|".join(cut))


def transformer_config(config, args):
    import torch
    from megatron.core.transformer import transformer_config as module

    kind = config["model_type"]
    heads = config["num_attention_heads"]
    rope = rope_of(config)
    fields = dict(
        num_layers=config.get("num_hidden_layers"),
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"] or 4 * config["hidden_size"],
        num_attention_heads=heads,
        num_query_groups=config["num_key_value_heads"] or heads,
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        normalization="LayerNorm" if kind == "nemotron" else "RMSNorm",
        layernorm_epsilon=config.get("rms_norm_eps") or config.get("norm_eps") or config["layer_norm_epsilon"],
        gated_linear_unit=kind != "nemotron",
        activation_func=activation(config.get("hidden_act") or config["mlp_hidden_act"]),
        add_bias_linear=kind == "gpt_oss",
        add_qkv_bias=config.get("attention_bias", kind == "qwen2"),
        qk_layernorm=kind.startswith("qwen3") or bool(config.get("use_qk_norm")),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        expert_model_parallel_size=args.ep,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        **experts_of(config),
    )
    if args.vpp > 1:
        fields.update(pipeline_stages(config["num_hidden_layers"], args))
    if config.get("sliding_window") and kind in ("mistral", "gpt_oss"):
        fields.update(window_size=(config["sliding_window"] - 1, 0))
    if kind == "gpt_oss":
        try:
            from megatron.core.fusions.fused_bias_geglu import quick_gelu
        except ImportError as reason:
            raise Unsupported("it has no quick_gelu") from reason

        fields.update(
            activation_func=quick_gelu,
            glu_linear_offset=1.0,
            activation_func_clamp_value=config["swiglu_limit"],
            softmax_type="learnable",
            window_attn_skip_freq=2,
        )
    if args.stand_ins:
        fields.update(moe_grouped_gemm="num_moe_experts" in fields)
        fields.update(gpu_fields(config), moe_use_legacy_grouped_gemm=args.legacy_experts)
    if kind == "nemotron-nas":
        from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

        return HeterogeneousTransformerConfig(**accepted(HeterogeneousTransformerConfig, fields))
    if "kv_lora_rank" not in config:
        return module.TransformerConfig(**accepted(module.TransformerConfig, fields))
    if config["q_lora_rank"] is None and importlib.util.find_spec("megatron.core.transformer.mla_qk_norm_config"):
        raise Unsupported("its queries without a latent vector have a norm that the model lacks")
    yarn = rope.get("rope_type") == "yarn"
    fields.update(
        multi_latent_attention=True,
        qk_layernorm=True,
        q_lora_rank=config["q_lora_rank"],
        kv_lora_rank=config["kv_lora_rank"],
        qk_head_dim=config["qk_nope_head_dim"],
        qk_pos_emb_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
        rope_type="yarn" if yarn else "rope",
        rotary_base=rope["rope_theta"],
        rotary_scaling_factor=rope.get("factor", 1.0),
        mscale=rope.get("mscale", 1.0),
        mscale_all_dim=rope.get("mscale_all_dim", 0.0) if yarn else 0.0,
    )
    if yarn:
        fields.update(
            original_max_position_embeddings=rope["original_max_position_embeddings"],
            beta_fast=rope["beta_fast"],
            beta_slow=rope["beta_slow"],
        )
    return module.MLATransformerConfig(**accepted(module.MLATransformerConfig, fields))


def gpu_layer_spec(transformer, kind, stage):
    from megatron.core.models.gpt import gpt_layer_specs

    if kind == "qwen3_next":
        from megatron.core.models.gpt import experimental_attention_variant_module_specs as variants

        return variants.get_transformer_block_with_experimental_attention_variant_spec(transformer, **stage)
    if kind == "nemotron-nas":
        from megatron.core.models.gpt.heterogeneous import heterogeneous_layer_specs

        return heterogeneous_layer_specs.get_gpt_heterogeneous_layer_spec(transformer, use_te=True)
    return gpt_layer_specs.get_gpt_decoder_block_spec(
        transformer, use_transformer_engine=True, normalization=transformer.normalization, **stage
    )


def gpu_fields(config):
    """Keywords of models whose layers need a GPU."""
    kind = config["model_type"]
    if kind == "qwen3_next":
        return dict(
            experimental_attention_variant="gated_delta_net",
            linear_attention_freq=[int(layer == "linear_attention") for layer in config["layer_types"]],
            linear_conv_kernel_dim=config["linear_conv_kernel_dim"],
            linear_key_head_dim=config["linear_key_head_dim"],
            linear_value_head_dim=config["linear_value_head_dim"],
            linear_num_key_heads=config["linear_num_key_heads"],
            linear_num_value_heads=config["linear_num_value_heads"],
            attention_output_gate=True,
            layernorm_zero_centered_gamma=True,
            moe_shared_expert_gate=True,
            moe_shared_expert_intermediate_size=config["shared_expert_intermediate_size"],
        )
    if kind == "nemotron_h":
        fields = dict(
            num_layers=len(config["layers_block_type"]),
            mamba_state_dim=config["ssm_state_size"],
            mamba_head_dim=config["mamba_head_dim"],
            mamba_num_groups=config["n_groups"],
            mamba_num_heads=config["mamba_num_heads"],
            is_hybrid_model=True,
            gated_linear_unit=False,
        )
        if "moe" in config["layers_block_type"]:
            fields.update(
                moe_shared_expert_intermediate_size=config["moe_shared_expert_intermediate_size"],
                moe_router_enable_expert_bias=True,
                moe_router_score_function="sigmoid",
                moe_router_pre_softmax=False,
                moe_latent_size=config["moe_latent_size"],
            )
        else:
            sizes = ("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
            fields.update(dict.fromkeys(sizes), moe_grouped_gemm=False)
        return fields
    if kind == "nemotron-nas":
        return dict(heterogeneous_layers_config_encoded_json=json.dumps(config))
    return {}


def layer_spec(transformer, stage):
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.identity_op import IdentityOp

    layered = isinstance(getattr(transformer, "moe_layer_freq", 1), list)
    if layered:
        spec = gpt_layer_specs.get_gpt_decoder_block_spec(
            transformer, use_transformer_engine=False, normalization=transformer.normalization, **stage
        )
        layers = spec.layer_specs
    else:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(
            num_experts=transformer.num_moe_experts,
            moe_grouped_gemm=False,
            qk_layernorm=transformer.qk_layernorm,
            multi_latent_attention=transformer.multi_latent_attention,
            normalization=transformer.normalization,
        )
        layers = [spec]
    for layer in layers:
        attention = layer.submodules.self_attention.submodules
        if transformer.multi_latent_attention:
            attention.core_attention = latent_core_attention(attention.core_attention)
            if transformer.q_lora_rank is None:
                attention.q_layernorm = IdentityOp
        # Names as in training runs, which use Transformer Engine's layers: norms belong to the projection after them,
        # but for those before experts and before latent attention.
        renamed = layer.submodules.sharded_state_dict_keys_map
        if "MoELayer" in str(layer.submodules.mlp):
            renamed.pop("pre_mlp_layernorm.", None)
        else:
            renamed["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        if transformer.multi_latent_attention:
            for part in ("q", "kv"):
                renamed[f"self_attention.{part}_layernorm."] = f"self_attention.linear_{part}_up_proj.layer_norm_"
    return spec


def latent_core_attention(base):
    """Megatron-Core's own attention takes keys and values of one width only: the same with two, in plain operations."""
    import torch

    class LatentCoreAttention(base):
        def __init__(self, *args, k_channels=None, v_channels=None, softmax_scale=None, **kwargs):
            super().__init__(*args, softmax_scale=softmax_scale, **kwargs)
            self.latent_scale = softmax_scale

        def forward(self, query, key, value, attention_mask, *_args, **_kwargs):
            # [seq, batch, heads, width] each.
            scores = torch.einsum("sbhd,tbhd->bhst", query, key) * self.latent_scale
            weights = scores.masked_fill(attention_mask, float("-inf")).softmax(-1)
            mixed = torch.einsum("bhst,tbhd->sbhd", weights, value)
            return mixed.reshape(*mixed.shape[:2], -1)

    return LatentCoreAttention


def windows_without_transformer_engine():
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    return "config.window_size is None" not in inspect.getsource(DotProductAttention.__init__)


def build(config, args, virtual=0):
    """The model, or its part for a virtual stage of this rank."""
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt.gpt_model import GPTModel

    # Versions before virtual stages were told to the model's parts have none here.
    stage = {"vp_stage": virtual} if args.vpp > 1 else {}
    if stage and "vp_stage" not in inspect.signature(GPTModel.__init__).parameters:
        raise Unsupported("its models are not told their virtual stage")
    transformer = transformer_config(config, args)
    rope = rope_of(config)
    kind = rope.get("rope_type")
    yarn = kind == "yarn" and not transformer.multi_latent_attention
    if yarn:
        transformer.yarn_rotary_scaling_factor = rope["factor"]
        transformer.yarn_original_max_position_embeddings = rope["original_max_position_embeddings"]
        transformer.yarn_beta_fast = rope["beta_fast"]
        transformer.yarn_beta_slow = rope["beta_slow"]
        transformer.yarn_mscale = None
        transformer.yarn_mscale_all_dim = None
        transformer.yarn_correction_range_round_to_int = rope.get("truncate", True)
    if config["model_type"] == "nemotron_h":
        return hybrid(config, transformer)
    if transformer.window_size is not None and not args.stand_ins and not windows_without_transformer_engine():
        raise Unsupported("its own attention has no windows")
    vocab = -(-config["vocab_size"] // (16 * args.tp)) * 16 * args.tp
    model = GPTModel(
        transformer,
        gpu_layer_spec(transformer, config["model_type"], stage) if args.stand_ins else layer_spec(transformer, stage),
        vocab_size=vocab,
        max_sequence_length=config["max_position_embeddings"],
        pre_process=mpu.is_pipeline_first_stage() and virtual == 0,
        post_process=mpu.is_pipeline_last_stage() and virtual == args.vpp - 1,
        share_embeddings_and_output_weights=config.get("tie_word_embeddings", False),
        position_embedding_type="yarn" if yarn else "rope",
        rotary_base=rope["rope_theta"],
        rotary_percent=rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)),
        parallel_output=False,
        **stage,
    )
    if kind == "llama3":
        # Megatron-Core's constructor takes the factor alone.
        rotary = model.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_position_embeddings=rope["original_max_position_embeddings"],
        )
    return model


def hybrid(config, transformer):
    from megatron.core import parallel_state as mpu
    from megatron.core.models.mamba import mamba_layer_specs
    from megatron.core.models.mamba.mamba_model import MambaModel

    signs = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E"}
    pattern = "".join(signs[kind] for kind in config["layers_block_type"])
    known = inspect.signature(MambaModel.__init__).parameters
    return MambaModel(
        transformer,
        mamba_layer_specs.mamba_stack_spec,
        vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"],
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=config["tie_word_embeddings"],
        **{"hybrid_layer_pattern" if "hybrid_layer_pattern" in known else "hybrid_override_pattern": pattern},
    )
