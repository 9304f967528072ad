"""Which device a Buffer works on: that of the first rows it is given."""

import sys
from typing import Any

from ... import _core


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

    def backend_for(self, space: Any) -> Any:
        """The caller's own; else, from the first call on, one for arrays of `space`. Collective."""
        if self._backend is None:
            device, identity = _device(space)
            everyone = self.transport.all_gather(identity.encode().ljust(64)[:64])
            rank = self.transport.rank
            sharers = [r for r, theirs in enumerate(everyone) if theirs == everyone[rank]]
            self._backend = _core.Backend(
                device, local_rank=sharers.index(rank), num_local_ranks=len(sharers)
            )
        return self._backend
