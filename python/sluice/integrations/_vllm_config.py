"""vLLM's quantization configs whose routed experts Sluice computes: "w4afp8" and, of three formats, "sluice"."""

import re
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization import get_quantization_config, register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.mxfp4 import Mxfp4Config
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from .._error import Error
from ._vllm_methods import Mxfp4Method, PackedMethod, W4AFP8Method, refuse

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


def _check_dynamic(prefix: str) -> None:
    """Raises Error: unsupported where static scales are asked for, for a format that has none."""
    if _recipe() == "static":
        refuse(prefix, 'recipe "static", and the checkpoint has no static scales of inputs')


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


class _Named:
    """What is Sluice's in a configuration of vLLM's."""

    @classmethod
    def get_name(cls) -> str:
        return "sluice"

    @classmethod
    def get_min_capability(cls) -> int:
        return 90


class SluiceConfig(_Named, CompressedTensorsConfig):
    """--quantization sluice: a checkpoint whose INT4 or MXFP4 experts Sluice computes as W4A8. This class is of
    compressed-tensors; from_config() gives another one for the other formats.

    Experts that the checkpoint leaves unquantized, and everything that is no expert, stay vLLM's.
    """

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, **others: Any) -> str | None:
        if user_quant != "sluice":
            return None
        method, model = (hf_quant_cfg or {}).get("quant_method"), getattr(others.get("hf_config"), "model_type", None)
        if method in ("mxfp4", "gpt_oss_mxfp4") and (model == "gpt_oss" or method != "mxfp4"):
            refuse("--quantization sluice", f"quant_method is {method!r}, model_type 'gpt_oss': MXFP4 experts with "
                                            "biases, which Sluice's backends for GPUs do not add; without the switch "
                                            "vLLM's own experts serve it")
        if method in ("fp8", "deepseek_v4_fp8") and model not in ("deepseek_v4", "deepseek_v41"):
            refuse("--quantization sluice", f"quant_method is {method!r} of model_type {model!r}: only that of "
                                            "DeepSeek-V4 has 4-bit experts")
        if method not in _FORMATS:
            refuse("--quantization sluice", f"quant_method is {method!r} in the checkpoint; it is for "
                                            "compressed-tensors and MXFP4 (w4afp8 needs no switch)")
        return "sluice"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        made = _FORMATS.get(config.get("quant_method", ""))
        return super().from_config(config) if made is None else made().from_config(config)

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
        _check_dynamic(prefix)
        if self._is_mxfp4_scheme(prefix, schemes[0]):
            return Mxfp4Method(layer, prefix, "compressed-tensors MXFP4", ("_weight_packed", "_weight_scale"))
        return PackedMethod(layer, prefix, self._check_scheme(prefix, schemes[0]))

    @staticmethod
    def _is_mxfp4_scheme(prefix: str, scheme: Any) -> bool:
        """Raises Error: unsupported, naming what else MXFP4 experts have."""
        if scheme.get("format") != "mxfp4-pack-quantized":
            return False
        weights, inputs = scheme["weights"], scheme.get("input_activations")
        wanted = {"weights.type": (weights.type, "float"), "weights.num_bits": (weights.num_bits, 4),
                  "weights.group_size": (weights.group_size, 32), "weights.symmetric": (weights.symmetric, True)}
        for field, (found, expected) in wanted.items():
            if found != expected:
                refuse(prefix, f"{field} is {getattr(found, 'value', found)!r} in mxfp4-pack-quantized, expected "
                               f"{expected!r}")
        if inputs is not None and not (inputs.type == "float" and inputs.num_bits == 8 and inputs.dynamic):
            refuse(prefix, f"input_activations {inputs.type} of {inputs.num_bits} bits; only none or dynamic FP8")
        return True

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


_NAMES = "_weight", "_weight_scale"  # Of vLLM's own parameters for MXFP4, which the models' loaders fill.


class SluiceMxfp4Config(_Named, Mxfp4Config):
    """Of Kimi-K3: vLLM's configuration of the model calls its compressed-tensors "mxfp4"."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            _check_dynamic(prefix)
            return Mxfp4Method(layer, prefix, "MXFP4", _NAMES)
        return super().get_quant_method(layer, prefix)


def _deepseek_v4_config() -> Any:
    """vLLM's class for DeepSeek-V4 with Sluice's experts. It is imported only for such a model."""
    theirs: Any = get_quantization_config("deepseek_v4_fp8")

    class SluiceDeepseekV4Config(_Named, theirs):
        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            if not isinstance(layer, RoutedExperts) or is_layer_skipped(
                    prefix=prefix, ignored_layers=self.ignored_layers, fused_mapping=self.packed_modules_mapping):
                return super().get_quant_method(layer, prefix)
            if self.expert_dtype != "fp4" or self.moe_quant_algo:
                refuse(prefix, f"experts of expert_dtype {self.expert_dtype!r}, moe_quant_algo "
                               f"{self.moe_quant_algo!r}: only MXFP4 ('fp4') is Sluice's; without --quantization "
                               "sluice vLLM's own experts serve it")
            _check_dynamic(prefix)
            return Mxfp4Method(layer, prefix, "DeepSeek-V4 MXFP4", _NAMES)

    return SluiceDeepseekV4Config


# quant_method -> who makes the class of its config; None: SluiceConfig. vLLM renames "fp8" of DeepSeek-V4.
_FORMATS: dict[str, Any] = {
    "compressed-tensors": None, "mxfp4": lambda: SluiceMxfp4Config, "fp8": _deepseek_v4_config,
    "deepseek_v4_fp8": _deepseek_v4_config}


def register() -> None:
    """Into vLLM's registry. More than once does no harm."""
    register_quantization_config("w4afp8")(W4AFP8Config)
    register_quantization_config("sluice")(SluiceConfig)
