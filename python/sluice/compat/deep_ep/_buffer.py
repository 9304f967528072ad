"""DeepEP's Buffer: argument names, defaults and results; the work is in the two halves."""

import functools
from collections.abc import Callable
from typing import Any

from ... import _core
from ..._error import Error
from .._arrays import check, empty_of, space_of
from ._config import Config
from ._event import EventHandle, EventOverlap
from ._low_latency import LowLatency, LowLatencyHandle
from ._normal import Normal, NormalHandle
from ._placement import ExpertPlacement
from ._rank_device import RankDevice, timeout_ms

_EXTRA = {
    # Of forks: name -> whether any value does no harm, else only None, False and 0.
    "use_nvfp4": False, "x_global_scale": False, "overlap": False, "packed_recv_count": False,
    "comp_signal": False, "src_signals": False, "src_signal_expect_value": False,
    "block_m": True, "threshold": True, "num_sms": True,
}  # fmt: skip


def _check_extra(operation: str, extra: dict[str, Any]) -> None:
    for name, value in extra.items():
        if name not in _EXTRA:
            raise TypeError(f"{operation}() got an unexpected keyword argument '{name}'")
        is_left_out = value is None or (isinstance(value, bool | int) and not value)
        if not is_left_out and not _EXTRA[name]:
            raise Error("unsupported", f"{operation}: {name} is of a fork of DeepEP; leave it out")


def _refuse(operation: str, name: str, is_given: bool, why: str) -> None:
    if is_given:
        raise Error("unsupported", f"{operation}: {name} is not served: {why}")


def _wait(event: EventOverlap | None) -> None:
    if event is not None and event.event is not None:
        event.current_stream_wait()


def _watched(call: Callable) -> Callable:
    """A method of Buffer that notes which ranks an error names, and which one ended the buffer: the errors
    of all later calls say so, whoever swallowed the first."""

    @functools.wraps(call)
    def watched(self: "Buffer", *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        except Error as error:
            self._missing.update(error.ranks)
            if error.code not in ("peer_timeout", "transport") or not (error.ranks or self._ended_by):
                raise  # What ranks disagree on blames none, and ends nothing.
            if self._ended_by is None:
                self._ended_by = str(error)
                raise
            raise Error(error.code, f"{error}; this buffer ended earlier: {self._ended_by}. Either all ranks "
                        "call low_latency_clean_mask_buffer(), once they are there again, or their processes "
                        "end", error.ranks) from error

    return watched


class Buffer:
    """Dispatch and combine for one expert-parallel group on one host.

    ``group`` is a torch ProcessGroup, an mpi4py communicator, any object with rank, size and
    all_gather(object), or a sluice.Transport. The sizes are accepted and not needed: memory is taken
    at the first call of a shape, on the device of the first rows. Calls queue on torch's current
    stream and return; nothing runs on a stream of the buffer's own.
    """

    num_sms: int = 20

    def __init__(
        self, group: Any = None, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0,
        low_latency_mode: bool = False, num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True, allow_mnnvl: bool = False,
        use_fabric: bool | None = None, explicitly_destroy: bool = False, enable_shrink: bool = False,
        comm: Any = None, *, backend: Any = None,
    ) -> None:
        if group is None and comm is None:
            raise Error("invalid_argument", "group: expected a process group or a sluice.Transport")
        group = comm if group is None else group
        is_transport = isinstance(group, _core.Transport)
        self._transport: Any = group if is_transport else _core.Transport.from_group(group, timeout_ms=timeout_ms())
        self.group = group
        self.rank, self.group_size = self._transport.rank, self._transport.num_ranks
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy, self.enable_shrink = explicitly_destroy, enable_shrink
        self._device = RankDevice(self._transport, backend)
        self._low_latency: Any = LowLatency(self._device)
        self._normal: Any = Normal(self._device)
        self._missing: set[int] = set()
        self._ended_by: str | None = None

    def destroy(self) -> None:
        """Lets go of all memory; not collective. Further calls are refused."""
        self._low_latency = self._normal = self._transport = self._device = None

    def _half(self, half: Any, operation: str) -> Any:
        if half is None:
            raise Error("invalid_argument", f"{operation}: this buffer has been destroyed")
        return half

    @staticmethod
    def is_sm90_compiled() -> bool:
        """True: the GPU code is for Hopper."""
        return True

    @classmethod
    def set_num_sms(cls, new_num_sms: int) -> None:
        """Kept for callers that read it back; SMs are shared out by the number of ranks on a GPU."""
        if new_num_sms % 2 != 0 or new_num_sms <= 0:
            raise Error("invalid_argument", f"num_sms {new_num_sms} is not a positive even number")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event of torch's current stream, as it is now."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes that the low-latency mode takes on each rank, at most: bf16, two in flight."""
        return _core.Exchange.workspace_bytes(
            num_experts=num_experts, num_topk=32, hidden=hidden, num_ranks=num_ranks,
            max_tokens_per_rank=num_max_dispatch_tokens_per_rank, wire="bf16", device="cuda",
        )

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The same for any number of ranks: nothing here depends on it."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """As get_dispatch_config()."""
        return Config(Buffer.num_sms)

    def get_comm_stream(self) -> Any:
        """The current stream: the buffer has none of its own."""
        import torch

        return torch.cuda.current_stream()

    def get_local_buffer_tensor(self, dtype: Any, size: Any = None, offset: int = 0,
                                use_rdma_buffer: bool = False) -> Any:
        """A tensor of no elements: no memory of the buffer is the caller's to write, and starting anew
        (``.zero_()`` of everything, as callers recover) needs none. A size or an offset is refused."""
        operation = "get_local_buffer_tensor"
        self._half(self._low_latency, operation)
        for name, value in (("size", size), ("offset", offset)):
            _refuse(operation, name, bool(value), "the memory of this buffer is not shown")
        return empty_of(dtype)

    # --- Low latency ------------------------------------------------------------------------------

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing to do: the modes share no memory, and flags carry epochs."""
        self._half(self._low_latency, "clean_low_latency_buffer")

    @_watched
    def low_latency_dispatch(
        self, x: Any, topk_idx: Any, num_max_dispatch_tokens_per_rank: int, num_experts: int,
        cumulative_local_expert_recv_stats: Any = None, dispatch_wait_recv_cost_stats: Any = None,
        x_global_scale: Any = None, use_fp8: bool = True, round_scale: bool = False,
        use_ue8m0: bool = False, use_nvfp4: bool = False, async_finish: bool = False,
        return_recv_hook: bool = False, **extra: Any,
    ) -> tuple[Any, Any, LowLatencyHandle, EventOverlap, Callable[[], None] | None]:
        """(recv_x, recv_count, handle, event, hook).

        x: [num_tokens, hidden] bfloat16. topk_idx: [num_tokens, num_topk], -1 for an empty entry.
        recv_x: bfloat16 [num_local_experts, num_ranks * num_max_dispatch_tokens_per_rank, hidden], or
        with use_fp8 the pair of e4m3 and scales [.., hidden / 128] float32 (use_ue8m0: [.., hidden /
        512] int32), rows densest. recv_count: [num_local_experts] int32.
        cumulative_local_expert_recv_stats: [num_local_experts] int32, increased by recv_count.
        dispatch_wait_recv_cost_stats: [num_ranks] int64, increased by the nanoseconds waited for each
        rank; reading them makes a GPU's host wait.
        With return_recv_hook the arrays are filled by hook(), on the stream that is current then.
        On a GPU, rows and counts may be overwritten by the dispatch after the next, or after combine
        by the next.
        """
        operation = "low_latency_dispatch"
        if isinstance(x_global_scale, bool):
            raise Error("invalid_argument", f"{operation}: the seventh argument is x_global_scale here and use_fp8 "
                        "in other releases of DeepEP: give both by name")
        _check_extra(operation, {"x_global_scale": x_global_scale, "use_nvfp4": use_nvfp4, **extra})
        if async_finish and return_recv_hook:
            raise Error("invalid_argument", f"{operation}: async_finish and return_recv_hook: give one")
        recv_x, count, handle, hook = self._half(self._low_latency, operation).dispatch(
            x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, use_fp8=use_fp8,
            round_scale=round_scale, use_ue8m0=use_ue8m0, with_hook=return_recv_hook,
            recv_stats=cumulative_local_expert_recv_stats, wait_stats=dispatch_wait_recv_cost_stats,
        )
        return recv_x, count, handle, self._event(x, async_finish), self._hook(hook)

    @_watched
    def low_latency_combine(
        self, x: Any, topk_idx: Any, topk_weights: Any, handle: LowLatencyHandle,
        use_logfmt: bool = False, zero_copy: bool = False, async_finish: bool = False,
        return_recv_hook: bool = False, out: Any = None, combine_wait_recv_cost_stats: Any = None,
        overlap: bool = False, src_signals: Any = None, src_signal_expect_value: int = 0, **extra: Any,
    ) -> tuple[Any, EventOverlap, Callable[[], None] | None]:
        """(combined [num_tokens, hidden] bfloat16, event, hook): sums of a token's rows, weighted.

        x: as recv_x, bfloat16; not read with zero_copy. topk_idx: as dispatched, or -1 in entries to leave
        out, whose weight is then 0; other numbers are refused on the CPU and not looked at on a GPU.
        topk_weights: [num_tokens, num_topk] float32. The hook of the dispatch must have been called.
        use_logfmt: accepted; rows stay bfloat16, which loses less.
        combine_wait_recv_cost_stats: as dispatch's. With return_recv_hook, combined is filled by hook().
        A second combine of one handle routes again, at the price of a dispatch.
        """
        operation = "low_latency_combine"
        _check_extra(operation, {"overlap": overlap, "src_signals": src_signals,
                                 "src_signal_expect_value": src_signal_expect_value, **extra})
        if async_finish and return_recv_hook:
            raise Error("invalid_argument", f"{operation}: async_finish and return_recv_hook: give one")
        combined, hook = self._half(self._low_latency, operation).combine(
            x, topk_idx, topk_weights, handle, zero_copy=zero_copy, with_hook=return_recv_hook,
            out=out, wait_stats=combine_wait_recv_cost_stats,
        )
        return combined, self._event(combined, async_finish), self._hook(hook)

    def _hook(self, hook: Callable[[], None] | None) -> Callable[[], None] | None:
        return None if hook is None else functools.partial(_watched(lambda _: hook()), self)

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> Any:
        """The array that a combine with zero_copy reads: bfloat16, shape of recv_x."""
        return self._half(self._low_latency, "get_next_low_latency_combine_buffer").next_buffer(handle)

    def low_latency_query_mask_buffer(self, mask_status: Any) -> None:
        """Fills mask_status [num_ranks] int32: 1 for the ranks that errors of this buffer have named as
        missing, gone or out of step, in either mode, since it was made or cleaned.

        A missing rank is not passed over: the call that waits for it raises sluice.Error, and so do
        all later ones until the buffer is cleaned.
        """
        check(space_of(mask_status, "mask_status"), "mask_status", mask_status, ("i32",), [self.group_size])
        for rank in range(self.group_size):
            mask_status[rank] = int(rank in self._missing)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Forgets that errors named a rank; to mask one that is there is refused."""
        if not 0 <= rank_to_mask < self.group_size:
            raise Error("invalid_argument",
                        f"rank_to_mask {rank_to_mask} is not in [0, {self.group_size})")
        _refuse("low_latency_update_mask_buffer", "mask", bool(mask),
                "rows have fixed places that all ranks know; make a buffer of the remaining ranks")
        self._missing.discard(rank_to_mask)

    def low_latency_clean_mask_buffer(self) -> None:
        """Starts anew if all ranks are there again: each calls this, and the next call of a shape takes
        new memory. Dispatches before it can no longer be combined."""
        self._half(self._low_latency, "low_latency_clean_mask_buffer")
        self._missing.clear()
        self._ended_by = None
        self._low_latency, self._normal = LowLatency(self._device), Normal(self._device)

    # --- Normal -----------------------------------------------------------------------------------

    def get_dispatch_layout(
        self, topk_idx: Any, num_experts: int, previous_event: EventOverlap | None = None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, None, Any, Any, EventOverlap]:
        """(num_tokens_per_rank, None, num_tokens_per_expert, is_token_in_rank, event)."""
        _wait(previous_event)
        per_rank, per_expert, in_rank = self._half(self._normal, "get_dispatch_layout").layout(
            topk_idx, num_experts
        )
        return per_rank, None, per_expert, in_rank, self._event(topk_idx, async_finish)

    @_watched
    def dispatch(
        self, x: Any, handle: NormalHandle | None = None, num_tokens_per_rank: Any = None,
        num_tokens_per_rdma_rank: Any = None, is_token_in_rank: Any = None,
        num_tokens_per_expert: Any = None, topk_idx: Any = None, topk_weights: Any = None,
        expert_alignment: int = 1, num_worst_tokens: int = 0, config: Config | None = None,
        previous_event: EventOverlap | None = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Any, Any, list[int] | None, NormalHandle | None, EventOverlap]:
        """(recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert, handle, event).

        x: [num_tokens, hidden] bfloat16, or the pair of e4m3 and its scales [num_tokens, hidden /
        128]. Rows come in order of source rank and token, one for each token; recv_topk_idx has this
        rank's expert numbers, -1 for others; the counts are of this rank's experts, rounded up to
        expert_alignment. Waits for the device. With `handle`, only x is sent, as it was then.
        num_worst_tokens: at least the tokens of all ranks together; then the results have so many
        rows, those that did not come with -1 for every expert, the counts are [], and nothing waits.
        """
        normal = self._half(self._normal, "dispatch")
        if num_worst_tokens < 0:
            raise Error("invalid_argument", f"dispatch: num_worst_tokens {num_worst_tokens} is negative")
        if num_worst_tokens and handle is None and topk_idx is None:
            raise Error("invalid_argument", "dispatch: num_worst_tokens needs topk_idx, which tells the "
                        "rows that came from the others")
        _wait(previous_event)
        rows, scale = x if isinstance(x, tuple) else (x, None)
        if handle is not None:
            for name, value in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
                if value is not None:
                    raise Error("invalid_argument", f"dispatch: {name} with a handle, which sends only x")
            got, got_scale = normal.again(rows, scale, handle)
            both = got if scale is None else (got, got_scale)
            return both, None, None, None, None, self._event(rows, async_finish)
        for name, value in (("is_token_in_rank", is_token_in_rank),
                            ("num_tokens_per_expert", num_tokens_per_expert)):
            if value is None:
                raise Error("invalid_argument",
                            f"dispatch: {name} is missing; get_dispatch_layout() gives it")
        config = config or Config()
        num_experts = len(num_tokens_per_expert)
        got, got_scale, idx, weights, handle = normal.dispatch(
            rows, scale, is_token_in_rank, topk_idx, topk_weights, num_experts,
            config.num_max_nvl_chunked_recv_tokens, num_worst_tokens,
        )
        if topk_weights is None:
            weights = None
        counts = None
        if num_worst_tokens:
            counts = []
        elif idx is not None:
            num_local = ExpertPlacement(num_experts, self.group_size).num_local
            counts = space_of(idx).count(idx, num_local).tolist()
            counts = [-(-c // expert_alignment) * expert_alignment for c in counts]
        both = got if scale is None else (got, got_scale)
        return both, idx, weights, counts, handle, self._event(rows, async_finish)

    @_watched
    def combine(
        self, x: Any, handle: NormalHandle, topk_weights: Any = None, bias: Any = None,
        config: Config | None = None, previous_event: EventOverlap | None = None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Any, EventOverlap]:
        """(combined [num_tokens, hidden] bfloat16, combined_topk_weights, event): sums over ranks, in
        their order.

        x: [rows of the dispatch, hidden] bfloat16, weighted by the caller already. topk_weights: [rows
        of the dispatch, num_topk] float32, summed too; they do not touch x. bias: one or two [num_tokens,
        hidden] bfloat16, added in float32 to the sum after it has been rounded to bfloat16.
        """
        normal = self._half(self._normal, "combine")
        _wait(previous_event)
        weights = None if topk_weights is None else normal.combine_weights(topk_weights, handle)
        biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        return normal.combine(x, handle, biases), weights, self._event(x, async_finish)

    def internode_dispatch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: ranks are on one host, where dispatch() is the whole of it."""
        _refuse("internode_dispatch", "a second host", True, "ranks are on one host; call dispatch()")

    def internode_combine(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: ranks are on one host, where combine() is the whole of it."""
        _refuse("internode_combine", "a second host", True, "ranks are on one host; call combine()")

    def _event(self, like: Any, is_wanted: bool) -> EventOverlap:
        return EventOverlap(EventHandle.of(space_of(like).event()) if is_wanted else None)
