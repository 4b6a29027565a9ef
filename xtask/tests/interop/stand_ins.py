"""Stand-ins for packages that need a GPU: Transformer Engine, mamba-ssm, causal-conv1d, flash-linear-attention and
grouped-gemm. Their layers have parameters of the right shapes and compute nothing, which is enough for Megatron-Core to build
the models of training runs on a CPU, to load checkpoints into them and to save them.
"""
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types

PACKAGES = ("transformer_engine", "transformer_engine_torch", "mamba_ssm", "causal_conv1d", "fla", "grouped_gemm")


class StandIn(types.ModuleType):
    """A module in which every name is there: capitalized, an empty class, and otherwise another such module."""

    __version__ = "2.8.0"
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {}) if name[0].isupper() else importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made


    def __call__(self, *_args, **_kwargs):
        raise RuntimeError(f"{self.__name__} is a stand-in, which computes nothing")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, _path, _target=None):
        if name.split(".")[0] in PACKAGES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


def install():
    """Has the packages imported as stand-ins from now on."""
    sys.meta_path.insert(0, Finder())
    import torch
    import transformer_engine.pytorch as te

    class Module(torch.nn.Module):
        def get_extra_state(self):
            return torch.empty(0, dtype=torch.uint8)

        def set_extra_state(self, _state):
            pass

        def set_tensor_parallel_group(self, _group):
            pass

    def parameter(*shape):
        return torch.nn.Parameter(torch.zeros(shape))

    class Linear(Module):
        def __init__(self, in_features, out_features, bias=True, tp_size=1, parallel_mode=None, **_):
            super().__init__()
            self.parallel_mode, self.use_bias = parallel_mode, bias
            self.tp_size = tp_size
            if parallel_mode == "column":
                out_features //= tp_size
            if parallel_mode == "row":
                in_features //= tp_size
            self.weight = parameter(out_features, in_features)
            if bias:
                self.bias = parameter(out_features)

    class LayerNormLinear(Linear):
        def __init__(self, in_features, out_features, normalization="LayerNorm", **options):
            super().__init__(in_features, out_features, **options)
            self.layer_norm_weight = parameter(in_features)
            if normalization == "LayerNorm":
                self.layer_norm_bias = parameter(in_features)

    class GroupedLinear(Module):
        def __init__(self, num_gemms, in_features, out_features, bias=True, tp_size=1, parallel_mode=None, **_):
            super().__init__()
            self.num_gemms, self.use_bias = num_gemms, bias
            self.parallel_mode, self.fp8_meta = parallel_mode, {"fp8_checkpoint": False}
            self.fp8 = self.fp8_calibration = False
            if parallel_mode == "column":
                out_features //= tp_size
            if parallel_mode == "row":
                in_features //= tp_size
            for index in range(num_gemms):
                setattr(self, f"weight{index}", parameter(out_features, in_features))
                if bias:
                    setattr(self, f"bias{index}", parameter(out_features))

        def init_fp8_metadata(self, num_gemms):
            pass

    class Norm(Module):
        def __init__(self, normalized_shape=None, hidden_size=None, **_):
            super().__init__()
            hidden_size = hidden_size or normalized_shape
            self.weight = parameter(hidden_size)
            if isinstance(self, LayerNorm):
                self.bias = parameter(hidden_size)

    class LayerNorm(Norm):
        pass

    class RMSNorm(Norm):
        pass

    class DotProductAttention(Module):
        def __init__(self, num_attention_heads, softmax_type="vanilla", tp_size=1, **_):
            super().__init__()
            if softmax_type == "learnable":
                self.softmax_offset = parameter(num_attention_heads // tp_size)

    for made in (Linear, LayerNormLinear, GroupedLinear, LayerNorm, RMSNorm, DotProductAttention):
        setattr(te, made.__name__, made)

    te.cpu_offload.get_cpu_offload_context = lambda *_, **__: (contextlib.nullcontext(), None)

    import mamba_ssm.ops.triton.layernorm_gated as gated

    class GatedNorm(torch.nn.Module):
        def __init__(self, hidden_size, **_):
            super().__init__()
            self.weight = parameter(hidden_size)

    gated.RMSNorm = GatedNorm
