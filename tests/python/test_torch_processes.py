"""Processes that are the ranks, with tensors of torch: on the CPU, and sharing a GPU."""

import os
from pathlib import Path

import pytest
from processes import run_ranks

torch = pytest.importorskip("torch", reason="torch is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def shared_gpu(_):
    """Ranks that share a GPU wait for each other inside kernels."""
    return {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER",
            "SLUICE_TIMEOUT_MS": "60000"}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_processes_through_deep_ep(tmp_path, num_ranks, device):
    run_ranks(Path(__file__).parent / "rank_of_deep_ep.py", num_ranks, tmp_path, device,
              environment=shared_gpu)


@pytest.mark.parametrize("device, late", [("cpu", 11), pytest.param("cuda", 20, marks=needs_gpu)])
def test_a_rank_is_late_at_its_first_call(tmp_path, device, late):
    """By more than Sluice's own timeout: with that of DeepEP, which is the default here, the others wait for it."""
    environment = {name: value for name, value in shared_gpu(0).items() if name != "SLUICE_TIMEOUT_MS"}
    run_ranks(Path(__file__).parent / "rank_of_deep_ep.py", 2, tmp_path, device, late, environment=lambda _: environment)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("device, sizes", [
    ("cpu", "small"),
    pytest.param("cuda", "small", marks=needs_gpu),
    pytest.param("cuda", "serving", marks=needs_gpu),
])
def test_a_token_does_not_depend_on_those_beside_it(tmp_path, num_ranks, device, sizes):
    print(*run_ranks(Path(__file__).parent / "rank_of_rows.py", num_ranks, tmp_path, device, sizes,
                     environment=shared_gpu))


@pytest.mark.parametrize("mode", ["low-latency", "normal"])
@pytest.mark.parametrize("device, shape", [
    ("cpu", "small"),
    pytest.param("cuda", "small", marks=needs_gpu),
    pytest.param("cuda", "published", marks=needs_gpu),
])
def test_published_checks(tmp_path, device, shape, mode):
    """As many processes as DeepEP's own; half where a GPU they share has not the memory."""
    num_ranks = 3
    if shape == "published":
        room = torch.cuda.device_count() * torch.cuda.get_device_properties(0).total_memory
        num_ranks = 8 if room > 120e9 else 4
    run_ranks(Path(__file__).parent / "rank_of_published_checks.py", num_ranks, tmp_path, device, mode,
              shape, environment=shared_gpu, timeout=150)
