"""What each expert did for each request: an account that is kept on the device while a model runs.

with model.attributing(batch) as attribution:            one kernel a layer and forward
    model.generate(ids, expert_mask=mask)
print(attribution.as_text(names, request=0))              when somebody looks
attribution.to_dict(names)                                for a bill
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_int
from .ops.attribution import attribute_, weight_sum


class Attribution(NamedTuple):
    """Rows and routing weights of L layers, for each of B requests and E experts, on the device.

    layer_rows (L, B, E) int64; layer_units (L, B, E) int64, weights in units of 2^-32; tokens (B,)
    int64, the tokens that went through the layers, each once. All are sums of integers, so they are
    the same to the bit in whatever parts the tokens came, and add up: over runs with `add_`, over
    processes with an all-reduce of each field. Nothing waits for the device but `as_text` and
    `to_dict`.

    A row is a pair (token, expert) of the routing: what the layer adds to that token's output is
    the expert's result times its routing weight. It is not how many numbers a kernel multiplied:
    tensor cores work on tiles of tokens, and in a tile that two experts share a kernel may multiply
    another token's numbers by an expert's factor and throw the product away, by a weight of 0. So
    rows 0 for an expert say that nothing of it is in the request's output. Of expert 0, the base,
    they say so of the base as an expert: a low-rank expert is the base's matrices plus its own.
    """

    layer_rows: Tensor
    layer_units: Tensor
    tokens: Tensor

    @classmethod
    def zeros(
        cls,
        num_layers: int,
        num_requests: int,
        num_experts: int,
        device: torch.device | str | int | None = None,
    ) -> Attribution:
        """A place to add up: 16 bytes for each of L B E. Raises ValueError for a size below 1."""
        shape = (
            check_int("num_layers", num_layers, 1),
            check_int("num_requests", num_requests, 1),
            check_int("num_experts", num_experts, 1, 1024),
        )
        rows, units = torch.zeros(2, *shape, dtype=torch.int64, device=device)
        return cls(rows, units, torch.zeros(shape[1], dtype=torch.int64, device=device))

    def check_requests(self, batch: int) -> None:
        """Raises ValueError for another number of requests than there is an account of."""
        if batch != self.num_requests:
            raise ValueError(
                f"input_ids: got {batch} rows; accepted: {self.num_requests}, as attributing was "
                "told: row b is request b in every call"
            )

    def count_(
        self, layer: int, indices: Tensor, weights: Tensor, counted: Tensor | None = None
    ) -> None:
        """Add a layer's routing, (B, S, K) each, of tokens that `counted` (B, S) does not exclude.

        One kernel on a GPU, which a CUDA graph can capture; the first layer's counts tokens too.
        """
        attribute_(
            self.layer_rows[layer],
            self.layer_units[layer],
            self.tokens if layer == 0 else None,
            indices.reshape(-1, indices.shape[-1]),
            weights.reshape(-1, weights.shape[-1]),
            counted=counted,
        )

    def add_(self, other: Attribution) -> Attribution:
        """Add `other`, of the same sizes, in place."""
        for mine, theirs in zip(self, other, strict=True):
            mine.add_(theirs)
        return self

    def zero_(self) -> Attribution:
        """Start again from zero, in place."""
        for part in self:
            part.zero_()
        return self

    @property
    def num_layers(self) -> int:
        return self.layer_rows.shape[0]

    @property
    def num_requests(self) -> int:
        return self.layer_rows.shape[1]

    @property
    def num_experts(self) -> int:
        return self.layer_rows.shape[2]

    @property
    def rows(self) -> Tensor:
        """(B, E) int64: rows over all layers. Zero where an expert had no part in a request."""
        return self.layer_rows.sum(0)

    @property
    def weight_sum(self) -> Tensor:
        """(B, E) float64: the routing weights of the rows, over all layers."""
        return weight_sum(self.layer_units.sum(0))

    @property
    def layer_weight_sum(self) -> Tensor:
        """(L, B, E) float64: the same for each layer."""
        return weight_sum(self.layer_units)

    @property
    def share(self) -> Tensor:
        """(B, E) float64: an expert's part of a request's rows; 0 for a request without any."""
        rows = self.rows
        return rows.to(torch.float64) / rows.sum(1, keepdim=True).clamp(min=1)

    @property
    def weight_share(self) -> Tensor:
        """(B, E) float64: its part of the request's routing weight; 0 where there is none."""
        units = self.layer_units.sum(0)
        return units.to(torch.float64) / units.sum(1, keepdim=True).clamp(min=1)

    def to_dict(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Plain lists and numbers, over all layers; waits for the device.

        {"layers": L, "experts": E names, "requests": B times {"tokens", "rows": E ints,
        "weight_sum", "share", "weight_share": E floats}}.
        """
        columns = {
            "tokens": self.tokens.tolist(),
            "rows": self.rows.tolist(),
            "weight_sum": self.weight_sum.tolist(),
            "share": self.share.tolist(),
            "weight_share": self.weight_share.tolist(),
        }
        requests = [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]
        return {
            "layers": self.num_layers, "experts": self._names(names), "requests": requests,
        }  # fmt: skip

    def as_text(self, names: Sequence[str] | None = None, *, request: int = 0) -> str:
        """One request's account as a table, an expert a line; waits for the device.

        names: E of them; by default the experts' numbers. Raises ValueError for another number of
        names, or a request that is not there.
        """
        request = check_int("request", request, 0, self.num_requests - 1)
        account = self.to_dict(names)
        names, mine = account["experts"], account["requests"][request]
        wide = max(len("expert"), *map(len, names))
        lines = [
            f"request {request}: {mine['tokens']} tokens through {account['layers']} layers, "
            f"{sum(mine['rows'])} rows",
            f"{'expert':<{wide}} {'rows':>10} {'share':>8} {'weight':>12} {'share':>8} {'mean':>7}",
        ]
        columns = (mine[key] for key in ("rows", "share", "weight_sum", "weight_share"))
        for name, rows, share, weight, weight_share in zip(names, *columns, strict=True):
            lines.append(
                f"{name:<{wide}} {rows:>10} {share:>8.2%} {weight:>12.4f} {weight_share:>8.2%} "
                f"{weight / max(1, rows):>7.4f}"
            )
        return "\n".join(lines)

    def _names(self, names: Sequence[str] | None) -> list[str]:
        if names is None:
            return [str(e) for e in range(self.num_experts)]
        if isinstance(names, str) or len(names) != self.num_experts:
            raise ValueError(
                f"names: got {names!r}; accepted: {self.num_experts} texts, one an expert"
            )
        return [str(name) for name in names]
