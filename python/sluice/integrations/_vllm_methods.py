"""vLLM's quantization methods for routed experts: a checkpoint's tensors in, Sluice's experts out.

Numerics and memory are in sluice.compat.w4a8; this maps vLLM's layers onto it. Importing this imports vLLM, as
_vllm_experts.py does.
"""

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.config import get_current_vllm_config
from vllm.distributed import get_ep_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoeWeightScaleSupported
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

from .. import _core
from .._error import Error
from ..compat._w4a8_scales import e8m0_bytes
from ..compat.w4a8 import W4A8Experts, WeightMemory, weight_memory
from ._vllm_experts import BatchedExperts, SluiceExperts, StandardExperts

# vLLM prints what loggers below "vllm" say, and nothing of others.
logger = init_logger("vllm.sluice")

_E8M0_ONE = 127
_CODE_TYPES = {torch.uint8, torch.int8} | {
    getattr(torch, name) for name in ("float4_e2m1fn_x2",) if hasattr(torch, name)}
FP8_BLOCK = [128, 128]
"""What makes vLLM's prepare/finalize classes send e4m3 with one scale for each 128 values."""


def refuse(name: str, what: str) -> None:
    raise Error("unsupported", f"{name}: {what}")


# --- What a layer must be -------------------------------------------------------------------------


def activation_of(layer: Any, name: str) -> str:
    """The layer's activation in Sluice's words. Raises Error: unsupported, naming layer and activation."""
    kind, config = layer.activation, layer.moe_config
    limit, alpha, beta = (getattr(layer, f"swiglu_{field}", None) for field in ("limit", "alpha", "beta"))
    if kind == MoEActivation.SILU:
        if limit is None:
            return "swiglu"
        if alpha in (None, 1.0) and beta in (None, 0.0):
            return f"swiglu:limit={float(limit)!r}"
    if kind == MoEActivation.SWIGLUOAI_UNINTERLEAVE and None not in (limit, alpha) and beta == 1.0:
        return f"swiglu-oai:alpha={float(alpha)!r},limit={float(limit)!r}"
    if kind.value == "situ":
        situ = getattr(config, "activation_situ_beta", None), getattr(config, "activation_situ_linear_beta", None)
        if None not in situ:
            return f"situ:beta={float(situ[0])!r},linear_beta={float(situ[1])!r}"
    refuse(name, f"activation {kind.value} with limit {limit}, alpha {alpha}, beta {beta}; Sluice has SwiGLU with and "
                 "without a limit, OpenAI's form in two halves, and SiTU-GLU")


def check_layer(layer: Any, name: str, group_size: int, width: int) -> None:
    """Raises Error: unsupported for a layer that Sluice cannot compute, naming it and what it has. width: what the
    sizes are multiples of."""
    moe: FusedMoEConfig = layer.moe_config
    parallel = moe.moe_parallel_config
    if moe.has_bias:
        refuse(name, "experts with biases")
    if moe.is_lora_enabled:
        refuse(name, "LoRA on routed experts")
    if parallel.enable_eplb:
        refuse(name, "--enable-eplb moves experts between ranks while it serves, and Sluice's are repacked")
    if not moe.is_act_and_mul:
        refuse(name, "experts without a gate matrix")
    if moe.in_dtype != torch.bfloat16:
        refuse(name, f"activations in {moe.in_dtype}; only bfloat16 (--dtype bfloat16) is supported")
    if group_size not in (32, 128):
        refuse(name, f"INT4 weights in groups of {group_size}; 32 and 128 are supported")
    sizes = {"hidden size": moe.hidden_dim, "intermediate size of a rank": moe.intermediate_size_per_partition}
    for what, size in sizes.items():
        if size % width:
            refuse(name, f"{what} {size} is no multiple of {width}" + (
                f" (tensor parallelism cuts it into {moe.tp_size}; --enable-expert-parallel does not)"
                if moe.tp_size > 1 else ""))
    known = "allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency"
    if (parallel.use_all2all_kernels or parallel.all2all_backend == "passthrough") and (
            parallel.all2all_backend not in known):
        refuse(name, f"--all2all-backend {parallel.all2all_backend}; Sluice's experts work with {', '.join(known)}")
    activation_of(layer, name)


# --- The quantization method ----------------------------------------------------------------------


class SluiceMoEMethod(FusedMoEMethodBase):
    """Weights of one layer as a checkpoint has them, then Sluice's. Subclasses know the checkpoint's format.

    name: the layer's, for errors. group_size: weights that share a scale.
    """

    format_name: str
    weight_layout: str
    suffixes: tuple[str, str]  # Of a matrix's codes and scales, in the parameters' names.
    width = 128  # What hidden and intermediate size must be multiples of.
    weights_name = "INT4"

    def __init__(self, layer: Any, name: str, group_size: int) -> None:
        super().__init__(layer.moe_config)
        check_layer(layer, name, group_size, self.width)
        self.name, self.group_size = name, group_size
        self._num_loaded: dict[str, int] = {}
        self._place: WeightMemory | None = None
        self._is_local = False

    def maybe_roundup_sizes(self, hidden_size: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        rounded = super().maybe_roundup_sizes(hidden_size, *args, **kwargs)
        if rounded[0] != hidden_size:
            refuse(self.name, f"--all2all-backend {self.moe.moe_parallel_config.all2all_backend} pads hidden size "
                              f"{hidden_size} to {rounded[0]}, and INT4 weights are not padded")
        return rounded

    def _counting(self, layer: Any, kind: str, prepare: Any) -> Any:
        """vLLM's weight loader of a parameter, behind prepare(param, tensor, what), and counted by kind and matrix."""
        vllms = type(layer).weight_loader

        def load(param: Any, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int,
                 return_success: bool = False) -> bool | None:
            tensor = prepare(param, loaded_weight, f"{weight_name} of expert {expert_id}")
            loaded = vllms(layer, param, tensor, weight_name, shard_id=shard_id, expert_id=expert_id,
                           return_success=True)
            if loaded:
                key = f"{kind} of {shard_id}"
                self._num_loaded[key] = self._num_loaded.get(key, 0) + 1
            return loaded if return_success else None

        load.supports_moe_loading = True  # type: ignore[attr-defined]
        return load

    def _as_codes(self, param: Any, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """As the parameter's integers. vLLM would cast FP8 or bf16 to integers without a word."""
        if tensor.is_floating_point() or tensor.dtype.itemsize != param.dtype.itemsize:
            refuse(self.name, f"{what} is {tensor.dtype} in the checkpoint, expected {param.dtype} "
                              f"({self.format_name})")
        return tensor.view(param.dtype)

    def _as_scales(self, param: Any, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """Widens the parameter at the first scale that its type would round."""
        if not tensor.is_floating_point():
            refuse(self.name, f"{what} is {tensor.dtype} in the checkpoint, expected float32, float16 or bfloat16")
        if tensor.dtype != param.dtype:
            param.data = param.data.float()
        return tensor

    def _create_matrices(self, layer: Any, num_experts: int, hidden: int, intermediate: int, scale_dtype: torch.dtype,
                         attrs: dict) -> None:
        """Codes and scales as parameters that count what is loaded, in the memory of what they will be repacked to."""
        self._use_parameters_loaders(layer)
        place = self._place = weight_memory(
            num_experts, hidden, intermediate, group_size=self.group_size, scale_dtype=scale_dtype,
            weight_layout=self.weight_layout, device=torch.get_default_device())
        for name, codes, scales in ("w13", place.w13, place.w13_scale), ("w2", place.w2, place.w2_scale):
            self._register(layer, name + self.suffixes[0], codes,
                           {**attrs, "weight_loader": self._counting(layer, "weights", self._as_codes)})
            self._register(layer, name + self.suffixes[1], scales,
                           {**attrs, "weight_loader": self._counting(layer, "scales", self._as_scales),
                            "quant_method": FusedMoeWeightScaleSupported.GROUP.value})

    @staticmethod
    def _use_parameters_loaders(layer: Any) -> None:
        """vLLM's older layers (FusedMoE, before RoutedExperts) call the layer's loader, not the parameter's."""
        layer.weight_loader = lambda param, *args, **kwargs: param.weight_loader(param, *args, **kwargs)

    def _register(self, layer: Any, name: str, tensor: torch.Tensor, attrs: dict) -> None:
        param = torch.nn.Parameter(tensor, requires_grad=False)
        layer.register_parameter(name, param)
        set_weight_attrs(param, attrs)

    def _check_complete(self, layer: Any) -> None:
        """Every expert's matrices and scales came. vLLM itself would serve what the memory happened to hold."""
        if not self._num_loaded and get_current_vllm_config().load_config.load_format == "dummy":
            return
        num = layer.local_num_experts
        keys = [f"{kind} of {shard}" for kind in ("weights", "scales") for shard in ("w1", "w2", "w3")]
        lacks = [f"{key} ({self._num_loaded.get(key, 0)})" for key in keys if self._num_loaded.get(key, 0) != num]
        if lacks:
            raise Error("unsupported", f"{self.name}: {', '.join(lacks)} were loaded, expected {num} of each")

    def _static_scales(self, layer: Any) -> dict[str, float]:
        """a1_scale and a2_scale of W4A8Experts, or none."""
        return {}

    def _repack(self, layer: Any) -> W4A8Experts:
        """In place, unless the parameters were moved (offloading) or widened (scales that bf16 would round)."""
        names = [name + suffix for name in ("w13", "w2") for suffix in self.suffixes]
        tensors, place = [getattr(layer, name).data for name in names], self._place
        stayed = all(a.data_ptr() == b.data_ptr() for a, b in zip(tensors, place[1:]))
        return W4A8Experts(*tensors, **self._static_scales(layer), activation=activation_of(layer, self.name),
                           weight_layout=self.weight_layout, scale_layout="plain",
                           memory=place.memory if stayed else None)

    def _release_weights(self, layer: Any) -> None:
        """Leaves parameters without elements where the checkpoint's were: vLLM asks for their leading sizes."""
        for name, param in list(layer.named_parameters(recurse=False)):
            replace_parameter(layer, name, torch.empty((*param.shape[:2], 0), dtype=param.dtype, device=param.device))
        layer.w13_weight, layer.w2_weight = (getattr(layer, name + self.suffixes[0]) for name in ("w13", "w2"))
        self._place = None

    def process_weights_after_loading(self, layer: Any) -> None:
        self._check_complete(layer)
        experts = self._repack(layer)
        self._release_weights(layer)
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.moe_kernel = self._kernel(layer, experts)
        parallel = self.moe.moe_parallel_config
        self._is_local = not (parallel.use_all2all_kernels or parallel.dp_size > 1
                              or layer.apply_router_weight_on_input)
        self._log(experts)

    def _kernel(self, layer: Any, experts: W4A8Experts) -> Any:
        transport = maybe_make_prepare_finalize(
            self.moe, self.moe_quant_config, layer._expert_routing_tables(), allow_new_interface=True)
        if transport is None:
            refuse(self.name, f"vLLM has no prepare/finalize for {self.moe.moe_parallel_config}")
        if transport.activation_format == mk.FusedMoEActivationFormat.BatchedExperts:
            made: SluiceExperts = BatchedExperts(
                self.moe, self.moe_quant_config, experts, max_num_tokens=transport.max_num_tokens_per_rank(),
                num_dispatchers=transport.num_dispatchers())
        else:
            made = StandardExperts(self.moe, self.moe_quant_config, experts)
        return mk.FusedMoEKernel(transport, made)

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make(torch.float8_e4m3fn, block_shape=FP8_BLOCK, weight_dtype="int4")

    def _log(self, experts: W4A8Experts) -> None:
        made = self.moe_kernel.fused_experts
        is_bf16 = made.activation_format() == mk.FusedMoEActivationFormat.Standard and made.expects_unquantized_inputs
        is_static = bool(experts._scales)
        recipe = {(True, False): "direct-bf16", (True, True): "bf16-static", (False, False): "direct",
                  (False, True): "requant-static"}[is_bf16, is_static]
        logger.info_once(
            "Sluice %s computes the routed experts: %s as W4A8 (%s in groups of %d, activations e4m3), recipe %s, %s "
            "with %s", _core.version(), self.format_name, self.weights_name, self.group_size, recipe,
            type(made).__name__, type(self.moe_kernel.prepare_finalize).__name__)

    def apply(self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
              shared_experts: Any, shared_experts_input: torch.Tensor | None) -> torch.Tensor:
        if self._is_local:  # Straight to the experts: no buffers of vLLM's, and no copy of the result.
            out = torch.empty_like(x)
            self.moe_kernel.fused_experts.compute(x, None, topk_ids, topk_weights, layer.expert_map, out)
            return out
        return self.moe_kernel.apply(
            hidden_states=x, w1=layer.w13_weight, w2=layer.w2_weight, topk_weights=topk_weights, topk_ids=topk_ids,
            activation=layer.activation, global_num_experts=layer.global_num_experts, expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input, shared_experts=shared_experts,
            shared_experts_input=shared_experts_input)


class PackedMethod(SluiceMoEMethod):
    """compressed-tensors pack-quantized: eight offset codes (value + 8) in an int32, even k low."""

    format_name = "compressed-tensors INT4"
    weight_layout = "uint4b8"
    suffixes = "_weight_packed", "_weight_scale"

    def create_weights(self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
                       params_dtype: torch.dtype, **attrs: Any) -> None:
        self._create_matrices(layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, attrs)
        for name in "w13", "w2":
            self._register(layer, f"{name}_weight_shape", torch.empty(num_experts, 2), attrs)


class Mxfp4Method(SluiceMoEMethod):
    """MXFP4: e2m1 codes, two in a byte, and e8m0 scales of 32. Sizes are padded to multiples of 128 with zeros, as
    vLLM's own MXFP4 methods have them padded: it then pads hidden states, and cuts the result."""

    weight_layout = "mxfp4"
    width = 32
    weights_name = "MXFP4"

    def __init__(self, layer: Any, name: str, format_name: str, suffixes: tuple[str, str]) -> None:
        self.format_name, self.suffixes = format_name, suffixes
        super().__init__(layer, name, 32)

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size: int, *args: Any,
                            **kwargs: Any) -> tuple[int, int]:
        sizes = FusedMoEMethodBase.maybe_roundup_sizes(self, hidden_size, intermediate_size, *args, **kwargs)
        hidden, intermediate = (-(-size // 128) * 128 for size in sizes)
        return hidden, intermediate

    def create_weights(self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
                       params_dtype: torch.dtype, **attrs: Any) -> None:
        self._create_matrices(layer, num_experts, hidden_size, intermediate_size_per_partition, torch.uint8, attrs)
        for name in "w13", "w2":  # What is padded stays as it is here.
            getattr(layer, name + self.suffixes[0]).data.zero_()
            getattr(layer, name + self.suffixes[1]).data.fill_(_E8M0_ONE)
            if self.suffixes[0] == "_weight_packed":  # Of compressed-tensors, some of whose exporters write it.
                self._register(layer, f"{name}_weight_shape", torch.empty(num_experts, 2), attrs)

    def _as_codes(self, param: Any, tensor: torch.Tensor, what: str) -> torch.Tensor:
        if tensor.dtype not in _CODE_TYPES:
            refuse(self.name, f"{what} is {tensor.dtype} in the checkpoint, expected uint8 or int8 "
                              f"({self.format_name})")
        return tensor.view(torch.uint8)

    def _as_scales(self, param: Any, tensor: torch.Tensor, what: str) -> torch.Tensor:
        codes = e8m0_bytes(tensor)
        if codes is None:
            refuse(self.name, f"{what} is {tensor.dtype} in the checkpoint with other values than powers of two, "
                              f"expected e8m0 ({self.format_name})")
        return codes


class W4AFP8Method(SluiceMoEMethod):
    """W4AFP8: two's complement codes, two in a byte, and static input scales, which recipe "direct" leaves out.

    "auto" uses them where the checkpoint has calibrated ones, "static" also where all are 1.0."""

    format_name = "W4AFP8"
    weight_layout = "int4"
    suffixes = "_weight", "_weight_scale_inv"

    def __init__(self, layer: Any, name: str, group_size: int, scale_dtype: torch.dtype, recipe: str) -> None:
        super().__init__(layer, name, group_size)
        self._scale_dtype, self._recipe = scale_dtype, recipe

    def create_weights(self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
                       params_dtype: torch.dtype, **attrs: Any) -> None:
        self._create_matrices(layer, num_experts, hidden_size, intermediate_size_per_partition, self._scale_dtype,
                              attrs)
        static = {**attrs, "weight_loader": self._static_scale_loader(layer)}
        self._register(layer, "w13_input_scale", torch.zeros(num_experts, 2), static)  # Gate's and up's.
        self._register(layer, "w2_input_scale", torch.zeros(num_experts, 1), static)

    @staticmethod
    def _static_scale_loader(layer: Any) -> Any:
        """vLLM's own would write up's scale over gate's."""

        def load(param: Any, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int,
                 return_success: bool = False) -> bool | None:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local != -1:
                param.data[local, 1 if shard_id == "w3" else 0] = loaded_weight.reshape(())
            return local != -1 if return_success else None

        load.supports_moe_loading = True  # type: ignore[attr-defined]
        return load

    def _static_scales(self, layer: Any) -> dict[str, float]:
        """The largest over all ranks' experts, so that ranks round alike. Empty for dynamic scales.

        Raises Error: invalid_argument if some are missing, or if there are none and recipe is static."""
        if self._recipe == "direct":
            return {}
        params = {"w13": layer.w13_input_scale, "w2": layer.w2_input_scale}
        extremes = torch.stack([x for p in params.values() for x in (-p.min(), p.max())])
        if self.moe.moe_parallel_config.use_ep:
            torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, group=get_ep_group().device_group)
        low1, high1, low2, high2 = (sign * x for sign, x in zip((-1, 1, -1, 1), extremes.tolist()))
        are_missing, are_uncalibrated = ({low1, high1, low2, high2} == {x} for x in (0.0, 1.0))
        if self._recipe == "auto" and (are_missing or are_uncalibrated):
            return {}
        if not (0 < min(low1, low2) and max(high1, high2) < float("inf")):
            raise Error("invalid_argument", f"{self.name}: input scales from {low1} to {high1} (gate, up) and {low2} "
                        f'to {high2} (down); each expert needs some above 0, or use recipe "direct"')
        return {"a1_scale": high1, "a2_scale": high2}
