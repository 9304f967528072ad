"""The low-latency half of a Buffer: one Lane for each shape of call."""

from collections.abc import Callable
from typing import Any

from ... import _core
from ..._error import Error
from .._arrays import space_of
from ._flight import Lane

_BF16 = _core.Recipe("direct-bf16").wire
_GROUPS = _core.Recipe("direct").wire
_POWERS = _core.Recipe("pow2-static", s1=1.0, s2=1.0).wire


class LowLatencyHandle:
    """What low_latency_combine() needs of its dispatch.

    A sequence of five, as DeepEP's, of which the last three may be read: most tokens of a rank,
    hidden and num_experts. Rows of an expert are ordered by source rank, then by token.
    """

    def __init__(self, flight: Any, sizes: tuple[int, int, int]) -> None:
        self.flight, self.sizes = flight, sizes
        self.buffer: Any = None  # On the CPU, what get_next_low_latency_combine_buffer() gave.

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> int:
        position = range(5)[index]
        if position < 2:
            raise Error(
                "unsupported",
                f"handle[{index}]: src_info and layout_range are not kept; rows of an expert are "
                "ordered by source rank, then by token",
            )
        return self.sizes[position - 2]


def _wrong(name: str, expected: str, seen: Any) -> Error:
    return Error("invalid_argument", f"{name}: expected {expected}, got {seen}")


def _once(body: Callable[[], None]) -> Callable[[], None]:
    """A hook that does nothing when called again."""
    steps = [body]

    def hook() -> None:
        if steps:
            steps[0]()
            steps.clear()

    return hook


class LowLatency:
    """Dispatch and combine in the masked layout."""

    def __init__(self, place: Any) -> None:
        self._place, transport = place, place.transport
        self._num_ranks = transport.num_ranks
        self._lanes: dict[tuple, Lane] = {}

    def _lane(self, space: Any, max_tokens: int, num_experts: int, topk: int, hidden: int,
              wire: str) -> Lane:
        key = (max_tokens, num_experts, topk, hidden, wire)
        if key not in self._lanes:
            if space.on_device and space.torch.cuda.is_current_stream_capturing():
                raise Error(
                    "invalid_argument",
                    "low_latency_dispatch: the first call of a shape allocates, which a graph "
                    "cannot capture: call it once before the capture, on every rank",
                )
            exchange = _core.Exchange(
                self._place.transport, self._place.backend_for(space), num_experts=num_experts,
                num_topk=topk, hidden=hidden, max_tokens_per_rank=max_tokens, wire=wire,
            )
            self._lanes[key] = Lane(exchange, space, hidden)
        return self._lanes[key]

    def dispatch(self, x: Any, topk_idx: Any, max_tokens: int, num_experts: int, *,
                 use_fp8: bool, round_scale: bool, use_ue8m0: bool, with_hook: bool,
                 recv_stats: Any) -> tuple[Any, Any, LowLatencyHandle, Callable[[], None] | None]:
        space = space_of(x)
        if len(x.shape) != 2:
            raise _wrong("x", "shape [num_tokens, hidden]", list(x.shape))
        num_tokens, hidden = x.shape
        if len(topk_idx.shape) != 2 or topk_idx.shape[0] != num_tokens:
            raise _wrong("topk_idx", f"shape [{num_tokens}, num_topk]", list(topk_idx.shape))
        topk = topk_idx.shape[1]
        if use_ue8m0 and not (round_scale and use_fp8):
            raise _wrong("use_ue8m0", "use_fp8 and round_scale with it", use_ue8m0)
        if use_ue8m0 and hidden % 512 != 0:
            raise _wrong("x", "hidden a multiple of 512 for use_ue8m0", list(x.shape))
        wire = (_POWERS if round_scale else _GROUPS) if use_fp8 else _BF16
        lane = self._lane(space, max_tokens, num_experts, topk, hidden, wire)
        weights = space.empty((num_tokens, topk), "f32")
        flight = lane.launch(space.bits(x), topk_idx, weights, receive=not with_hook)
        received = _Received(flight, use_fp8, use_ue8m0, recv_stats)
        handle = LowLatencyHandle(flight, (max_tokens, hidden, num_experts))
        if with_hook:
            return received.x, received.count, handle, _once(received.fill)
        received.fill()
        return received.x, received.count, handle, None

    def combine(self, x: Any, topk_idx: Any, topk_weights: Any, handle: LowLatencyHandle, *,
                zero_copy: bool, with_hook: bool, out: Any) -> tuple[Any, Callable[[], None] | None]:
        flight = handle.flight
        space = space_of(topk_weights)
        slots = flight.topk_weights.shape
        for name, array in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
            if array.shape != slots:
                raise _wrong(name, f"shape {list(slots)}, as dispatched", list(array.shape))
        space.copy(flight.topk_weights, topk_weights)
        if zero_copy:
            rows = flight.expert_y() if space.on_device else handle.buffer
            if rows is None:
                raise Error("invalid_argument", "zero_copy: write to the array of "
                            "get_next_low_latency_combine_buffer(handle) first")
        else:
            rows = space.bits(x)
        y = space.empty((flight.num_tokens, handle.sizes[1]), "bf16") if out is None else out
        if not with_hook:
            flight.combine(rows, y)
            return y, None
        flight.send_home(rows)
        return y, _once(lambda: flight.come_home(y))

    def next_buffer(self, handle: LowLatencyHandle) -> Any:
        rows = handle.flight.expert_y()
        if rows is None:
            lane = handle.flight.lane
            shape = (lane.exchange.num_local_experts, lane.exchange.max_m, handle.sizes[1])
            rows = handle.buffer = lane.space.zeros(shape, "bf16")
        return rows


class _Received:
    """Results of a dispatch: arrays that stand before the rows have come, and fill() for then.

    On a GPU rows and counts are views of the exchange; on the CPU, where rows move last, copies.
    """

    def __init__(self, flight: Any, use_fp8: bool, use_ue8m0: bool, stats: Any) -> None:
        self._flight, self._ue8m0, self._stats = flight, use_ue8m0, stats
        self._space = space = flight.lane.space
        exchange = flight.lane.exchange
        num_local, max_m, hidden = exchange.num_local_experts, exchange.max_m, flight.lane.hidden
        if space.on_device:
            batch = flight.batch
            self._rows, self.count = batch.x, batch.num_rows
        else:
            self._rows = space.zeros((num_local, max_m, hidden), "u8" if use_fp8 else "bf16")
            self._rows = space.view(self._rows, "e4m3") if use_fp8 else self._rows
            self.count = space.zeros((num_local,), "i32")
        self._scale = None
        if use_fp8:
            columns = hidden // (512 if use_ue8m0 else 128)
            dtype = "i32" if use_ue8m0 else "f32"
            self._scale = space.empty_columns_first((num_local, max_m, columns), dtype)
        self.x = (self._rows, self._scale) if use_fp8 else self._rows

    def fill(self) -> None:
        space = self._space
        self._flight.receive()
        batch = self._flight.batch
        if not space.on_device:
            if self._scale is not None:
                space.copy(space.view(self._rows, "u8"), space.view(batch.x, "u8"))
            else:
                space.copy(self._rows, batch.x)
            space.copy(self.count, batch.num_rows)
        if self._scale is not None:
            scale = batch.x_scale
            space.copy(self._scale, space.exponents(scale) if self._ue8m0 else scale)
        if self._stats is not None:
            self._stats += self.count
