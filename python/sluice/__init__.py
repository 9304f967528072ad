"""Expert-parallel mixture-of-experts layers with INT4 weights and FP8 activations.

    transports = sluice.Transport.inproc(num_ranks)      # one for each rank, each rank a thread
    backend = sluice.Backend("cpu", local_rank=r, num_local_ranks=num_ranks)
    engine = sluice.Engine(checkpoint, transports[r], backend, layer=3, max_tokens_per_rank=128)
    y = sluice.moe_forward(engine, x, sluice.Routing(topk_idx, topk_weights), mode="low-latency")

Tensors are numpy arrays or anything with DLPack, C-contiguous, on the backend's device, and are not
copied. numpy has no bf16: pass ml_dtypes.bfloat16 or the bits as uint16; results are uint16
(``.view(ml_dtypes.bfloat16)``). e4m3 is uint8. Functions with ``out=`` write there and return it.
Every failure is a ``sluice.Error`` with a ``code``. docs/python.md has the rest.
"""

from ._array import Array
from ._core import (
    Backend,
    Checkpoint,
    Dispatched,
    Engine,
    Exchange,
    ExpertBatch,
    Experts,
    ExpertWeights,
    InFlight,
    Layer,
    LayerGroup,
    LocalExperts,
    LocalGroup,
    ModelGeometry,
    Placement,
    Recipe,
    Routing,
    Transport,
    accuracy,
    balance,
    combine,
    count_moves,
    dispatch,
    end_mpi,
    expected_rows,
    experts_grouped,
    experts_masked,
    make_checkpoint,
    make_workload,
    max_over_mean,
    moe_forward,
    placement_toward,
    plan,
    quantize,
    read_expert_rows,
    read_placements,
    recipe_names,
    repack,
    requantize,
    slice_experts,
    stats,
    suite_names,
    version,
    write_expert_rows,
    write_placements,
)
from ._error import Error

__version__ = version()

__all__ = [
    "Array",
    "Backend",
    "Checkpoint",
    "Dispatched",
    "Engine",
    "Error",
    "Exchange",
    "ExpertBatch",
    "Experts",
    "ExpertWeights",
    "InFlight",
    "Layer",
    "LayerGroup",
    "LocalExperts",
    "LocalGroup",
    "ModelGeometry",
    "Placement",
    "Recipe",
    "Routing",
    "Transport",
    "accuracy",
    "balance",
    "combine",
    "count_moves",
    "dispatch",
    "end_mpi",
    "expected_rows",
    "experts_grouped",
    "experts_masked",
    "make_checkpoint",
    "make_workload",
    "max_over_mean",
    "moe_forward",
    "placement_toward",
    "plan",
    "quantize",
    "read_expert_rows",
    "read_placements",
    "recipe_names",
    "repack",
    "requantize",
    "slice_experts",
    "stats",
    "suite_names",
    "version",
    "write_expert_rows",
    "write_placements",
]
