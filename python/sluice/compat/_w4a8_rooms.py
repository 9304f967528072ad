"""What the experts of all layers on one device share: a backend, a lock, the memory between the stages."""

import threading
import weakref
from typing import Any

from .. import _core

_lock = threading.Lock()
_backends: dict[str, Any] = {}
_rooms: "weakref.WeakValueDictionary[tuple[int, int, int], Room]" = weakref.WeakValueDictionary()
_locks: "weakref.WeakKeyDictionary[Any, threading.RLock]" = weakref.WeakKeyDictionary()


def backend_for(array: Any) -> Any:
    """One for each device of the process."""
    device = getattr(array, "device", "cpu")
    on_gpu = getattr(device, "type", "cpu") == "cuda"
    name = f"cuda:{device.index or 0}" if on_gpu else "cpu"
    with _lock:
        if name not in _backends:
            _backends[name] = _core.Backend(name)
        return _backends[name]


class Room:
    """A LocalGroup, whose layers run one after the other, and the lock under which they are called.

    A backend serves one thread at a time; threads that share one wait here for each other. On a GPU that is
    for as long as a call takes the host, and the device orders their streams.
    """

    def __init__(self, backend: Any, hidden: int, intermediate: int, lock: Any) -> None:
        self.lock = lock
        with lock:
            self.group = _core.LocalGroup(backend, hidden=hidden, intermediate=intermediate, max_entries=1)


def lock_of(backend: Any) -> Any:
    with _lock:
        lock = _locks.get(backend)
        if lock is None:
            lock = _locks[backend] = threading.RLock()
        return lock


def room_for(backend: Any, hidden: int, intermediate: int) -> Room:
    """One for all experts of a backend and size."""
    lock = lock_of(backend)
    key = id(backend), hidden, intermediate  # The group keeps the backend, and so its id, alive.
    with _lock:
        room = _rooms.get(key)
        if room is None:
            room = _rooms[key] = Room(backend, hidden, intermediate, lock)
        return room
