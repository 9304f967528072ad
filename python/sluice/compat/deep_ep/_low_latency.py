"""The low-latency half of a Buffer: one DispatchQueue for each shape of call."""

from collections.abc import Callable
from typing import Any

import numpy

from ... import _core
from ..._error import Error
from .._arrays import check, space_of
from ._flight import DispatchQueue
from ._placement import ExpertPlacement
from ._waits import WaitStats

_BF16 = _core.Recipe("direct-bf16").wire
_GROUPS = _core.Recipe("direct").wire
_POWERS = _core.Recipe("pow2-static", s1=1.0, s2=1.0).wire


class LowLatencyHandle:
    """What low_latency_combine() needs of its dispatch.

    A sequence of five, as DeepEP's: src_info, layout_range, most tokens of a rank, hidden and
    num_experts. Rows of an expert are ordered by source rank, then by token.

    src_info [num_local_experts, max_m] int32 has the source's token of each row, -1 where there is
    none; layout_range [num_local_experts, num_ranks] int64 has first row << 32 | rows of each source.
    Nothing needs these two but tests, so ranks exchange them when they are first read: collective,
    and the caller's topk_idx must still be as dispatched.
    """

    def __init__(self, owner: Any, flight: Any, sizes: tuple[int, int, int], device: Any) -> None:
        self.owner, self.flight, self.sizes = owner, flight, sizes
        self.buffer: Any = None  # On the CPU, what get_next_low_latency_combine_buffer() gave.
        self._rank_device, self._origins = device, None

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        position = range(5)[index]
        if position >= 2:
            return self.sizes[position - 2]
        if self._origins is None:
            self._origins = _origins(self.flight, self.sizes[0], self._rank_device)
        return self._origins[position]


def _origins(flight: Any, max_tokens: int, device: Any) -> tuple[Any, Any]:
    """src_info and layout_range, from the routing of all ranks."""
    transport = device.transport
    space, exchange = flight.queue.space, flight.queue.exchange
    if space.is_capturing():
        raise Error("invalid_argument", "handle: src_info and layout_range are exchanged by the hosts, "
                    "which a graph cannot capture")
    mine = numpy.full((max_tokens, flight.topk_idx.shape[1]), -1, numpy.int64)
    mine[: flight.num_tokens] = numpy.asarray(space.on_host(flight.topk_idx))
    num_local = exchange.num_local_experts
    placement = ExpertPlacement(num_local * transport.num_ranks, transport.num_ranks)
    source_token = numpy.full((num_local, exchange.max_m), -1, numpy.int32)
    ranges = numpy.zeros((num_local, transport.num_ranks), numpy.int64)
    begin = numpy.zeros(num_local, numpy.int64)
    for source, theirs in enumerate(device.all_gather(mine.tobytes())):
        experts = numpy.frombuffer(theirs, numpy.int64)
        for expert in range(num_local):
            here = experts == placement.expert_of(transport.rank, expert)
            tokens = numpy.flatnonzero(here) // mine.shape[1]
            ranges[expert, source] = begin[expert] << 32 | len(tokens)
            source_token[expert, begin[expert] : begin[expert] + len(tokens)] = tokens
            begin[expert] += len(tokens)
    return space.of_host(source_token), space.of_host(ranges)


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


def _leave_out(flight: Any, topk_idx: Any) -> None:
    """Gives entries of -1 the weight 0. Other numbers than those dispatched are refused where the host sees them.

    On a GPU what was dispatched is not looked at again: that would take two kernels more in each call."""
    space, dispatched = flight.queue.space, flight.topk_idx
    if space.on_device and topk_idx.data_ptr() == dispatched.data_ptr() and topk_idx.dtype == dispatched.dtype \
            and topk_idx.stride() == dispatched.stride():
        return
    is_left_out = topk_idx < 0
    if not space.on_device and bool((wrong := (topk_idx != dispatched) & ~is_left_out).any()):
        token, entry = (int(i) for i in numpy.argwhere(numpy.asarray(wrong))[0])
        raise Error("invalid_argument", f"topk_idx: [{token}, {entry}] is {int(topk_idx[token, entry])}, dispatched was "
                    f"{int(dispatched[token, entry])}: expected the same or -1")
    space.zero_where(flight.topk_weights, is_left_out)


class LowLatency:
    """Dispatch and combine in the masked layout."""

    def __init__(self, device: Any) -> None:
        self._device, transport = device, device.transport
        self._num_ranks = transport.num_ranks
        self._queues: dict[tuple, DispatchQueue] = {}

    def _queue(self, space: Any, max_tokens: int, num_experts: int, topk: int, hidden: int,
               wire: str) -> DispatchQueue:
        key = (max_tokens, num_experts, topk, hidden, wire)
        if key not in self._queues:
            if space.is_capturing():
                raise Error(
                    "invalid_argument",
                    "low_latency_dispatch: the first call of a shape allocates, which a graph "
                    "cannot capture: call it once before the capture, on every rank",
                )
            exchange = self._device.exchange(
                space, num_experts=num_experts, num_topk=topk, hidden=hidden,
                max_tokens_per_rank=max_tokens, wire=wire,
            )
            self._queues[key] = DispatchQueue(exchange, space, hidden)
        return self._queues[key]

    def dispatch(self, x: Any, topk_idx: Any, max_tokens: int, num_experts: int, *,
                 use_fp8: bool, round_scale: bool, use_ue8m0: bool, with_hook: bool,
                 recv_stats: Any, wait_stats: Any) -> tuple[Any, Any, LowLatencyHandle, Callable[[], None] | None]:
        space = space_of(x)
        check(space, "x", x, ("bf16",), ["num_tokens", "hidden"])
        num_tokens, hidden = x.shape
        check(space, "topk_idx", topk_idx, ("i64", "i32"), [num_tokens, "num_topk"])
        topk = topk_idx.shape[1]
        if recv_stats is not None:
            num_local = ExpertPlacement(num_experts, self._num_ranks).num_local
            check(space, "cumulative_local_expert_recv_stats", recv_stats, ("i32",), [num_local])
        if use_ue8m0 and not (round_scale and use_fp8):
            raise _wrong("use_ue8m0", "use_fp8 and round_scale with it", use_ue8m0)
        if use_ue8m0 and hidden % 512 != 0:
            raise _wrong("x", "hidden a multiple of 512 for use_ue8m0", list(x.shape))
        wire = (_POWERS if round_scale else _GROUPS) if use_fp8 else _BF16
        queue = self._queue(space, max_tokens, num_experts, topk, hidden, wire)
        waits = WaitStats("dispatch_wait_recv_cost_stats", wait_stats, queue, self._num_ranks)
        weights = space.empty((num_tokens, topk), "f32")
        with waits.counting():
            flight = queue.launch(space.bits(x), topk_idx, weights, receive=not with_hook)
        received = _Received(flight, use_fp8, use_ue8m0, recv_stats, waits)
        handle = LowLatencyHandle(self, flight, (max_tokens, hidden, num_experts), self._device)
        if with_hook:
            return received.x, received.count, handle, _once(received.fill)
        received.fill()
        return received.x, received.count, handle, None

    def combine(self, x: Any, topk_idx: Any, topk_weights: Any, handle: LowLatencyHandle, *,
                zero_copy: bool, with_hook: bool, out: Any, wait_stats: Any) -> tuple[Any, Callable[[], None] | None]:
        flight = self._flight_of(handle)
        space, shape = flight.queue.space, list(flight.topk_weights.shape)
        check(space, "topk_idx", topk_idx, ("i64", "i32"), shape)
        check(space, "topk_weights", topk_weights, ("f32",), shape)
        waits = WaitStats("combine_wait_recv_cost_stats", wait_stats, flight.queue, self._num_ranks)
        if not flight.is_filled:
            raise Error("invalid_argument", "handle: the hook of its dispatch was not called, so no rows have come to "
                        "combine: call it before the experts run")
        space.copy(flight.topk_weights, topk_weights)
        _leave_out(flight, topk_idx)
        if zero_copy:
            rows = flight.expert_y() if space.on_device else handle.buffer
            if rows is None:
                raise Error("invalid_argument", "zero_copy: write to the array of "
                            "get_next_low_latency_combine_buffer(handle) first")
        else:
            exchange = flight.queue.exchange
            check(space, "x", x, ("bf16",), [exchange.num_local_experts, exchange.max_m, handle.sizes[1]])
            rows = space.bits(x)
        y = space.empty((flight.num_tokens, handle.sizes[1]), "bf16") if out is None else out
        if not with_hook:
            with waits.counting():
                flight.combine(rows, y)
            return y, None
        flight.send_home(rows)

        def come_home() -> None:
            with waits.counting():
                flight.come_home(y)

        return y, _once(come_home)

    def _flight_of(self, handle: Any) -> Any:
        if not isinstance(handle, LowLatencyHandle):
            raise _wrong("handle", "what low_latency_dispatch() gave", type(handle).__name__)
        if handle.owner is not self:
            raise Error("invalid_argument",
                        "handle: is of another buffer, or older than low_latency_clean_mask_buffer()")
        return handle.flight

    def next_buffer(self, handle: LowLatencyHandle) -> Any:
        flight = self._flight_of(handle)
        rows = flight.expert_y()
        if rows is None:
            queue = flight.queue
            shape = (queue.exchange.num_local_experts, queue.exchange.max_m, handle.sizes[1])
            rows = handle.buffer = queue.space.zeros(shape, "bf16")
        return rows


class _Received:
    """Results of a dispatch: arrays that stand before the rows have come, and fill() for then.

    On a GPU rows and counts are views of the exchange; on the CPU, where rows move last, copies.
    """

    def __init__(self, flight: Any, use_fp8: bool, use_ue8m0: bool, stats: Any, waits: WaitStats) -> None:
        self._flight, self._ue8m0, self._stats, self._waits = flight, use_ue8m0, stats, waits
        self._space = space = flight.queue.space
        exchange = flight.queue.exchange
        num_local, max_m, hidden = exchange.num_local_experts, exchange.max_m, flight.queue.hidden
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
        if not self._flight.is_received:
            with self._waits.counting():
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
        self._flight.is_filled = True
