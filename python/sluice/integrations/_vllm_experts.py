"""Sluice's experts as vLLM's modular MoE kernel calls them, in both of its activation formats.

Importing this imports vLLM. A name that vLLM no longer has is an ImportError or AttributeError here, which
sluice.integrations.vllm turns into a refusal that names it.
"""

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNoOP,
)

from ..compat.w4a8 import W4A8Experts


class SluiceExperts(mk.FusedMoEExpertsModular):
    """What both activation formats share. `experts` are the repacked weights of this rank."""

    def __init__(self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig, experts: W4A8Experts,
                 **batched: int) -> None:
        super().__init__(moe_config, quant_config, **batched)
        self.experts = experts

    @staticmethod
    def _supports_current_device() -> bool:
        return True  # The backend was made for it, or has refused.

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return True  # SluiceMoEMethod chooses this class, by the checkpoint's scheme; no oracle does.

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation.value in ("silu", "swigluoai_uninterleave", "situ")

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True  # A row's result does not depend on the rows beside it.

    def supports_expert_map(self) -> bool:
        return True


class StandardExperts(SluiceExperts):
    """Rows [tokens, hidden] with top-k entries: no exchange, all-gather, or DeepEP's normal mode."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._map: torch.Tensor | None = None
        self._local_of: torch.Tensor | None = None

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        """Without an exchange rows stay bf16 and Sluice's kernels quantize them; what travels is quantized before."""
        parallel = self.moe_config.moe_parallel_config
        return not (parallel.use_all2all_kernels or parallel.dp_size > 1)

    def workspace_shapes(self, M: int, N: int, K: int, topk: int, global_num_experts: int, local_num_experts: int,
                         expert_tokens_meta: Any, activation: Any) -> tuple:
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()

    def local_ids(self, topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
        """This rank's numbers of the experts, -1 for others'. -1 in topk_ids stays -1."""
        if expert_map is None:
            return topk_ids
        if self._map is not expert_map:
            # Index -1 is the last entry: with -1 there, an empty top-k slot stays empty.
            self._local_of = torch.cat([expert_map, expert_map.new_full((1,), -1)])
            self._map = expert_map
        return self._local_of[topk_ids]

    def compute(self, x: torch.Tensor, x_scale: torch.Tensor | None, topk_ids: torch.Tensor,
                topk_weights: torch.Tensor, expert_map: torch.Tensor | None, out: torch.Tensor) -> None:
        """out [tokens, hidden] = each row's experts, weighted and summed."""
        self.experts.grouped(x, x_scale, self.local_ids(topk_ids, expert_map), topk_weights, out=out)

    def apply(self, output: torch.Tensor, hidden_states: torch.Tensor, w1: Any, w2: Any, topk_weights: torch.Tensor,
              topk_ids: torch.Tensor, activation: Any, global_num_experts: int, expert_map: torch.Tensor | None,
              a1q_scale: torch.Tensor | None, a2_scale: Any, workspace13: Any, workspace2: Any,
              expert_tokens_meta: Any, apply_router_weight_on_input: bool) -> None:
        if apply_router_weight_on_input:  # prepare() has multiplied the rows by them.
            topk_weights = torch.ones_like(topk_weights)
        self.compute(hidden_states, a1q_scale, topk_ids, topk_weights, expert_map, output)


class BatchedExperts(SluiceExperts):
    """Rows [local experts, max_m, hidden] with their counts: DeepEP's low-latency mode."""

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.BatchedExperts

    def workspace_shapes(self, M: int, N: int, K: int, topk: int, global_num_experts: int, local_num_experts: int,
                         expert_tokens_meta: Any, activation: Any) -> tuple:
        return (0,), (0,), (local_num_experts, M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceDelegate()  # Combine applies the router's weights.

    def apply(self, output: torch.Tensor, hidden_states: torch.Tensor, w1: Any, w2: Any, topk_weights: torch.Tensor,
              topk_ids: torch.Tensor, activation: Any, global_num_experts: int, expert_map: torch.Tensor | None,
              a1q_scale: torch.Tensor | None, a2_scale: Any, workspace13: Any, workspace2: Any,
              expert_tokens_meta: Any, apply_router_weight_on_input: bool) -> None:
        self.experts.masked(hidden_states, a1q_scale, expert_tokens_meta.expert_num_tokens, out=output)
