"""When the work of a call is done on its stream."""

from typing import Any


class Passed:
    """The event of a call that has been done when it returned: there is no stream on the CPU."""


class EventOverlap:
    """An event and the tensors that must live until it has passed.

    Work is queued on the caller's current stream, so on that stream there is nothing to wait for;
    another stream waits through this. ``event`` is None where none was asked for (async_finish=False).
    On the CPU one that was asked for has passed already, and waiting for it returns at once.
    """

    def __init__(self, event: Any = None, extra_tensors: tuple | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Lets torch's current stream wait for the event."""
        if self.event is None:
            raise RuntimeError("EventOverlap.current_stream_wait: this has no event to wait for")
        if isinstance(self.event, Passed):
            return
        import torch

        torch.cuda.current_stream().wait_event(self.event)

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        if self.event is not None:
            self.current_stream_wait()
