"""Which device a Buffer works on: that of the first rows it is given."""

import os
import sys
from typing import Any

from ... import _core

_TIMEOUT_MS = 100_000


def timeout_ms() -> int | None:
    """How long a call waits for another rank: as DeepEP does, since engines count on it while a rank compiles
    kernels or captures graphs. None: SLUICE_TIMEOUT_MS says it, which the core reads."""
    return None if "SLUICE_TIMEOUT_MS" in os.environ else _TIMEOUT_MS


def _device(space: Any) -> tuple[str, str]:
    """The current GPU of torch and what tells it from others, or the CPU."""
    if not space.on_device:
        return "cpu", "cpu"
    torch = sys.modules["torch"]
    index = torch.cuda.current_device()
    return f"cuda:{index}", str(torch.cuda.get_device_properties(index).uuid)


class RankDevice:
    """A transport, and a backend with this rank's share of what it has in common with others."""

    def __init__(self, transport: Any, backend: Any = None) -> None:
        self.transport = transport
        self._backend = backend

    def all_gather(self, mine: bytes) -> list[bytes]:
        """Of all ranks, in order. Collective."""
        return self.transport.all_gather(mine, timeout_ms=timeout_ms())

    def exchange(self, space: Any, **config: Any) -> Any:
        """An Exchange over all ranks on the device of `space`. Collective."""
        return _core.Exchange(self.transport, self.backend_for(space), timeout_ms=timeout_ms(), **config)

    def backend_for(self, space: Any) -> Any:
        """The caller's own; else, from the first call on, one for arrays of `space`. Collective."""
        if self._backend is None:
            device, identity = _device(space)
            everyone = self.all_gather(identity.encode().ljust(64)[:64])
            rank = self.transport.rank
            sharers = [r for r, theirs in enumerate(everyone) if theirs == everyone[rank]]
            self._backend = _core.Backend(
                device, local_rank=sharers.index(rank), num_local_ranks=len(sharers)
            )
        return self._backend
