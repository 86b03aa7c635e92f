"""Write docs/registers.md anew: `make registers`, or `make registers ARGS=cuda` for csrc/ alone.

The Triton half needs Triton 3.6 and some minutes; the CUDA half a library with CUDA kernels for all
architectures (FORCE_CUDA=1). A half that is not asked for, or has no library, stays as it is.
"""

from __future__ import annotations

import sys

import registers
import triton
from compiling import CALLS, compile_all
from library_kernels import compiled_kernels, nvcc

HALVES = ("triton", "cuda")


def main(halves: list[str]) -> None:
    if not set(halves) <= set(HALVES):
        raise SystemExit(f"got {halves}; accepted: {', '.join(HALVES)}")
    recorded, versions = registers.read()
    of_cuda = {row: cells for row, cells in recorded.items() if row[1] == registers.CUDA}
    of_triton = {row: cells for row, cells in recorded.items() if row[1] != registers.CUDA}
    version = {half: versions.split(", ")[i] if versions else "" for i, half in enumerate(HALVES)}
    if "triton" in halves:
        if not triton.__version__.startswith("3.6."):
            raise SystemExit(f"got Triton {triton.__version__}; accepted: 3.6, for its compiler")
        version["triton"] = "Triton 3.6"
        of_triton = registers.table(compile_all([(t, c) for c in CALLS for t in registers.TARGETS]))
    if "cuda" in halves:
        found, why_not = compiled_kernels()
        if why_not or {one.target for one in found} != set(registers.TARGETS):
            print(f"CUDA kernels are left as recorded: {why_not or 'not all architectures'}")
        else:
            version["cuda"], of_cuda = f"nvcc {nvcc()}", registers.table(found)
    new = of_triton | of_cuda
    registers.write(new, ", ".join(version.values()))
    print(*registers.violations(new, recorded), sep="\n")
    print(f"{len(new)} rows written to {registers.TABLE}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(HALVES))
