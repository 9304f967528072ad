"""Host time of the modules and operators of sluice.torch_ops in eager torch: eager_time.py [--device cuda]

Microseconds of the calling thread for one call, the least of several rounds. "around nothing" is a call whose
function does nothing, so what torch and the module add; "of a layer" runs a layer of one rank, 4 tokens.
"""

import argparse
import contextlib
import tempfile
import time

import numpy as np
import torch

import sluice
from sluice import torch_ops


def host_us(call, device, calls=100, rounds=40):
    def wait():
        if device != "cpu":
            torch.cuda.synchronize()

    for _ in range(50):
        call()
    least = float("inf")
    for _ in range(rounds):
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        least = min(least, (time.perf_counter() - begin) / calls)
    wait()
    return least * 1e6


def print_lines(title, device, layer, tensors):
    x, idx, weights = tensors
    operator = torch.ops.sluice.moe_forward
    contexts = {"": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    for name, context in contexts.items():
        with context():
            module = host_us(lambda: layer(x, idx, weights), device)
            direct = host_us(lambda: operator(x, idx, weights, layer.number, layer.mode), device)
        print(f"  {title} {name:15} MoeLayer {module:6.2f}  operator {direct:6.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    backend = sluice.Backend(device, **({"num_threads": 1} if device == "cpu" else {}))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = sluice.make_checkpoint(f"{folder}/model", sluice.ModelGeometry.preset("tiny"))
        engine = sluice.Engine(
            checkpoint, sluice.Transport.inproc(1)[0], backend, layer=3, max_tokens_per_rank=16)
        x, idx, weights = sluice.make_workload(checkpoint.geometry, 4)
    tensors = [t.to(device) for t in (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16),
                                      torch.from_numpy(idx), torch.from_numpy(weights))]
    routing = sluice.Routing(*tensors[1:])
    expected = sluice.moe_forward(engine, tensors[0], routing, mode="low-latency")
    layer = torch_ops.MoeLayer(engine)
    operator = torch.ops.sluice.moe_forward
    for y in layer(*tensors), operator(*tensors, layer.number, layer.mode):
        assert torch.equal(y.view(torch.int16), expected.view(torch.int16))
    print(f"torch {torch.__version__}, {device}, sluice {sluice.__version__}: us of the host for a call")
    function = host_us(lambda: sluice.moe_forward(engine, tensors[0], routing, mode=layer.mode), device)
    print(f"  of a layer, the function moe_forward() with a kept routing {function:.2f}")
    print_lines("of a layer", device, layer, tensors)
    kept, core = torch.empty_like(tensors[0]), torch_ops._core
    core.moe_forward, core.Routing = lambda *args, **options: kept, lambda *args: None
    print_lines("around nothing", device, layer, tensors)


if __name__ == "__main__":
    main()
