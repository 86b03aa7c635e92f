"""Keys and values of the tokens so far, for decoding: grown at each call, or preallocated.

A cache begins empty and is given to each forward of a conversation: the first brings the prompts,
left-padded to one length, the later ones what follows. It remembers which columns are padding,
each request's position, and each request's expert mask, which is fixed for its life: what the
keys and values of a prefix are depends on it, so `key` is part of what a prefix cache looks up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_int
from .model_config import FlexMoREConfig
from .ops.attention import Filled, Place
from .ops.decoding import begin_token
from .positions import Heads, Step, among_themselves, first_positions, heads_of, visible
from .rank_limit import RequestLimits
from .rotary import rotary_table

COLUMNS_MULTIPLE = 16  # a mask's rows of a multiple of 16 bytes are read by attention as they lie


def _alone(x: Tensor) -> Tensor:
    """x, copied where it is a part of a product that it would keep."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.contiguous()


class KVCache:
    """What both kinds of cache share; use `DynamicCache` or `StaticCache`.

    length: columns so far, padding included. expert_mask: None, or the requests' (B, E) bool.
    limits: None, or the requests' rank limits.
    ended: None, or bool (B,) on the device: requests whose tokens are no longer counted.
    """

    def __init__(self) -> None:
        self.length = 0
        self.expert_mask: Tensor | None = None
        self.limits: RequestLimits | None = None
        self.ended: Tensor | None = None
        self._requests: tuple[int, int] | None = None  # B, E

    @property
    def key(self) -> tuple[str, ...] | None:
        """A request's allowed experts as "1101", with rank limits as "1101 -,16,-,4", one text a
        request; None before the first forward.

        Two requests share a prefix's keys and values only if their tokens and these are equal.
        Waits for the device.
        """
        if self._requests is None:
            return None
        batch, experts = self._requests
        keys = ("1" * experts,) * batch
        if self.expert_mask is not None:
            keys = ("".join("01"[one] for one in row) for row in self.expert_mask.tolist())
        limits = self._limits_of_each(batch)
        return tuple(
            key
            if limit is None
            else f"{key} {','.join('-' if r is None else str(r) for r in limit)}"
            for key, limit in zip(keys, limits, strict=True)
        )

    def bind(self, expert_mask: Tensor | None, batch: int, num_experts: int) -> Tensor | None:
        """The requests' mask (B, E), or None for all experts: set by the first forward.

        A mask given again must be equal, which waits for the device; None means the one there is.
        """
        if not self.length:  # nothing is stored: what a refused call left does not count
            self.expert_mask, self.limits, self._requests = None, None, None
        if self._requests is not None and self._requests[0] != batch:
            raise ValueError(
                f"input_ids: got {batch} rows; accepted: {self._requests[0]}, as the cache holds"
            )
        if self._requests is not None and self._requests[1] != num_experts:
            raise ValueError(
                f"cache: began with {self._requests[1]} experts, the model has {num_experts} now; "
                "accepted: a new cache"
            )
        if expert_mask is not None:
            if expert_mask.dim() == 3:
                raise ValueError(
                    f"expert_mask: got shape {tuple(expert_mask.shape)} with a cache; accepted: "
                    f"({num_experts},) or ({batch}, {num_experts}), fixed for a request's life"
                )
            expert_mask = expert_mask.expand(batch, num_experts)
        if self._requests is None:
            self._requests = (batch, num_experts)
            # A copy: what the caller writes into theirs later must not change it.
            self.expert_mask = None if expert_mask is None else expert_mask.clone()
        elif expert_mask is not None:
            mine = self.expert_mask
            same = expert_mask.all() if mine is None else (expert_mask == mine).all()
            if not bool(same):
                raise ValueError(
                    "expert_mask: got another than the one that this cache began with; accepted: "
                    "the same, or None: a request's mask is fixed for its life"
                )
        return self.expert_mask

    def bind_limits(self, limits: RequestLimits | None) -> RequestLimits | None:
        """The requests' rank limits: set by the first forward, after `bind`; None: as they are."""
        if not self.length:
            self.limits = limits
        elif limits is not None and limits.each != self._limits_of_each(len(limits.each)):
            raise ValueError(
                "rank_limit: got another than the one that this cache began with; accepted: the "
                "same, or None: a request's limits are fixed for its life"
            )
        return self.limits

    def _limits_of_each(self, batch: int) -> tuple:
        return (None,) * batch if self.limits is None else self.limits.each

    def place(self, layer: int) -> Place | None:
        """Where a layer's new keys and values are written to; None: they are given to `update`."""
        return None

    def reset(self) -> None:
        """Empty the cache for other requests."""
        self.length, self.expert_mask, self.ended, self._requests = 0, None, None, None
        self.limits = None


class DynamicCache(KVCache):
    """Keys and values that grow by concatenation: any length, and no memory before its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        super().reset()
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._real: Tensor | None = None  # (B, length); None: no padding so far
        self._position: Tensor | None = None  # (B, 1) or (1, 1), of the next token

    def begin(self, mask: Tensor | None, batch: int, length: int, device, heads: Heads) -> Step:
        """The step of `length` more tokens of each request; `mask` (B, S) is 0 at padding."""
        past, self.length = self.length, self.length + length
        before = self._position
        if before is None:
            before = torch.zeros(1, 1, dtype=torch.int64, device=device)
        positions = before + first_positions(mask, length, device)
        count = length if mask is None else mask.to(torch.int64).sum(1, keepdim=True)
        self._position = before + count
        if mask is not None or self._real is not None:
            ones = torch.ones(batch, self.length, dtype=torch.bool, device=device)
            old = ones[:, :past] if self._real is None else self._real
            new = ones[:, past:] if mask is None else mask.to(torch.bool)
            self._real = torch.cat([old, new], 1)
        if self._real is not None or (past and length > 1):
            columns = torch.arange(self.length, device=device)
            real = torch.ones_like(columns, dtype=torch.bool)[None]
            real = real if self._real is None else self._real
            allowed = visible(real, columns[past:], columns)
        else:
            allowed = None
        return Step(rotary_table(positions, *heads[:3]), allowed, allowed is None and not past)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values (B, H, S, d); return those to attend to."""
        if layer == len(self._layers):
            self._layers.append((_alone(k), _alone(v)))
        else:
            old_k, old_v = self._layers[layer]
            self._layers[layer] = (torch.cat([old_k, k], 2), torch.cat([old_v, v], 2))
        return self._layers[layer]


class StaticCache(KVCache):
    """Preallocated keys and values, written in place at an index that is kept on the device.

    A forward of one token a request launches the same kernels on the same memory at any length, so
    a CUDA graph can hold it; replays must be told to the host by `advance`. For inference: no
    gradient flows into it.

    Args:
        config: the model's. batch: requests. max_length: columns, prompt and padding included; the
            next multiple of 16 is allocated: 2 * layers * batch * max_length * key-value width
            entries.
        device, dtype: the model's.
    """

    def __init__(
        self,
        config: FlexMoREConfig,
        batch: int,
        max_length: int,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.batch = check_int("batch", batch, 1)
        self.max_length = check_int("max_length", max_length, 1)
        columns = -(-self.max_length // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE
        shape = (batch, config.num_key_value_heads, columns, config.head_dim)
        # Zeros: a column that is not yet written has weight 0, and 0 times NaN would be NaN.
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
            for layers in (config.num_hidden_layers,) * 2
        )
        self.columns = torch.arange(columns, device=self.keys[0].device)
        self.heads = heads_of(config, self.keys[0].dtype)
        self.rotary = rotary_table(self.columns, *self.heads[:3])
        self.real = torch.zeros(batch, columns, dtype=torch.bool, device=self.columns.device)
        # A request each, so that a kernel may count them side by side: columns, the same for all;
        # the next token's position.
        self.end = torch.zeros(batch, dtype=torch.int64, device=self.columns.device)
        self.position = torch.zeros(batch, 1, dtype=torch.int64, device=self.columns.device)
        self._now = self.columns[:0]  # columns of the step under way
        self._column = torch.zeros(1, dtype=torch.int64, device=self.columns.device)

    def reset(self) -> None:
        super().reset()
        # Keys and values too: a hidden column has weight 0, and 0 times NaN would be NaN.
        for state in (*self.keys, *self.values, self.real, self.end, self.position):
            state.zero_()

    def advance(self, length: int) -> None:
        """Count columns that were written without the host, by a replayed graph."""
        if self.length + length > self.max_length:
            raise ValueError(
                f"cache: got {self.length + length} columns; accepted: max_length, "
                f"{self.max_length}"
            )
        self.length += length

    def begin(self, mask: Tensor | None, batch: int, length: int, device, heads: Heads) -> Step:
        """The step of `length` more tokens of each request; `mask` (B, S) is 0 at padding."""
        if batch != self.batch:
            raise ValueError(f"input_ids: got {batch} rows; accepted: the cache's, {self.batch}")
        enough = self.heads._replace(layers=min(self.heads.layers, heads.layers))
        if (heads, device) != (enough, self.real.device):
            raise ValueError(
                f"cache: got one on {self.real.device} for {self.heads}; accepted: as the model, "
                f"on {device} for {heads}"
            )
        past = self.length
        self.advance(length)
        if past and length == 1 and mask is None:
            self._now = self._column
            rotary = begin_token(self.end, self.position, self.real, self._now, self.rotary)
            filled = Filled(self.real, self.end)
            return Step(rotary, self.real[:, None, None, :], False, filled)
        self._now = self.end[:1] + self.columns[:length]
        if mask is None:
            self.real.index_fill_(1, self._now, True)
            positions = self.position + self.columns[:length]
            self.position += length
        else:
            real = mask.to(torch.bool)
            self.real.index_copy_(1, self._now, real)
            positions = self.position + first_positions(real, length, device)
            self.position += real.sum(1, keepdim=True)
        self.end += length
        if past == 0:
            allowed = among_themselves(mask, length)
        else:
            allowed = visible(self.real, self._now, self.columns)
        cos, sin = self.rotary
        return Step((cos[positions], sin[positions]), allowed, allowed is None)

    def place(self, layer: int) -> Place:
        return Place(self.keys[layer], self.values[layer], self._now)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of a layer's keys and values, which are written, those to attend to."""
        if self.length > self._now.shape[0]:
            return keys, values
        # All that there is came now: attend to it causally, not to the empty columns.
        return keys[:, :, : self.length], values[:, :, : self.length]
