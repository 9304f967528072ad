"""The names, arguments, events and refusals of sluice.compat.deep_ep: what callers of the published package rely on."""

import inspect

import numpy as np
import pytest
from deep_ep_workload import CAPACITY, EXPERTS, HIDDEN, buffers, tokens
from spaces import Torch

import sluice
from sluice.compat.deep_ep import Buffer, Config, EventHandle, EventOverlap

PUBLISHED = {  # sgl-deep-ep 0.1.2.post1, buffers/legacy.py: names in order, with defaults; - where none.
    "__init__": "group -, num_nvl_bytes 0, num_rdma_bytes 0, low_latency_mode False, num_qps_per_rank 24, "
    "allow_nvlink_for_low_latency_mode True, allow_mnnvl False, use_fabric None, "
    "explicitly_destroy False, enable_shrink False, comm None",
    "destroy": "", "is_sm90_compiled": "", "capture": "", "get_comm_stream": "",
    "set_num_sms": "new_num_sms -",
    "get_low_latency_rdma_size_hint":
    "num_max_dispatch_tokens_per_rank -, hidden -, num_ranks -, num_experts -",
    "get_local_buffer_tensor": "dtype -, size None, offset 0, use_rdma_buffer False",
    "get_dispatch_config": "num_ranks -", "get_combine_config": "num_ranks -",
    "get_dispatch_layout": "topk_idx -, num_experts -, previous_event None, async_finish False, "
    "allocate_on_comm_stream False",
    "dispatch": "x -, handle None, num_tokens_per_rank None, num_tokens_per_rdma_rank None, "
    "is_token_in_rank None, num_tokens_per_expert None, topk_idx None, topk_weights None, expert_alignment 1, "
    "num_worst_tokens 0, config None, previous_event None, async_finish False, allocate_on_comm_stream False",
    "combine": "x -, handle -, topk_weights None, bias None, config None, previous_event None, "
    "async_finish False, allocate_on_comm_stream False",
    "clean_low_latency_buffer": "num_max_dispatch_tokens_per_rank -, hidden -, num_experts -",
    "low_latency_dispatch": "x -, topk_idx -, num_max_dispatch_tokens_per_rank -, num_experts -, "
    "cumulative_local_expert_recv_stats None, dispatch_wait_recv_cost_stats None, "
    "x_global_scale None, use_fp8 True, round_scale False, use_ue8m0 False, use_nvfp4 False, async_finish False, "
    "return_recv_hook False",
    "low_latency_combine": "x -, topk_idx -, topk_weights -, handle -, use_logfmt False, zero_copy False, "
    "async_finish False, return_recv_hook False, out None, combine_wait_recv_cost_stats None, overlap False, "
    "src_signals None, src_signal_expect_value 0",
    "low_latency_update_mask_buffer": "rank_to_mask -, mask False",
    "low_latency_query_mask_buffer": "mask_status -", "low_latency_clean_mask_buffer": "",
    "get_next_low_latency_combine_buffer": "handle -",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_arguments_are_the_published_ones(name):
    """Their names, order and defaults; what is more comes after them. `group` may be left out here."""
    wanted = [w.split(" ") for w in PUBLISHED[name].split(", ")] if PUBLISHED[name] else []
    parameters = [p for p in inspect.signature(getattr(Buffer, name)).parameters.values() if p.name != "self"]
    assert len(parameters) >= len(wanted)
    for parameter, (argument, default) in zip(parameters, wanted):
        assert parameter.name == argument
        if argument != "group":
            assert default == ("-" if parameter.default is parameter.empty else str(parameter.default))
    for more in parameters[len(wanted):]:
        assert more.kind == more.VAR_KEYWORD or more.default is not more.empty


def test_sizes_configs_and_switches():
    small = Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256)
    assert 0 < small < Buffer.get_low_latency_rdma_size_hint(256, 7168, 8, 256)
    config = Buffer.get_dispatch_config(8)
    assert config == Config(20, 6, 256, 6, 256) and Buffer.get_combine_config(160) == config
    assert config.get_nvl_buffer_size_hint(7168 * 2, 8) > 0
    assert config.get_rdma_buffer_size_hint(7168 * 2, 8) == 0
    Buffer.set_num_sms(24)
    assert Buffer.num_sms == 24
    Buffer.set_num_sms(20)
    with pytest.raises(sluice.Error, match="num_sms 3"):
        Buffer.set_num_sms(3)
    assert isinstance(Buffer.capture(), EventOverlap)
    with EventOverlap() as event:
        assert event.event is None
    with pytest.raises(RuntimeError, match="no event"):
        EventOverlap().current_stream_wait()


def test_events_that_were_asked_for_can_be_waited_for(space, geometry):
    """As engines do, whatever the device: SGLang's normal dispatcher asks for one at each call."""
    (buffer,), num = buffers(1), geometry.num_experts
    x, idx = space.bf16(np.zeros((3, geometry.hidden), np.uint16)), space.array(np.zeros((3, 1), np.int64))
    Buffer.capture().current_stream_wait()
    to_rank, _, to_expert, in_rank, event = buffer.get_dispatch_layout(idx, num, Buffer.capture(), async_finish=True)
    event.current_stream_wait()
    *_, handle, event = buffer.dispatch(
        x, num_tokens_per_rank=to_rank, is_token_in_rank=in_rank, num_tokens_per_expert=to_expert, topk_idx=idx,
        topk_weights=space.array(np.ones((3, 1), np.float32)), previous_event=event, async_finish=True)
    event.current_stream_wait()
    y, _, event = buffer.combine(x, handle, async_finish=True)
    with event:
        assert y.shape == x.shape and event.event is not None
    _, _, _, event, _ = buffer.low_latency_dispatch(x, idx, 8, num, async_finish=True)
    event.current_stream_wait()
    assert buffer.low_latency_dispatch(x, idx, 8, num)[3].event is None


def test_refusals(space):
    buffer = buffers(1)[0]
    x, idx, weights = tokens(0, 4)
    x, idx, weights = space.bf16(x), space.array(idx), space.array(weights)

    def refused(text, code, call, *args, **kwargs):
        with pytest.raises(sluice.Error, match=text) as caught:
            call(*args, **kwargs)
        assert caught.value.code == code

    dispatch = lambda *a, **k: buffer.low_latency_dispatch(*(a or (x, idx, CAPACITY, EXPERTS)), **k)  # noqa: E731
    refused("use_nvfp4 is of a fork", "unsupported", dispatch, use_nvfp4=True)
    with pytest.raises(TypeError, match="'use_fp4'"):
        dispatch(use_fp4=False)
    _, _, handle, _, _ = dispatch(use_nvfp4=False, x_global_scale=None)
    refused("give one", "invalid_argument", dispatch, async_finish=True, return_recv_hook=True)
    refused("num_tokens 4 exceeds max_tokens_per_rank 3", "invalid_argument", dispatch, x, idx, 3, EXPERTS)
    refused("topk_idx: expected shape", "invalid_argument", dispatch, x, idx[:3], CAPACITY, EXPERTS)
    refused(r"shape \[num_tokens, hidden\]", "invalid_argument", dispatch, x[0], idx, CAPACITY, EXPERTS)
    rows = space.bf16(np.zeros((EXPERTS, CAPACITY, HIDDEN), np.uint16))
    combine = buffer.low_latency_combine
    refused("topk_weights: expected shape", "invalid_argument", combine, rows, idx, weights[:2], handle)
    refused("topk_idx: expected shape", "invalid_argument", combine, rows, idx[:2], weights, handle)
    refused(r"x: expected shape \[8, 8, 512\], got \[7, 8, 512\]", "invalid_argument", combine, rows[1:], idx, weights, handle)
    refused("overlap is of a fork", "unsupported", combine, rows, idx, weights, handle, overlap=True)
    refused("src_signal_expect_value is of a fork", "unsupported", combine, rows, idx, weights, handle,
            src_signal_expect_value=3)
    refused("x_global_scale here and use_fp8 in other", "invalid_argument", dispatch, x, idx, CAPACITY, EXPERTS,
            None, None, False)
    refused("internode_dispatch: a second host is not served", "unsupported", buffer.internode_dispatch, x)
    refused("internode_combine: a second host is not served", "unsupported", buffer.internode_combine, x, handle)
    refused("zero_copy", "invalid_argument", combine, None, idx, weights, handle, zero_copy=True)
    combine(rows, idx, weights, handle, use_logfmt=True, overlap=False, src_signal_expect_value=0, block_m=64)
    for number, dtype, text in ((2, np.int64, r"shape \[1\], got \[2\]"), (1, np.int32, "dtype int64, got int32")):
        waits = space.array(np.zeros(number, dtype))
        refused(f"dispatch_wait_recv_cost_stats: expected {text}", "invalid_argument", dispatch,
                dispatch_wait_recv_cost_stats=waits)
        refused(f"combine_wait_recv_cost_stats: expected {text}", "invalid_argument", combine,
                rows, idx, weights, handle, combine_wait_recv_cost_stats=waits)
    refused("size is not served", "unsupported", buffer.get_local_buffer_tensor, np.int8, size=64)
    refused("offset is not served", "unsupported", buffer.get_local_buffer_tensor, np.int8, offset=64)
    status = space.array(np.ones(2, np.int32))
    refused(r"mask_status: expected shape \[1\]", "invalid_argument", buffer.low_latency_query_mask_buffer,
            status)
    buffer.low_latency_update_mask_buffer(0, False)
    refused("rank_to_mask 1 is", "invalid_argument", buffer.low_latency_update_mask_buffer, 1, False)
    refused("mask is not served", "unsupported", buffer.low_latency_update_mask_buffer, 0, True)
    refused("num_worst_tokens needs topk_idx", "invalid_argument", buffer.dispatch, x, num_worst_tokens=8)
    refused("num_worst_tokens -1", "invalid_argument", buffer.dispatch, x, num_worst_tokens=-1)
    _, _, to_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)
    normal = lambda **k: buffer.dispatch(  # noqa: E731
        x, is_token_in_rank=in_rank, num_tokens_per_expert=to_expert, **k)
    refused("num_worst_tokens 3 of rank 0: the ranks have 4", "invalid_argument", normal,
            topk_idx=idx, num_worst_tokens=3)
    rows_x, _, _, _, home, _ = normal()
    refused("dispatch without topk_idx", "invalid_argument", buffer.combine, rows_x, home,
            topk_weights=weights)
    refused(r"bias: expected shape \[4, 512\], got \[3, 512\]", "invalid_argument", buffer.combine,
            rows_x, home, bias=(x, x[:3]))
    refused("bias: expected dtype bfloat16.*, got float32", "invalid_argument", buffer.combine, rows_x, home,
            bias=space.array(np.zeros((4, HIDDEN), np.float32)))
    refused("bias: expected one or two arrays, got 3", "invalid_argument", buffer.combine, rows_x, home,
            bias=(x, x, x))
    refused("is_token_in_rank is missing", "invalid_argument", buffer.dispatch, x)
    refused("num_experts 3", "invalid_argument", buffers(2)[0].get_dispatch_layout, idx, 3)
    buffer.clean_low_latency_buffer(CAPACITY, HIDDEN, EXPERTS)
    buffer.destroy()
    refused("has been destroyed", "invalid_argument", dispatch)
    refused("has been destroyed", "invalid_argument", buffer.get_local_buffer_tensor, np.int8)


def test_recovery_as_vllm_does_it(space):
    """Zeroes the memory of the buffer, which here is nothing, and cleans the mask; then calls go on."""
    buffer = buffers(1)[0]
    x, idx, _ = tokens(0, 4)
    dtype = space.torch.int8 if isinstance(space, Torch) else np.int8
    for _ in range(2):
        _, count, _, _, _ = buffer.low_latency_dispatch(space.bf16(x), space.array(idx), CAPACITY, EXPERTS)
        assert space.plain(count).sum() == (idx >= 0).sum()
        memory = buffer.get_local_buffer_tensor(dtype, use_rdma_buffer=True)
        assert memory.dtype == dtype and tuple(memory.shape) == (0,)
        memory.zero_() if isinstance(space, Torch) else memory.fill(0)
        buffer.low_latency_clean_mask_buffer()


def test_events():
    """Made by callers too; on the CPU they have passed."""
    event = EventOverlap(EventHandle())
    assert event.event is not None
    event.current_stream_wait()
    with event:
        pass
    event.current_stream_wait(release_handle=True)
    with pytest.raises(RuntimeError, match="no event to wait for"):
        event.current_stream_wait()
    Buffer.capture().current_stream_wait()


def test_timeout_is_that_of_deep_ep(monkeypatch):
    """Unless the environment says another one."""
    from sluice.compat.deep_ep import _rank_device

    given = []
    exchange = sluice._core.Exchange
    monkeypatch.setattr(_rank_device._core, "Exchange", lambda *a, **k: given.append(k["timeout_ms"]) or exchange(*a, **k))
    x, idx, _ = tokens(0, 4)
    monkeypatch.delenv("SLUICE_TIMEOUT_MS", raising=False)
    buffers(1)[0].low_latency_dispatch(x, idx, CAPACITY, EXPERTS)
    monkeypatch.setenv("SLUICE_TIMEOUT_MS", "500")
    buffers(1)[0].low_latency_dispatch(x, idx, CAPACITY, EXPERTS)
    assert given == [100_000, None]


def test_topk_idx_type():
    from sluice.compat import deep_ep

    assert "int64" in str(deep_ep.topk_idx_t)


def test_the_name_deep_ep(monkeypatch):
    """python/deep_ep_shim, which is a distribution of its own."""
    import importlib
    import sys
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "python" / "deep_ep_shim"))
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    module = importlib.import_module("deep_ep")
    assert module.Buffer is Buffer and "int64" in str(module.topk_idx_t)
    version = (Path(__file__).parents[2] / "VERSION").read_text().strip()
    assert f'version = "{version}"' in (Path(module.__file__).parents[1] / "pyproject.toml").read_text()
    monkeypatch.delitem(sys.modules, "deep_ep")
