"""One rank of a layer in a process of its own: rank size folder checkpoint how.

how: group, environment or ipc. Writes y to folder/y.RANK.npy.
"""

import sys

import numpy as np
from conftest import LAYER
from processes import FolderGroup

import sluice

TOKENS = 5


def main(rank, size, folder, path, how):
    if how == "group":
        transport = sluice.Transport.from_group(FolderGroup(folder, rank, size))
    elif how == "environment":
        transport = sluice.Transport.from_environment()
    else:
        transport = sluice.Transport.ipc(folder, secret="of this test alone", rank=rank, num_ranks=size)
    assert (transport.rank, transport.num_ranks, transport.name) == (rank, size, "ipc")
    assert transport.all_gather(b"%02d" % rank) == [b"%02d" % r for r in range(size)]
    run(transport, folder, path)


def run(transport, folder, path):
    rank, checkpoint = transport.rank, sluice.Checkpoint(path)
    engine = sluice.Engine(
        checkpoint, transport, sluice.Backend(num_threads=1), layer=LAYER,
        max_tokens_per_rank=TOKENS, timeout_ms=20000,
    )
    x, idx, weights = sluice.make_workload(checkpoint.geometry, TOKENS, first_token=rank * TOKENS)
    y = sluice.moe_forward(engine, x, sluice.Routing(idx, weights), mode="low-latency")
    np.save(f"{folder}/y.{rank}.npy", y)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
