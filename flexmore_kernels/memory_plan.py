"""What a model needs of a GPU's memory, from its config alone: weights, KV cache, work, training.

T = B S tokens, w bytes a number, a = max(4, w) where norms compute; W_q, W_kv the widths of q and
of k and v; E experts, K a token, H heads, V the vocabulary.

    weights       w times the parameters
    kv_cache      2 L B ceil16(S + new) W_kv w
    work          the largest of what is alive at a time, beside the three above and below:
      attention   T w (D + 2 W_q + 4 W_kv): q, k, v before and after norms and RoPE
      mixture     2 T D w (before and after attention) + `memory_workspace.forward_bytes`
      logits      (D + V) w of every token that gets them, T or B
    gradients     w times the trained parameters, and 2 w for AdamW's moments
    saved         for the backward, a token and layer; n(W) = a W + a is a norm's, + a W if trained
      attention   n(W_q) + n(W_kv) + n(D) + w (2 W_q + 2 W_kv) + 4 H, and if trained + w D;
                  nothing in the first layer where what comes before it is not trained
      mixture     w D + 12 K + w E + n(D): x, weights and indices, router's logits; and what
                  kept.py lists, G and U first; with `recompute` little of it, and a layer's
                  backward has the rest at its own time
      head        n(D), and if trained + w D; once for all RoPE's table, a S d
    loss          F.cross_entropy(logits.float(), ids): T V (w + 3 * 4), in float32 and after one
                  another its log-softmax, that one's gradient and the logits' gradient
    backward      of one layer: 2 T D w + `memory_workspace.backward_bytes`, and the logits, which
                  the caller still holds; of the last norm: 5 T D a, and the logits

The peak of a training step is the largest over: the loss, with all saved; the backward of each
layer, with what the layers before saved and the gradients of those behind. Assumed: attention by a
kernel that forms no S x S matrix (no padding), gradients None before the step, AdamW(fused=True).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .checkpoint_layout import tensor_shapes
from .checks import FLOATS, check_int, check_one_of
from .kv_cache import COLUMNS_MULTIPLE
from .memory_workspace import LayerSizes, backward_bytes, forward_bytes, kept_bytes
from .model_config import FlexMoREConfig

TRAINED = (None, "factors", "all")
RESERVE = 1 << 30
"""Of a GPU: its context, libraries and their workspaces, and what an allocator cannot use."""


class Use(NamedTuple):
    """How the model is used: B requests of S tokens and `new` more; what is trained.

    train: None, "factors" (low-rank factors and routers) or "all". all_logits: of every token, as
    training needs, else of the last. hopper: an H100 with the compiled library. recompute: of
    training, each layer's switch of that name is on.
    """

    tokens: int
    batch: int = 1
    new_tokens: int = 0
    train: str | None = None
    dtype: torch.dtype = torch.bfloat16
    all_logits: bool = False
    hopper: bool = False
    recompute: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part; `stages`: what is alive beside weights and optimizer at each candidate."""

    use: Use
    weights: int
    kv_cache: int
    optimizer: int
    gradients: int
    saved: int
    stages: dict[str, int] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """Where the peak is."""
        return max(self.stages, key=lambda name: self.stages[name])

    @property
    def peak(self) -> int:
        """The most bytes that are allocated at a time."""
        return self.weights + self.kv_cache + self.optimizer + self.stages[self.stage]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        use = {**self.use._asdict(), "dtype": str(self.use.dtype).removeprefix("torch.")}
        names = ("weights", "kv_cache", "optimizer", "gradients", "saved", "peak", "stage")
        return {"use": use, **{n: getattr(self, n) for n in names}, "stages": self.stages}


def plan_memory(config: FlexMoREConfig, use: Use) -> MemoryPlan:
    """The bytes that a model needs for a use; ValueError names a field that is none."""
    for name in ("tokens", "batch"):
        check_int(name, getattr(use, name), 1)
    check_int("new_tokens", use.new_tokens, 0)
    check_one_of("train", use.train, TRAINED)
    check_one_of("dtype", use.dtype, FLOATS)
    check_one_of("recompute", use.recompute, (False, True) if use.train else (False,))
    return _Plan(config, use).result()


class _Plan:
    def __init__(self, config: FlexMoREConfig, use: Use) -> None:
        self.config, self.use = config, use
        self.w, self.a = use.dtype.itemsize, max(4, use.dtype.itemsize)
        self.T = use.tokens * use.batch
        self.D, self.V = config.hidden_size, config.vocab_size
        self.W_q = config.num_attention_heads * config.head_dim
        self.W_kv = config.num_key_value_heads * config.head_dim
        self.layers = [
            LayerSizes(
                self.D, config.intermediate_size,
                tuple(tuple(e) if isinstance(e, list) else e for e in config.layer_ranks(layer)),
                config.num_experts_per_tok, use.dtype,
            )
            for layer in range(config.num_hidden_layers)
        ]  # fmt: skip
        self.params, self.trained = self._count()

    def _count(self) -> tuple[int, dict[int, int]]:
        """Parameters, and how many are trained by layer; -1: behind them, -2: the embedding."""
        config = self.config
        values = {
            name: getattr(config, name)
            for name in ("hidden_size", "intermediate_size", "num_experts", "num_attention_heads",
                         "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings")
        }  # fmt: skip
        ranks = [layer.ranks for layer in self.layers]
        total, trained = 0, dict.fromkeys(range(-2, len(ranks)), 0)
        for name, shape in tensor_shapes(values, ranks, config.expert_bias).items():
            size = math.prod(shape)
            total += size
            factor = "_proj_a." in name or "_proj_b." in name or ".mlp.gate." in name
            if self.use.train == "all" or (self.use.train and factor):
                layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
                if "embed_tokens" in name and not config.tie_word_embeddings:
                    layer = -2
                trained[layer] += size
        return total, trained

    def result(self) -> MemoryPlan:
        use, w = self.use, self.w
        gradients = w * sum(self.trained.values())
        saved = sum(map(self.saved_bytes, range(len(self.layers)))) if use.train else 0
        kv_cache = 0
        if use.train:
            stages = self._training()
        else:
            columns = use.tokens + use.new_tokens
            columns = -(-columns // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE
            kv_cache = 2 * len(self.layers) * use.batch * columns * self.W_kv * w
            stages = self._inference()
        return MemoryPlan(
            use, self.params * w, kv_cache, 2 * gradients, gradients, saved + self._head_saved(),
            stages,
        )  # fmt: skip

    def _inference(self) -> dict[str, int]:
        T, D, w = self.T, self.D, self.w
        forward = max(forward_bytes(layer, T, self.use.hopper) for layer in set(self.layers))
        rows = T if self.use.all_logits else self.use.batch
        attention = w * (D + 2 * self.W_q + 4 * self.W_kv)
        return {
            "attention": T * attention + self._rotary(),
            "mixture": 2 * T * D * w + forward + self._rotary(),
            "logits": rows * w * (D + self.V),
        }

    def _training(self) -> dict[str, int]:
        T, D, w = self.T, self.D, self.w
        logits, head = T * self.V * w, self._head_saved()
        saved = [self.saved_bytes(i) for i in range(len(self.layers))]
        stages = {
            "loss": sum(saved) + head + logits + 3 * 4 * T * self.V,
            "backward of the last norm": sum(saved) + head + logits + 5 * T * D * self.a,
        }
        backward: dict[LayerSizes, int] = {}
        grads, held = self.trained[-1] * w, sum(saved)
        everything, how = self.use.train == "all", (self.use.recompute, self.use.hopper)
        for i, layer in reversed(list(enumerate(self.layers))):
            if layer not in backward:
                backward[layer] = backward_bytes(layer, T, everything, *how)
            grads += self.trained[i] * w
            stages[f"backward of layer {i}"] = (
                held - self._norm(D) * T + 2 * T * D * w + logits + backward[layer] + grads
            )
            held -= saved[i]
        # Tied, the embedding's own gradient is added to the head's; it is as large.
        last = self.V * D * w if everything else 0
        stages["backward of the embedding"] = logits + grads + last + T * D * w
        return stages

    def _norm(self, width: int) -> int:
        return self.a * (width + 1) + (self.a * width if self.use.train == "all" else 0)

    def _head_saved(self) -> int:
        if not self.use.train:
            return 0
        own = self.w * self.D if self.use.train == "all" else 0
        return self.T * (self._norm(self.D) + own) + self._rotary()

    def _rotary(self) -> int:
        return self.use.tokens * self.config.head_dim * self.a

    def saved_bytes(self, index: int) -> int:
        """What one layer's forward keeps for its backward."""
        config, w, D = self.config, self.w, self.D
        everything, layer = self.use.train == "all", self.layers[index]
        mixture = w * (D + config.num_experts) + 12 * layer.top_k + self._norm(D)
        kept = kept_bytes(layer, self.T, everything, self.use.recompute)
        if index == 0 and not everything:
            return self.T * mixture + kept
        attention = self._norm(self.W_q) + self._norm(self.W_kv) + self._norm(D)
        attention += w * 2 * (self.W_q + self.W_kv) + 4 * config.num_attention_heads
        return self.T * (mixture + attention + (w * D if everything else 0)) + kept


def largest(fits: Callable[[int], bool], limit: int = 1 << 22) -> int:
    """A number from 1 to `limit` that was tested and fits, 0 if none of those tested does.

    By halving: the largest, where more never fits better. A plan is not quite so (more tokens may
    take a way that needs less, rank 1 needs less than full-size): it may be a smaller one.
    """
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def advice(config: FlexMoREConfig, use: Use, available: int) -> list[str]:
    """What to change, each alone, so that the plan's peak is at most `available` bytes."""

    def fits(config: FlexMoREConfig = config, **change) -> bool:
        return plan_memory(config, use._replace(**change)).peak <= available

    found = []
    tokens = largest(lambda n: fits(tokens=n), use.tokens)
    if tokens:
        found.append(f"--tokens {tokens}")
    if use.batch > 1 and (batch := largest(lambda n: fits(batch=n), use.batch)):
        found.append(f"--batch {batch}")
    if use.train and not use.recompute and fits(recompute=True):
        found.append("--recompute: layers keep little besides x, and compute its products again")
    if use.train == "all":
        tokens = largest(lambda n: fits(tokens=n, train="factors"), use.tokens)
        fewer = f" --tokens {tokens}" if tokens < use.tokens else ""
        found += [f"--train factors{fewer}: the base stays as it is"] if tokens else []
    if use.dtype.itemsize > 2 and fits(dtype=torch.bfloat16):
        found.append("--dtype bfloat16")
    rank = largest(lambda r: fits(_with_rank(config, r)), min(config.hidden_size,
                                                             config.intermediate_size))  # fmt: skip
    if (
        rank
        and plan_memory(_with_rank(config, rank), use).weights < plan_memory(config, use).weights
    ):
        found.append(f"experts of rank {rank} (`flexmore convert --rank {rank}`)")
    return found


def _with_rank(config: FlexMoREConfig, rank: int) -> FlexMoREConfig:
    """The same model with every expert beside the base of this rank."""
    values = config.to_dict() | {"expert_ranks": [0] + [rank] * (config.num_experts - 1)}
    values.pop("layer_expert_ranks", None)
    return FlexMoREConfig.from_dict(values)
