"""A layer of random INT4 experts over an installed package alone, against numpy in float64; and its plug-ins, as
engines find them.

one_layer.py [cpu | cuda]: a GPU needs torch beside it.
"""

import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

import numpy as np

import sluice

NUM_EXPERTS, HIDDEN, MIDDLE, TOKENS, TOPK, GROUP = 4, 256, 128, 5, 2, 128
rng = np.random.default_rng(1)


def matrix(rows, columns):
    """Codes, two to a byte with the even one low; scales; and what they mean in float64."""
    codes = rng.integers(-7, 8, (NUM_EXPERTS, rows, columns))
    scales = rng.uniform(0.01, 0.02, (NUM_EXPERTS, rows, columns // GROUP)).astype(np.float32)
    packed = (codes[..., 0::2] & 15 | (codes[..., 1::2] & 15) << 4).astype(np.uint8).view(np.int8)
    return (packed, scales), codes * np.repeat(scales.astype(np.float64), GROUP, axis=-1)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


gate, exact_gate = matrix(MIDDLE, HIDDEN)
up, exact_up = matrix(MIDDLE, HIDDEN)
down, exact_down = matrix(HIDDEN, MIDDLE)
weights = sluice.ExpertWeights.from_arrays(gate, up, down, group_size=GROUP)
device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
backend = sluice.Backend(device, num_threads=1)
experts = sluice.LocalExperts(weights, backend, max_entries=TOKENS * TOPK, recipe="direct-bf16")

x = (rng.standard_normal((TOKENS, HIDDEN)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
ids = np.stack([rng.permutation(NUM_EXPERTS)[:TOPK] for _ in range(TOKENS)]).astype(np.int32)
shares = rng.uniform(0.2, 0.8, (TOKENS, TOPK)).astype(np.float32)
if device == "cpu":
    y = from_bf16(experts.forward(x, sluice.Routing(ids, shares)))
else:
    import torch

    on_device = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(device)
    routing = sluice.Routing(*(torch.from_numpy(a).to(device) for a in (ids, shares)))
    y = experts.forward(on_device, routing).double().cpu().numpy()

expected = np.zeros((TOKENS, HIDDEN))
for t in range(TOKENS):
    row = from_bf16(x[t])
    for k in range(TOPK):
        g, u = exact_gate[ids[t, k]] @ row, exact_up[ids[t, k]] @ row
        expected[t] += shares[t, k] * (exact_down[ids[t, k]] @ (g / (1 + np.exp(-g)) * u))
error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
# e4m3 rounds by at most 2^-4, twice; over random rows that is some 4 % (docs/accuracy.md).
assert 0.0 < error < 0.08, error
print(f"sluice {sluice.__version__}, {backend.description}: relative error {error:.2%} of float64")

for group in ("sglang.srt.plugins", "vllm.general_plugins"):
    values = {entry.value for entry in entry_points(group=group) if entry.name == "sluice"}
    assert len(values) == 1, (group, values)
    module, _, function = values.pop().partition(":")
    assert find_spec(module) and function == "register", (group, module, function)
    print(f"plug-in of {group}: {module}")
