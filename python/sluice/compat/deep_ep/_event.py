"""When the work of a call is done on its stream."""

import sys
from typing import Any


class EventHandle:
    """A point of torch's current stream as it is when this is made: EventHandle().

    On the CPU calls are done when they return, so the point has passed already.
    """

    def __init__(self) -> None:
        torch = sys.modules.get("torch")
        self._event: Any = None
        if torch is not None and torch.cuda.is_available():
            self._event = torch.cuda.Event()
            self._event.record()

    @classmethod
    def of(cls, event: Any) -> "EventHandle":
        """Of an event that torch has recorded, or None for one that has passed."""
        handle = cls.__new__(cls)
        handle._event = event
        return handle

    def current_stream_wait(self) -> None:
        """Lets torch's current stream wait for the point."""
        if self._event is not None:
            sys.modules["torch"].cuda.current_stream().wait_event(self._event)


class EventOverlap:
    """An event and the tensors that must live until it has passed.

    Work is queued on the caller's current stream, so on that stream there is nothing to wait for;
    another stream waits through this. ``event`` is an EventHandle, None where none was asked for
    (async_finish=False). On the CPU one that was asked for has passed, and waiting for it returns at once.
    """

    def __init__(self, event: Any = None, extra_tensors: tuple | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Lets torch's current stream wait for the event. release_handle: then lets go of the event and of
        the tensors."""
        if self.event is None:
            raise RuntimeError("EventOverlap.current_stream_wait: this has no event to wait for")
        self.event.current_stream_wait()
        if release_handle:
            self.event = self.extra_tensors = None

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        if self.event is not None:
            self.current_stream_wait()
