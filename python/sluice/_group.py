"""Meeting place of the processes of a group, agreed on through whatever group they have already."""

import importlib.util
import os
import secrets
import sys
from collections.abc import Callable
from typing import Any, NoReturn

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


def _refuse(why: str) -> NoReturn:
    raise Error("invalid_argument", f"group: {why}")


def _check_everyone(everyone: list, rank: int, size: int) -> None:
    """That there is an object of every rank, each the one that this rank gave."""
    if not 0 <= rank < size:
        _refuse(f"rank {rank} is not in [0, {size})")
    if len(everyone) != size:
        _refuse(f"all_gather gave {len(everyone)} objects for {size} ranks")
    says: dict[int, int] = {}  # Rank -> its place.
    for place, theirs in enumerate(everyone):
        if not (isinstance(theirs, (tuple, list)) and [type(part) for part in theirs] == [int, str, str, str]):
            _refuse(f"all_gather gave {type(theirs).__name__} in place {place}, and not the object that rank {place} "
                    "gave: it must pass on every rank's, unchanged, and every rank must make this call, with this "
                    "version of Sluice")
        if theirs[0] in says:
            _refuse(f"two processes say that they are rank {theirs[0]}: places {says[theirs[0]]} and {place} of "
                    "all_gather")
        says[theirs[0]] = place
    for said, place in says.items():
        if said != place:
            _refuse(f"all_gather gave rank {said}'s object in place {place}")


def meet(group: Any, host: str) -> tuple[int, int, str, str, int, Callable[[bytes], list[bytes]]]:
    """Collective over the group. `host` names this process's host.

    Returns rank, num_ranks, a job and a secret for Transport.ipc(), on how many hosts the ranks are, and all_gather
    of bytes.
    """
    rank, size, all_gather = _parts(group)
    everyone = list(all_gather((rank, host, secrets.token_hex(16), secrets.token_hex(32))))
    _check_everyone(everyone, rank, size)

    def all_gather_bytes(mine: bytes) -> list[bytes]:
        parts = list(all_gather(mine))
        for place, part in enumerate(parts):
            if not isinstance(part, bytes):
                _refuse(f"all_gather gave {type(part).__name__} in place {place}, and not the bytes that rank {place} "
                        "gave")
        return parts

    _, _, job, secret = everyone[0]
    return rank, size, job, secret, len({theirs[1] for theirs in everyone}), all_gather_bytes


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
