"""A plug-in for vLLM: Sluice computes the routed experts of INT4 and MXFP4 models.

    pip install .                                               # in a checkout of Sluice; docs/serving.md
    vllm serve DeepSeek-R1-W4AFP8                               # loads: vLLM alone has no w4afp8
    vllm serve Kimi-K2-Thinking --quantization sluice           # compressed-tensors INT4 experts as W4A8
    vllm serve DeepSeek-V4-Flash --quantization sluice          # MXFP4 experts as W4A8, as Kimi-K3's

vLLM calls register() in each of its processes (entry point "sluice" of the group vllm.general_plugins;
VLLM_PLUGINS leaves it out). It adds two quantization methods:

- "w4afp8", taken by itself for checkpoints that say so. Experts are Sluice's, other matrices are FP8 in
  blocks or unquantized, as the checkpoint's files have them, and vLLM's.
- "sluice", for compressed-tensors checkpoints (INT4 in groups of 32 and 128, MXFP4), Kimi-K3 and DeepSeek-V4, only
  where --quantization names it. gpt-oss, whose experts have biases, is refused.

and the module "deep_ep" (sluice.compat.deep_ep), if no DeepEP is installed, for
--all2all-backend deepep_low_latency and deepep_high_throughput on one host. Both send e4m3.

--additional-config '{"sluice": {"recipe": "direct"}}' chooses for W4AFP8: "auto" uses the checkpoint's
static input scales where it has calibrated ones (not all 1.0), "static" also others, and "direct" none:
activations have one dynamic scale for each 128 values, which loses less.

What Sluice cannot compute is refused while the model loads, with the layer's name. A log line of vLLM's
says "Sluice VERSION computes the routed experts" with format, recipe and classes. docs/serving.md has
the rest.
"""

import importlib.util
import logging
from typing import Any

from .. import _core
from .._error import Error
from ..compat import deep_ep

__all__ = ["register"]

_METHODS = ("w4afp8", "sluice")
_TESTED = "0.33 (0.26 passes the same tests but for Kimi-K3, which it has not)"


def _refusing(reason: str) -> Any:
    """A config for methods that cannot work with this vLLM: to use one is an error that says why.

    register() itself must not fail: vLLM would not start, also for models that are not Sluice's."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class RefusedConfig(QuantizationConfig):
        def get_name(self) -> str:
            return "sluice"

        def get_supported_act_dtypes(self) -> list:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 90

        @staticmethod
        def get_config_filenames() -> list:
            return []

        @classmethod
        def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, **_: Any) -> None:
            if user_quant in _METHODS or (hf_quant_cfg or {}).get("quant_method") == "w4afp8":
                raise Error("unsupported", reason)

        @classmethod
        def from_config(cls, config: Any) -> Any:
            raise Error("unsupported", reason)

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            raise Error("unsupported", reason)

    return RefusedConfig


def register() -> None:
    """What vLLM calls in each process. May be called again."""
    if importlib.util.find_spec("deep_ep") is None:
        deep_ep.register()  # Before vLLM looks for it.
    try:
        from ._vllm_config import register as register_configs
    except (ImportError, AttributeError) as error:
        from vllm import __version__
        from vllm.model_executor.layers.quantization import register_quantization_config

        reason = (f"vllm {__version__} lacks what Sluice {_core.version()} is put on: {error}. Sluice's plug-in was "
                  f"written for vllm {_TESTED}")
        logging.getLogger("vllm.sluice").warning("%s. %s are refused.", reason, " and ".join(_METHODS))
        for method in _METHODS:
            register_quantization_config(method)(_refusing(reason))
        return
    register_configs()
