"""`flexmore demo`: runs every MoE layer of a checkpoint, proves it right, and says what it costs.

Each layer's router and experts are checked against the float64 reference by the accuracy rule
(accuracy.py), at the layer's output and given the layer's own routing, before anything is timed.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, baselines
from .checkpoint import (
    build_layer,
    expert_weights,
    layer_arguments,
    make_demo_checkpoint,
    read_layer,
)
from .checkpoint_layout import Layout, as_triple, read_layout
from .layer import FlexMoRE
from .testing import Accuracy, accuracy, make_x, tree_map
from .timing import compare

COLUMNS = ("ours", "fair eager", "published", "dense FFN")
GPU_SIZES = {"hidden_size": 2048, "intermediate_size": 5504, "dtype": torch.bfloat16}
RANKS_WIDTH = 30
RIGHT, WRONG = 0, 1


class Check(NamedTuple):
    """One comparison with the reference."""

    name: str
    found: Accuracy


def run(
    checkpoint: str | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    tokens: int | None = None,
    break_it: bool = False,
    seed: int = 0,
) -> int:
    """Print the table; return 0 when every layer is right, else 1.

    Args:
        checkpoint: a directory; None makes one with mixed ranks in a temporary place.
        device: default "cuda" where there is one. dtype: default bfloat16 on CUDA, else float32.
        tokens: default 4096 on CUDA, else 256.
        break_it: swap two experts' factors in the layer that is checked, which must be noticed.

    Raises ValueError or FileNotFoundError for a bad checkpoint or argument.
    """
    device = backend.device_or_default(device)
    on_gpu = torch.device(device).type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    tokens = tokens or (4096 if on_gpu else 256)
    with contextlib.ExitStack() as stack:
        if checkpoint is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "checkpoint"
            _progress("making a checkpoint with mixed ranks")
            make_demo_checkpoint(place, seed=seed, **(GPU_SIZES if on_gpu else {}))
            layout = read_layout(place)
        else:
            layout = read_layout(checkpoint)
        _print_head(layout, checkpoint, device, dtype, tokens)
        failures = []
        torch.manual_seed(seed)
        for layer in range(len(layout.layer_ranks)):
            worst = _run_layer(layout, layer, device, dtype, tokens, break_it)
            if not worst.found.ok:
                failures.append((layer, worst))
    return _verdict(layout, dtype, failures, break_it)


@torch.no_grad()
def _run_layer(
    layout: Layout, layer: int, device: str, dtype: torch.dtype, tokens: int, break_it: bool
) -> Check:
    """Check and time one layer, print its row, return its worst check."""
    count = len(layout.layer_ranks)
    _progress(f"layer {layer}: checking ({layer + 1} of {count})")
    arguments = layer_arguments(layout, layer)
    stored = {name: t.to(device) for name, t in read_layer(layout, layer, dtype).items()}
    x_TD = make_x(tokens, arguments["hidden_size"], device, dtype)
    arguments_ours, stored_ours = arguments, stored
    if break_it:
        chosen, _ = baselines.route(x_TD, stored["gate.weight"], arguments["top_k"], False)
        arguments_ours, stored_ours = _swapped(arguments, stored, chosen)
    ours = build_layer(arguments_ours, stored_ours, device)
    weights = expert_weights(stored, arguments["expert_ranks"])
    worst = max(_checks(ours, arguments, stored, weights, x_TD), key=lambda c: c.found.ratio)
    times = "  WRONG: not timed"
    if worst.found.ok:
        _progress(f"layer {layer}: timing ({layer + 1} of {count})")
        milliseconds = _times(ours, arguments, stored, weights, x_TD)
        times = "".join(f"{milliseconds[name]:>11.2f}" for name in COLUMNS)
    _progress("")
    ranks = _ranks_in_words(arguments["expert_ranks"])
    print(f"{layer:>5}  {ranks:<{RANKS_WIDTH}}{worst.found.ratio:>10.3g}{times}", flush=True)
    return worst


def _checks(
    ours: FlexMoRE, arguments: dict, stored: dict[str, Tensor], weights: tuple, x_TD: Tensor
) -> list[Check]:
    """Logits, routing and output of a layer against the reference, each given the step before."""
    from . import reference

    y_TD, routing = ours(x_TD, return_routing=True)
    logits_TE, weights_TK, indices_TK = routing
    how = {name: arguments[name] for name in ("top_k", "norm_topk_prob", "scoring")}
    bias = stored.get("gate.expert_bias")
    wide = _double(bias)
    routed = reference.topk_route(logits_TE, bias=bias, **how)
    routed64 = reference.topk_route(logits_TE.double(), bias=wide, **how)
    router = stored["gate.weight"]
    checks = [
        Check("logits", accuracy(logits_TE, x_TD.double() @ router.double().T, x_TD @ router.T)),
        Check("experts chosen", accuracy(indices_TK.float(), routed.indices.double())),
        Check("routing weights", accuracy(weights_TK, routed64.weights, routed.weights)),
    ]
    same = reference.experts(x_TD, indices_TK, weights_TK, *weights)
    exact = (_double(t) for t in (x_TD, indices_TK, weights_TK, *weights))
    checks.append(Check("output", accuracy(y_TD, reference.experts(*exact), same)))
    return checks


def _times(
    ours: FlexMoRE, arguments: dict, stored: dict[str, Tensor], weights: tuple, x_TD: Tensor
) -> dict[str, float]:
    """Milliseconds of the whole layer, router included, ours and plain; and of one dense FFN."""
    base = [entries[0] for entries in weights]

    def plain(mix):
        how = arguments["top_k"], arguments["norm_topk_prob"]
        return lambda: mix(x_TD, *baselines.route(x_TD, stored["gate.weight"], *how), *weights)

    candidates = {
        "ours": lambda: ours(x_TD),
        "fair eager": plain(baselines.fair_eager),
        "published": plain(baselines.published),
        "dense FFN": lambda: baselines.dense_ffn(x_TD, *base),
    }
    return {name: found.ms for name, found in compare(candidates, x_TD.device).items()}


def _double(tree: Any) -> Any:
    return tree_map(lambda t: t.double() if t.is_floating_point() else t, tree)


def _swapped(
    arguments: dict, stored: dict[str, Tensor], chosen_TK: Tensor
) -> tuple[dict, dict[str, Tensor]]:
    """The layer with the two low-rank experts that most tokens chose in each other's place."""
    ranks = list(arguments["expert_ranks"])
    low_rank = [
        e for e, r in enumerate(ranks) if any(isinstance(k, int) and k for k in as_triple(r))
    ]
    if len(low_rank) < 2:
        raise ValueError("--break: needs a checkpoint with two low-rank experts in every layer")
    counts = chosen_TK.flatten().bincount(minlength=len(ranks)).tolist()
    i, j = sorted(low_rank, key=counts.__getitem__)[-2:]
    if not counts[j]:
        raise ValueError("--break: no token chose a low-rank expert; give more --tokens")
    ranks[i], ranks[j] = ranks[j], ranks[i]
    other = {f"experts.{i}": f"experts.{j}", f"experts.{j}": f"experts.{i}"}

    def renamed(name: str) -> str:
        expert = ".".join(name.split(".")[:2])
        return other.get(expert, expert) + name[len(expert) :]

    return {**arguments, "expert_ranks": ranks}, {renamed(k): t for k, t in stored.items()}


def _print_head(
    layout: Layout, checkpoint: str | None, device: str, dtype: torch.dtype, tokens: int
) -> None:
    config = layout.config
    where = torch.cuda.get_device_name(device) if device != "cpu" else _cpu_name()
    name = str(dtype).removeprefix("torch.")
    _progress("")
    print(
        f"{checkpoint or 'A checkpoint made for this run'}: {len(layout.layer_ranks)} layers, "
        f"D = {config['hidden_size']}, F = {config['intermediate_size']}, "
        f"{config['num_experts']} experts, top-{config['num_experts_per_tok']}"
    )
    for note in layout.notes:
        print(f"  note: {note}")
    print(f"{tokens} tokens, {name}, on {where}")
    stems = (stem for stem in backend.STEMS if stem != "attribution")  # nobody asks for it here
    print("kernels: " + ", ".join(f"{stem} {backend.chosen(stem, device)}" for stem in stems))
    print()
    print(f"{'':{RANKS_WIDTH + 7}}{'error /':>10}{'milliseconds':>44}")
    titles = "".join(f"{column:>11}" for column in COLUMNS)
    print(f"layer  {'ranks of the experts':<{RANKS_WIDTH}}{'allowed':>10}{titles}")


def _verdict(layout: Layout, dtype: torch.dtype, failures: list, break_it: bool) -> int:
    config, count = layout.config, len(layout.layer_ranks)
    mlp = [shape for name, shape in layout.shapes.items() if ".mlp.experts." in name]
    held = sum(torch.Size(shape).numel() for shape in mlp)
    one_full = 3 * config["hidden_size"] * config["intermediate_size"]
    full = count * config["num_experts"] * one_full
    name = str(dtype).removeprefix("torch.")
    print(
        f"\nParameters of the experts: {held / 1e6:.1f} M; all {config['num_experts']} full-size: "
        f"{full / 1e6:.1f} M ({full / held:.2f} times as many)."
    )
    print(
        "Error: against the float64 reference. Allowed: twice that of plain PyTorch in "
        f"{name},\nplus one rounding of the largest entry."
    )
    for layer, (what, found) in failures:
        detail = found.note or f"{found.ratio:.3g} times the allowed error, worst at {found.worst}"
        print(f"  layer {layer}: {what}: {detail}")
    if break_it:
        print("Two experts were swapped in the layers under test (--break): this must fail.")
    right = count - len(failures)
    print(f"{'FAIL' if failures else 'PASS'}: {right} of {count} layers are right.")
    return WRONG if failures else RIGHT


def _ranks_in_words(ranks: Sequence) -> str:
    words = [
        "/".join(map(str, r)) if isinstance(r, tuple) else (str(r) if r else "full") for r in ranks
    ]
    text = " ".join(words)
    if len(text) <= RANKS_WIDTH:
        return text
    numbers = [k for r in ranks for k in as_triple(r) if isinstance(k, int) and k]
    full = sum(r == 0 for r in ranks)
    return f"{full} full, {len(ranks) - full} of rank {min(numbers)} to {max(numbers)}"


def _cpu_name() -> str:
    return f"the CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _progress(message: str) -> None:
    """Say on stderr what takes time; "" clears it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{message}", end="", file=sys.stderr, flush=True)
    elif message:
        print(message, file=sys.stderr, flush=True)
