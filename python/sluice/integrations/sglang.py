"""SGLang's MoE layers with INT4 experts, served by Sluice: a plug-in, without a fork.

Installing sluice beside sglang is all: SGLang finds ``register`` by the entry point "sluice" of the group
``sglang.srt.plugins`` and calls it in each of its processes. It puts Sluice in the place of

- W4AFP8 experts (quantization "w4afp8", DeepSeek-R1-W4AFP8): ``W4AFp8MoEMethod``;
- INT4 experts of compressed-tensors in groups of 128 or 32 (Kimi-K2): what ``get_moe_scheme`` gives;
- MXFP4 experts (DeepSeek-V4, Kimi-K3): what ``get_quant_method`` of three configurations gives for them;
- the module ``deep_ep``, for ``--moe-a2a-backend deepep`` on one host.

Everything else of a model stays SGLang's. A layer that Sluice has no experts for is refused while the
model is made, with the layer and the reason; no other kernel takes over in silence. Settings, from the
environment:

    SLUICE_SGLANG=0             the plug-in does nothing
    SLUICE_RECIPE=auto          static scales where the checkpoint has them, otherwise dynamic ones
                  static        static scales of the checkpoint, also if all are 1.0
                  direct        dynamic scales for each 128 values, whatever the checkpoint has
    SLUICE_MXFP4=0              MXFP4 experts stay SGLang's own, in all layers; INT4 ones are Sluice's
    SLUICE_DEEP_EP=0            deep_ep stays what is installed (several hosts); the experts are Sluice's

docs/serving.md has the rest: launch lines, numerics, memory, limits and messages.
"""

import logging
import os
import sys
from typing import Any

from .. import __version__
from .._error import Error

__all__ = ["register", "setting"]

_SETTINGS = {  # Name -> its values, the default first.
    "SLUICE_SGLANG": ("1", "0"),
    "SLUICE_RECIPE": ("auto", "static", "direct"),
    "SLUICE_MXFP4": ("1", "0"),
    "SLUICE_DEEP_EP": ("1", "0"),
}

# What register() puts hooks on, or takes the place of.
SEAMS = (
    "sglang.srt.layers.quantization.w4afp8.W4AFp8MoEMethod",
    "sglang.srt.layers.quantization.compressed_tensors.compressed_tensors.CompressedTensorsConfig.get_moe_scheme",
    "sglang.srt.layers.moe.ep_moe.layer.DeepEPMoE.run_moe_core",
    "sglang.srt.server_args.ServerArgs.add_cli_args",
    "sglang.srt.layers.quantization.fp8.Fp8Config.get_quant_method",
    "sglang.srt.layers.quantization.mxfp4.Mxfp4Config.get_quant_method",
    "sglang.srt.layers.quantization.compressed_tensors.compressed_tensors.CompressedTensorsConfig.get_quant_method",
)

_logger = logging.getLogger(__name__)


def setting(name: str) -> str:
    """The value of a setting. Raises Error: invalid_argument, naming it, for one that it does not have."""
    values = _SETTINGS[name]
    value = os.environ.get(name) or values[0]
    if value not in values:
        raise Error("invalid_argument", f"{name}: expected {' or '.join(values)}, got {value!r}")
    return value


def _about() -> str:
    kinds = ", compressed-tensors INT4 and MXFP4" if setting("SLUICE_MXFP4") == "1" else " and compressed-tensors INT4"
    return (f"Sluice {__version__} computes W4AFP8{kinds} experts (SLUICE_SGLANG=0 switches it off, "
            f"SLUICE_RECIPE={setting('SLUICE_RECIPE')}, SLUICE_MXFP4={setting('SLUICE_MXFP4')})")


def register() -> None:
    """Called by SGLang's load_plugins(). Exits the process where Sluice cannot take its place: SGLang logs what
    a plug-in raises and goes on without it, with other numbers than were asked for."""
    try:
        if setting("SLUICE_SGLANG") == "0":
            _logger.warning("Sluice %s is installed and switched off: SLUICE_SGLANG=0", __version__)
            return
        about = _about()
        _register()
    except Exception as error:
        raise SystemExit(f"sluice.integrations.sglang: {type(error).__name__}: {error}\n"
                         "SLUICE_SGLANG=0 serves the model without Sluice.") from error
    # SGLang calls this before it lets lines of a lesser level through.
    _logger.warning("%s", about)


def _register() -> None:
    if setting("SLUICE_DEEP_EP") == "1":
        _provide_deep_ep()
    import pkgutil

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for seam in SEAMS:
        try:
            pkgutil.resolve_name(seam)
        except (ImportError, AttributeError) as error:
            raise Error("unsupported", f"this SGLang has no {seam} ({error}); sluice {__version__} was written for "
                                       "0.5.23") from error
    try:
        from . import _sglang_experts as ours
        from . import _sglang_mxfp4
    except ImportError as error:
        raise Error("unsupported", f"this SGLang has no name that the experts need ({error}); sluice {__version__} was "
                                   "written for 0.5.23") from error
    method, scheme, core, arguments, *configurations = SEAMS
    HookRegistry.register(method, ours.SluiceW4AFp8MoEMethod, HookType.REPLACE)
    HookRegistry.register(scheme, ours.moe_scheme, HookType.AFTER)
    HookRegistry.register(core, ours.run_moe_core, HookType.AROUND)
    HookRegistry.register(arguments, _add_to_help, HookType.AFTER)
    for configuration in configurations:
        HookRegistry.register(configuration, _sglang_mxfp4.quant_method, HookType.AROUND)


def _provide_deep_ep() -> None:
    """Sluice's Buffer for SGLang, whether or not the module that asks for it has been imported already."""
    from ..compat import deep_ep

    name = "sglang.srt.layers.moe.token_dispatcher.deepep"
    if name not in sys.modules:
        if "deep_ep" not in sys.modules:
            deep_ep.register()
            return
        __import__(name)  # An installed DeepEP was imported by something else: only SGLang's use of it is changed.
    module: Any = sys.modules[name]
    module.Buffer, module.Config = deep_ep.Buffer, deep_ep.Config
    module.use_deepep, module._deepep_import_error = True, None
    if "deep_ep" not in sys.modules:
        deep_ep.register()
    if not hasattr(module, "sglang_per_token_group_quant_fp8"):  # Its import came after deep_ep's, which failed.
        from sglang.kernels.ops.quantization import fp8_kernel

        module.sglang_per_token_group_quant_fp8 = fp8_kernel.sglang_per_token_group_quant_fp8


def _add_to_help(result: Any, parser: Any) -> None:
    """The last line of --help."""
    parser.epilog = "\n".join(filter(None, [parser.epilog, _about()]))
