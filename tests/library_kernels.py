"""The CUDA kernels inside the compiled library, as the compilers left them: read, not compiled."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from registers import CUDA, Compiled, cuobjdump, float_atomics, resources

from flexmore_kernels import native

NO_BOUNDS = 1024  # threads of a block of a kernel without __launch_bounds__


def nvcc() -> str:
    """Release of the nvcc that compiled the library, "13.0"; "" if it is not known."""
    return ".".join(str(native.build_info().get("nvcc", "")).split(".")[:2])


def architectures() -> set[int]:
    """Those that the library has machine code for."""
    return {int(arch) for arch in re.findall(r"(\d+)\w?-real", native.build_info()["cuda_archs"])}


def compiled_kernels() -> tuple[list[Compiled], str]:
    """(all kernels for all architectures, "") or ([], why there are none)."""
    if not native.available() or not native.build_info()["cuda_archs"]:
        return [], native.why_not() or "the library was built without CUDA kernels"
    if shutil.which("c++filt") is None:
        return [], "no c++filt"
    library = Path(native.__file__).with_name("_C.abi3.so")
    ptx = cuobjdump("--dump-ptx", library)
    if ".entry" not in ptx:
        return [], "the library holds no PTX, which has the launch bounds"
    bounds = launch_bounds(ptx)
    atomics = {symbol: float_atomics(body) for symbol, body in entries(ptx)}
    found = resources(library)
    names = dict(zip((f[1] for f in found), demangled([f[1] for f in found]), strict=True))
    return [
        Compiled(
            names[symbol], CUDA, arch, bounds[symbol], registers, spilled, shared,
            atomics=atomics[symbol],
        )
        for arch, symbol, registers, spilled, shared in found
    ], ""  # fmt: skip


def entries(ptx: str) -> list[tuple[str, str]]:
    """(symbol, text) of every kernel in PTX."""
    parts = re.split(r"\.entry (\w+)\(", ptx)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def launch_bounds(ptx: str) -> dict[str, int]:
    """The most threads of a block, by kernel."""
    bounds = {}
    for symbol, text in entries(ptx):
        match = re.search(r"\.maxntid (\d+)", text.split("{")[0])
        bounds[symbol] = int(match[1]) if match else NO_BOUNDS
    return bounds


def demangled(symbols: list[str]) -> list[str]:
    """permute_kernel<uint4>, without namespaces, result and parameters."""
    run = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True)
    names = []
    for name in run.stdout.splitlines():
        name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
        kernel, bracket, arguments = name.split("(")[0].partition("<")
        names.append(kernel.split("::")[-1] + bracket + arguments)
    return names
