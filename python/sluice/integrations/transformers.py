"""Models of Hugging Face's transformers (5.24 or newer) whose routed experts Sluice computes.

    import sluice.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained("model-w4afp8")     # experts in INT4
    model.generate(...)

Importing this registers

- the quantization method "w4afp8", and a quantizer for "compressed-tensors" in place of the one of
  transformers. A checkpoint whose routed experts are INT4 (in groups of 128; compressed-tensors also
  of 32, and MXFP4) loads with SluiceExperts in place of the experts. The rest is what transformers makes of it,
  as is every checkpoint without such experts.
- a quantizer for "mxfp4" (gpt-oss) that refuses "sluice" by name, and is transformers' own otherwise.
- "sluice" in ALL_EXPERTS_FUNCTIONS, for a model in bfloat16 that is loaded already:
  model.set_experts_implementation("sluice"). Each layer's weights are quantized at its first call.
- the same in ALL_FP8_EXPERTS_FUNCTIONS, for the MXFP4 experts of DeepSeek-V4, which are computed as they are.
- "sluice" as an ep_implementation of DistributedConfig, and in the place of "auto" for INT4 experts:
  each rank holds its share of them, and tokens go through Sluice's exchange.

The experts of all layers share one backend and the memory between their stages. They are for
inference: a backward pass is refused. docs/transformers.md has the rest.
"""

import os
import re
from typing import Any

from . import _transformers_version  # noqa: F401, I001  First: refuses a transformers without what follows.

import torch
from safetensors import safe_open
from torch import nn
from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import FineGrainedFP8Config

from .. import _core
from .._error import Error
from ._transformers_activation import activation_of
from ._transformers_fp4 import fp4_experts_forward
from ._transformers_kept import kept
from ._transformers_layers import (
    Buffers,
    ExpertParallel,
    Inference,
    LocalLayer,
    SluiceExperts,
    auto_expert_parallel,
)

__all__ = ["ExpertParallel", "SluiceExperts", "W4AFP8Config", "W4AFP8Quantizer", "forget", "sluice_experts_forward"]

_logger = logging.get_logger(__name__)


# --- What both ways have in common ----------------------------------------------------------------


def _refuse(module: nn.Module, what: str) -> None:
    raise Error("unsupported", f"{type(module).__name__}: {what}")


def _check_supported(module: nn.Module) -> str:
    """The activation of its experts, as ExpertWeights.from_arrays() takes it.

    Raises Error: unsupported, naming the class and what its experts have that Sluice's have not."""
    if module.has_bias:
        _refuse(module, "experts with biases")
    if module.is_transposed:
        _refuse(module, "experts whose matrices are transposed")
    if not module.has_gate:
        _refuse(module, "experts without a gate matrix")
    if not module.is_concatenated:
        _refuse(module, "experts whose gate and up rows alternate")
    if getattr(module, "has_post_expert_norm", False):
        _refuse(module, "experts with a norm after each")
    activation = activation_of(module)
    if activation is None:
        function = type(getattr(module, "act_fn", None)).__name__
        _refuse(module, f"an activation ({function} in _apply_gate) that is none of Sluice's: SwiGLU, also with a "
                        "limit, gpt-oss's, SiTU-GLU")
    return activation


# --- Checkpoints with INT4 experts ----------------------------------------------------------------


_OF_AN_EXPERT = re.compile(r"\.experts\.\d+\.")


def _names_in(files: list[str]) -> list[str]:
    names: list[str] = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names


def _is_experts(module: nn.Module) -> bool:
    """Whether transformers dispatches the module's forward (use_experts_implementation)."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "gate_up_proj"))


class _RoutedExperts:
    """Of a quantizer: the routed experts are SluiceExperts and are read by Sluice."""

    _modules: list[str] = []
    _directory = ""
    _ep_size = 1

    def _experts_of(self, model: Any, files: list[str] | None) -> dict[str, nn.Module]:
        """By name. Checks them, and that the checkpoint is one that Sluice reads."""
        modules = {name: module for name, module in model.named_modules() if _is_experts(module)}
        if not modules or not files:
            raise Error("unsupported", f"{type(model).__name__}: no routed experts as transformers 5 has them "
                                       "(gate_up_proj and down_proj of all experts in one module)")
        for module in modules.values():
            _check_supported(module)
        split = getattr(model.config, "distributed_config", None)
        tp_size, self._ep_size = (getattr(split, name, None) or 1 for name in ("tp_size", "ep_size"))
        if tp_size > 1 and self._ep_size == 1:
            raise Error("unsupported", f"distributed_config: tp_size={tp_size} without ep_size: INT4 experts are not "
                                       f"cut; spread them with ep_size={tp_size}")
        for module in modules.values():
            if module.num_experts % self._ep_size:
                raise Error("invalid_argument", f"distributed_config: ep_size={self._ep_size} does not divide "
                                                f"{module.num_experts} experts")
        self._directory = os.path.dirname(files[0])
        return modules

    def _replace(self, model: Any, modules: dict[str, nn.Module]) -> None:
        # Their tensors are read afterwards, not by transformers: it must neither miss nor report them.
        ignored = {re.escape(name.removeprefix("model.")) + r"\.\d+\." for name in modules}
        model._keys_to_ignore_on_load_unexpected = ignored.union(model._keys_to_ignore_on_load_unexpected or ())
        for name, module in modules.items():
            _, rows, hidden = module.gate_up_proj.shape
            model.set_submodule(name, SluiceExperts(
                module.num_experts // self._ep_size, hidden, rows // 2, activation_of(module)))
        for plan in (model.tp_plan, model.ep_plan):  # Nothing is left to cut; the experts' forward stays.
            for rule in [r for r in plan if re.search(r"experts\.(gate_up_proj|down_proj)$", r)]:
                del plan[rule]
        self._modules = list(modules)

    def update_weight_conversions(self, weight_conversions: list, model: Any) -> list:
        if self._modules:
            merged = re.compile(r"experts\.(gate_up_proj|down_proj)$")
            weight_conversions = [c for c in weight_conversions
                                  if not any(merged.search(p) for p in getattr(c, "target_patterns", []))]
        return super().update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs) or model
        if self._modules:
            group = model._mesh_manager.get_mesh("ep").get_group() if self._ep_size > 1 else None
            checkpoint, buffers = _core.Checkpoint(self._directory), Buffers(group)
            for name in self._modules:
                layer = re.search(r"layers\.(\d+)\.", name)
                if layer is None:
                    raise Error("unsupported", f"{name}: no layer number in the name")
                block = model.get_submodule(name.rpartition(".")[0])
                device = next(block.parameters()).device  # Of the router.
                model.get_submodule(name).load(checkpoint, int(layer[1]), buffers, device, group)
        return model

    def is_serializable(self) -> bool:
        return not self._modules and super().is_serializable()

    @property
    def is_trainable(self) -> bool:
        return not self._modules and super().is_trainable

    @property
    def is_compileable(self) -> bool:
        return self._ep_size == 1 and super().is_compileable


@register_quantization_config("w4afp8")
class W4AFP8Config(FineGrainedFP8Config):
    """INT4 experts in groups of 128; the other matrices are FP8 in blocks, or as in the model."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "quant_method": "w4afp8"})

    def to_dict(self) -> dict[str, Any]:
        """What goes to config.json. `expert_dtype`, which FP8's config has and gives as "fp8", is false of these
        experts, and a reader would refuse it."""
        return {key: value for key, value in super().to_dict().items() if key != "expert_dtype"}


@register_quantizer("w4afp8")
class W4AFP8Quantizer(_RoutedExperts, FineGrainedFP8HfQuantizer):
    """Loads W4AFP8: experts through Sluice, FP8 matrices as transformers does."""

    _has_fp8 = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise Error("unsupported", "w4afp8: only checkpoints that are quantized already; make one with "
                                       "`sluice convert --format w4afp8`")
        self._environment = kwargs  # What FP8 needs is asked for when there is some.

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        modules = self._experts_of(model, checkpoint_files)
        names = _names_in(checkpoint_files)
        self._has_fp8 = any(n.endswith("weight_scale_inv") and not _OF_AN_EXPERT.search(n) for n in names)
        if self._has_fp8:
            super().validate_environment(**self._environment)
            super()._process_model_before_weight_loading(model, **kwargs)
        else:
            self.serialized_names = {}
        self._replace(model, modules)

    def get_load_operations(self) -> dict:
        return super().get_load_operations() if self._has_fp8 else {}


class CompressedTensorsQuantizer(_RoutedExperts, CompressedTensorsHfQuantizer):
    """As transformers', but for experts in INT4 or MXFP4, in groups, which are Sluice's."""

    def _has_our_experts(self, files: list[str] | None) -> bool:
        scheme = self.quantization_config.quantization_config
        groups = scheme.config_groups.values() if scheme and not self.quantization_config.dequantize else ()
        weights = [(group.weights, group.format or scheme.format) for group in groups if group.weights is not None]
        is_ours = any(w.num_bits == 4 and (
            (w.type == "int" and w.group_size in (32, 128)) or
            (w.type == "float" and w.group_size == 32 and form == "mxfp4-pack-quantized")) for w, form in weights)
        return is_ours and bool(files) and files[0].endswith(".safetensors") and any(
            n.endswith("weight_packed") and _OF_AN_EXPERT.search(n) for n in _names_in(files))

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if self._has_our_experts(checkpoint_files):
            self._replace(model, self._experts_of(model, checkpoint_files))
            stored = {n.rpartition(".")[2] for n in _names_in(checkpoint_files) if not _OF_AN_EXPERT.search(n)}
            if not stored & (set(self.serialized_names["weight"]) - {"weight"}):
                return  # Nothing else is compressed; the package would hook every module to undo that.
        super()._process_model_before_weight_loading(model, **kwargs)


class Mxfp4Quantizer(Mxfp4HfQuantizer):
    """As transformers', whose class for gpt-oss' MXFP4 experts would pass over a request for Sluice's without a word."""

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(model.config, "_experts_implementation", None) == "sluice":
            _refuse(model, "experts_implementation='sluice' with MXFP4 experts that have biases (quant_method 'mxfp4', "
                           "gpt-oss); leave it out, and transformers' own run")
        super()._process_model_before_weight_loading(model, *args, **kwargs)


AUTO_QUANTIZER_MAPPING["compressed-tensors"] = CompressedTensorsQuantizer
AUTO_QUANTIZER_MAPPING["mxfp4"] = Mxfp4Quantizer


# --- Models in bfloat16 ---------------------------------------------------------------------------


def _int4_of(module: nn.Module, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [E, n, k / 2] uint8, scales [E, n, k / 128] float32) of [E, n, k]: scale = amax / 7.

    Raises Error: unsupported, naming the class, `name` and the expert, for NaN and infinity."""
    experts, n, k = weight.shape
    codes = torch.empty(experts, n, k // 2, dtype=torch.uint8)
    scales = torch.empty(experts, n, k // 128)
    for e in range(experts):
        groups = weight[e].detach().cpu().float().reshape(n, k // 128, 128)
        scale = groups.abs().amax(-1) / 7
        if not torch.isfinite(scale).all():
            _refuse(module, f"{name} of expert {e} has NaN or infinity; INT4 has neither")
        is_zero = scale == 0
        q = torch.round(groups / scale.masked_fill(is_zero, 1)[..., None]).clamp(-8, 7).to(torch.int8)
        q = q.reshape(n, k // 2, 2).bitwise_and(0xF).to(torch.uint8)
        codes[e] = q[..., 0] | q[..., 1] << 4
        scales[e] = scale.masked_fill(is_zero, 2.0**-24)
    return codes, scales


_buffers = Buffers()


def _quantized(module: nn.Module) -> LocalLayer:
    """Made at the first call, and again when the weights have changed."""
    if not module.has_gate:
        _check_supported(module)  # Raises: there is no gate_up_proj to look at.
    return kept.layer_of(module, [module.gate_up_proj, module.down_proj], lambda: _quantize(module))


def _quantize(module: nn.Module) -> LocalLayer:
    activation = _check_supported(module)
    _, rows, hidden = module.gate_up_proj.shape
    for name, width in ("hidden", hidden), ("intermediate", rows // 2):
        if width % 128:
            _refuse(module, f"{name} size {width} is no multiple of 128")
    _logger.warning_once(
        f"{type(module).__name__}: experts are quantized to INT4 at the first call of each layer (scale = amax / 7 "
        "of 128 weights), and computed by Sluice. The bfloat16 weights stay as they are.")
    gate, up = (_int4_of(module, "gate_up_proj", half) for half in module.gate_up_proj.chunk(2, dim=1))
    weights = _core.ExpertWeights.from_arrays(gate, up, _int4_of(module, "down_proj", module.down_proj),
                                               activation=activation)
    device = module.gate_up_proj.device
    group, lock = _buffers.local_group(device, hidden, rows // 2)
    with lock:
        experts = group.add_layer(weights, name=type(module).__name__)
    return LocalLayer(group, lock, device, experts)


def forget(module: nn.Module) -> None:
    """Experts in the module are quantized, or repacked, anew at their next call. For weights whose change nobody can
    see: on a GPU one in place through `.data`; on a CPU the same of a few numbers."""
    kept.forget(module)


def sluice_experts_forward(self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                           top_k_weights: torch.Tensor) -> torch.Tensor:
    """experts_implementation="sluice": [T, H], [T, K], [T, K] -> [T, H]. Ids >= num_experts, which mark
    other ranks' experts under expert parallelism, are skipped.

    Raises Error: unsupported, naming the class and what its experts have that Sluice's have not.
    """
    return Inference.apply(_quantized(self), hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register("sluice", sluice_experts_forward)
ALL_FP8_EXPERTS_FUNCTIONS.register("sluice", fp4_experts_forward)
EPImplementationInterface.register("sluice", ExpertParallel)
EPImplementationInterface.register("auto", auto_expert_parallel)
