"""The name ``deep_ep`` in this process, without a distribution that owns a folder of that name."""

import importlib.machinery
import sys
import threading
from types import ModuleType
from typing import Any

from ..._error import Error

_lock = threading.Lock()


class _Module(ModuleType):
    """deep_ep as importers see it. Names are looked up in sluice.compat.deep_ep when they are used, so
    that topk_idx_t imports torch no earlier than there."""

    def __getattr__(self, name: str) -> Any:
        from .. import deep_ep

        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        try:
            return getattr(deep_ep, name)
        except AttributeError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None


def _is_ours(module: Any) -> bool:
    from ._buffer import Buffer

    return isinstance(module, _Module) or getattr(module, "Buffer", None) is Buffer


def register(name: str = "deep_ep") -> ModuleType:
    """Makes ``import deep_ep`` give this package's classes in this process, and returns that module.

    A plug-in calls it in every process, before the engine imports ``deep_ep`` for the first time. It
    touches no file: an installed DeepEP stays as it is, and is what processes get that do not call
    this. ``importlib.util.find_spec("deep_ep")`` finds the module, which has a spec of its own. A
    second call, or one where the distribution of python/deep_ep_shim was imported, returns the module
    that is there.

    Raises Error: unsupported if another deep_ep is imported already, naming its file. Nothing has
    changed then: modules that took its Buffer would keep it, so two exchanges would run side by side.
    """
    with _lock:
        there = sys.modules.get(name)
        if there is not None:
            if _is_ours(there):
                return there
            file = getattr(there, "__file__", None) or "a module without a file"
            raise Error("unsupported", f"{name}: imported already from {file}, which is not Sluice's; call "
                        "sluice.compat.deep_ep.register() before the first import of it")
        from .. import deep_ep

        module = _Module(name, deep_ep.__doc__)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=deep_ep.__file__)
        module.__file__, module.__version__ = deep_ep.__file__, deep_ep.__version__
        module.__all__ = list(deep_ep.__all__)  # type: ignore[attr-defined]
        sys.modules[name] = module
        return module
