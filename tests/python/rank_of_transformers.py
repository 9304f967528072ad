"""One rank of a model whose INT4 experts are spread over the ranks: rank size folder model device
ep_implementation...

For each ep_implementation writes the tokens that it generated to folder/tokens.EP_IMPLEMENTATION.RANK.pt, with
the bytes of experts that it holds. "graph" is "auto" with the decode step in a CUDA graph, for ranks with a GPU each.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as distributed
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import sluice.integrations.transformers  # noqa: F401
from sluice.integrations._transformers_layers import SplitLayer

sys.path.append(str(Path(__file__).parents[2] / "python" / "examples"))
from transformers_graph import greedy  # noqa: E402

rank, size, folder, path, device = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
torch.set_num_threads(1)
torch.backends.cuda.enable_cudnn_sdp(False)  # As tiny_models.py.
place = rank if device == "cpu" else rank % torch.cuda.device_count()  # NCCL refuses ranks that share a GPU.
os.environ.update(RANK=str(rank), LOCAL_RANK=str(place), WORLD_SIZE=str(size))
backend = "nccl" if "graph" in sys.argv[6:] else "gloo"  # Which copies through the host: no graph holds that.
distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)
if device == "cuda":
    torch.cuda.set_device(place)
    torch.cuda.set_stream(torch.cuda.Stream())  # Ranks that share a GPU each need one of their own.
# Everything but the experts is on every rank alike, so that nothing else can differ.
rules = [rule for rule in AutoConfig.from_pretrained(path).base_model_tp_plan if ".experts." not in rule]
alike = dict.fromkeys(["lm_head", "model.embed_tokens", *(f"model.{rule}" for rule in rules)], "replicate")
prompt = torch.load(f"{folder}/prompt.pt").to(device)
for how in sys.argv[6:]:
    if how == "sluice":
        SplitLayer.MAX_TOKENS = 4  # So that a prefill takes several calls of the exchange.
    config = DistributedConfig(tp_size=size, ep_size=size, tp_plan=alike,
                               ep_implementation="auto" if how == "graph" else how)
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config)
    assert model.device.type == device
    if how == "graph":
        tokens = greedy(model, prompt, 32, use_graph=True)[0].cpu()
    else:
        tokens = model.generate(prompt, max_new_tokens=32, do_sample=False).cpu()
    held = sum(getattr(module, "weight_bytes", 0) for module in model.modules())
    torch.save((tokens, held), f"{folder}/tokens.{how}.{rank}.pt")
    distributed.barrier()
distributed.destroy_process_group()
