"""A rank of a torch group whose processes say that they are on hosts of their own: rank size folder."""

import os
import sys

import torch.distributed as distributed

import sluice

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.environ["NCCL_HOSTID"] = f"host {rank}"
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
try:
    sluice.Transport.from_group(distributed.group.WORLD)
except sluice.Error as error:
    print(error.code, error)
distributed.destroy_process_group()
