"""What a checkpoint directory holds, checked, without loading it."""

from __future__ import annotations

import argparse

NAME, HELP = "inspect", "what a checkpoint directory holds"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT_DIR")


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoint_layout import read_layout

    layout = read_layout(arguments.checkpoint)
    config = layout.config
    print(
        f"{layout.directory}: {len(layout.shapes)} tensors in {len(set(layout.files.values()))} "
        f"files, all there\n{config['num_hidden_layers']} layers, D = {config['hidden_size']}, "
        f"F = {config['intermediate_size']}, top-{config['num_experts_per_tok']} of "
        f"{config['num_experts']} experts{', with expert bias' if layout.expert_bias else ''}"
    )
    previous = None
    for layer, ranks in enumerate(layout.layer_ranks):
        if ranks != previous:
            print(f"  from layer {layer}: ranks {', '.join(map(str, ranks))}  (0: full-size)")
        previous = ranks
    for note in layout.notes:
        print(f"  note: {note}")
    return 0
