"""The name deep_ep, served by sluice.compat.deep_ep."""

from sluice.compat import deep_ep as _deep_ep
from sluice.compat.deep_ep import Buffer, Config, EventHandle, EventOverlap, __version__

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "__version__", "topk_idx_t"]


def __getattr__(name: str):
    return getattr(_deep_ep, name)
