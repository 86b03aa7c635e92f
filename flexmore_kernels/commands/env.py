"""Versions, devices, what was built, which kernels run each op and why not the others."""

from __future__ import annotations

import argparse
import json

NAME, HELP = "env", "versions, devices, kernels: for a bug report"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same for programs")


def run(arguments: argparse.Namespace) -> int:
    from .. import environment, environment_text

    found = environment.report()
    print(json.dumps(found, indent=1) if arguments.json else environment_text.as_text(found))
    return 0
