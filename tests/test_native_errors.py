"""An error inside an op of the compiled library is a RuntimeError in Python, not the process's end.

C++ exceptions cross the stable ABI there, so each case runs in a process of its own kind: a child
works through the cases one after the other and says what came of each; where it dies, the case that
it was at has failed, and another child goes on with the next.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

from flexmore_kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no library: {native.why_not()}")

CHILD = """
import faulthandler, json, sys, torch
faulthandler.enable()
from flexmore_kernels import native
assert native.available()
ops, device = torch.ops.flexmore_native, sys.argv[1]

def rows(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype, device=device)

def ids(*shape):
    return torch.zeros(shape, dtype=torch.int32, device=device)

def route(width, experts):
    return ops.topk_route_linear(rows(2, width), rows(experts, width), None, None, 2, False, 0)

def few(tokens, layout=(-1, -1, -1), tensors=3, indices=None):
    indices = ids(tokens, 1).long() if indices is None else indices
    weights = torch.zeros(tokens, 1, device=device)
    return ops.experts_decode(rows(tokens, 8), indices, weights, [rows(8, 8)] * tensors, layout)

CASES = {
    "dtype": lambda: ops.permute(rows(2, 8, dtype=torch.int64), ids(2), ids(2, 1)),
    "dimensions": lambda: ops.permute(rows(2, 8), ids(2, 1), ids(2, 1)),
    "sizes": lambda: ops.unpermute(rows(4, 8), ids(2, 2), torch.zeros(2, 3, device=device), None),
    "scoring": lambda: ops.topk_route(rows(2, 4), None, None, 2, False, 7),
    "memory": lambda: ops.permute(rows(2, 2**16), ids(2**21), ids(2, 2**20)),
    "experts": lambda: ops.topk_route(rows(2, 1025), None, None, 2, False, 0),
    "keys": lambda: ops.make_plan(ids(2, 2).long(), 1025, False),
    "long rows": lambda: ops.permute(rows(1, 2**29), ids(1), ids(1, 1)),
    "device": lambda: ops.permute(rows(2, 8), ids(2).cpu(), ids(2, 1)),
    "router's width": lambda: route(12, 4),
    "router's experts": lambda: route(8, 33),
    "tokens": lambda: few(65),
    "base": lambda: few(2, layout=[0, -1, -1]),
    "weights": lambda: few(2, tensors=2),
    "ids' device": lambda: few(2, indices=ids(2, 1).long().cpu()),
}
for name in sys.argv[2:]:
    print(json.dumps([name, "began", ""]), flush=True)
    try:
        CASES[name]()
        result = ["no error", ""]
    except BaseException as error:
        result = [type(error).__name__, str(error)[:400]]
    print(json.dumps([name, *result]), flush=True)
if device == "cuda":
    torch.cuda.synchronize()  # the device still works
    assert torch.ones(4, device=device).sum().item() == 4
print(json.dumps(["end", "reached", ""]), flush=True)
"""

MESSAGES = {
    "dtype": "dtype Long is not supported",
    "dimensions": "row_to_slot must have 1 dimensions",
    "sizes": "weights has size",
    "scoring": "scoring must be in",
}
ON_CUDA = MESSAGES | {
    "memory": "CUDA out of memory. Tried to allocate a result of shape (2097152, 65536)",
    "experts": "at most 1024 experts",
    "keys": "at most 1024 experts",
    "long rows": "too long",
    "device": "same CUDA device",
    "router's width": "the width must be a multiple of 8, got 12",
    "router's experts": "1 to 32 experts, got 33",
    "tokens": "1 to 64 tokens, got 65",
    "base": "expert 0 must be full-size",
    "weights": "too few tensors",
    "ids' device": "same CUDA device",
}


@functools.cache
def outcomes(device: str) -> dict[str, tuple[str, str]]:
    """(what was raised, its message) by case, from as many children as it takes."""
    found: dict[str, tuple[str, str]] = {}
    left = list(MESSAGES if device == "cpu" else ON_CUDA)
    while left:
        child = subprocess.run(
            [sys.executable, "-c", CHILD, device, *left], capture_output=True, text=True
        )
        lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("[")]
        assert lines, child.stderr
        for name, kind, message in lines:
            found[name] = (kind, message)
        if child.returncode:
            name = lines[-1][0]
            found[name] = (f"the process ended with {child.returncode}", child.stderr[-4000:])
        left = left[left.index(name) + 1 :] if name in left else []
    return found


@pytest.mark.parametrize("case", (*MESSAGES, "end"))
def test_an_error_in_an_op_is_a_runtime_error(case):
    kind, message = outcomes("cpu")[case]
    assert (kind == "reached") if case == "end" else (kind == "RuntimeError"), message
    assert MESSAGES.get(case, "") in message


@pytest.mark.gpu
@pytest.mark.skipif(not native.cuda_runs_on(), reason="needs a GPU and the CUDA kernels")
@pytest.mark.parametrize("case", (*ON_CUDA, "end"))
def test_an_error_in_a_cuda_op_is_a_runtime_error(case):
    """The end is reached: after all of them the device still computes."""
    kind, message = outcomes("cuda")[case]
    assert kind == ("reached" if case == "end" else "RuntimeError"), (kind, message)
    assert ON_CUDA.get(case, "") in message
