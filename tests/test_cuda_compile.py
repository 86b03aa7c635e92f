"""The CUDA kernels of the compiled library: registers, spills and launches, read from the binary.

They are compiled where the library is built, in CI for every architecture (FORCE_CUDA=1); the
reader of binaries comes with Triton.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

import registers  # noqa: E402
from library_kernels import architectures, compiled_kernels, nvcc  # noqa: E402
from registers import CUDA, TARGETS, Compiled  # noqa: E402

SOURCES = Path(__file__).parent.parent / "csrc/cuda"


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    found, why_not = compiled_kernels()
    if why_not:
        pytest.skip(why_not)
    return found


def test_every_kernel_is_compiled_for_every_architecture(compiled):
    written = set()
    for path in SOURCES.iterdir():
        written |= set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", path.read_text()))
    assert written
    for target in architectures():
        kernels = {one.kernel.split("<")[0] for one in compiled if one.target == target}
        assert kernels == written, f"sm_{target}"


def test_blocks_of_the_largest_size_can_be_launched(compiled):
    """A kernel without __launch_bounds__ may be launched with 1024 threads."""
    assert [one for one in compiled if one.blocks == 0] == []


def test_no_kernel_adds_floats_atomically(compiled):
    assert [one for one in compiled if one.atomics] == []


def test_registers_and_spills_stay_in_budget(compiled):
    recorded, versions = registers.read()
    if versions.split(", ")[-1] != f"nvcc {nvcc()}":
        pytest.skip(f"the budget holds for {versions}; the library was compiled by {nvcc()!r}")
    targets = architectures()
    recorded = {
        row: {target: cell for target, cell in cells.items() if target in targets}
        for row, cells in recorded.items()
        if row[1] == CUDA
    }
    broken = registers.violations(registers.table(compiled), recorded)
    assert not broken, "\n".join(
        ["docs/registers.md; `make registers ARGS=cuda` writes these anew:", *broken]
    )
    assert targets <= set(TARGETS)
