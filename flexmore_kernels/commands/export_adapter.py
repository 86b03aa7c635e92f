"""A low-rank expert of a checkpoint as a PEFT LoRA adapter of the dense model around expert 0."""

from __future__ import annotations

import argparse

NAME, HELP = "export-adapter", "a low-rank expert as a PEFT LoRA adapter"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT_DIR")
    parser.add_argument("expert", type=int, help="1 to E - 1")
    parser.add_argument("out", metavar="OUT_DIR", help="the new adapter's directory")
    parser.add_argument(
        "--base-name", default="", help="for base_model_name_or_path: the dense model's name"
    )


def run(arguments: argparse.Namespace) -> int:
    from ..adapter_export import export_adapter

    ranks = export_adapter(
        arguments.checkpoint, arguments.expert, arguments.out, base_name=arguments.base_name
    )
    print(
        f"{arguments.out}: written, {len(ranks)} modules, ranks {min(ranks.values())} to "
        f"{max(ranks.values())}; load it with peft.PeftModel.from_pretrained"
    )
    return 0
