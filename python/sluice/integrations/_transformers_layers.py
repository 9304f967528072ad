"""What sluice.integrations.transformers puts in the place of a model's experts."""

from typing import Any

import torch
import torch.distributed as distributed
from torch import nn
from transformers.distributed.expert_parallel import AutoEP, EPImplementation

from .. import _core, torch_ops
from .._error import Error
from ..compat._w4a8_rooms import lock_of
from ._transformers_activation import same_activation


def _refuse_other_tensors(x: torch.Tensor, device: torch.device) -> None:
    if x.dtype != torch.bfloat16:
        raise Error("invalid_argument", f"hidden states: expected torch.bfloat16, got {x.dtype}; "
                                        "load the model with dtype=torch.bfloat16")
    if x.device != device:
        raise Error("invalid_argument", f"hidden states: expected on {device}, where the experts are, "
                                        f"got {x.device}; name the device in from_pretrained(device_map=...)")


class LocalLayer:
    """Experts [first, first + count) of one layer, and the group that they share memory in. Calls may come from several
    threads: those on one backend take turns, on a GPU as long as a call takes the host."""

    def __init__(self, group: Any, lock: Any, device: torch.device, experts: Any) -> None:
        self._group, self._lock, self._device, self._first = group, lock, device, experts.first_expert
        self._experts = experts
        self.weight_bytes = experts.weight_bytes

    def run(self, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, H] bfloat16, idx [T, K] int, weights [T, K] -> [T, H]. Ids count from the first expert
        here; other numbers are skipped."""
        _refuse_other_tensors(x, self._device)
        if self._first:
            idx = idx + self._first
        x, idx, weights = x.contiguous(), idx.contiguous(), weights.float().contiguous()
        with self._lock:
            if idx.numel() > self._group.max_entries:
                self._group.reserve(max(idx.numel(), 2 * self._group.max_entries))
            return self._experts.forward_topk(x, idx, weights)


class SplitLayer:
    """One layer over the ranks of a process group, which all have the same tokens. Each brings an equal
    part of them to the exchange, and gets what the others' parts gave. The bits are those of one rank."""

    MAX_TOKENS = 1024  # Of a rank in a call of the exchange; more take several calls.

    def __init__(self, layer: Any, process_group: Any, device: torch.device) -> None:
        self._layer, self._process_group, self._device = layer, process_group, device
        self.weight_bytes = layer.weight_bytes

    def run(self, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As LocalLayer.run(), with ids of the whole layer. Collective."""
        _refuse_other_tensors(x, self._device)
        rank, size = self._process_group.rank(), self._process_group.size()
        rows = -(-len(x) // size)
        mine = slice(rank * rows, (rank + 1) * rows)
        part = x.new_zeros(rows, x.shape[1])
        for begin in range(0, rows, self.MAX_TOKENS):
            now = slice(begin, begin + self.MAX_TOKENS)
            routing = _core.Routing(idx[mine][now].contiguous(), weights[mine][now].float().contiguous())
            y = self._layer.forward(x[mine][now].contiguous(), routing, mode="normal")
            part[begin: begin + len(y)] = y
        whole = x.new_empty(rows * size, x.shape[1])
        distributed.all_gather_into_tensor(whole, part, group=self._process_group)
        return whole[: len(x)]


class Buffers:
    """What the layers of a model share: a backend for each device, and on it a group for each width."""

    def __init__(self, process_group: Any = None) -> None:
        self._process_group = process_group
        self._backends: dict[str, Any] = {}
        self._groups: dict[tuple, Any] = {}

    def _backend(self, device: torch.device) -> Any:
        name = "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
        if name not in self._backends:
            ranks = {}
            if name == "cpu" and self._process_group is not None:  # Which share of the cores.
                ranks = {"local_rank": self._process_group.rank(), "num_local_ranks": self._process_group.size()}
            self._backends[name] = _core.Backend(name, **ranks)
        return self._backends[name]

    def local_group(self, device: torch.device, hidden: int, intermediate: int) -> tuple[Any, Any]:
        """And the lock under which it is called."""
        key, backend = ("local", device, hidden, intermediate), self._backend(device)
        lock = lock_of(backend)
        if key not in self._groups:
            with lock:
                self._groups[key] = _core.LocalGroup(
                    backend, hidden=hidden, intermediate=intermediate, max_entries=1024)
        return self._groups[key], lock

    def layer_group(self, device: torch.device, geometry: Any) -> Any:
        """Collective over the process group."""
        key = "split", device, geometry.hidden, geometry.intermediate
        if key not in self._groups:
            self._groups[key] = _core.LayerGroup(
                _core.Transport.from_group(self._process_group), self._backend(device), geometry=geometry,
                normal_tokens=SplitLayer.MAX_TOKENS)
        return self._groups[key]


def _refuse_backward(ctx: Any, *gradients: torch.Tensor) -> None:
    raise Error("unsupported", "experts in Sluice have no backward pass; use another experts_implementation")


class Inference(torch.autograd.Function):
    """A call whose gradient is refused when somebody asks for it, not left out."""

    @staticmethod
    def forward(ctx: Any, layer: Any, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return layer.run(x, idx, weights)

    backward = staticmethod(_refuse_backward)


# The same for torch.compile, which does not look into it.
torch_ops.define(
    "routed_experts(Tensor x, Tensor topk_idx, Tensor topk_weights, int layer) -> Tensor",
    lambda x, topk_idx, topk_weights, layer: torch_ops.registered(layer)[0].run(x, topk_idx, topk_weights),
    lambda x, topk_idx, topk_weights, layer: torch.empty_like(x, memory_format=torch.contiguous_format),
    has_side_effect=True,  # Of a layer over several ranks.
    backward=_refuse_backward,
)


class SluiceExperts(torch_ops.Registered):
    """The routed experts of one layer, in Sluice: (hidden_states [T, H] bfloat16, top_k_index [T, K],
    top_k_weights [T, K]) -> [T, H]. Has no parameters; they stay where from_pretrained() put them.

    Each output row depends on its own token alone: the same bits in prefill and in decoding, alone
    and in a batch. Raises Error: invalid_argument for another dtype or device.
    """

    def __init__(self, num_experts: int, hidden: int, intermediate: int, activation: str = "swiglu") -> None:
        super().__init__()
        self.activation = activation  # As ModelGeometry.activation names it; the checkpoint must say the same.
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden, intermediate
        self.uses_exchange = False  # Set by ExpertParallel, before load().
        self._layer: Any = None

    _shared = ("_layer",)

    @property
    def weight_bytes(self) -> int:
        """Of the repacked weights; 0 before they are loaded."""
        return self._layer.weight_bytes if self._layer else 0

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"

    def load(self, checkpoint: Any, layer: int, buffers: Buffers, device: torch.device,
             process_group: Any = None) -> None:
        """This rank's experts of a layer of the checkpoint, repacked for the device: all of them, or an equal
        share for each rank of a process group."""
        rank, size = (process_group.rank(), process_group.size()) if process_group else (0, 1)
        sizes = {"experts": (self.num_experts * size, checkpoint.geometry.num_experts),
                 "hidden size": (self.hidden_dim, checkpoint.geometry.token_width),
                 "intermediate size": (self.intermediate_dim, checkpoint.geometry.inner_width)}
        for name, (model, stored) in sizes.items():
            if model != stored:
                raise Error("invalid_argument", f"layer {layer}: {name} is {model} in the model and {stored} in "
                                                f"{checkpoint.path}")
        stored = checkpoint.activation(layer)
        if not same_activation(self.activation, stored):
            raise Error("invalid_argument", f"layer {layer}: activation is {self.activation} in the model and {stored} "
                                            f"in {checkpoint.path}")
        if self.uses_exchange:
            group = buffers.layer_group(device, checkpoint.geometry)
            self._layer = SplitLayer(group.add_layer(checkpoint, layer=layer), process_group, device)
        else:
            geometry = checkpoint.geometry  # Whose widths are padded to multiples of 128.
            group, lock = buffers.local_group(device, geometry.hidden, geometry.intermediate)
            experts, = group.add_layers(checkpoint, [layer], first=rank * self.num_experts, count=self.num_experts)
            self._layer = LocalLayer(group, lock, device, experts)
        self._hold(self._layer)

    def run(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        if self._layer is None:
            raise Error("invalid_argument", "SluiceExperts without weights: only from_pretrained() loads them")
        if torch.compiler.is_compiling():
            return torch.ops.sluice.routed_experts(hidden_states, top_k_index, top_k_weights, self.number)
        tensors = hidden_states, top_k_index, top_k_weights
        y = torch_ops.run_alone(self._layer.run, tensors, tensors)
        return Inference.apply(self._layer, *tensors) if y is NotImplemented else y

    forward = run


class ExpertParallel(EPImplementation):
    """ep_implementation="sluice": a layer's experts are spread over the ranks, and its tokens go through
    Sluice's exchange. The ranks must have the same batch (ep_size == tp_size)."""

    needs_shared_batch = True

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        if not isinstance(experts, SluiceExperts):
            raise Error("unsupported", f"ep_implementation='sluice': {type(experts).__name__} are not INT4 experts "
                                       "from a checkpoint")
        experts.uses_exchange = True
        self._experts = experts

    def __call__(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                 top_k_weights: torch.Tensor) -> torch.Tensor:
        return self._experts.run(hidden_states, top_k_index, top_k_weights)


def auto_expert_parallel(experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> EPImplementation:
    """ep_implementation="auto": Sluice's exchange for its experts, as before for others."""
    shares_batch = ep_mesh.size() == tp_mesh.size()
    kind = ExpertParallel if isinstance(experts, SluiceExperts) and shares_batch else AutoEP
    return kind(experts, ep_mesh, tp_mesh)
