"""Ranks as processes: what the tests of transports start."""

import pickle
import subprocess
import sys
import time
from pathlib import Path


class FolderGroup:
    """A group that meets in a folder: any object with rank, size and all_gather will do."""

    def __init__(self, folder, rank, size):
        self.folder, self.rank, self.size, self.round = Path(folder), rank, size, 0

    def all_gather(self, mine):
        self.round += 1
        names = [self.folder / f"{self.round}.{r}" for r in range(self.size)]
        hidden = self.folder / f".{self.round}.{self.rank}"
        hidden.write_bytes(pickle.dumps(mine))
        hidden.rename(names[self.rank])
        deadline = time.monotonic() + 60
        while not all(name.exists() for name in names):
            assert time.monotonic() < deadline, "a process of the group did not come"
            time.sleep(0.002)
        return [pickle.loads(name.read_bytes()) for name in names]


def run_ranks(script, num_ranks, *arguments, environment=None, timeout=120):
    """Runs `script rank num_ranks arguments...` once for each rank; the outputs, by rank."""
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(num_ranks), *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(rank) if environment else None,
        )
        for rank in range(num_ranks)
    ]
    deadline = time.monotonic() + timeout
    try:
        results = [process.communicate(timeout=max(deadline - time.monotonic(), 1)) for process in processes]
    finally:
        for process in processes:
            process.kill()  # Whoever still waits for a rank that did not come.
    for rank, (process, (out, err)) in enumerate(zip(processes, results)):
        assert process.returncode == 0, f"rank {rank}: {out}\n{err}"
    return [out for out, _ in results]
