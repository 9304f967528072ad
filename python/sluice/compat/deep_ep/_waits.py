"""How long calls wait for each rank, added to an array of the caller's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..._error import Error
from .._arrays import check


class WaitStats:
    """Adds the nanoseconds that the calls inside ``counting()`` wait for each rank to an array
    [num_ranks] int64; without an array does nothing.

    The numbers are the exchange's own counters, which on a GPU the host reads: it waits for the
    stream before and after, so this is for looking for a slow rank, not for every call.
    """

    def __init__(self, name: str, array: Any, queue: Any, num_ranks: int) -> None:
        self._array, self._queue = array, queue
        if array is None:
            return
        space = queue.space
        check(space, name, array, ("i64",), [num_ranks])
        if space.is_capturing():
            raise Error("invalid_argument", f"{name}: the host reads what was waited, which a graph "
                        "cannot capture: leave it out of the capture")

    def _waited(self) -> list[int]:
        self._queue.space.synchronize()
        return self._queue.exchange.counters()["wait_ns"]

    @contextmanager
    def counting(self) -> Iterator[None]:
        if self._array is None:
            yield
            return
        before = self._waited()
        yield
        added = [after - b for after, b in zip(self._waited(), before)]
        self._array += self._queue.space.of_list(added, "i64")
