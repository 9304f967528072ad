"""As rank_of_layer.py, met through a process group of torch: rank size folder checkpoint."""

import sys

import rank_of_layer
import torch.distributed as distributed

import sluice

rank, size, folder, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
transport = sluice.Transport.from_group(distributed.group.WORLD)
rank_of_layer.run(transport, folder, path)
distributed.destroy_process_group()
