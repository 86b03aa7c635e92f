"""One more token for each request: forward, choice, stop test; as one CUDA graph where asked."""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .kv_cache import KVCache
from .ops.decoding import settle
from .sampling import Sampling, choose

WARM_UP = 2
"""Steps that run before a capture: kernels are compiled, libraries set up, in what is no rehearsal
but the first tokens themselves."""
LAG = 4
"""On a GPU, tokens reach the host at most so many steps after their own."""


class DecodeStep:
    """The tokens of now, and what makes the next ones of them.

    Args:
        model, cache: the cache holds the prompts. sampling, generator: see `sampling.choose`.
        stops: ids that end a request. pad: what an ended request gets.
        cuda_graph: run WARM_UP steps as they are, capture one, replay it from then on. The graph
            holds the weights where they lie: it is of this object, and lives as long.

    tokens (B, 1) int64 and finished (B,) bool are rewritten in place by every step. made: tokens
    that a request got. lag: steps that may be under way when the tokens of one are looked at.
    """

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        sampling: Sampling,
        stops: Sequence[int],
        pad: int,
        generator: torch.Generator | None = None,
        *,
        cuda_graph: bool = False,
    ) -> None:
        self.model, self.cache = model, cache
        self.sampling, self.generator, self.pad = sampling, generator, pad
        device = model.model.embed_tokens.weight.device
        self._stops = torch.tensor(list(stops), dtype=torch.int64, device=device)
        self._left = WARM_UP
        self._wants_graph = cuda_graph
        if cuda_graph:
            self._beside = _Beside.of(device)
            weakref.finalize(self, self._beside.give_back).atexit = False
        self.lag = LAG if device.type == "cuda" else 0

    @torch.no_grad()
    def take(self, logits: Tensor) -> None:
        """The first tokens, from the prompts' last logits (B, 1, V)."""
        chosen = choose(logits[:, -1], self.sampling, self.generator)
        self.tokens = torch.empty_like(chosen)[:, None]
        self.finished, self.made = torch.zeros_like(chosen, dtype=torch.bool), 1
        settle(chosen, self.tokens, self.finished, self._stops, self.pad)
        self.cache.ended = self.finished  # what fills up an ended request is not counted

    def run_to(self, made: int) -> None:
        """Step until each request got so many tokens."""
        while self.made < made:
            self()

    def __call__(self) -> None:
        """Replace the tokens by the next ones."""
        self.made += 1
        if not self._wants_graph:
            self._run()
        elif self._beside.graph is not None:
            self._replay()
        elif self._left:
            self._left -= 1
            with self._beside.running():
                self._run()
        else:
            self._capture()
            self._replay()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None and self.sampling.temperature:
            graph.register_generator_state(self.generator)
        length, stream = self.cache.length, self._beside.stream
        # By default torch captures all graphs on one stream, that of the first device that did.
        how = {"stream": stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.device(stream.device), torch.cuda.graph(graph, **how):
                self._run()
        finally:
            self.cache.length = length  # what is captured has not run
        self._beside.graph = graph

    def _replay(self) -> None:
        self.cache.advance(1)
        self._beside.replay()

    @torch.no_grad()
    def _run(self) -> None:
        logits = self.model(self.tokens, cache=self.cache, logits_to_keep=1)
        chosen = choose(logits[:, -1], self.sampling, self.generator)
        settle(chosen, self.tokens, self.finished, self._stops, self.pad)

    def host_buffer(self) -> Tensor:
        """Room for one step's tokens (B,) on the CPU, that the device can write to by itself."""
        pinned = self.tokens.device.type == "cuda"
        return torch.zeros(self.tokens.shape[0], dtype=torch.int64, pin_memory=pinned)

    def copy_to(self, slot: Tensor) -> torch.cuda.Event | None:
        """Copy the tokens; on a GPU without waiting, and with the event of their arrival."""
        slot.copy_(self.tokens[:, 0], non_blocking=True)
        if self.tokens.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.tokens.device))
        return event


class _Beside:
    """A stream to warm up and capture on, of one step at a time, its graph, where its cuBLAS works.

    A captured product goes on writing to the workspace that torch gave its stream, although torch
    may free it: a compilation with CUDA graphs does, and the end of another graph of the stream
    (pytorch/pytorch#193402). In a pool of the stream's own it stays memory, and nobody else's.
    """

    STREAMS = 32
    """That torch hands out in turn: a new one may be one that somebody has."""

    def __init__(self, device: torch.device) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self._replayed: torch.cuda.Event | None = None
        self._pool = None
        with torch.cuda.device(device):
            if torch.cuda.get_allocator_backend() == "native":  # others have no pools
                self._pool = torch.cuda.MemPool()
            for _ in range(self.STREAMS):
                self.stream = torch.cuda.Stream()
                if self.stream.cuda_stream in _taken:
                    continue
                if self._pool is None or self._gives_workspace():
                    break
            _taken.add(self.stream.cuda_stream)

    @classmethod
    def of(cls, device: torch.device) -> _Beside:
        """One that is idle, or a new one."""
        with contextlib.suppress(IndexError):
            return _idle[device].pop()
        return cls(device)

    def _gives_workspace(self) -> bool:
        """See to it that the stream has a workspace; whether it had none."""
        before = torch.cuda.memory_allocated(self.stream.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.cuda.stream(self.stream))
            if self._pool is not None:
                stack.enter_context(torch.cuda.use_mem_pool(self._pool))
            torch.cuda.current_blas_handle()
        return torch.cuda.memory_allocated(self.stream.device) > before

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Launch on the stream, after what the current one has and before what it gets."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        if self._replayed is not None:  # the step before this one, wherever it ran
            self.stream.wait_event(self._replayed)
        self._gives_workspace()
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def replay(self) -> None:
        """Replay the graph on the current stream."""
        self.graph.replay()
        if self._replayed is None:
            self._replayed = torch.cuda.Event()
        self._replayed.record(torch.cuda.current_stream(self.stream.device))

    def give_back(self) -> None:
        """Its step is gone: the graph too, before another step takes the stream."""
        self.graph = None
        _idle[self.stream.device].append(self)


_idle: defaultdict[torch.device, list[_Beside]] = defaultdict(list)
_taken: set[int] = set()
