"""Ranks as processes, met in every way there is: the bytes are those of ranks as threads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import LAYER, on_every_rank
from processes import run_ranks
from rank_of_layer import TOKENS

import sluice

HERE = Path(__file__).parent
RANKS = 2


@pytest.fixture(scope="module")
def expected(checkpoint):
    transports = sluice.Transport.inproc(RANKS)

    def body(rank):
        engine = sluice.Engine(
            checkpoint, transports[rank], sluice.Backend(num_threads=1), layer=LAYER,
            max_tokens_per_rank=TOKENS, timeout_ms=20000,
        )
        x, idx, weights = sluice.make_workload(
            checkpoint.geometry, TOKENS, first_token=rank * TOKENS
        )
        return sluice.moe_forward(engine, x, sluice.Routing(idx, weights), mode="low-latency")

    return on_every_rank(RANKS, body)


def check(folder, expected):
    for rank, y in enumerate(expected):
        assert np.array_equal(np.load(folder / f"y.{rank}.npy"), y)


@pytest.mark.parametrize("how", ["group", "environment", "ipc"])
def test_processes(checkpoint, expected, tmp_path, how):
    def environment(rank):
        place = {"SLUICE_RANK": rank, "SLUICE_WORLD_SIZE": RANKS, "SLUICE_JOB": tmp_path}
        return {**os.environ, **{k: str(v) for k, v in place.items()}}

    run_ranks(HERE / "rank_of_layer.py", RANKS, tmp_path, checkpoint.path, how,
              environment=environment)
    check(tmp_path, expected)


def test_torch_process_group(checkpoint, expected, tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    run_ranks(HERE / "rank_of_torch_group.py", RANKS, tmp_path, checkpoint.path)
    check(tmp_path, expected)


def under_mpirun(code):
    mpirun = shutil.which("mpirun") or pytest.skip("mpirun is not installed")
    subprocess.run([mpirun, "--oversubscribe", "--allow-run-as-root", "-n", "2", sys.executable, "-c", code],
                   check=True, timeout=60)


def test_mpi4py():
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    under_mpirun(
        "import sluice; from mpi4py import MPI; t = sluice.Transport.from_group(MPI.COMM_WORLD);"
        "assert t.num_ranks == 2 and t.all_gather(b'x') == [b'x', b'x']"
    )


def test_mpi():
    # In a process of its own: the first transport starts MPI.
    probe = "import sluice; sluice.Transport.mpi(); assert sluice.end_mpi()"
    alone = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    if "not in this build" in alone.stderr:
        pytest.skip("this build has no MPI")
    under_mpirun(
        "import sluice; t = sluice.Transport.mpi(timeout_ms=20000);"
        "assert (t.name, t.num_ranks) == ('mpi', 2);"
        "assert t.all_gather(b'%d' % t.rank) == [b'0', b'1'];"
        "del t; assert sluice.end_mpi()"
    )


@pytest.fixture
def no_nccl():
    """Where there are GPUs, NCCL would start."""
    try:
        sluice.Backend("cuda")
    except sluice.Error:
        return
    pytest.skip("this machine has a GPU")


class Group:
    def __init__(self, rank=0, size=1, all_gather=None):
        self.rank, self.size = rank, lambda: size
        self.all_gather = all_gather or (lambda mine: [mine])


def test_a_group_of_one():
    transport = sluice.Transport.from_group(Group())
    assert (transport.rank, transport.num_ranks) == (0, 1)
    assert transport.all_gather(b"") == [b""]


def as_rank(rank, given):
    """What another rank would bring to the first all_gather."""
    return rank, *given[1:]


@pytest.mark.parametrize("gathered, why", [
    (lambda mine: [mine, mine], "two processes say that they are rank 0: places 0 and 1"),
    (lambda mine: [as_rank(1, mine), mine], "all_gather gave rank 1's object in place 0"),
    (lambda mine: [mine, 17], "all_gather gave int in place 1, and not the object that rank 1 gave"),
    (lambda mine: [mine, None], "all_gather gave NoneType in place 1"),
    (lambda mine: [str(mine)] * 2, "all_gather gave str in place 0"),
    (lambda mine: [mine, mine[1:]], "all_gather gave tuple in place 1"),
    (lambda mine: [mine, as_rank("1", mine)], "all_gather gave tuple in place 1"),
])
def test_a_group_that_passes_on_something_else(gathered, why):
    with pytest.raises(sluice.Error, match=why) as caught:
        sluice.Transport.from_group(Group(size=2, all_gather=gathered))
    assert caught.value.code == "invalid_argument"


def test_a_rank_that_the_group_does_not_have():
    with pytest.raises(sluice.Error, match=r"group: rank 5 is not in \[0, 2\)"):
        sluice.Transport.from_group(Group(rank=5, size=2, all_gather=lambda mine: [mine, mine]))


def test_a_group_of_two_hosts_that_passes_on_other_bytes():
    def all_gather(mine):
        return ["no", "bytes"] if isinstance(mine, bytes) else [mine, (1, "far", *mine[2:])]

    from sluice import _group

    *_, num_hosts, gather = _group.meet(Group(size=2, all_gather=all_gather), "here")
    assert num_hosts == 2
    with pytest.raises(sluice.Error, match="all_gather gave str in place 0, and not the bytes that rank 0 gave"):
        gather(b"x")


def test_refusals(monkeypatch):
    with pytest.raises(sluice.Error, match="got dict without rank, size, all_gather") as caught:
        sluice.Transport.from_group({})
    assert caught.value.code == "invalid_argument"
    with pytest.raises(sluice.Error, match="all_gather gave 1 objects for 2 ranks"):
        sluice.Transport.from_group(Group(size=2))
    with pytest.raises(sluice.Error, match=r"still missing rank\(s\) 1") as caught:
        sluice.Transport.from_group(Group(size=2, all_gather=lambda mine: [mine, as_rank(1, mine)]), timeout_ms=50)
    assert caught.value.code == "peer_timeout"
    for name in ("SLUICE_RANK", "RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(sluice.Error, match="the environment names no rank"):
        sluice.Transport.from_environment()
    monkeypatch.setenv("SLUICE_RANK", "7")
    monkeypatch.setenv("SLUICE_WORLD_SIZE", "2")
    with pytest.raises(sluice.Error, match="SLUICE_RANK='7'"):
        sluice.Transport.from_environment()


def test_ranks_of_two_hosts_take_nccl(monkeypatch, no_nccl):
    """A group chooses it by the hosts of its ranks, and says so where it cannot work."""
    def all_gather(mine):  # First who is where, then where to meet.
        return [mine, mine if isinstance(mine, bytes) else (1, "far", *mine[2:])]

    before = os.listdir("/proc/self/fd")
    with pytest.raises(sluice.Error, match="transport 'nccl'") as caught:
        sluice.Transport.from_group(Group(size=2, all_gather=all_gather))
    assert len(os.listdir("/proc/self/fd")) == len(before)  # Nobody listens any more.
    assert caught.value.code == "unsupported"
    assert sluice.host_id()
    monkeypatch.setenv("NCCL_HOSTID", "part of a host")
    assert sluice.host_id() == "part of a host"


def test_a_torch_group_of_two_hosts(tmp_path, no_nccl):
    pytest.importorskip("torch", reason="torch is not installed")
    script = Path(__file__).with_name("rank_of_torch_hosts.py")
    for text in run_ranks(script, 2, tmp_path):
        assert text.startswith("unsupported transport 'nccl'"), text


def test_the_environment_of_two_hosts(monkeypatch, no_nccl):
    """What a launcher says is enough, or the variable that is missing is named."""
    for name in ("SLUICE_SECRET", "SLUICE_MEETING", "MASTER_ADDR", "MASTER_PORT", "SLUICE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)

    def refusal():
        with pytest.raises(sluice.Error) as caught:
            sluice.Transport.from_environment()
        return caught.value

    assert refusal().code == "invalid_argument" and "SLUICE_MEETING=''" in str(refusal())
    monkeypatch.setenv("MASTER_PORT", "65535")
    assert "MASTER_PORT='65535' is not a whole number in [1, 65534]" in str(refusal())
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "SLUICE_SECRET=''" in str(refusal()) and "127.0.0.1:29501" in str(refusal())
    monkeypatch.setenv("SLUICE_SECRET", "x")
    assert "SLUICE_SECRET of 1 bytes can be guessed" in str(refusal())
    monkeypatch.setenv("SLUICE_SECRET", "sixteen bytes, at least")
    assert refusal().code == "unsupported" and "transport 'nccl'" in str(refusal())
