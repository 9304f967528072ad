"""Which device a Buffer works on, when its caller does not say."""

import sys
from typing import Any

from ... import _core


def _device() -> tuple[str, str]:
    """The current GPU of torch and what tells it from others, or the CPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "cpu", "cpu"
    index = torch.cuda.current_device()
    return f"cuda:{index}", str(torch.cuda.get_device_properties(index).uuid)


def make_backend(transport: Any) -> Any:
    """A backend with this rank's share of what it has in common with others. Collective."""
    device, identity = _device()
    everyone = transport.all_gather(identity.encode().ljust(64)[:64])
    sharers = [rank for rank, theirs in enumerate(everyone) if theirs == everyone[transport.rank]]
    return _core.Backend(
        device, local_rank=sharers.index(transport.rank), num_local_ranks=len(sharers)
    )
