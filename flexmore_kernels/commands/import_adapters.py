"""PEFT LoRA adapters, of any ranks and scales, as the experts of one mixture around their base."""

from __future__ import annotations

import argparse
import json
import sys

from . import DTYPES, positive

NAME, HELP = "import-adapters", "PEFT LoRA adapters as the experts of one mixture"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE_DIR", help="a dense OLMo-2, or a mixture")
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER_DIR", help="PEFT directories, in experts' order"
    )
    parser.add_argument("out", metavar="OUT_DIR", help="the new checkpoint")
    parser.add_argument(
        "--other", choices=("refuse", "drop", "average"), default="refuse",
        help="deltas of attention, lm_head and what else the experts share (default: refuse)",
    )  # fmt: skip
    parser.add_argument(
        "--router-rows", metavar="FILE", help="safetensors: gate.weight, or one matrix a layer"
    )
    parser.add_argument(
        "--top-k", type=positive, metavar="K", help="default: all for a dense base, else its own"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the factors (default: the base's)")
    parser.add_argument("--json", action="store_true", help="the report for programs")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from ..adapter_import import import_adapters

    report = import_adapters(
        arguments.base,
        arguments.adapters,
        arguments.out,
        other=arguments.other,
        router_rows=arguments.router_rows,
        top_k=arguments.top_k,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        say=lambda text: print(f"flexmore {NAME}: {text}", file=sys.stderr, flush=True),
    )
    if arguments.json:
        others = [part._asdict() for part in report.others]
        experts = [
            {"expert": expert, "adapter": name, "layer_ranks": ranks}
            for expert, name, ranks in report.experts
        ]
        print(json.dumps({"experts": experts, "others": others, "notes": report.notes}, indent=1))
        return 0
    print(f"{arguments.out}: written")
    for expert, name, ranks in report.experts:
        words = ", ".join(sorted({_entry(rank) for rank in ranks}))
        print(f"  expert {expert}: {name}, rank (gate/up/down) {words}")
    for part in report.others:
        print(
            f"  {part.adapter}: {part.kind}, {part.tensors} tensors: the deltas' norm is "
            f"{part.size:.3g} of the base's; of what the mixture lacks of them {part.lost:.3g}"
        )
    for note in report.notes:
        print(f"  note: {note}")
    return 0


def _entry(rank: int | tuple) -> str:
    return "/".join(map(str, rank)) if isinstance(rank, tuple) else str(rank)
