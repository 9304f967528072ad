"""Tuning numbers of the normal mode, as callers hand them over."""

from dataclasses import dataclass

from ..._core import Exchange


@dataclass
class Config:
    """Accepted whole; used is only ``num_max_nvl_chunked_recv_tokens``: tokens of each rank that the
    normal mode has room for before a larger call makes it grow."""

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes that the normal mode takes before it grows. hidden_bytes: of a bf16 token."""
        return Exchange.workspace_bytes(
            num_experts=num_ranks,
            num_topk=min(num_ranks, 32),
            hidden=max(hidden_bytes // 2 + 127, 128) // 128 * 128,
            max_tokens_per_rank=self.num_max_nvl_chunked_recv_tokens,
            wire="bf16",
            num_ranks=num_ranks,
            device="cuda",
        )

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: nothing crosses a network."""
        return 0
