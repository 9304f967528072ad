"""DeepEP's buffers over Sluice, on one host: ``from sluice.compat.deep_ep import Buffer``.

The calls, arguments, defaults, results and strides of DeepEP's V1 ``Buffer`` as SGLang and vLLM use
them, over tensors of torch and, on the CPU, arrays of numpy. docs/deep_ep.md lists what differs.
``register()`` gives them the name ``deep_ep`` in this process; the distribution in
python/deep_ep_shim does so for all of them.
"""

from typing import Any

from ... import _core
from ._buffer import Buffer
from ._config import Config
from ._event import EventHandle, EventOverlap
from ._register import register

__version__ = f"1.2.1+sluice.{_core.version()}"
"""DeepEP's release whose V1 interface this is, and Sluice's."""

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "register", "topk_idx_t"]


def __getattr__(name: str) -> Any:
    """topk_idx_t: the type of expert numbers that callers should use; torch is imported for it."""
    if name == "topk_idx_t":
        try:
            import torch
        except ImportError:
            import numpy

            return numpy.int64
        return torch.int64
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
