"""Dispatches that wait for their combine, on one exchange."""

from collections import deque
from typing import Any

from ... import _core
from ..._error import Error

MOST = 2
"""Dispatches in flight; one more takes the place of the oldest."""


class DispatchQueue:
    """An exchange whose slots are handed out and taken back in the same order on every rank,
    whatever the callers keep alive."""

    def __init__(self, exchange: Any, space: Any, hidden: int) -> None:
        self.exchange, self.space, self.hidden = exchange, space, hidden
        self._flights: deque[Flight] = deque()

    def launch(self, x: Any, topk_idx: Any, topk_weights: Any, receive: bool) -> "Flight":
        """topk_weights: may be filled as late as combine."""
        flight = Flight(self, len(x), topk_idx, topk_weights)
        flight.depart(x, receive)
        return flight

    def make_room(self, flight: "Flight") -> None:
        if len(self._flights) == MOST:
            self._flights.popleft().drop()
        self._flights.append(flight)

    def landed(self, flight: "Flight") -> None:
        if flight in self._flights:
            self._flights.remove(flight)


class Flight:
    """One dispatch. Combining a second time, or after it had to make room, routes once more."""

    def __init__(self, queue: DispatchQueue, num_tokens: int, topk_idx: Any, topk_weights: Any) -> None:
        self.queue, self.num_tokens = queue, num_tokens
        self.topk_idx, self.topk_weights = topk_idx, topk_weights
        self._dispatched: Any = None
        self.is_received = False
        self.is_filled = False  # Whether the caller's arrays have the rows.

    def depart(self, x: Any, receive: bool) -> None:
        self.queue.make_room(self)
        routing = _core.Routing(self.topk_idx, self.topk_weights)
        if receive:
            self._dispatched = _core.dispatch(self.queue.exchange, x, routing)
        else:
            self._dispatched = self.queue.exchange.dispatch_send(x, routing)
        self.is_received = receive

    def _require_place(self) -> None:
        if self._dispatched is None:
            raise Error(
                "invalid_argument",
                f"hook: {MOST} later dispatches have taken the place of this one; call it before",
            )

    def receive(self) -> None:
        self._require_place()
        if not self.is_received:
            self._dispatched.receive()
            self.is_received = True

    @property
    def batch(self) -> Any:
        return self._dispatched.batch

    def drop(self) -> None:
        """Its slot has been taken back."""
        self._dispatched = None

    def abandon(self) -> None:
        """No combine will follow; the slot is free again."""
        self._finish()

    def expert_y(self) -> Any:
        """The exchange's own memory for the experts' rows; None on the CPU."""
        self._ready()
        return self._dispatched.expert_y

    def send_home(self, expert_y: Any) -> None:
        self._ready()
        self._dispatched.combine_send(expert_y)

    def come_home(self, out: Any) -> None:
        self._require_place()
        self._dispatched.combine_receive(out=out)
        self._finish()

    def combine(self, expert_y: Any, out: Any) -> None:
        self._ready()
        _core.combine(self._dispatched, expert_y, out=out)
        self._finish()

    def _ready(self) -> None:
        if self._dispatched is None:
            self.depart(self.queue.space.zeros((self.num_tokens, self.queue.hidden), "bf16"), True)
        self.receive()

    def _finish(self) -> None:
        self._dispatched = None
        self.queue.landed(self)
