"""What sluice.integrations.sglang puts in the place of SGLang's own MXFP4 experts.

SGLang has three configurations that come to such experts: Fp8Config where a model's experts are FP4 (DeepSeek-V4),
Mxfp4Config (Kimi-K3, whose model makes one of its compressed-tensors configuration, and gpt-oss), and
compressed-tensors of any other model. All three load e2m1 codes and e8m0 scales, under names of their own.
"""

from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE, FusedMoeWeightScaleSupported
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
from sglang.srt.layers.quantization.utils import is_layer_skipped
from sglang.srt.utils import set_weight_attrs
from torch.nn import Parameter

from .. import __version__
from ..compat._w4a8_scales import e8m0_bytes
from ..compat.w4a8 import WeightMemory, weight_memory
from ._sglang_experts import (
    LayerExperts,
    _check_in_place,
    _let_go,
    _logged,
    _logger,
    _refuse,
    _refuse_wrapper,
    _set_dispatcher,
    check_supported,
)
from .sglang import setting

_SWITCH = "SLUICE_MXFP4=0 leaves MXFP4 experts to SGLang"
_NAN, _ONE = 0xFF, 127  # Of e8m0. A scale that the checkpoint lacks stays NaN, and is refused for it.


class SluiceMxfp4MoEMethod(FusedMoEMethodBase):
    """MXFP4 experts, with SGLang's parameters under SGLang's names: codes [E, n, k / 2] and scales [E, n, k / 32], of
    uint8. The intermediate size of a rank is padded to a multiple of 128 with zeros."""

    runs_any_dispatch = True  # See run_moe_core().
    runner = None  # None: SGLang's router gives this rank's own numbers of experts, and their weights.
    _experts: LayerExperts

    def __init__(self, prefix: str, scale_suffix: str) -> None:
        self.prefix = prefix
        self._names = tuple(name + suffix for name in ("w13_weight", "w2_weight") for suffix in ("", scale_suffix))

    def create_weights(self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
                       params_dtype: torch.dtype, **attrs: Any) -> None:
        _refuse_wrapper(layer, self)
        check_supported(layer, layer.moe_runner_config, 32, "MXFP4", _SWITCH)
        if hidden_size != getattr(layer, "hidden_size_unpadded", hidden_size):
            _refuse(layer, f"hidden size, {layer.hidden_size_unpadded} is no multiple of 256, as SGLang pads it for "
                           "--moe-runner-backend flashinfer_mxfp4", _SWITCH)
        if setting("SLUICE_RECIPE") == "static":
            _refuse(layer, "SLUICE_RECIPE=static, and MXFP4 has no static scales of inputs", _SWITCH)
        padded = -(-intermediate_size_per_partition // 128) * 128
        self._place: WeightMemory | None = weight_memory(
            num_experts, hidden_size, padded, group_size=32, weight_layout="mxfp4", device=torch.empty(0).device)
        load = attrs.pop("weight_loader")
        self._came: dict[str, set] = {name: set() for name in self._names}  # (matrix, expert), also of other ranks.
        for name, tensor in zip(self._names, self._place[1:]):
            is_scale = "scale" in name
            tensor.fill_(_NAN if is_scale else 0)
            if is_scale:  # What is padded has numbers, whether SGLang writes there (0.5.23) or not (0.5.20).
                rows, groups = intermediate_size_per_partition, intermediate_size_per_partition // 32
                padding = tensor.unflatten(1, (2, padded))[:, :, rows:] if name == self._names[1] else (
                    tensor[:, :, groups:])
                padding.fill_(_ONE)
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
            set_weight_attrs(getattr(layer, name), {
                **attrs, "weight_loader": _as_bytes(layer, load, is_scale, self._came[name])})
            if is_scale:
                getattr(layer, name).quant_method = FusedMoeWeightScaleSupported.GROUP.value

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        self.moe_runner_config = moe_runner_config

    def process_weights_after_loading(self, layer: Any) -> None:
        if self._place is None:  # SGLang may ask again.
            return
        _check_in_place(layer, self._place, self._names)
        self._check_codes(layer)
        self._experts = LayerExperts(layer, self.moe_runner_config, "MXFP4", self._place, None, "mxfp4")
        self._place = None
        _let_go(layer, self._names)
        _set_dispatcher(layer)

    def _check_codes(self, layer: Any) -> None:
        """Whatever came has both. A scale that did not come is NaN and refused for it; codes would be zeros."""
        for codes, scales in (self._names[:2], self._names[2:]):
            for matrix, expert in sorted(self._came[scales] - self._came[codes]):
                _refuse(layer, f"{matrix} of expert {expert} has scales and no weights that SGLang loads", _SWITCH)

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        return self._experts.run(layer, dispatch_output)


def _as_bytes(layer: Any, load: Any, is_scale: bool, came: set) -> Any:
    """SGLang's loader, which copies numbers, behind one that hands on the bytes of e2m1 and e8m0."""

    def loader(param: Any, loaded_weight: torch.Tensor, weight_name: str, *args: Any, **kwargs: Any) -> None:
        if is_scale:
            codes = e8m0_bytes(loaded_weight)
            if codes is None:
                _refuse(layer, f"{weight_name} is {loaded_weight.dtype} that is no power of two; MXFP4 has scales of "
                               "e8m0", _SWITCH)
        else:
            if loaded_weight.dtype not in _CODE_TYPES:
                _refuse(layer, f"{weight_name} is {loaded_weight.dtype}; MXFP4 has two codes in a byte of uint8 or "
                               "int8", _SWITCH)
            codes = loaded_weight.view(torch.uint8)
        load(param, codes, weight_name, *args, **kwargs)
        given = dict(zip(("shard_id", "expert_id"), args)) | kwargs
        came.add((given["shard_id"], given.get("expert_id")))

    return loader


_CODE_TYPES = {torch.uint8, torch.int8} | {
    getattr(torch, name) for name in ("float4_e2m1fn_x2",) if hasattr(torch, name)}


# --- Where SGLang asks for a method ---------------------------------------------------------------


def _scale_suffix(config: Any, layer: Any, prefix: str) -> str | None:
    """Of the scales' names, for experts that are MXFP4; None for all others."""
    if isinstance(config, Fp8Config):
        if not config.is_fp4_experts or is_layer_skipped(
                prefix, config.ignored_layers, fused_mapping=config.packed_modules_mapping):
            return None
        if config.dequant_fp4_to_fp8:
            _refuse(layer, "SGLANG_DSV4_FP4_DEQUANT=1 makes FP8 of FP4 experts: leave it out", _SWITCH)
        return "_scale_inv"
    if isinstance(config, Mxfp4Config):
        return "_scale" if config.is_checkpoint_mxfp4_serialized else None
    return "_scale" if config._is_mxfp4_moe(layer_name=prefix) else None


def quant_method(original: Any, config: Any, layer: Any, prefix: str = "") -> Any:
    """Around get_quant_method() of the three configurations: Sluice's method for MXFP4 experts."""
    suffix = _scale_suffix(config, layer, prefix) if isinstance(layer, FusedMoE) else None
    if suffix is None:
        return original(config, layer, prefix)
    if setting("SLUICE_MXFP4") == "0":
        if "MXFP4 left" not in _logged:
            _logged.add("MXFP4 left")
            _logger.info("Sluice %s: %s: MXFP4, and SLUICE_MXFP4=0: SGLang serves it", __version__, prefix)
        return original(config, layer, prefix)
    return SluiceMxfp4MoEMethod(prefix, suffix)
