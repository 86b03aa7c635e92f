"""Runs examples/train_expert.py again and again in processes that are killed at given moments.

    python tests/kill_example.py '[["out", "step", 4], ["out", "torn", 1], ["out", "", 0]]' TEXT ...

Each is a directory, a kind of moment and a count; prints how each process ended, as JSON. SIGKILL
comes from within, so that the moment is exact: nothing is flushed, cleaned up or caught.

    step     before the count-th step of AdamW in the process
    torn     in the count-th write of a state: half of the file is there
    written  before the rename of the count-th state
    renamed  after it, before older states are removed
    saved    when the count-th state, and all that goes with it, is done
    finish   before the count-th rename of what the run leaves at its end
    ""       never
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # which a model on the meta device imports: once, not in each process

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_expert

from flexmore_kernels import checkpoint_writer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def patched(owner, name: str, count: int, counts, before=None, after=None) -> None:
    """Of the calls that `counts`, the count-th is the last thing but `before` or `after` it."""
    original, calls = getattr(owner, name), [0]

    def call(*args, **named):
        calls[0] += counts(*args)
        hit = calls[0] == count and counts(*args)
        if hit and before is not None:
            before(*args)
        result = original(*args, **named)
        if hit and after is not None:
            after(*args)
        return result

    setattr(owner, name, call)


def tear(tensors, path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
    die()


def arm(kind: str, count: int) -> None:
    def of_state(*args) -> bool:
        return Path(args[1]).name.startswith("state-")

    def always(*args) -> bool:
        return True

    def kill(*args) -> None:
        die()

    if kind == "step":
        patched(torch.optim.AdamW, "step", count, always, before=kill)
    elif kind == "torn":
        patched(checkpoint_writer, "save_file", count, of_state, after=tear)
    elif kind == "written":
        patched(os, "replace", count, of_state, before=kill)
    elif kind == "renamed":
        patched(os, "replace", count, of_state, after=kill)
    elif kind == "saved":
        patched(train_expert.Run, "_save", count, always, after=kill)
    elif kind == "finish":
        ends = lambda _, path: Path(path).name in ("expert", "model") and "unf" not in str(path)
        patched(os, "replace", count, ends, before=kill)


def main() -> None:
    torch.set_num_threads(1)
    ends = []
    for out, kind, count in json.loads(sys.argv[1]):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                arm(kind, count)
                code = train_expert.main([sys.argv[2], out, *sys.argv[3:]])
            finally:
                os._exit(code)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
