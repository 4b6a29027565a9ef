"""Loads Megatron-Core checkpoints into Megatron-Core's own GPT model on a CPU, and compares its logits with references.

    megatron_core.py available
    megatron_core.py names HF_DIR
    megatron_core.py check [--tp N] [--pp N] [--vpp N] [--ep N] [--dp N] [--singleton] [--optimizer SHARDING]
        [--stand-ins [--legacy-experts]] CHECKPOINT,HF_DIR[,RESAVE_DIR] ...

CHECKPOINT is an iteration's folder, HF_DIR the Hugging Face folder of the same model with its `oracle.safetensors`. `check`
prints a line of JSON for each model: the largest difference of the logits, or why this version has no such model. Into
RESAVE_DIR Megatron-Core saves what it has loaded: with a name for each expert where `--singleton` says so, and with all that a
training run keeps, optimizer state included, where `--optimizer` names one of its ways of storing that. `--stand-ins` builds
the models of training runs, whose layers need a GPU and are there by name and shape alone: without logits, then. `names`
prints the tensors that a model asks for, with their shapes.
"""
import argparse
import contextlib
import datetime
import functools
import inspect
import json
import math
import os
import sys
import warnings

from megatron_models import Unsupported, build

warnings.filterwarnings("ignore")
# Norms whose stored weight w scales by 1 + w, which Megatron-Core's own norms (as against Transformer Engine's) lack.
UNIT_OFFSET = ("gemma", "nemotron")


def adapt(model, config):
    """What Megatron-Core leaves to Transformer Engine or to a subclass."""
    if config["model_type"] in UNIT_OFFSET:
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.data += 1
    if config["model_type"] == "gemma" and hasattr(model, "embedding"):
        scale = math.sqrt(config["hidden_size"])
        model.embedding.register_forward_hook(lambda _module, _inputs, output: output * scale)


def forward(parts, ids, args):
    """The logits, on the rank that has them. `parts` are this rank's, one for each virtual stage."""
    import torch
    from megatron.core import parallel_state as mpu

    batch, seq = ids.shape
    positions = torch.arange(seq).expand(batch, seq)
    mask = torch.ones(1, 1, seq, seq, dtype=torch.bool).triu(1)
    output = None
    # A plain relay from stage to stage; hidden states are [seq, batch, hidden].
    for virtual, model in enumerate(parts):
        first = mpu.is_pipeline_first_stage() and virtual == 0
        last = mpu.is_pipeline_last_stage() and virtual == args.vpp - 1
        if not first:
            hidden = torch.empty(seq, batch, model.config.hidden_size)
            torch.distributed.recv(hidden, src=mpu.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        output = model(ids, positions, mask)
        if not last:
            torch.distributed.send(output.contiguous(), dst=mpu.get_pipeline_model_parallel_next_rank())
            output = None
    return output


def on_the_cpu(constructor):
    def construct(*args, device=None, **kwargs):
        return constructor(*args, device="cpu" if str(device).startswith("cuda") else device, **kwargs)

    return construct


def on_a_cpu():
    """What asks for the GPU of this process gets the CPU."""
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.fusions import fused_softmax
    from megatron.core.transformer.moe import moe_utils

    # 0.16 names this where Transformer Engine is missing, too.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # Classes of Transformer Engine that are asked after where it is missing.
    from megatron.core.transformer import multi_latent_attention

    for name in ("TEColumnParallelLinear", "TELinear", "TENorm"):
        if not isinstance(getattr(multi_latent_attention, name, None), type):
            setattr(multi_latent_attention, name, type(name, (), {}))
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    torch.tensor = on_the_cpu(torch.tensor)
    torch.zeros = on_the_cpu(torch.zeros)
    # The optimizer asks for the kind of a parameter by the name of its class.
    type_of = torch.Tensor.type
    torch.Tensor.type = lambda tensor, *kind, **options: (
        type_of(tensor, *kind, **options) if kind or options else type_of(tensor).replace("torch.", "torch.cuda.")
    )
    # 0.12 hands the list of its FP8 weights, an empty one here, to what only Transformer Engine has.
    from megatron.core.optimizer import distrib_optimizer

    if hasattr(distrib_optimizer, "quantize_param_shard"):
        distrib_optimizer.quantize_param_shard = lambda *_: None
    # 0.12 calls it so, and today's NumPy does not.
    import numpy

    if not hasattr(numpy, "product"):
        numpy.product = numpy.prod
    # Without dropout nothing is drawn, and the tracker's states live on a GPU.
    tracker = tensor_parallel.random.get_cuda_rng_tracker()
    type(tracker).fork = lambda *_, **__: contextlib.nullcontext()

    # Before 0.13 it writes with what later became a required argument of PyTorch's.
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import filesystem

    if "serialization_format" not in inspect.getsource(filesystem_async):
        form = filesystem.SerializationFormat.TORCH_SAVE
        filesystem_async._write_item = functools.partial(filesystem._write_item, serialization_format=form)

    def window_mask(rows, columns, window):
        distance = torch.arange(columns - rows, columns)[:, None] - torch.arange(columns)[None, :]
        return (distance < 0) | (distance > window[0])

    for name in ("get_sliding_window_causal_mask",):
        if hasattr(fused_softmax, name):
            setattr(fused_softmax, name, window_mask)


def collect(state, names):
    """Keys and global shapes of the tensors in a sharded state dict, and keys of its objects."""
    for value in state.values() if isinstance(state, dict) else state:
        if isinstance(value, (dict, list)):
            collect(value, names)
        elif hasattr(value, "global_shape"):
            is_tensor = hasattr(value, "dtype")
            names[value.key if is_tensor else value.unique_key] = list(value.global_shape) if is_tensor else None


def named(parts):
    """The parts by the names that training runs give them."""
    return [("model", parts[0])] if len(parts) == 1 else [(f"model{index}", part) for index, part in enumerate(parts)]


def sharded(parts, metadata=None):
    return {name: part.sharded_state_dict(prefix="", metadata=metadata) for name, part in named(parts)}


def training_state(parts, model_state, args):
    """What a training run saves beside the model: here after a step that changes no weight."""
    import torch
    from megatron.core import optimizer as optimizers
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    plain = args.optimizer == "plain"
    settings = DistributedDataParallelConfig(use_distributed_optimizer=not plain, overlap_grad_reduce=False)
    parts = [DistributedDataParallel(part.config, settings, part) for part in parts]
    config = optimizers.OptimizerConfig(
        optimizer="adam", lr=1e-3, weight_decay=0.0, clip_grad=0.0, use_distributed_optimizer=not plain
    )
    optimizer = optimizers.get_megatron_optimizer(config, parts)
    for part in parts:
        part.zero_grad_buffer()
    optimizer.step()
    rank = torch.distributed.get_rank()
    world = torch.distributed.get_world_size()
    if plain:
        kind = {}
    elif "metadata" in inspect.signature(optimizers.DistributedOptimizer.sharded_state_dict).parameters:
        kind = {"metadata": {"distrib_optim_sharding_type": args.optimizer, "chained_optim_avoid_prefix": True}}
    else:
        kind = {"sharding_type": args.optimizer}
    return {
        "args": argparse.Namespace(**vars(args)),
        "checkpoint_version": 3.0,
        "iteration": 1,
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 1},
        "num_floating_point_operations_so_far": 0,
        "rng_state": ShardedObject("rng_state", [{"torch_rng_state": torch.get_rng_state()}], (world,), (rank,)),
        "optimizer": optimizer.sharded_state_dict(model_state, **kind),
    }


def check(rank, args, checkpoint, hf, resave):
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu
    from safetensors.torch import load_file

    with open(os.path.join(hf, "config.json")) as file:
        config = json.load(file)
    parts = [build(config, args, virtual).eval() for virtual in range(args.vpp)]
    loaded = dist_checkpointing.load(sharded(parts), checkpoint)
    for name, part in named(parts):
        part.load_state_dict(loaded[name], strict=False)
    result = {"hf": hf}
    if resave:
        if rank == 0:
            os.makedirs(resave)
        torch.distributed.barrier()
        try:
            metadata = {"singleton_local_shards": True} if args.singleton else None
            state = sharded(parts, metadata)
            if args.optimizer:
                state.update(training_state(parts, state, args))
            dist_checkpointing.save(state, resave)
        except Exception as reason:  # An old version that this PyTorch no longer fits.
            result["not_saved"] = str(reason)
    if args.stand_ins:
        return result if torch.distributed.get_rank() == 0 else None
    for part in parts:
        adapt(part, config)

    reference = load_file(os.path.join(hf, "oracle.safetensors"))
    with torch.no_grad():
        logits = forward(parts, reference["input_ids"], args)
    # One rank speaks for those that compute the same.
    if logits is None or mpu.get_tensor_model_parallel_rank() != 0 or mpu.get_data_parallel_rank() != 0:
        return None
    expected = reference["logits"]
    result["logits_max_abs_diff"] = (logits[..., : expected.shape[-1]] - expected).abs().max().item()
    return result


def world_size(args):
    # Experts are divided among the ranks that divide the batch.
    return args.tp * args.pp * max(args.dp, args.ep)


def rank_main(rank, args):
    if args.stand_ins:
        import stand_ins

        stand_ins.install()
    import torch
    from megatron.core import parallel_state as mpu

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    torch.set_num_threads(1)
    world = world_size(args)
    # A rank that fails must not have the others wait for half an hour.
    patience = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=patience)
    stages = args.vpp if args.vpp > 1 else None
    mpu.initialize_model_parallel(args.tp, args.pp, stages, expert_model_parallel_size=args.ep)
    on_a_cpu()
    if args.what == "names":
        from megatron.core.dist_checkpointing.mapping import apply_factories

        with open(os.path.join(args.hf, "config.json")) as file:
            state = build(json.load(file), args).sharded_state_dict(prefix="")
        apply_factories(state)
        names = {}
        collect(state, names)
        for name, shape in sorted(names.items()):
            print(name, json.dumps(shape))
        return
    for model in args.models:
        checkpoint, hf, resave = (model.split(",") + [None])[:3]
        try:
            result = check(rank, args, checkpoint, hf, resave)
        except Unsupported as reason:
            if rank == 0:
                print(json.dumps({"hf": hf, "unsupported": str(reason)}), flush=True)
            continue
        if result is not None:
            print(json.dumps(result), flush=True)
        torch.distributed.barrier()


def main():
    if sys.argv[1:] == ["available"]:
        import megatron.core
        import safetensors.torch  # noqa: F401

        print(megatron.core.__version__)
        return
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("names", "check"):
        command = commands.add_parser(name)
        command.add_argument("--tp", type=int, default=1)
        command.add_argument("--pp", type=int, default=1)
        command.add_argument("--vpp", type=int, default=1)
        command.add_argument("--ep", type=int, default=1)
        command.add_argument("--dp", type=int, default=1)
        command.add_argument("--port", type=int, default=29561)
    commands.choices["names"].add_argument("hf")
    commands.choices["check"].add_argument("--singleton", action="store_true")
    commands.choices["check"].add_argument("--optimizer", metavar="SHARDING")
    for name in ("names", "check"):
        commands.choices[name].add_argument("--stand-ins", action="store_true")
        commands.choices[name].add_argument("--legacy-experts", action="store_true")
    commands.choices["check"].add_argument("models", nargs="+", metavar="CHECKPOINT,HF_DIR[,RESAVE_DIR]")
    args = parser.parse_args()
    world = world_size(args)
    if world == 1:
        rank_main(0, args)
        return
    import torch.multiprocessing as mp

    mp.spawn(rank_main, args=(args,), nprocs=world)


if __name__ == "__main__":
    main()
