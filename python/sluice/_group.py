"""Meeting place of the processes of a group, agreed on through whatever group they have already."""

import secrets
import socket
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


def _host() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{socket.gethostname()} {file.read().strip()}"
    except OSError:
        return socket.gethostname()


def meet(group: Any) -> tuple[int, int, str, str]:
    """(rank, num_ranks, job, secret) for Transport.ipc(). Collective over the group."""
    rank, size, all_gather = _parts(group)
    everyone = all_gather((_host(), secrets.token_hex(16), secrets.token_hex(32)))
    if len(everyone) != size:
        raise Error(
            "invalid_argument",
            f"group: all_gather gave {len(everyone)} objects for {size} ranks",
        )
    host, job, secret = everyone[0]
    elsewhere = [r for r, theirs in enumerate(everyone) if theirs[0] != host]
    if elsewhere:
        raise Error(
            "unsupported",
            f"group: rank(s) {', '.join(map(str, elsewhere))} are not on the host of rank 0 "
            f"({host.split()[0]}); this transport stays on one host",
        )
    return rank, size, job, secret
