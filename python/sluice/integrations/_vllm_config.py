"""vLLM's quantization configs whose routed experts Sluice computes: "w4afp8" and "sluice"."""

import re
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from .._error import Error
from ._vllm_methods import PackedMethod, W4AFP8Method, refuse

_EXPERT_WEIGHT = re.compile(r"(.*\.experts)\.\d+\.[^.]+\.weight$")
_INT8, _FP8 = ("I8", "U8"), ("F8_E4M3",)


def _recipe() -> str:
    """--additional-config '{"sluice": {"recipe": "direct"}}': it reaches the workers on other hosts, too."""
    options = get_current_vllm_config().additional_config
    options = options.get("sluice", {}) if isinstance(options, dict) else {}
    recipe = options.get("recipe", "auto")
    if set(options) - {"recipe"} or recipe not in ("auto", "static", "direct"):
        raise Error("invalid_argument", f"additional_config['sluice']: {options}; known is recipe, one of auto, static "
                                        "and direct")
    return recipe


class W4AFP8Config(Fp8Config):
    """Routed experts in INT4 (Sluice's), other matrices FP8 in blocks of 128x128 or as in the checkpoint (vLLM's).

    What a matrix is comes from the checkpoint's headers, since W4AFP8 checkpoints have no key that says so.
    """

    def __init__(self, ignored_layers: list[str] | None = None) -> None:
        super().__init__(is_checkpoint_fp8_serialized=True, activation_scheme="dynamic",
                         ignored_layers=ignored_layers, weight_block_size=[128, 128])
        # By the name of a layer's experts, of those that are INT4: the group size, and the type of scales.
        self._int4: dict[str, tuple[int, torch.dtype]] = {}

    @classmethod
    def get_name(cls) -> str:
        return "w4afp8"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 90

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return []

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, **_: Any) -> str | None:
        """For checkpoints that say so, and for those that TensorRT-LLM wrote, which say "MIXED_PRECISION" in
        hf_quant_config.json, if the user does."""
        method = (hf_quant_cfg or {}).get("quant_method")
        if user_quant == "w4afp8" and method not in (None, "", "w4afp8"):
            refuse("--quantization w4afp8", f"quant_method is {method!r} in the checkpoint")
        return "w4afp8" if "w4afp8" in (method, user_quant) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "W4AFP8Config":
        for key in "ignored_layers", "modules_to_not_convert", "ignore":
            if config.get(key):
                return cls(list(config[key]))
        return cls()

    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        """Input scales have other names than the weights: w1, w3, w2 for gate, up, down."""
        names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
        renamed = {re.compile(rf"(\.experts\.\d+)\.{old}\.input_scale$"): rf"\1.{new}.input_scale"
                   for old, new in names.items()}
        return WeightsMapper(orig_to_new_regex=renamed) | Fp8Config.get_cache_scale_mapper()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Reads which matrices are INT4 and FP8, and in what groups, from the headers of the checkpoint's files."""
        headers = get_safetensors_params_metadata(model_name, revision=revision)
        if not headers:
            refuse(model_name, "w4afp8 needs the headers of its safetensors files, and none were found")
        for name, header in headers.items():
            if not name.endswith(".weight") or len(header["shape"]) != 2:
                continue
            layer, scale = name.removesuffix(".weight"), headers.get(f"{name}_scale_inv")
            expert = _EXPERT_WEIGHT.match(name)
            if expert and header["dtype"] in _INT8:
                if scale is None:
                    refuse(name, "INT4 weights without weight_scale_inv")
                group_size = 2 * header["shape"][1] // scale["shape"][-1]
                self._add_experts(expert[1], group_size, torch.bfloat16 if scale["dtype"] == "BF16" else torch.float32)
            elif not expert and header["dtype"] not in _FP8:
                self.ignored_layers.append(layer)
        if not self._int4:
            refuse(model_name, "w4afp8, but no expert's weights are INT4 (int8, two to a byte)")

    def _add_experts(self, name: str, group_size: int, scale_dtype: torch.dtype) -> None:
        if self._int4.setdefault(name, (group_size, scale_dtype)) != (group_size, scale_dtype):
            refuse(name, f"INT4 weights in groups of {group_size} with {scale_dtype} scales beside others: "
                         f"{self._int4[name]}")

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self._int4 = hf_to_vllm_mapper.apply_dict(self._int4)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if not isinstance(layer, RoutedExperts):
            return super().get_quant_method(layer, prefix)
        if prefix not in self._int4:
            refuse(prefix, f"the checkpoint has no INT4 experts of this name; it has {', '.join(self._int4)}")
        return W4AFP8Method(layer, prefix, *self._int4[prefix], _recipe())


class SluiceConfig(CompressedTensorsConfig):
    """--quantization sluice: a compressed-tensors checkpoint whose INT4 experts Sluice computes as W4A8.

    Experts that the checkpoint leaves unquantized, and everything that is no expert, stay vLLM's.
    """

    def get_name(self) -> str:
        return "sluice"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 90

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, **_: Any) -> str | None:
        if user_quant != "sluice":
            return None
        method = (hf_quant_cfg or {}).get("quant_method")
        if method != "compressed-tensors":
            refuse("--quantization sluice", f"quant_method is {method!r} in the checkpoint; it is for "
                                            "compressed-tensors (w4afp8 needs no switch)")
        return "sluice"

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if not isinstance(layer, RoutedExperts):
            return super().get_quant_method(layer, prefix)
        self._add_fused_moe_to_target_scheme_map()
        names = [f"{prefix}.0.{getattr(layer, f'ckpt_{name}_name', name)}" for name in ("gate_proj", "up_proj",
                                                                                       "down_proj")]
        schemes = [self.get_scheme_dict(layer, name) for name in names]
        if all(scheme is None for scheme in schemes):
            return super().get_quant_method(layer, prefix)
        if any(scheme != schemes[0] for scheme in schemes):
            refuse(prefix, "gate, up and down of an expert have different quantization schemes")
        return PackedMethod(layer, prefix, self._check_scheme(prefix, schemes[0]))

    @staticmethod
    def _check_scheme(prefix: str, scheme: Any) -> int:
        """The group size. Raises Error: unsupported, naming what of the scheme Sluice has not."""
        weights, inputs = scheme["weights"], scheme.get("input_activations")
        is_dynamic_fp8 = inputs is not None and inputs.type == "float" and inputs.num_bits == 8 and inputs.dynamic
        wanted = {
            "format": (scheme.get("format"), "pack-quantized"), "weights.type": (weights.type, "int"),
            "weights.num_bits": (weights.num_bits, 4), "weights.symmetric": (weights.symmetric, True),
            "weights.strategy": (weights.strategy, "group"),
        }
        for field, (found, expected) in wanted.items():
            if found != expected:
                refuse(prefix, f"{field} is {getattr(found, 'value', found)!r}, expected {expected!r}")
        if str(getattr(weights.actorder, "value", weights.actorder)) in ("group", "dynamic"):
            refuse(prefix, "weights.actorder 'group': columns in another order")
        if inputs is not None and not is_dynamic_fp8:
            refuse(prefix, f"input_activations {inputs.type} of {inputs.num_bits} bits; only none or dynamic FP8")
        return weights.group_size


def register() -> None:
    """Into vLLM's registry. More than once does no harm."""
    register_quantization_config("w4afp8")(W4AFP8Config)
    register_quantization_config("sluice")(SluiceConfig)
