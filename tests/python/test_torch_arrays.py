"""Tensors of torch, on the CPU and wherever there is a GPU: taken, made and refused like arrays."""

import gc

import numpy as np
import pytest
from conftest import MODES, one_rank_engine

import sluice

torch = pytest.importorskip("torch", reason="torch is not installed")

TOKENS = 6


@pytest.fixture()
def device_backend(device):
    return sluice.Backend(device, **({"num_threads": 1} if device == "cpu" else {}))


def tensors(geometry, device, tokens=TOKENS):
    x, idx, weights = sluice.make_workload(geometry, tokens)
    x = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return x.to(device), torch.from_numpy(idx).to(device), torch.from_numpy(weights).to(device)


def bits(tensor):
    return tensor.cpu().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("mode", MODES)
def test_same_bytes_as_numpy(checkpoint, geometry, device, device_backend, mode):
    x, idx, weights = tensors(geometry, device)
    engine = one_rank_engine(checkpoint, device_backend)
    y = sluice.moe_forward(engine, x, sluice.Routing(idx, weights), mode=mode)
    assert y.dtype == torch.bfloat16 and y.shape == x.shape and y.device == x.device
    out = torch.empty_like(x)
    assert sluice.moe_forward(engine, x, sluice.Routing(idx.long(), weights), mode=mode, out=out) is out
    assert torch.equal(y.view(torch.int16), out.view(torch.int16))
    if device == "cpu":
        arrays = sluice.make_workload(geometry, TOKENS)
        expected = sluice.moe_forward(engine, arrays[0], sluice.Routing(*arrays[1:]), mode=mode)
        assert np.array_equal(bits(y), expected)


def test_batches_are_tensors(geometry, device, device_backend):
    x, idx, weights = tensors(geometry, device)
    exchange = sluice.Exchange(
        sluice.Transport.inproc(1)[0], device_backend, num_experts=geometry.num_experts,
        num_topk=geometry.num_topk, hidden=geometry.hidden, max_tokens_per_rank=8,
    )
    dispatched = sluice.dispatch(exchange, x, sluice.Routing(idx, weights))
    batch = dispatched.batch
    assert batch.x.dtype == torch.float8_e4m3fn and batch.x_scale.dtype == torch.float32
    assert batch.num_rows.dtype == torch.int32 and batch.row_begin.dtype == torch.int64
    assert int(batch.num_rows.sum()) == idx.numel()
    rows, before = batch.x, batch.x.view(torch.uint8).clone()
    codes, scale = sluice.quantize(device_backend, x)
    expert = int(idx[0, 0])
    assert torch.equal(rows[expert, 0].view(torch.uint8), codes[0].view(torch.uint8))
    assert torch.equal(batch.x_scale[expert, 0], scale[0])
    del dispatched, batch, exchange
    gc.collect()
    assert torch.equal(rows.view(torch.uint8), before)


def test_refusals(checkpoint, geometry, device, device_backend):
    x, idx, weights = tensors(geometry, device)
    engine = one_rank_engine(checkpoint, device_backend)
    routing = sluice.Routing(idx, weights)

    def refused(text, tensor):
        with pytest.raises(sluice.Error, match=text) as caught:
            sluice.moe_forward(engine, tensor, routing, mode="normal")
        assert caught.value.code == "invalid_argument"

    refused("x: expected dtype bfloat16.* got float16", x.half())
    refused("x: expected C-contiguous memory.* strides", x.t().contiguous().t())
    refused(r"x: expected shape \[num_tokens, 256\], got \[6, 128\]", x[:, :128].contiguous())
    refused("x: expected an array.* got Tensor of torch.bfloat16: .*layout", x.to_sparse())
    refused("x: expected an array.* got Tensor of torch.bfloat16: .*meta", x.to("meta"))
    if device == "cuda":
        refused("x: expected memory on cuda:0, got cpu", x.cpu())


def test_views_of_negatives_are_refused_by_name(checkpoint, geometry, device, device_backend):
    """Their memory holds the opposite of their values, and DLPack does not say so."""
    x, idx, weights = tensors(geometry, device)
    engine = one_rank_engine(checkpoint, device_backend)
    local = sluice.LocalExperts(
        checkpoint.load_experts(3, 0, geometry.num_experts), device_backend, max_entries=TOKENS * geometry.num_topk)
    routing = sluice.Routing(idx, weights)
    y = local.forward(x, routing)
    for _ in range(3):  # A call that comes again is not looked at anew.
        assert torch.equal(bits_of(local.forward_topk(x, idx, weights)), bits_of(y))

    def refused(name, call):
        with pytest.raises(sluice.Error, match=rf"^{name}: .*negative bit.*{name}\.resolve_neg\(\)") as caught:
            call()
        assert caught.value.code == "invalid_argument"

    negated, out = torch._neg_view, torch.empty_like(x)
    refused("x", lambda: sluice.moe_forward(engine, negated(x), routing, mode="normal"))
    refused("out", lambda: sluice.moe_forward(engine, x, routing, mode="normal", out=negated(out)))
    refused("topk_weights", lambda: local.forward(x, sluice.Routing(idx, negated(weights))))
    refused("topk_weights", lambda: local.forward_topk(x, idx, negated(weights)))
    refused("x", lambda: local.forward_topk(negated(x), idx, weights))
    refused("x", lambda: sluice.quantize(device_backend, negated(x)))
    # Of other types too, in turns: what a type answers is remembered.
    class Subclass(torch.Tensor):
        pass

    class Passing:
        """Of no framework, but of an array that has one."""

        def __init__(self, tensor):
            self.tensor = tensor

        def __getattr__(self, name):
            return getattr(self.tensor, name)

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    kinds = (lambda t: torch.nn.Parameter(t, requires_grad=False), lambda t: t.as_subclass(Subclass), Passing,
             lambda t: t)
    for _ in range(2):
        for kind in kinds:
            refused("topk_weights", lambda: local.forward_topk(x, idx, kind(negated(weights))))
            assert torch.equal(bits_of(local.forward_topk(x, idx, kind(weights), out=out)), bits_of(y))
    # As it comes about: the imaginary part of a conjugate.
    part = torch.complex(weights[:1, :1].cpu(), weights[:1, :1].cpu()).conj().imag.to(device)
    assert torch.equal(part, -weights[:1, :1])
    resolved = negated(weights).resolve_neg()
    assert torch.equal(bits_of(local.forward(x, sluice.Routing(idx, resolved))) & 0x7FFF, bits_of(y) & 0x7FFF)


def bits_of(tensor):
    return tensor.cpu().view(torch.int16).to(torch.int32)


def test_tensors_do_not_leak(checkpoint, geometry, device, device_backend):
    import weakref

    x, idx, weights = tensors(geometry, device)
    engine = one_rank_engine(checkpoint, device_backend)
    y = sluice.moe_forward(engine, x, sluice.Routing(idx, weights), mode="normal")
    alive = [weakref.ref(t) for t in (x, idx, weights, y)]
    del x, idx, weights, y
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4
