"""The normal half of a Buffer: each token crosses once to each rank that needs it.

An exchange whose "experts" are the ranks does that: its masked layout with one expert on each rank
is one list of rows in order of source rank and token, and its sum with weights of one is the sum
over ranks, in order of rank. A second exchange of the same shape carries what belongs to a row:
expert numbers and weights, 256 bytes, and the scales of e4m3 rows.

e4m3 rows cross as e4m3, code for code (NaN without its sign): as bf16 they are exact, and the wire
format with powers of two as scales takes them apart and together again without rounding.
"""

import struct
from typing import Any

from ... import _core
from ..._error import Error
from .._arrays import check, check_numbers, space_of
from ._flight import DispatchQueue, Flight
from ._placement import ExpertPlacement

_MOST_RANKS = 32
_ATTACHED = 128
"""Elements of bf16 that an attached row has: out, 32 numbers and 32 weights of four bytes, before
scales; home, the three bf16 parts of 32 weights."""
_BF16 = _core.Recipe("direct-bf16").wire
_POWERS = _core.Recipe("pow2-static", s1=1.0, s2=1.0).wire


def _width_attached(num_scales: int) -> int:
    return (_ATTACHED + 2 * num_scales + 127) // 128 * 128


class NormalHandle:
    """Where the rows of a dispatch came from; for combine() and for more dispatches alike it."""

    def __init__(self, owner: Any, flight: Flight, num_rows: int, topk: int) -> None:
        self.owner, self.flight, self.num_rows, self.topk = owner, flight, num_rows, topk


class Normal:
    """Dispatch and combine of rows."""

    def __init__(self, device: Any) -> None:
        self._device, transport = device, device.transport
        self._rank, self._num_ranks = transport.rank, transport.num_ranks
        self._queues: dict[tuple[int, str], DispatchQueue] = {}
        self._capacity = 0

    def layout(self, topk_idx: Any, num_experts: int) -> tuple[Any, Any, Any]:
        """Tokens to each rank [num_ranks], tokens to each expert [num_experts], and which token goes
        where [num_tokens, num_ranks]."""
        space = space_of(topk_idx, "topk_idx")
        check(space, "topk_idx", topk_idx, ("i64", "i32"), ["num_tokens", "num_topk"])
        if num_experts % self._num_ranks != 0:
            raise Error("invalid_argument",
                        f"num_experts {num_experts} is not a multiple of {self._num_ranks} ranks")
        check_numbers(space, "topk_idx", topk_idx, num_experts)
        ranks = ExpertPlacement(num_experts, self._num_ranks).rank_of(topk_idx)
        in_rank = space.zeros((topk_idx.shape[0], self._num_ranks), "bool")
        for rank in range(self._num_ranks):
            in_rank[:, rank] = (ranks == rank).any(1)
        return space.to(in_rank.sum(0), "i32"), space.count(topk_idx, num_experts), in_rank

    def dispatch(self, x: Any, scale: Any, in_rank: Any, topk_idx: Any, topk_weights: Any,
                 num_experts: int, capacity: int,
                 worst: int) -> tuple[Any, Any, Any, Any, NormalHandle]:
        """Rows, their scales, expert numbers, weights, and the way home.

        With `worst` the results have so many rows, and the host need not know how many came.
        """
        space = space_of(x)
        num_scales = _num_scales(space, x, scale)
        num_tokens, hidden = int(x.shape[0]), int(x.shape[1])
        check(space, "is_token_in_rank", in_rank, ("bool",), [num_tokens, self._num_ranks])
        topk = self._check_routing(space, topk_idx, topk_weights, num_tokens, num_experts)
        self._grow(space, num_tokens, hidden, topk, num_scales, capacity, worst)
        rank_idx = space.where(in_rank, space.arange(self._num_ranks), space.arange(1) - 1)
        rank_idx = space.to(rank_idx, "i32")
        flight, rows, count = self._send(space, x, rank_idx, worst)
        got_scale = idx = weights = None
        if topk or num_scales:
            extra = self._send_attached(space, topk_idx, topk_weights, scale, rank_idx, len(rows))
            idx, weights = self._detach(space, extra, count, topk, num_experts) if topk else (None, None)
            got_scale = _scales(space, extra, scale)
        return rows, got_scale, idx, weights, NormalHandle(self, flight, len(rows), topk)

    def again(self, x: Any, scale: Any, handle: NormalHandle) -> tuple[Any, Any]:
        """Other values over the routes of an earlier dispatch."""
        before = self._flight_of(handle)
        space = before.queue.space
        _num_scales(space, x, scale)
        if int(x.shape[0]) != before.num_tokens:
            raise Error("invalid_argument", f"x: expected {before.num_tokens} tokens, as in "
                        f"the handle's dispatch, got {x.shape[0]}")
        before.abandon()
        rank_idx, got_scale = before.topk_idx, None
        handle.flight, rows, _ = self._send(space, x, rank_idx, handle.num_rows)
        if scale is not None:
            extra = self._send_attached(space, None, None, scale, rank_idx, handle.num_rows)
            got_scale = _scales(space, extra, scale)
        return rows, got_scale

    def combine(self, x: Any, handle: NormalHandle, biases: tuple) -> Any:
        flight = self._flight_of(handle)
        queue, space = flight.queue, flight.queue.space
        check(space, "x", x, ("bf16",), [handle.num_rows, queue.hidden])
        if len(biases) > 2:
            raise Error("invalid_argument", f"bias: expected one or two arrays, got {len(biases)}")
        for bias in biases:
            check(space, "bias", bias, ("bf16",), [flight.num_tokens, queue.hidden])
        rows = flight.expert_y()
        if rows is None:
            rows = space.zeros((1, queue.exchange.max_m, queue.hidden), "bf16")
        held = min(handle.num_rows, queue.exchange.max_m)
        space.copy(rows[0, :held], space.bits(x)[:held])
        y = space.empty((flight.num_tokens, queue.hidden), "bf16")
        flight.combine(rows, y)
        if not biases:
            return y
        total = space.float_of(biases[0])
        for bias in biases[1:]:
            total = total + space.float_of(bias)
        return space.bf16_of(space.float_of(y) + total)

    def combine_weights(self, weights: Any, handle: NormalHandle) -> Any:
        """Sums over ranks of a weight for each row and top-k entry, [num_tokens, topk] float32.

        Exact where one rank's weight is not 0, as dispatch gives them: a float32 is the sum of three
        bf16, which cross as a row.
        """
        space, topk = self._flight_of(handle).queue.space, handle.topk
        if topk == 0:
            raise Error("invalid_argument", "combine: topk_weights for a dispatch without topk_idx")
        check(space, "topk_weights", weights, ("f32",), [handle.num_rows, topk])
        num_tokens, rank_idx = handle.flight.num_tokens, handle.flight.topk_idx
        extra, _, _ = self._send(space, space.zeros((num_tokens, _ATTACHED), "bf16"), rank_idx,
                                 handle.num_rows)
        rows = space.zeros((1, extra.queue.exchange.max_m, _ATTACHED), "bf16")
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

    def _check_routing(self, space: Any, topk_idx: Any, topk_weights: Any, num_tokens: int,
                       num_experts: int) -> int:
        """num_topk; 0 where the caller leaves the routing out."""
        if topk_idx is None:
            if topk_weights is not None:
                raise Error("invalid_argument", "dispatch: topk_weights without topk_idx")
            return 0
        check(space, "topk_idx", topk_idx, ("i64", "i32"), [num_tokens, "num_topk"])
        check_numbers(space, "topk_idx", topk_idx, num_experts)
        topk = int(topk_idx.shape[1])
        if not 1 <= topk <= 32:
            raise Error("invalid_argument", f"topk_idx: num_topk {topk} is not in [1, 32]")
        if topk_weights is not None:
            check(space, "topk_weights", topk_weights, ("f32",), [num_tokens, topk])
        return topk

    def _flight_of(self, handle: Any) -> Flight:
        if not isinstance(handle, NormalHandle):
            raise Error("invalid_argument",
                        f"handle: expected what dispatch() gave, got {type(handle).__name__}")
        if handle.owner is not self:
            raise Error("invalid_argument",
                        "handle: is of another buffer, or older than low_latency_clean_mask_buffer()")
        return handle.flight

    def _grow(self, space: Any, num_tokens: int, hidden: int, topk: int, num_scales: int, capacity: int,
              worst: int) -> None:
        """Every rank hears of the largest call and makes the same exchanges."""
        record = struct.Struct("<6q")
        everyone = [
            record.unpack(r)
            for r in self._device.all_gather(
                record.pack(num_tokens, hidden, topk, capacity, worst, num_scales)
            )
        ]
        for name, position in (("hidden", 1), ("num_topk", 2), ("scales of a token (0: bf16)", 5)):
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
            self._queues.clear()
        self._queue(space, hidden, _POWERS if num_scales else _BF16)
        if topk or num_scales:
            self._queue(space, _width_attached(num_scales))
        if topk:
            self._queue(space, _ATTACHED)

    def _queue(self, space: Any, hidden: int, wire: str = _BF16) -> DispatchQueue:
        key = hidden, wire
        if key not in self._queues:
            if self._num_ranks > _MOST_RANKS:
                raise Error("unsupported", f"dispatch: {self._num_ranks} ranks, at most {_MOST_RANKS}")
            exchange = self._device.exchange(
                space, num_experts=self._num_ranks, num_topk=self._num_ranks, hidden=hidden,
                max_tokens_per_rank=self._capacity, wire=wire,
            )
            self._queues[key] = DispatchQueue(exchange, space, hidden)
        return self._queues[key]

    def _send(self, space: Any, x: Any, rank_idx: Any, num_rows: int) -> tuple[Flight, Any, Any]:
        """The rows that came, as many as come or num_rows, of x's type; and their number [1]."""
        as_e4m3, hidden = space.is_e4m3(x), int(x.shape[1])
        queue = self._queue(space, hidden, _POWERS if as_e4m3 else _BF16)
        ones = space.zeros(tuple(rank_idx.shape), "f32") + 1
        sent = space.bf16_of_e4m3(x) if as_e4m3 else space.bits(x)
        flight = queue.launch(sent, rank_idx, ones, receive=True)
        batch = flight.batch
        if num_rows == 0:
            num_rows = int(batch.num_rows[0])  # Waits for the device.
        rows = space.empty((num_rows, hidden), "e4m3" if as_e4m3 else "bf16")
        held = min(num_rows, batch.x.shape[1])
        if as_e4m3 and held:
            # The scale is a power of two, so that this undoes the sender's.
            _core.requantize(self._device.backend_for(space), batch.x[0, :held], batch.x_scale[0, :held],
                             1.0, out=rows[:held])
        elif held:
            space.copy(rows[:held], batch.x[0, :held])
        return flight, (rows.view(x.dtype) if rows.dtype != x.dtype else rows), batch.num_rows

    def _send_attached(self, space: Any, topk_idx: Any, topk_weights: Any, scale: Any, rank_idx: Any,
                       num_rows: int) -> Any:
        """What belongs to the rows that came, [num_rows, ..] int32: numbers, weights, scales."""
        num_scales = 0 if scale is None else int(scale.shape[1])
        attached = space.zeros((int(rank_idx.shape[0]), _width_attached(num_scales) // 2), "i32")
        if topk_idx is not None:
            topk = topk_idx.shape[1]
            attached[:, :topk] = space.to(topk_idx, "i32")
            if topk_weights is not None:
                space.view(attached, "f32")[:, 32 : 32 + topk] = topk_weights
        if scale is not None:
            attached[:, 64 : 64 + num_scales] = space.view(scale, "i32")
        flight, rows, _ = self._send(space, space.view(attached, "bf16"), rank_idx, num_rows)
        flight.abandon()
        return space.view(rows, "i32")

    def _detach(self, space: Any, numbers: Any, count: Any, topk: int,
                num_experts: int) -> tuple[Any, Any]:
        """Expert numbers of this rank, -1 for others, and weights, 0 for others."""
        idx = space.to(numbers[:, :topk], "i64")
        weights = space.view(numbers, "f32")[:, 32 : 32 + topk]
        placement = ExpertPlacement(num_experts, self._num_ranks)
        has_come = space.arange(len(numbers))[:, None] < count
        mine = (placement.rank_of(idx) == self._rank) & has_come
        none = space.zeros((1,), "i64") - 1
        return space.where(mine, placement.local_of(idx), none), space.where(mine, weights, space.zeros((1,), "f32"))


def _num_scales(space: Any, x: Any, scale: Any) -> int:
    """Scales of a token, each of four bytes: float32, or powers of two packed into int32."""
    check(space, "x", x, ("bf16",) if scale is None else ("e4m3",), ["num_tokens", "hidden"])
    if scale is None:
        return 0
    check(space, "x[1]", scale, ("f32", "i32"), [x.shape[0], "hidden / 128 or less"])
    num, most = int(scale.shape[1]), int(x.shape[1]) // 128
    if not 1 <= num <= most:
        raise Error("invalid_argument", f"x[1]: {num} scales for a token of {x.shape[1]}, expected 1 .. {most}")
    return num


def _scales(space: Any, attached: Any, scale: Any) -> Any:
    """Of the rows that came, of the caller's type; None without."""
    if scale is None:
        return None
    bits = space.row_major(attached[:, 64 : 64 + int(scale.shape[1])])
    return bits.view(scale.dtype)
