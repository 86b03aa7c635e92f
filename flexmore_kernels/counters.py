"""The counters of a router, which stay on the device: see `ops.router_statistics`.

totals = fk.RouterStatistics.zeros(num_experts, device)            before the steps
totals.add_(fk.ops.router_statistics(logits, indices, weights))    in each
totals.load_fraction, totals.router_entropy                        when somebody looks
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RouterStatistics(NamedTuple):
    """What a router did with the tokens that count: sums, on the device, of one layer.

    tokens () int64; load (E,) int64, the slots of each expert; weight_sum (E,), their routing
    weights; score_sum (E,), the router's distribution q summed over the tokens; entropy_sum (E,),
    -q ln q summed over the tokens, in nats. Sums add up, over steps with `add_`, over processes
    with an all-reduce of each field. The properties divide them. Nothing waits for the device.
    """

    tokens: Tensor
    load: Tensor
    weight_sum: Tensor
    score_sum: Tensor
    entropy_sum: Tensor

    @classmethod
    def zeros(cls, num_experts: int, device: torch.device | str | int | None = None):
        """A place to add up: sums in float64, so that many steps do not round."""
        sums = torch.zeros(3, num_experts, dtype=torch.float64, device=device)
        load = torch.zeros(num_experts, dtype=torch.int64, device=device)
        return cls(torch.zeros((), dtype=torch.int64, device=device), load, *sums)

    def add_(self, other: RouterStatistics) -> RouterStatistics:
        """Add `other` in place; a CUDA graph can capture it."""
        for mine, theirs in zip(self, other, strict=True):
            mine.add_(theirs)
        return self

    def zero_(self) -> RouterStatistics:
        """Start again from zero, in place."""
        for part in self:
            part.zero_()
        return self

    @property
    def load_fraction(self) -> Tensor:
        """f (E,): each expert's part of all slots; 1/E where the load is even."""
        return self.load.to(self.score_sum.dtype) / self.load.sum().clamp(min=1)

    @property
    def mean_weight(self) -> Tensor:
        """(E,): the routing weight of an expert where it is selected; 0 where it never is."""
        return self.weight_sum / self.load.clamp(min=1)

    @property
    def mean_score(self) -> Tensor:
        """(E,): the mean of q over the tokens."""
        return self.score_sum / self.tokens.clamp(min=1)

    @property
    def entropy(self) -> Tensor:
        """(E,): the mean of -q_e ln q_e, each expert's part of `router_entropy`."""
        return self.entropy_sum / self.tokens.clamp(min=1)

    @property
    def router_entropy(self) -> Tensor:
        """(): the mean over tokens of the entropy of q; 0 if every token is sure, at most ln E."""
        return self.entropy.sum()

    @property
    def load_entropy(self) -> Tensor:
        """(): the entropy of `load_fraction`; 0 if one expert gets all, ln E if all get as much."""
        return torch.special.entr(self.load_fraction).sum()
