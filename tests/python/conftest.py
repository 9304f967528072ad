"""What the tests share: a tiny checkpoint, and ranks as threads."""

import os
import threading

import numpy as np
import pytest
from spaces import Numpy, Torch, has_gpu

import sluice

LAYER = 3
MODES = ("low-latency", "normal")


@pytest.fixture(scope="session")
def geometry():
    return sluice.ModelGeometry.preset("tiny")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, geometry):
    return sluice.make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", geometry)


@pytest.fixture(scope="session")
def arrays(checkpoint, geometry):
    """w13, w13_scale, w2, w2_scale of all experts, as published."""
    weights = checkpoint.load_experts(LAYER, 0, geometry.num_experts)

    def stack(name):
        pairs = [weights.matrix(e, name) for e in range(len(weights))]
        return np.stack([c for c, _ in pairs]).view(np.int8), np.stack([s for _, s in pairs])

    gate, up, down = stack("gate"), stack("up"), stack("down")
    return (np.concatenate([gate[0], up[0]], 1), np.concatenate([gate[1], up[1]], 1), *down)


@pytest.fixture(scope="session")
def backend():
    return sluice.Backend("cpu", num_threads=1)


@pytest.fixture(scope="session")
def gpu():
    if not has_gpu():
        pytest.skip("no CUDA device")
    return sluice.Backend("cuda")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Where tensors of torch are."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return request.param


@pytest.fixture(params=[Numpy, Torch], ids=["numpy", "torch"])
def space(request):
    """Arrays of either kind, on the CPU."""
    return request.param()


@pytest.fixture(scope="session")
def command_line():
    path = os.environ.get("SLUICE_COMMAND")
    if not path:
        pytest.skip("SLUICE_COMMAND does not name a built command line")
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory, command_line):
    """Of tiny_models: model, format -> folder."""
    from tiny_models import make_models  # Skips where there is no transformers.

    return make_models(tmp_path_factory.mktemp("transformers"), command_line)


def on_every_rank(num_ranks, body):
    """body(rank) on a thread each; results in order. Raises the first failure."""
    results, failures = [None] * num_ranks, []

    def run(rank):
        try:
            results[rank] = body(rank)
        except BaseException as failure:  # Also assertions.
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(r,)) for r in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        # Peers of a failed rank time out: that is not the cause.
        raise min(failures, key=lambda f: getattr(f, "code", "") == "peer_timeout")
    return results


def one_rank_engine(checkpoint, backend, tokens=8, **options):
    return sluice.Engine(
        checkpoint,
        sluice.Transport.inproc(1)[0],
        backend,
        layer=LAYER,
        max_tokens_per_rank=tokens,
        **options,
    )
