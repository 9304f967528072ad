"""Meeting place of the processes of a group, agreed on through whatever group they have already."""

import importlib.util
import os
import secrets
import sys
from collections.abc import Callable
from typing import Any

from ._error import Error


def _is_process_group(group: Any) -> bool:
    distributed = sys.modules.get("torch.distributed")
    kind = getattr(distributed, "ProcessGroup", None)
    return kind is not None and isinstance(group, kind)


def _value(member: Any) -> int:
    return int(member() if callable(member) else member)


def _parts(group: Any) -> tuple[int, int, Callable[[Any], list]]:
    """Rank, size and all_gather of a group of any of the kinds that are known."""
    if _is_process_group(group):
        import torch.distributed as distributed

        def gather(mine: Any) -> list:
            everyone: list = [None] * group.size()
            distributed.all_gather_object(everyone, mine, group=group)
            return everyone

        return group.rank(), group.size(), gather
    if hasattr(group, "Get_rank") and hasattr(group, "allgather"):  # mpi4py
        return group.Get_rank(), group.Get_size(), group.allgather
    missing = [name for name in ("rank", "size", "all_gather") if not hasattr(group, name)]
    if missing:
        raise Error(
            "invalid_argument",
            "group: expected a torch ProcessGroup, an mpi4py communicator or an object with rank, "
            f"size and all_gather(object), got {type(group).__name__} without {', '.join(missing)}",
        )
    return _value(group.rank), _value(group.size), group.all_gather


def meet(group: Any, host: str) -> tuple[int, int, str, str, int, Callable[[bytes], list]]:
    """Collective over the group. `host` names this process's host.

    Returns rank, num_ranks, a job and a secret for Transport.ipc(), on how many hosts the ranks are, and all_gather.
    """
    rank, size, all_gather = _parts(group)
    everyone = all_gather((host, secrets.token_hex(16), secrets.token_hex(32)))
    if len(everyone) != size:
        raise Error(
            "invalid_argument",
            f"group: all_gather gave {len(everyone)} objects for {size} ranks",
        )
    _, job, secret = everyone[0]
    return rank, size, job, secret, len({theirs[0] for theirs in everyone}), all_gather


def nccl_path() -> str:
    """Path of the package nvidia-nccl's library; empty if torch has loaded one, or there is no such package."""
    if "torch" in sys.modules:
        return ""
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return ""
    for folder in spec.submodule_search_locations or [] if spec else []:
        path = os.path.join(folder, "lib", "libnccl.so.2")
        if os.path.exists(path):
            return path
    return ""
