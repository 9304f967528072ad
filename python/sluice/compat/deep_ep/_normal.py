"""The normal half of a Buffer: each token crosses once to each rank that needs it.

An exchange whose "experts" are the ranks does that: its masked layout with one expert on each rank
is one list of rows in order of source rank and token, and its sum with weights of one is the sum
over ranks, in order of rank. A second exchange of the same shape carries what belongs to a row:
expert numbers and weights, 256 bytes.
"""

import struct
from typing import Any

from ... import _core
from ..._error import Error
from .._arrays import space_of
from ._flight import Flight, Lane

_MOST_RANKS = 32
_ATTACHED = 128
"""Elements of bf16 that an attached row has: out, 32 numbers and 32 weights of four bytes; home, the
three bf16 parts of 32 weights."""
_BF16 = _core.Recipe("direct-bf16").wire


class NormalHandle:
    """Where the rows of a dispatch came from; for combine() and for more dispatches alike it."""

    def __init__(self, flight: Flight, num_rows: int, topk: int) -> None:
        self.flight, self.num_rows, self.topk = flight, num_rows, topk


class Normal:
    """Dispatch and combine of rows."""

    def __init__(self, place: Any) -> None:
        self._place, transport = place, place.transport
        self._rank, self._num_ranks = transport.rank, transport.num_ranks
        self._lanes: dict[int, Lane] = {}
        self._capacity = 0

    def layout(self, topk_idx: Any, num_experts: int) -> tuple[Any, Any, Any]:
        """Tokens to each rank [num_ranks], tokens to each expert [num_experts], and which token goes
        where [num_tokens, num_ranks]."""
        space = space_of(topk_idx)
        if num_experts % self._num_ranks != 0:
            raise Error("invalid_argument",
                        f"num_experts {num_experts} is not a multiple of {self._num_ranks} ranks")
        per_rank = num_experts // self._num_ranks
        in_rank = space.zeros((topk_idx.shape[0], self._num_ranks), "bool")
        for rank in range(self._num_ranks):
            here = (topk_idx >= rank * per_rank) & (topk_idx < (rank + 1) * per_rank)
            in_rank[:, rank] = here.any(1)
        return space.to(in_rank.sum(0), "i32"), space.count(topk_idx, num_experts), in_rank

    def dispatch(self, x: Any, scale: Any, in_rank: Any, topk_idx: Any, topk_weights: Any,
                 num_experts: int, capacity: int,
                 worst: int) -> tuple[Any, Any, Any, Any, NormalHandle]:
        """Rows, their scales, expert numbers, weights, and the way home.

        With `worst` the results have so many rows, and the host need not know how many came.
        """
        space = space_of(x)
        num_tokens, hidden = int(x.shape[0]), int(x.shape[1])
        if list(in_rank.shape) != [num_tokens, self._num_ranks]:
            raise Error("invalid_argument", f"is_token_in_rank: expected shape "
                        f"[{num_tokens}, {self._num_ranks}], got {list(in_rank.shape)}")
        topk = 0 if topk_idx is None else int(topk_idx.shape[1])
        if topk > 32:
            raise Error("invalid_argument", f"topk_idx: num_topk {topk} is not in [1, 32]")
        self._grow(space, num_tokens, hidden, topk, capacity, worst)
        slots = space.where(in_rank, space.arange(self._num_ranks), space.arange(1) - 1)
        slots = space.to(slots, "i32")
        flight, rows, count = self._send(space, _packed(space, x, scale), slots, hidden, worst)
        idx = weights = None
        if topk:
            attached = _attach(space, topk_idx, topk_weights)
            extra, got, _ = self._send(space, attached, slots, _ATTACHED, len(rows))
            idx, weights = self._detach(space, got, count, topk, num_experts)
            extra.abandon()
        x_out, scale_out = _unpacked(space, rows, x, scale)
        return x_out, scale_out, idx, weights, NormalHandle(flight, len(rows), topk)

    def again(self, x: Any, scale: Any, handle: NormalHandle) -> tuple[Any, Any]:
        """Other values over the routes of an earlier dispatch."""
        space = space_of(x)
        if int(x.shape[0]) != handle.flight.num_tokens:
            raise Error("invalid_argument", f"x: expected {handle.flight.num_tokens} tokens, as in "
                        f"the handle's dispatch, got {x.shape[0]}")
        hidden = int(x.shape[1])
        self._lane(space, hidden)
        before = handle.flight
        before.abandon()
        handle.flight, rows, _ = self._send(space, _packed(space, x, scale), before.topk_idx, hidden,
                                            handle.num_rows)
        return _unpacked(space, rows, x, scale)

    def combine(self, x: Any, handle: NormalHandle) -> Any:
        space = space_of(x)
        flight, lane = handle.flight, handle.flight.lane
        if list(x.shape) != [handle.num_rows, lane.hidden]:
            raise Error("invalid_argument", f"x: expected shape [{handle.num_rows}, {lane.hidden}], "
                        f"got {list(x.shape)}")
        rows = flight.expert_y()
        if rows is None:
            rows = space.zeros((1, lane.exchange.max_m, lane.hidden), "bf16")
        held = min(handle.num_rows, lane.exchange.max_m)
        space.copy(rows[0, :held], space.bits(x)[:held])
        y = space.empty((flight.num_tokens, lane.hidden), "bf16")
        flight.combine(rows, y)
        return y

    def combine_weights(self, weights: Any, handle: NormalHandle) -> Any:
        """Sums over ranks of a weight for each row and slot, [num_tokens, topk] float32.

        Exact where one rank's weight is not 0, as dispatch gives them: a float32 is the sum of three
        bf16, which cross as a row.
        """
        space, topk = space_of(weights), handle.topk
        if list(weights.shape) != [handle.num_rows, topk]:
            raise Error("invalid_argument", f"topk_weights: expected shape [{handle.num_rows}, {topk}], "
                        f"got {list(weights.shape)}")
        num_tokens, slots = handle.flight.num_tokens, handle.flight.topk_idx
        extra, _, _ = self._send(space, space.zeros((num_tokens, _ATTACHED), "bf16"), slots, _ATTACHED,
                                 handle.num_rows)
        rows = space.zeros((1, extra.lane.exchange.max_m, _ATTACHED), "bf16")
        held = min(handle.num_rows, rows.shape[1])
        rest = weights[:held]
        for part in range(3):
            bits = space.bf16_of(rest)
            rows[0, :held, 32 * part : 32 * part + topk] = bits
            rest = rest - space.float_of(bits)
        y = space.empty((num_tokens, _ATTACHED), "bf16")
        extra.combine(rows, y)
        sums = space.float_of(y)
        return sums[:, :topk] + (sums[:, 32 : 32 + topk] + sums[:, 64 : 64 + topk])

    def _grow(self, space: Any, num_tokens: int, hidden: int, topk: int, capacity: int,
              worst: int) -> None:
        """Every rank hears of the largest call and makes the same exchanges."""
        record = struct.Struct("<5q")
        everyone = [
            record.unpack(r)
            for r in self._place.transport.all_gather(
                record.pack(num_tokens, hidden, topk, capacity, worst)
            )
        ]
        for name, position in (("hidden", 1), ("num_topk", 2)):
            values = [r[position] for r in everyone]
            if len(set(values)) != 1:
                raise Error("transport", f"dispatch: ranks differ in {name}: {values}")
        total = sum(r[0] for r in everyone)
        for rank, theirs in enumerate(everyone):
            if 0 < theirs[4] < total:
                raise Error("invalid_argument", f"dispatch: num_worst_tokens {theirs[4]} of rank {rank}: "
                            f"the ranks have {total} tokens, which may all come")
        needed = max(max(r[0], r[3], 1) for r in everyone)
        if needed > self._capacity:
            self._capacity = 1 << (needed - 1).bit_length()
            self._lanes.clear()
        self._lane(space, hidden)
        if topk:
            self._lane(space, _ATTACHED)

    def _lane(self, space: Any, hidden: int) -> Lane:
        if hidden not in self._lanes:
            if self._num_ranks > _MOST_RANKS:
                raise Error("unsupported", f"dispatch: {self._num_ranks} ranks, at most {_MOST_RANKS}")
            exchange = _core.Exchange(
                self._place.transport, self._place.backend_for(space), num_experts=self._num_ranks,
                num_topk=self._num_ranks, hidden=hidden, max_tokens_per_rank=self._capacity,
                wire=_BF16,
            )
            self._lanes[hidden] = Lane(exchange, space, hidden)
        return self._lanes[hidden]

    def _send(self, space: Any, x: Any, slots: Any, hidden: int,
              num_rows: int) -> tuple[Flight, Any, Any]:
        """The rows that came, as many as come or num_rows, and their number [1]."""
        ones = space.zeros(tuple(slots.shape), "f32") + 1
        flight = self._lanes[hidden].launch(x, slots, ones, receive=True)
        batch = flight.batch
        if num_rows == 0:
            num_rows = int(batch.num_rows[0])  # Waits for the device.
        rows = space.empty((num_rows, hidden), "bf16")
        held = min(num_rows, batch.x.shape[1])
        space.copy(rows[:held], batch.x[0, :held])
        return flight, rows, batch.num_rows

    def _detach(self, space: Any, rows: Any, count: Any, topk: int, num_experts: int) -> tuple[Any, Any]:
        """Expert numbers of this rank, -1 for others, and weights, 0 for others."""
        numbers = space.view(rows, "i32")
        idx = space.to(numbers[:, :topk], "i64")
        weights = space.view(rows, "f32")[:, 32 : 32 + topk]
        per_rank = num_experts // self._num_ranks
        local = idx - self._rank * per_rank
        has_come = space.arange(len(rows))[:, None] < count
        mine = (local >= 0) & (local < per_rank) & (idx >= 0) & has_come
        none = space.zeros((1,), "i64") - 1
        return space.where(mine, local, none), space.where(mine, weights, space.zeros((1,), "f32"))


def _attach(space: Any, topk_idx: Any, topk_weights: Any) -> Any:
    num_tokens, topk = topk_idx.shape
    attached = space.zeros((num_tokens, 64), "i32")
    attached[:, :topk] = space.to(topk_idx, "i32")
    if topk_weights is not None:
        space.view(attached, "f32")[:, 32 : 32 + topk] = topk_weights
    return space.view(attached, "bf16")


def _packed(space: Any, x: Any, scale: Any) -> Any:
    """bf16 as it is; e4m3 and its scales one after the other in a row of as many bytes as bf16."""
    if scale is None:
        return space.bits(x)
    num_tokens, hidden = x.shape
    row = space.zeros((num_tokens, 2 * hidden), "u8")
    row[:, :hidden] = space.view(x, "u8")
    row[:, hidden : hidden + hidden // 32] = space.view(scale, "u8")
    return space.view(row, "bf16")


def _unpacked(space: Any, rows: Any, x: Any, scale: Any) -> tuple[Any, Any]:
    if scale is None:
        return (rows.view(x.dtype) if rows.dtype != x.dtype else rows), None
    hidden = x.shape[1]
    data = space.view(rows, "u8")
    codes = space.empty((len(rows), hidden), "u8")
    scales = space.empty((len(rows), hidden // 32), "u8")
    space.copy(codes, data[:, :hidden])
    space.copy(scales, data[:, hidden : hidden + hidden // 32])
    return codes.view(x.dtype), scales.view(scale.dtype)
