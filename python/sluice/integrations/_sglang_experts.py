"""What sluice.integrations.sglang puts in the place of SGLang's own INT4 experts."""

import logging
from typing import Any, NoReturn

import torch
import torch.distributed as distributed
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoeWeightScaleSupported
from sglang.srt.layers.moe.token_dispatcher import DispatchOutputChecker, StandardCombineInput
from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLCombineInput, DeepEPNormalCombineInput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsMoEScheme
from sglang.srt.layers.quantization.w4afp8 import W4AFp8MoEMethod
from sglang.srt.runtime_context import get_context, get_server_args
from sglang.srt.utils import set_weight_attrs
from torch.nn import Parameter

from .. import __version__, _core
from .._error import Error
from ..compat.w4a8 import W4A8Experts, WeightMemory, weight_memory
from .sglang import setting

_logger = logging.getLogger("sluice.integrations.sglang")


# --- What is refused ------------------------------------------------------------------------------


_ELSE = "SLUICE_SGLANG=0 serves it without Sluice"


def _refuse(layer: Any, what: str, otherwise: str = _ELSE) -> NoReturn:
    raise Error("unsupported", f"{layer.layer_name or f'layer {layer.layer_id}'}: {what}; {otherwise}")


# SGLang itself chooses flashinfer_mxfp4 for the FP4 experts of DeepSeek-V4.
_RUNNERS = {"INT4": ("auto", "cutlass", "deep_gemm"), "MXFP4": ("auto", "deep_gemm", "flashinfer_mxfp4")}


def activation_of(layer: Any, config: Any, otherwise: str = _ELSE) -> str:
    """In Sluice's words, from SGLang's MoeRunnerConfig."""
    if not config.is_gated:
        _refuse(layer, "experts without a gate matrix (is_gated=False)", otherwise)
    numbers = {name: getattr(config, name, None) for name in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")}
    if config.activation == "situ":  # Kimi-K3's, whose two numbers come under names of another one.
        beta, linear_beta = numbers["gemm1_alpha"], numbers["gemm1_clamp_limit"]
        if beta is None or linear_beta is None:
            _refuse(layer, f"activation 'situ' with beta {beta} and linear beta {linear_beta}", otherwise)
        return f"situ:beta={beta:g},linear_beta={linear_beta:g}"
    if config.activation != "silu":
        _refuse(layer, f"activation {config.activation!r}; silu and situ are supported", otherwise)
    for name, value in numbers.items():
        if value is not None:
            _refuse(layer, f"{name}={value}: an activation of its own", otherwise)
    limit = getattr(config, "swiglu_limit", None)
    return f"swiglu:limit={limit:g}" if limit else "swiglu"


def check_supported(layer: Any, config: Any, group_size: int, kind: str = "INT4", otherwise: str = _ELSE) -> None:
    """Raises Error: unsupported, naming the layer and the field, before any weight is read.

    kind: INT4 or MXFP4, whose intermediate size of a rank may be any multiple of 32: it is padded."""
    if layer.with_bias:
        _refuse(layer, f"{kind} experts with biases (with_bias=True)", otherwise)
    activation_of(layer, config, otherwise)
    for name, value in {"apply_router_weight_on_input": True, "no_combine": True}.items():
        if getattr(config, name, None) == value:
            _refuse(layer, f"{name}={value}", otherwise)
    if layer.num_fused_shared_experts:
        _refuse(layer, f"{layer.num_fused_shared_experts} shared experts fused with the routed ones; launch with "
                       "--disable-shared-experts-fusion", otherwise)
    if config.params_dtype != torch.bfloat16:
        _refuse(layer, f"hidden states of {config.params_dtype}; launch with --dtype bfloat16", otherwise)
    if group_size not in (32, 128):
        _refuse(layer, f"INT4 weights in groups of {group_size}; 128 and 32 are supported", otherwise)
    sizes = {"hidden size": (config.hidden_size, 128),
             f"intermediate size, cut by {layer.moe_tp_size}": (config.intermediate_size_per_partition,
                                                                128 if kind == "INT4" else 32)}
    for name, (size, step) in sizes.items():
        if size % step:
            _refuse(layer, f"{name}, {size} is no multiple of {step}", otherwise)
    if get_moe_a2a_backend().value not in ("none", "deepep"):
        _refuse(layer, f"--moe-a2a-backend {get_moe_a2a_backend().value}; none and deepep are supported", otherwise)
    if get_moe_runner_backend().value not in _RUNNERS[kind]:
        _refuse(layer, f"--moe-runner-backend {get_moe_runner_backend().value} asks for experts of SGLang's own; "
                       "leave it out", otherwise)
    if _of_server("enable_eplb"):
        _refuse(layer, "--enable-eplb moves experts between ranks while it serves", otherwise)


def _of_server(name: str) -> Any:
    """What a switch of the server came to; releases before 0.5.18 keep that in the arguments themselves."""
    context = get_context()
    return context.config_leaf(name) if hasattr(context, "config_leaf") else getattr(get_server_args(), name)


def _refuse_wrapper(layer: Any, method: Any) -> None:
    if layer.quant_method is not method:
        _refuse(layer, f"{type(layer.quant_method).__name__} is around the experts' method")


# --- One layer ------------------------------------------------------------------------------------


_backends: dict[torch.device, Any] = {}
_logged: set[str] = set()


def _backend(device: torch.device) -> Any:
    if device not in _backends:
        group = get_tp_group()
        ranks = {"local_rank": group.rank_in_group, "num_local_ranks": group.world_size}
        _backends[device] = _core.Backend("cpu", **ranks) if device.type == "cpu" else _core.Backend(
            f"cuda:{device.index or 0}")
    return _backends[device]


def static_scales(layer: Any, s1: torch.Tensor, s2: torch.Tensor) -> tuple[float, float] | None:
    """The largest of all ranks, or None for dynamic ones, as SLUICE_RECIPE says. Collective: SGLang makes and
    loads the same layers on every rank of the group."""
    pair = torch.stack([s1.float().max(), s2.float().max(), -s1.float().min(), -s2.float().min()])
    if get_tp_group().world_size > 1:
        distributed.all_reduce(pair, distributed.ReduceOp.MAX, group=get_tp_group().device_group)
    high1, high2, low1, low2 = pair.tolist()
    wanted = setting("SLUICE_RECIPE")
    is_one = [(high, -low) == (1.0, 1.0) for high, low in ((high1, low1), (high2, low2))]
    if wanted == "direct" or (wanted == "auto" and all(is_one)):
        return None
    if wanted == "auto" and 1.0 in (high1, high2):
        _refuse(layer, f"some input scales are calibrated and the largest are 1.0 (w13 {high1:g}, w2 {high2:g}): "
                       "SGLang has 1.0 where a checkpoint has none; choose with SLUICE_RECIPE=static or direct")
    return high1, high2


class LayerExperts:
    """The repacked experts of one layer, between SGLang's dispatch and combine."""

    def __init__(self, layer: Any, config: Any, kind: str, place: WeightMemory, scales: tuple[float, float] | None,
                 weight_layout: str = "int4") -> None:
        """place: the loaded weights, in the memory where the repacked ones will lie."""
        if getattr(layer.dispatcher, "skip_local_expert_mapping", False):
            # Releases before 0.5.23 ask the server's runner, which they choose for DeepSeek-V4 themselves, whether to
            # leave experts' numbers over all ranks. Sluice takes a rank's own.
            layer.dispatcher.skip_local_expert_mapping = False
        self._factor = getattr(config, "routed_scaling_factor", None) or 1.0
        s1, s2 = scales or (None, None)
        activation = activation_of(layer, config)
        device, groups = place.memory.device, config.hidden_size // place.w13_scale.shape[-1]
        self._experts = W4A8Experts(
            *place[1:], a1_scale=s1, a2_scale=s2, activation=activation, backend=_backend(device),
            max_rows=_largest_call(config), weight_layout=weight_layout, scale_layout="plain", memory=place.memory)
        recipe = "static scales of the checkpoint" if scales else "dynamic scales for each 128 values"
        what = (f"{kind} experts, {self._experts.num_experts} of {config.num_experts}, hidden {self._experts.hidden}, "
                f"intermediate {self._experts.intermediate}, groups of {groups}, {activation}, {recipe}, {device}, "
                f"--moe-a2a-backend {get_moe_a2a_backend().value}")
        line = f"Sluice {__version__}: {layer.layer_name or layer.layer_id}: {what}"
        line += f", s1 {s1:g}, s2 {s2:g} (largest of all ranks)" if scales else ""
        _logger.log(logging.DEBUG if what in _logged else logging.INFO, "%s", line)
        _logged.add(what)

    def standard(self, layer: Any, dispatched: Any) -> StandardCombineInput:
        """--moe-a2a-backend none: every rank has the same tokens, -1 stands for experts of other ranks, and the
        ranks' sums are added up afterwards."""
        if dispatched.hidden_states_scale is not None:
            _refuse(layer, "hidden states that were quantized before the experts")
        if not TopKOutputChecker.format_is_standard(dispatched.topk_output):
            _refuse(layer, f"a router's output of {type(dispatched.topk_output).__name__}")
        weights, ids, _ = dispatched.topk_output
        if self._factor != 1.0:
            weights = weights.float() * self._factor
        return StandardCombineInput(self._grouped(dispatched.hidden_states, None, ids, weights))

    def normal(self, dispatched: Any) -> torch.Tensor:
        """deepep, normal: a token came once, whatever number of experts here it has. [rows, hidden]."""
        x, scale = dispatched.hidden_states, dispatched.hidden_states_scale
        return self._grouped(x, scale, dispatched.topk_ids, dispatched.topk_weights)

    def low_latency(self, dispatched: Any) -> torch.Tensor:
        """deepep, low latency: rows lie by expert, and combine applies the router's weights. [E, m, hidden]."""
        return self._experts.masked(dispatched.hidden_states, dispatched.hidden_states_scale, dispatched.masked_m,
                                    expected_m=dispatched.expected_m)

    def _grouped(self, x: torch.Tensor, scale: Any, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._experts.grouped(x, scale, ids, weights.float())

    def run(self, layer: Any, dispatched: Any) -> Any:
        """For a dispatch of any of the three, what combine takes."""
        if DispatchOutputChecker.format_is_standard(dispatched):
            return self.standard(layer, dispatched)
        if DispatchOutputChecker.format_is_deepep_ll(dispatched):
            y, combine = self.low_latency(dispatched), DeepEPLLCombineInput
        elif DispatchOutputChecker.format_is_deepep_normal(dispatched):
            y, combine = self.normal(dispatched), DeepEPNormalCombineInput
        else:
            _refuse(layer, f"a dispatch of {type(dispatched).__name__}")
        return combine(hidden_states=y, topk_ids=dispatched.topk_ids, topk_weights=dispatched.topk_weights)


def _largest_call(config: Any) -> int:
    """Rows of the largest call that can be told in advance: a prefill of --chunked-prefill-size tokens."""
    tokens = _of_server("chunked_prefill_size") or 0
    return max(tokens, 1) * (config.top_k or 1)


def _set_dispatcher(layer: Any) -> None:
    """In bf16 a token is quantized where its experts are, which gives the same codes; in low latency the wire
    is e4m3. --deepep-dispatcher-output-dtype overrides both, and both are computed either way."""
    if hasattr(layer, "dispatcher"):
        layer.dispatcher.set_quant_config({"normal_dispatcher_output_dtype": "bf16",
                                           "low_latency_dispatcher_output_dtype": "fp8"})


def _check_in_place(layer: Any, place: WeightMemory, names: tuple[str, ...]) -> None:
    """That SGLang loaded into the memory that it was given."""
    for name, view in zip(names, place[1:]):
        if getattr(layer, name).data_ptr() != view.data_ptr():
            _refuse(layer, f"{name} was moved to {getattr(layer, name).device} while weights were loaded "
                           "(--cpu-offload-gb?)")


def _let_go(layer: Any, names: tuple[str, ...]) -> None:
    """SGLang's parameters without elements: the repacked experts lie in their memory now. Loading anything into
    them again is refused."""

    def refuse(param: Any, loaded: Any, name: str, *_: Any, **__: Any) -> None:
        _refuse(layer, f"new weights for {name}: Sluice repacked the experts when the model was loaded")

    for name in names:
        param = getattr(layer, name)
        param.data = torch.empty(0, dtype=param.dtype, device=param.device)
        param.weight_loader = refuse


# --- W4AFP8 ---------------------------------------------------------------------------------------


_W4AFP8_WEIGHTS = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")  # As in WeightMemory.
_W4AFP8_INPUT_SCALES = ("w13_input_scale", "w2_input_scale")


class SluiceW4AFp8MoEMethod(W4AFp8MoEMethod):
    """In the place of W4AFp8MoEMethod, whose parameters, and so whose loading, it keeps."""

    _experts: LayerExperts

    def create_weights(self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
                       *args: Any, **kwargs: Any) -> None:
        """SGLang's parameters, with the weights in memory that the repacked experts will have."""
        _refuse_wrapper(layer, self)
        check_supported(layer, layer.moe_runner_config, self.quant_config.group_size)
        device = torch.empty(0).device  # SGLang makes its parameters on the default device.
        with torch.device("meta"):
            super().create_weights(layer, num_experts, hidden_size, intermediate_size_per_partition, *args, **kwargs)
        self._place: WeightMemory | None = weight_memory(
            num_experts, hidden_size, intermediate_size_per_partition, group_size=self.quant_config.group_size,
            scale_dtype=layer.w13_weight_scale_inv.dtype, device=device)
        real = dict(zip(_W4AFP8_WEIGHTS, self._place[1:]))
        real |= {name: torch.ones_like(getattr(layer, name), device=device) for name in _W4AFP8_INPUT_SCALES}
        for name, tensor in real.items():
            if name.endswith("_weight_scale_inv"):
                tensor.zero_()  # A scale that the checkpoint lacks is refused for it.
            attributes = vars(getattr(layer, name))
            setattr(layer, name, Parameter(tensor, requires_grad=False))
            set_weight_attrs(getattr(layer, name), attributes)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self._place is None:  # SGLang may ask again.
            return
        _check_in_place(layer, self._place, _W4AFP8_WEIGHTS)
        scales = static_scales(layer, layer.w13_input_scale, layer.w2_input_scale)
        self._experts = LayerExperts(layer, self.moe_runner_config, "W4AFP8", self._place, scales)
        self._place = None
        _let_go(layer, _W4AFP8_WEIGHTS + _W4AFP8_INPUT_SCALES)
        _set_dispatcher(layer)

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        return self._experts.run(layer, dispatch_output)

    def apply_deepep_ll(self, layer: Any, dispatch_output: Any) -> torch.Tensor:
        return self._experts.low_latency(dispatch_output)

    def apply_deepep_normal(self, layer: Any, dispatch_output: Any) -> torch.Tensor:
        return self._experts.normal(dispatch_output)


# --- INT4 of compressed-tensors -------------------------------------------------------------------


_INT4_WEIGHTS = ("w13_weight_packed", "w13_weight_scale", "w2_weight_packed", "w2_weight_scale")  # As in WeightMemory.
_INT4_SHAPES = ("w13_weight_shape", "w2_weight_shape")


class SluiceInt4MoE(CompressedTensorsMoEScheme):
    """Scheme of a layer whose experts are INT4 in groups, packed eight to an int32 as offset codes (Kimi-K2).
    Activations are e4m3, quantized dynamically: the format has no static scales."""

    runner = None
    _experts: LayerExperts

    def __init__(self, quantization_config: Any, group_size: int) -> None:
        self.quant_config, self.group_size = quantization_config, group_size

    @classmethod
    def get_min_capability(cls) -> int:
        return 90

    def create_weights(self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
                       params_dtype: torch.dtype, **attrs: Any) -> None:
        """As the checkpoint has them, [E, n, k / 8] int32 and [E, n, k / group] bfloat16."""
        if getattr(layer.quant_method, "quant_config", None) is not self.quant_config:
            _refuse(layer, f"{type(layer.quant_method).__name__} is around the experts' method")
        check_supported(layer, layer.moe_runner_config, self.group_size)
        if setting("SLUICE_RECIPE") == "static":
            _refuse(layer, "SLUICE_RECIPE=static, and compressed-tensors has no static scales of inputs")
        attrs["quant_method"] = FusedMoeWeightScaleSupported.GROUP.value
        exact = {**attrs, "weight_loader": _exact_in_bf16(layer, attrs["weight_loader"])}
        self._place: WeightMemory | None = weight_memory(
            num_experts, hidden_size, intermediate_size_per_partition, group_size=self.group_size,
            weight_layout="uint4b8", device=torch.empty(0).device)
        for name, tensor in zip(_INT4_WEIGHTS, self._place[1:]):
            self._add(layer, name, tensor, exact if name.endswith("scale") else attrs)
        for name in _INT4_SHAPES:
            self._add(layer, name, torch.empty(num_experts, 2, dtype=torch.int64), attrs)

    @staticmethod
    def _add(layer: Any, name: str, tensor: torch.Tensor, attributes: dict) -> None:
        if name.endswith("scale"):
            tensor.zero_()
        layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        set_weight_attrs(getattr(layer, name), attributes)

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        self.moe_runner_config = moe_runner_config

    def process_weights_after_loading(self, layer: Any) -> None:
        if self._place is None:
            return
        _check_in_place(layer, self._place, _INT4_WEIGHTS)
        self._experts = LayerExperts(layer, self.moe_runner_config, "compressed-tensors INT4", self._place, None,
                                     "uint4b8")
        self._place = None
        _let_go(layer, _INT4_WEIGHTS + _INT4_SHAPES)
        _set_dispatcher(layer)

    def restore_weights_before_loading(self, layer: Any) -> None:
        _refuse(layer, "new weights: Sluice repacked the experts when the model was loaded")

    def apply_weights(self, layer: Any, dispatch_output: Any) -> Any:
        return self._experts.run(layer, dispatch_output)


def _exact_in_bf16(layer: Any, load: Any) -> Any:
    def loader(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if not torch.equal(loaded_weight.bfloat16().to(loaded_weight.dtype), loaded_weight):
            _refuse(layer, f"scales of {loaded_weight.dtype} that are no bfloat16")
        load(param, loaded_weight, *args, **kwargs)

    return loader


def moe_scheme(result: Any, config: Any, layer: Any, layer_name: str | None = None) -> Any:
    """After CompressedTensorsConfig.get_moe_scheme(): Sluice's scheme for INT4; None leaves the result."""
    scheme = None if result is None else config.get_scheme_dict(layer, f"{layer_name}.0.gate_proj")
    weights = scheme and scheme.get("weights")
    if weights is None or weights.num_bits != 4 or str(getattr(weights.type, "value", weights.type)) != "int":
        if result is not None and "not INT4" not in _logged:
            _logged.add("not INT4")
            _logger.info("Sluice %s: %s: %s, not INT4: SGLang serves it", __version__, layer_name,
                         type(result).__name__)
        return None
    word = lambda value: str(getattr(value, "value", value))  # noqa: E731  Of an enumeration, or its value.
    asks = {"strategy": (word(weights.strategy), ("group",)), "symmetric": (bool(weights.symmetric), (True,)),
            "actorder": (word(getattr(weights, "actorder", None)), ("None", "weight", "static")),
            "format": (word(scheme.get("format") or config.quant_format), ("pack-quantized",))}
    for name, (got, supported) in asks.items():
        if got not in supported:
            _refuse(layer, f"INT4 weights with {name}={got}; {' or '.join(map(str, supported))} is supported")
    return SluiceInt4MoE(config, weights.group_size)


def run_moe_core(original: Any, layer: Any, dispatch_output: Any) -> Any:
    """Around DeepEPMoE.run_moe_core(), which knows of no compressed-tensors and, without DeepGEMM, of no MXFP4."""
    scheme, method = getattr(layer, "scheme", None), layer.quant_method
    if isinstance(scheme, SluiceInt4MoE):
        return scheme.apply_weights(layer, dispatch_output)
    if getattr(method, "runs_any_dispatch", False):
        return method.apply(layer, dispatch_output)
    return original(layer, dispatch_output)
