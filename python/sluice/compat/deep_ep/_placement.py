"""Which rank has an expert, and at which index there, for the host's side of DeepEP's calls."""

from typing import Any, NamedTuple


class ExpertPlacement(NamedTuple):
    """DeepEP's placement, which its callers rely on: rank 0 has the first experts, rank 1 the next.

    The exchange has the same in src/exchange/slot_ranks.h. The functions take numbers or arrays of
    numbers; an empty entry, -1, has rank -1.
    """

    num_experts: int
    num_ranks: int

    @property
    def num_local(self) -> int:
        """Experts of each rank."""
        return self.num_experts // self.num_ranks

    def rank_of(self, expert: Any) -> Any:
        return expert // self.num_local

    def local_of(self, expert: Any) -> Any:
        """The expert's index on its rank, in [0, num_local)."""
        return expert - self.rank_of(expert) * self.num_local

    def expert_of(self, rank: int, local: Any) -> Any:
        return rank * self.num_local + local
