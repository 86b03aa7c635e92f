"""Memory of a model on a GPU, from its config alone: does it fit, and if not, what to change."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from . import DTYPES, FAILED, positive

NAME, HELP = "plan", "memory that a model needs, and whether it fits a GPU"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a checkpoint directory or a config.json")
    parser.add_argument(
        "--gpu",
        type=_bytes,
        metavar="24GB",
        help="its memory, 1 GB = 2^30 bytes, as cards are sold",
    )
    parser.add_argument(
        "--tokens", type=positive, required=True, metavar="T", help="of a request, in one forward"
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="B", help="requests at a time")
    parser.add_argument(
        "--new-tokens", type=int, default=0, metavar="N", help="room in the KV cache for N more"
    )
    parser.add_argument(
        "--train", nargs="?", const="factors", choices=("factors", "all"),
        help="a step of training with AdamW: of the low-rank factors and routers, or of all",
    )  # fmt: skip
    parser.add_argument(
        "--recompute", action="store_true",
        help="with --train: layers keep little besides x and compute again what the backward needs",
    )  # fmt: skip
    parser.add_argument("--all-logits", action="store_true", help="of every token, not the last")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--hopper", action=argparse.BooleanOptionalAction, default=None,
        help="an H100 with the compiled library, which needs less (default: whether one is here)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same for programs")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from ..memory_plan import RESERVE, Use, advice, plan_memory

    config = _config(Path(arguments.config))
    hopper = arguments.hopper
    if hopper is None:
        hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    use = Use(
        arguments.tokens,
        arguments.batch,
        arguments.new_tokens,
        arguments.train,
        getattr(torch, arguments.dtype),
        arguments.all_logits or arguments.train is not None,
        hopper,
        arguments.recompute,
    )
    plan = plan_memory(config, use)
    report: dict[str, Any] = plan.as_dict()
    if arguments.gpu is not None:
        available = arguments.gpu - RESERVE
        fits = plan.peak <= available
        report |= {"gpu": arguments.gpu, "reserve": RESERVE, "fits": fits}
        report["advice"] = [] if fits else advice(config, use, available)
    print(json.dumps(report, indent=1) if arguments.json else _text(report))
    return 0 if report.get("fits", True) else FAILED


def _text(report: dict[str, Any]) -> str:
    use, stage = report["use"], report["stage"]
    lines = [
        f"{use['batch']} x {use['tokens']} tokens, {use['dtype']}"
        + (f", training {use['train']}" if use["train"] else "")
        + (", recomputing" if use["recompute"] else "")
    ]
    parts = {name: report[name] for name in ("weights", "kv_cache", "optimizer") if report[name]}
    parts[f"at the peak: {stage}"] = report["stages"][stage]
    lines += [f"  {name:<36}{_size(size):>12}" for name, size in parts.items()]
    if use["train"]:
        lines += [f"    of it saved for the backward, at most {_size(report['saved']):>12}"]
    lines += [f"  {'peak':<36}{_size(report['peak']):>12}"]
    if "fits" in report:
        card = f"{_size(report['gpu'])} with {_size(report['reserve'])} in reserve"
        lines.append(f"fits {card}" if report["fits"] else f"does not fit {card}")
        lines += [f"  would: {change}" for change in report["advice"]]
        if not report["fits"] and not report["advice"]:
            lines.append("  no single change that this command knows is enough")
    return "\n".join(lines)


def _config(path: Path) -> Any:
    """The model's config; of a checkpoint's directory with the ranks that its tensors have."""
    from ..checkpoint import model_config
    from ..checkpoint_config import check_config
    from ..checkpoint_headers import read_json
    from ..checkpoint_layout import read_layout
    from ..model_config import FlexMoREConfig

    if path.is_dir() and any(path.glob("*.safetensors")):
        return model_config(read_layout(path))
    return FlexMoREConfig.from_dict(check_config(read_json(_file(path))))


def _file(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"config: no file or directory {path}")
    return path / "config.json" if path.is_dir() else path


def _bytes(text: str) -> int:
    """ "24GB", "24 GiB" or "24e9" as bytes."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    try:
        found = int(float(match.group(1)) * _UNITS[match.group(2).upper()]) if match else 0
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: 24GB, 80GB, 500MB")
    return found


def _size(size: int) -> str:
    return f"{size / (1 << 30):.2f} GB" if size >= 1 << 27 else f"{size / (1 << 20):.2f} MB"
