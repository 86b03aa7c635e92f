"""What counts as an error in compute-sanitizer's logs, and the script that runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sanitizer_log import PRINT_LIMIT, errors

SCRIPT = Path(__file__).with_name("sanitize.sh")


def log(*reports: str, total: int | None = None, summary: str = "") -> str:
    total = len(reports) if total is None else total
    summary = summary or f"ERROR SUMMARY: {total} errors"
    text = "\n".join(["COMPUTE-SANITIZER", *reports, summary])
    return "".join(f"========= {line}\n" for line in text.splitlines())


def read(kernel: str) -> str:
    return (
        f"Uninitialized __global__ memory read of size 2 bytes\n    at {kernel}+0x3a0 in file:12\n"
        "    by thread (3,0,0) in block (0,0,0)\n    Access to 0x7f00 is at offset 6 in a buffer\n"
    )


OURS = read("flexmore_shrink")
CUDA = read("void flexmore::cuda::(anonymous namespace)::permute_kernel<uint4>(const T1 *)")
LIBRARY = read("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>(T1::Params)")
BOUNDS = "Invalid __global__ read of size 4 bytes\n    at cutlass+0x10\n    by thread (0,0,0)\n"
HOST = (
    "Host API uninitialized memory access on access by cudaMemcpy source.\n    Host Frame: main\n"
)
HAZARDS = "RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)"


@pytest.mark.parametrize(
    ("tool", "text", "expected"),
    [
        ("memcheck", log(), 0),
        ("memcheck", log(BOUNDS), 1),
        ("memcheck", log(OURS, LIBRARY), 2),
        ("initcheck", log(), 0),
        ("initcheck", log(LIBRARY, LIBRARY), 0),
        ("initcheck", log(LIBRARY, OURS, LIBRARY, CUDA), 2),
        ("initcheck", log(LIBRARY, HOST), 1),
        ("initcheck", log(LIBRARY, total=2), 1),  # one that was not understood
        ("initcheck", log(LIBRARY, total=PRINT_LIMIT + 1), None),
        ("racecheck", log(summary=HAZARDS.format(0, 0)), 0),
        ("racecheck", log(summary=HAZARDS.format(3, 3)), 3),
        ("synccheck", log("Barrier error detected.\n    at flexmore_route+0x10"), 1),
        ("synccheck", "killed", None),
        ("initcheck", "", None),
    ],
)
def test_errors_that_count(tool, text, expected):
    assert errors(tool, text) == expected


STUB = """#!/bin/bash
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] && [[ "$* " == *"-m pytest"*"-m sanitize "* ]] || exit 9
tool=$2 errors=0
[ "$tool" = "$FAILING" ] && errors=1
while [ "$1" != --log-file ]; do shift; done
case $tool in
racecheck) echo "========= RACECHECK SUMMARY: $errors hazards displayed" >"$2" ;;
*) echo "========= ERROR SUMMARY: $errors errors" >"$2" ;;
esac
[ "$FAILING" != tests ]
"""


@pytest.mark.parametrize("failing", ("", "memcheck", "tests"))
def test_the_script_runs_all_tools_and_tells(tmp_path, failing):
    """compute-sanitizer is a stand-in that prints a summary and does not run the tests."""
    stub = tmp_path / "bin/compute-sanitizer"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    path = f"{stub.parent}:{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", SCRIPT, tmp_path / "out"],
        env={**os.environ, "PATH": path, "PYTHON": sys.executable, "FAILING": failing},
        capture_output=True,
        text=True,
    )
    lines = {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines()}
    assert sorted(lines) == ["initcheck", "memcheck", "racecheck", "synccheck"], run.stderr
    for tool, (result, label, count, seconds, unit) in lines.items():
        assert result == ("FAILED" if failing in (tool, "tests") else "passed")
        assert (label, unit) == ("errors:", "s") and int(seconds) < 60
        assert count == ("1" if failing == tool else "0")
        assert "SUMMARY" in (tmp_path / f"out/{tool}.txt").read_text()
    assert run.returncode == int(bool(failing))
