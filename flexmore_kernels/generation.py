"""Generation: prompts in, the model's own tokens out, one for each request a step.

On a GPU with a static cache a step is one CUDA graph: forward, choice, stop test, all on the device
and in place. The host only starts it again; tokens come to it some steps late, so that it never
waits for the one just started.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_int, check_one_of, check_tensor, checks_values
from .decode_step import LAG, WARM_UP, DecodeStep
from .kv_cache import DynamicCache, KVCache, StaticCache
from .router import ProjectedRouter
from .sampling import Sampling

REPAID = 8
"""New tokens from which on a capture is worth it: it takes about as long as one step whose launches
the host makes one by one."""


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    expert_mask: Tensor | None = None,
    rank_limit: Sequence | None = None,
    stream: Callable[[Tensor], None] | None = None,
    cache: str | None = None,
    cuda_graph: bool | None = None,
) -> Tensor:
    """Continue prompts (B, S) by up to `max_new_tokens` tokens a request; greedy by default.

    Args:
        model: a `FlexMoREForCausalLM`, whose `generate` this is.
        input_ids: (B, S) int64 or int32, left-padded where prompts differ in length.
        max_new_tokens: at least 1.
        attention_mask: (B, S), 0 at padding.
        temperature, top_k, top_p: 0 is greedy; see `sampling.choose`.
        eos_token_id: one or more ids that end a request; default: the config's (`extra`), if it has
            any; () for none.
        pad_token_id: what an ended request gets while others go on; default: the config's, or the
            first eos, or 0.
        generator: for sampling, on the model's device; default: torch's own.
        expert_mask: bool (E,) or (B, E), the experts that a request may use, for all its tokens.
        rank_limit: as `FlexMoREForCausalLM.forward` takes it, for all tokens.
        stream: called with each step's tokens, (B,) int64 on the CPU, in order; on a GPU up to LAG
            steps after they were made.
        cache: "static" (memory for all tokens at once, what a CUDA graph needs) or "dynamic";
            default: static on a GPU.
        cuda_graph: capture a step once, after two that run as they are, and replay it; default:
            on a GPU, with a static cache, for REPAID new tokens or more. Inside `validation()`, and
            where no step is left to replay, nothing is captured, whatever is asked.

    Returns: (B, S + n): the prompts and n new tokens, where n is `max_new_tokens` or the number at
    which the last request ended. Deterministic (with a generator, given its state). Waits for the
    device before the first token, once where a graph is captured (torch does, as it begins) and
    otherwise only for tokens that are LAG steps old.
    Raises ValueError or TypeError naming the argument.
    """
    check_tensor("input_ids", input_ids, ("B", "S"), (torch.int64, torch.int32))
    batch, length = input_ids.shape
    if not batch or not length:
        raise ValueError(f"input_ids: got shape {(batch, length)}; accepted: at least one token")
    check_int("max_new_tokens", max_new_tokens, 1)
    how = Sampling(temperature, top_k, top_p).checked()
    stops, pad = _ends(model.config, eos_token_id, pad_token_id)
    attention_mask = _left_padded(input_ids, attention_mask)
    _check_generator(generator, input_ids.device)
    if expert_mask is not None:
        check_tensor("expert_mask", expert_mask, None, (torch.bool,))
    if expert_mask is not None and expert_mask.dim() == 3:
        raise ValueError(
            f"expert_mask: got shape {tuple(expert_mask.shape)}; accepted: "
            f"({model.config.num_experts},) or ({batch}, {model.config.num_experts})"
        )
    device = input_ids.device
    kv = _cache(model, cache, batch, length + max_new_tokens, device)
    graph = _whether_graph(cuda_graph, kv, input_ids, max_new_tokens)
    asked = {"expert_mask": expert_mask, "rank_limit": rank_limit, "cache": kv}
    with _rows_kept(model):
        logits = model(input_ids, attention_mask, **asked, logits_to_keep=1)
        step = DecodeStep(model, kv, how, stops, pad, generator, cuda_graph=graph)
        step.take(logits)
        new = _new_tokens(step, max_new_tokens, stops, stream)
    return torch.cat([input_ids, torch.stack(new, 1).to(device, input_ids.dtype)], 1)


@contextlib.contextmanager
def _rows_kept(model: Any) -> Iterator[None]:
    """Within, routers that make their rows make them once: nothing writes weights meanwhile. Calls
    side by side share them, and what `prepare` kept stays where a captured graph reads it."""
    routers = [getattr(block.mlp, "gate", None) for block in model.model.layers]
    routers = [router for router in routers if isinstance(router, ProjectedRouter)]
    with _lock:
        for router in routers:
            users, before = _users.get(router) or (0, router.keeps or router.keep(True))
            _users[router] = users + 1, before
    try:
        yield
    finally:
        with _lock:
            for router in routers:
                users, before = _users.pop(router)
                if users > 1:
                    _users[router] = users - 1, before
                elif not before:
                    router.keep(False)


_users: weakref.WeakKeyDictionary[ProjectedRouter, tuple[int, bool]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _new_tokens(
    step: DecodeStep, count: int, stops: list[int], stream: Callable | None
) -> list[Tensor]:
    """The tokens (B,) of each step until all requests have ended, on the CPU."""
    batch = step.tokens.shape[0]
    new: list[Tensor] = []
    ended = torch.zeros(batch, dtype=torch.bool)
    ids = torch.tensor(stops, dtype=torch.int64)
    for column in _columns(step, count):
        new.append(column)
        ended |= torch.isin(column, ids)
        if stream is not None:
            stream(column.clone())
        if bool(ended.all()):
            # However soon the host saw it: what is drawn must not depend on timing.
            step.run_to(min(len(new) + step.lag, count))
            break
    return new


def _columns(step: DecodeStep, count: int) -> Iterator[Tensor]:
    """The tokens (B,) of up to `count` steps on the CPU, the first being there already."""
    pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
    slots = [step.host_buffer() for _ in range(LAG + 1)]
    for number in range(count):
        if number:
            step()
        slot = slots[number % len(slots)]
        pending.append((slot, step.copy_to(slot)))
        while pending and (len(pending) > LAG or _arrived(pending[0][1])):
            yield _taken(*pending.popleft())
    while pending:
        yield _taken(*pending.popleft())


def _arrived(event: torch.cuda.Event | None) -> bool:
    return event is None or event.query()


def _taken(slot: Tensor, event: torch.cuda.Event | None) -> Tensor:
    if event is not None:
        event.synchronize()
    return slot.clone()


def _ends(config: Any, eos: Any, pad: int | None) -> tuple[list[int], int]:
    """The ids that end a request, and the one that follows them."""
    eos = config.extra.get("eos_token_id") if eos is None else eos
    eos = () if eos is None else eos
    stops = list(eos) if isinstance(eos, (list, tuple)) else [eos]
    for stop in stops:
        check_int("eos_token_id", stop, 0, config.vocab_size - 1)
    pad = config.extra.get("pad_token_id") if pad is None else pad
    if pad is None:
        pad = stops[0] if stops else 0
    return stops, check_int("pad_token_id", pad, 0, config.vocab_size - 1)


def _left_padded(input_ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask, or None where it hides nothing: then attention is causal, by its fast kernels."""
    if mask is None:
        return None
    check_tensor("attention_mask", mask, tuple(input_ids.shape), None, input_ids.device)
    real = mask.to(torch.bool).cpu()
    if not bool(real.any(1).all()):
        row = int((~real.any(1)).nonzero()[0])
        raise ValueError(
            f"attention_mask: got row {row} without tokens; accepted: at least one in each row"
        )
    if bool((real[:, :-1] & ~real[:, 1:]).any()) or not bool(real[:, -1].all()):
        raise ValueError("attention_mask: got 0 after a token; accepted: 0 before a row's tokens")
    return None if bool(real.all()) else mask


def _check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    if generator is None:
        return
    # Of torch.Generator("cuda") the device has no index, and is the current one.
    index = generator.device.index
    if generator.device.type != device.type or index not in (None, device.index):
        raise ValueError(f"generator: got one on {generator.device}; accepted: one on {device}")


def _cache(model: Any, kind: str | None, batch: int, length: int, device) -> KVCache:
    check_one_of("cache", kind, (None, "static", "dynamic"))
    if kind == "dynamic" or (kind is None and device.type != "cuda"):
        return DynamicCache()
    dtype = model.model.embed_tokens.weight.dtype
    return StaticCache(model.config, batch, length, device=device, dtype=dtype)


def _whether_graph(asked: bool | None, kv: KVCache, ids: Tensor, count: int) -> bool:
    check_one_of("cuda_graph", asked, (None, False, True))
    possible = ids.device.type == "cuda" and isinstance(kv, StaticCache)
    if asked and not possible:
        kind = "a static" if isinstance(kv, StaticCache) else "a dynamic"
        raise ValueError(
            f"cuda_graph: got True on {ids.device} with {kind} cache; accepted: on cuda, static"
        )
    # The first token is the prompt's, the next ones warm up.
    fewest = WARM_UP + 2 if asked else REPAID
    # Checks of values wait for the device, which a capture cannot.
    return possible and asked is not False and not checks_values(ids) and count >= fewest
