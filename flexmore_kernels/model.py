"""The decoder as a language model: ids to logits, and to more ids. Maths: reference/model.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .attribution import Attribution
from .cards import Card, cards_of, mask_of
from .checks import check_int, check_tensor
from .counters import RouterStatistics
from .decoder import Decoder, RMSNorm, Watcher
from .generation import generate
from .kv_cache import KVCache
from .layer import FlexMoRE
from .model_config import FlexMoREConfig
from .ops.routing import Routing
from .preparation import Prepared
from .rank_limit import RequestLimits, largest_ranks_of


class FlexMoREForCausalLM(nn.Module):
    """The language model: ids to logits. state_dict keys are those of the authors' checkpoints.

    With `config.tie_word_embeddings` there is no `lm_head.weight`. Builds on the meta device; after
    `to_empty`, `reset_parameters` or `load_state_dict` fills it.
    """

    def __init__(
        self,
        config: FlexMoREConfig,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.model = Decoder(config, **kind)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **kind)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices normal(0.02), norms one, the layers as `FlexMoRE.reset_parameters`."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, FlexMoRE):
                module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        expert_mask: Tensor | None = None,
        rank_limit: Sequence | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Logits (B, S, vocab_size) of ids (B, S); each position sees itself and those before it.

        Args:
            input_ids: (B, S) int64 or int32.
            attention_mask: (B, S), 0 at padding, on either side: no other token sees it, and
                positions count from a request's first token, as in Hugging Face.
            expert_mask: bool (E,), (B, E) a request or (B, S, E) a token, for every layer.
            rank_limit: E entries for all requests, or B sequences of them, one a request, each
                entry None or a rank: of the expert's factors the first ranks alone, in every layer
                (rank_limit.py). A layer runs once for each group of requests with equal limits.
            cache: `DynamicCache()` or a `StaticCache`. What earlier calls left in it comes before
                these ids, and theirs is added. All of this call's masks are of these ids alone; an
                expert mask is a request's for its life, None later, or the same (else ValueError),
                and so are its rank limits.
            logits_to_keep: of the last so many positions alone; 0: all.

        Returns: (B, S or logits_to_keep, vocab_size) in the model's dtype. Deterministic; no host
        sync on CUDA, but where requests' rank limits differ (once a cache). Raises ValueError or
        TypeError naming the argument.
        """
        check_tensor("input_ids", input_ids, ("B", "S"), (torch.int64, torch.int32))
        batch, length = input_ids.shape
        if attention_mask is not None:
            device = input_ids.device
            check_tensor("attention_mask", attention_mask, (batch, length), None, device)
        if expert_mask is not None:
            self._check_expert_mask(expert_mask, batch, length)
        if cache is not None and not isinstance(cache, KVCache):
            got = type(cache).__name__
            raise TypeError(f"cache: got {got}; accepted: DynamicCache(), a StaticCache or None")
        check_int("logits_to_keep", logits_to_keep, 0)
        limits = None
        if rank_limit is not None:
            limits = RequestLimits(rank_limit, self._largest_ranks(), batch, input_ids.device)
        h = self.model(input_ids, attention_mask, expert_mask, limits, cache, logits_to_keep)
        if self.lm_head is None:
            return F.linear(h, self.model.embed_tokens.weight)
        return self.lm_head(h)

    def _largest_ranks(self) -> list[int]:
        """Of each expert its largest rank in any layer."""
        layers = [largest_ranks_of(block.mlp.expert_ranks) for block in self.model.layers]
        return [max(ranks) for ranks in zip(*layers, strict=True)]

    def _check_expert_mask(self, mask: Tensor, batch: int, length: int) -> None:
        check_tensor("expert_mask", mask, None, (torch.bool,))
        E = self.config.num_experts
        shapes = ((E,), (batch, E), (batch, length, E))
        if tuple(mask.shape) not in shapes:
            listed = ", ".join(map(str, shapes))
            raise ValueError(f"expert_mask: got shape {tuple(mask.shape)}; accepted: {listed}")

    @contextlib.contextmanager
    def counting(self) -> Iterator[list[RouterStatistics]]:
        """Within, forwards add what each layer's router does to counters, which are yielded.

        They stay on the device (`RouterStatistics`, one a layer); padding does not count, nor what
        `generate` fills up ended requests with, nor tokens that may use a shared expert alone, of
        which no router decides. Nested, the inner counters alone count.
        """
        device, blocks = self._device, self.model.layers
        counters = [RouterStatistics.zeros(self.config.num_experts, device) for _ in blocks]

        def watcher(layer: FlexMoRE, counter: RouterStatistics) -> Watcher:
            def add(routing: Routing, mask: Tensor | None, counted: Tensor | None) -> None:
                how = {"scoring": layer.scoring, "bias": layer.gate.expert_bias, "mask": mask}
                given = (routing.logits, routing.indices, routing.weights)
                counter.add_(ops.router_statistics(*given, **how, padding_mask=counted))

            return add

        pairs = zip(blocks, counters, strict=True)
        with self._watched("counting", [watcher(block.mlp, one) for block, one in pairs]):
            yield counters

    @contextlib.contextmanager
    def attributing(self, batch: int) -> Iterator[Attribution]:
        """Within, forwards of `batch` requests add what each expert did for each of them.

        Row b of every forward is request b: another number of rows raises ValueError. One kernel a
        layer, no host sync, captured by `generate`'s CUDA graphs: it can stay on. Padding does not
        count, nor what `generate` fills up ended requests with; a forward that a backward runs
        again counts again. Nested, the inner one alone counts.
        """
        blocks = self.model.layers
        found = Attribution.zeros(len(blocks), batch, self.config.num_experts, self._device)

        def watcher(layer: int) -> Watcher:
            def add(routing: Routing, mask: Tensor | None, counted: Tensor | None) -> None:
                if layer == 0:
                    found.check_requests(routing.indices.shape[0])
                found.count_(layer, routing.indices, routing.weights, counted)

            return add

        with self._watched("attributing", [watcher(layer) for layer in range(len(blocks))]):
            yield found

    @contextlib.contextmanager
    def routings(self) -> Iterator[list[Routing]]:
        """Within, forwards append each layer's routing to the list, differentiable, (B, S, ..)."""
        seen: list[Routing] = []
        watchers = [lambda routing, *_: seen.append(routing)] * len(self.model.layers)
        with self._watched("routings", watchers):
            yield seen

    @contextlib.contextmanager
    def _watched(self, name: str, watchers: Sequence[Watcher]) -> Iterator[None]:
        """Within, each layer's routings go to its watcher, in the place of another of this name."""
        blocks = list(self.model.layers)
        before = [block.watchers for block in blocks]
        for block, watcher in zip(blocks, watchers, strict=True):
            block.watchers = {**block.watchers, name: watcher}
        try:
            yield
        finally:
            for block, watchers in zip(blocks, before, strict=True):
                block.watchers = watchers

    @property
    def cards(self) -> tuple[Card, ...]:
        """The experts' cards: names, owners, licences."""
        return cards_of(self.config, self.config.num_experts)

    def expert_mask(
        self,
        only: Iterable[int | str] | None = None,
        without: Iterable[int | str] | None = None,
    ) -> Tensor:
        """bool (E,) for `expert_mask=`: these experts alone, or all but those, by name or number.

        Raises ValueError for an expert that is not there, or not any more, or where none is left.
        """
        return mask_of(self.cards, only, without).to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def prepare(self, merge: Any = "auto") -> list[Prepared]:
        """Prepare every layer for serving: see `FlexMoRE.prepare`; what was copied, one a layer.

        Of attention the weights of q, k and v are laid end to end, in place of where they were.
        """
        for block in self.model.layers:
            block.self_attn.prepare()
        return [block.mlp.prepare(merge) for block in self.model.layers]

    def generate(self, input_ids: Tensor, **options) -> Tensor:
        """Continue prompts by the model's own tokens: see `generation.generate`."""
        return generate(self, input_ids, **options)
